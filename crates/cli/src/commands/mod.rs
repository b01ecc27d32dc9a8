//! The subcommands, one file for each family. A new one is a file, a line in `mod`, a variant and an arm.

mod carrying;
mod check;
mod checkpoint;
mod containers;
mod exec;
mod guard;
mod inspect;
mod logs;
mod migrate;
mod posted;
mod restore;
mod run;
mod shells;
mod terminal;

use clap::Subcommand;
use limosa_engine::resources::processor::Rule;

use crate::context::{Context, Failure, Outcome};

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Checkpoint(checkpoint::Checkpoint),
    Restore(restore::Restore),
    Migrate(migrate::Migrate),
    Receive(migrate::Receive),
    Settle(migrate::Settle),
    #[command(hide = true)]
    Guard(guard::Guard),
    Inspect(inspect::Inspect),
    Verify(inspect::Verify),
    Check(check::Check),
    Run(run::Run),
    Exec(exec::Exec),
    Attach(terminal::Attach),
    #[command(hide = true)]
    Keeper(terminal::Keeper),
    Logs(logs::Logs),
    Ps(containers::Ps),
    Stop(containers::Stop),
    Rm(containers::Rm),
    Completions(shells::Completions),
    Man(shells::Man),
}

impl Command {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        match self {
            Self::Checkpoint(command) => command.execute(context),
            Self::Restore(command) => command.execute(context),
            Self::Migrate(command) => command.execute(context),
            Self::Receive(command) => command.execute(context),
            Self::Settle(command) => command.execute(context),
            Self::Guard(command) => command.execute(context),
            Self::Inspect(command) => command.execute(context),
            Self::Verify(command) => command.execute(context),
            Self::Check(command) => command.execute(context),
            Self::Run(command) => command.execute(context),
            Self::Exec(command) => command.execute(context),
            Self::Attach(command) => command.execute(context),
            Self::Keeper(command) => command.execute(context),
            Self::Logs(command) => command.execute(context),
            Self::Ps(command) => command.execute(context),
            Self::Stop(command) => command.execute(context),
            Self::Rm(command) => command.execute(context),
            Self::Completions(command) => command.execute(),
            Self::Man(command) => command.execute(context),
        }
    }
}

/// Fails where the caller is not root, with `code` as the exit status: most of what Limosa does is root's to do, and the
/// kernel's own answer would come late and say little.
fn require_root(command: &str, code: u8) -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::with_code(
        code,
        anyhow::anyhow!("not root: `limosa {command}` needs root's privileges (use sudo)"),
    ))
}

/// What a processor must have.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Cpu {
    /// All instructions that programs could find where they ran: they choose their code by them when they start.
    #[default]
    Features,
    /// Only what registers in use need; programs that choose their code by the processor may die of SIGILL.
    Registers,
}

impl From<Cpu> for Rule {
    fn from(cpu: Cpu) -> Self {
        match cpu {
            Cpu::Features => Self::Features,
            Cpu::Registers => Self::Registers,
        }
    }
}

/// An argument `KEY=PATH`.
fn key_and_path(text: &str) -> Result<(String, std::path::PathBuf), String> {
    match text.split_once('=') {
        Some((key, path)) if !key.is_empty() && !path.is_empty() => Ok((key.to_owned(), path.into())),
        _ => Err("it must be KEY=PATH".to_owned()),
    }
}
