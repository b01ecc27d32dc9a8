//! `limosa run`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use limosa_container::{Config, Name, Network, RunError};
use serde::Serialize;

use crate::context::{Context, Failure, Outcome};

/// Exit status when Limosa itself could not do what it was asked to (as other container programs have it).
pub const FAILED: u8 = 125;
/// Exit status when the command could not be executed.
const NOT_EXECUTABLE: u8 = 126;
/// Exit status when the command was not found.
const NOT_FOUND: u8 = 127;

/// Run a command in a new container.
///
/// Without --detach, waits for the command, shows its output and passes on its exit status.
/// The container then remains, stopped, until `limosa rm`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa run hello -- echo hello\n  \
    limosa run db --detach --net br0,ip=10.0.0.7/24,gw=10.0.0.1 --memory 1G -- redis-server --bind 0.0.0.0\n  \
    limosa run shell --tty -- bash\n  \
    limosa run shell --tty --detach -- bash")]
pub struct Run {
    /// Name of the container, and its host name.
    name: Name,

    /// Directory that becomes the container's root; it is only read, changes go to a layer of the container.
    #[arg(long, value_name = "DIR", default_value = "/")]
    rootfs: PathBuf,

    /// Bridge of this host to connect to, with address and gateway.
    #[arg(long, value_name = "BRIDGE,ip=ADDR/LEN[,gw=ADDR]")]
    net: Option<Network>,

    /// Limit of its memory, such as 512M.
    #[arg(long, value_name = "SIZE", value_parser = limosa_container::parse_size)]
    memory: Option<u64>,

    /// Environment variable of the command; may be given several times.
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,

    /// Give the command a terminal, connected to this one; with --detach, to whichever `limosa attach` is called from.
    #[arg(long, short)]
    tty: bool,

    /// Return when the command has started.
    #[arg(long, short)]
    detach: bool,

    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it must be KEY=VALUE".to_owned()),
    }
}

/// The report of `run --detach`.
#[derive(Debug, Serialize)]
struct Report {
    name: Name,
    pid: i32,
}

impl Run {
    /// Runs the container.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("run", FAILED)?;
        let rootfs = std::path::absolute(&self.rootfs)?;
        let config = Config {
            name: self.name,
            command: self.command,
            environment: self.env.into_iter().collect::<BTreeMap<_, _>>(),
            rootfs,
            rootfs_identity: None,
            network: self.net,
            memory: self.memory,
            terminal: self.tty,
        };
        let registry = context.registry();
        if self.detach {
            let keep = |master, pid, name: &Name| super::terminal::have_kept(context, master, pid, name);
            let started = if self.tty {
                limosa_container::run_detached_on_terminal(&registry, &config, &keep)
            } else {
                limosa_container::run(&registry, &config)
            };
            let started = started.map_err(failure)?;
            let report = Report { name: config.name, pid: started.process.pid() };
            context.report(&report, format_args!("{}\n", report.name))?;
            return Ok(ExitCode::SUCCESS);
        }
        let ended = if self.tty {
            limosa_container::run_on_terminal(&registry, &config)
        } else {
            limosa_container::run_in_foreground(&registry, &config)
        };
        let ended = ended.map_err(failure)?;
        super::terminal::say_fate(&config.name, ended.fate.as_deref());
        Ok(ExitCode::from(ended.exit.code()))
    }
}

fn failure(error: RunError) -> Failure {
    let code = match &error {
        RunError::Command { source, .. } => not_executed(source),
        _ => FAILED,
    };
    Failure::with_code(code, error)
}

/// The exit status when the command could not be executed, as shells have it.
pub fn not_executed(cause: &limosa_kernel::Error) -> u8 {
    if cause.is_gone() { NOT_FOUND } else { NOT_EXECUTABLE }
}
