//! The terminal of a container: `limosa attach`, and the process that keeps it while nobody is attached.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use limosa_container::{Attached, Keeper as Keeping, Name};

use crate::context::{Context, Outcome};

/// Connect this terminal to that of a running container.
///
/// Ctrl-] leaves it again, as does closing this terminal; the container runs on. For containers that were started with
/// `run --tty --detach`, restored with `restore --detach`, or received from another host.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa attach shell")]
pub struct Attach {
    /// The container.
    name: Name,
}

impl Attach {
    /// Attaches.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("attach", super::run::FAILED)?;
        match limosa_container::attach(&context.registry(), &self.name)? {
            Attached::Left => eprintln!("\nlimosa: left container {}, which runs on", self.name),
            Attached::Ended(fate) => say_fate(&self.name, fate.as_deref()),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Tells a person why a container that was in the foreground is gone.
pub fn say_fate(name: &Name, fate: Option<&str>) {
    if let Some(fate) = fate {
        eprintln!("\nlimosa: container {name} does not run here any more: {fate}");
    }
}

/// Keep the terminal of a container: its master is standard input.
#[derive(Debug, Args)]
pub struct Keeper {
    /// The container.
    name: Name,

    /// Its first process.
    #[arg(long)]
    pid: i32,
}

impl Keeper {
    /// Keeps it until the container ends.
    pub fn execute(self, context: &Context) -> Outcome {
        // A terminal's signals are not for this process. Leads a session already: as good.
        let _ = rustix::process::setsid();
        let master = io::stdin().as_fd().try_clone_to_owned()?;
        let keeper = Keeping::new(&context.registry(), &self.name, self.pid, master)?;
        io::stdout().write_all(b".")?;
        io::stdout().flush()?;
        keeper.keep()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Starts a keeper of `master`, and waits until it is ready. It ends with the container.
pub fn have_kept(context: &Context, master: OwnedFd, pid: i32, name: &Name) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    let arguments: [OsString; 4] =
        ["keeper".into(), name.as_str().into(), "--pid".into(), pid.to_string().into()];
    command.arg("--state-dir").arg(std::path::absolute(&context.state_dir)?).args(arguments);
    command.stdin(Stdio::from(master)).stdout(Stdio::piped()).stderr(Stdio::null()).current_dir("/");
    #[cfg(feature = "fault")]
    command.env_remove("LIMOSA_KILL_AT").env_remove("LIMOSA_PASSED_FILE");
    let mut keeper = command.spawn()?;
    // It says so once; nobody listens to it afterwards.
    let mut ready = [0];
    if keeper.stdout.take().is_none_or(|mut output| output.read_exact(&mut ready).is_err()) {
        return Err(io::Error::other(format!("its keeper did not start: {}", keeper.wait()?)));
    }
    Ok(())
}
