//! `limosa exec`.

use std::process::ExitCode;

use clap::Args;
use limosa_container::{ExecError, Name};

use super::run::{FAILED, not_executed};
use crate::context::{Context, Failure, Outcome};

/// Run a command in a running container, with its own standard streams; passes on its exit status.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa exec db -- redis-cli info\n  limosa exec --tty db -- bash")]
pub struct Exec {
    /// The container.
    name: Name,

    /// Give the command a terminal of the container, connected to this one.
    #[arg(long, short)]
    tty: bool,

    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

impl Exec {
    /// Runs the command.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("exec", super::run::FAILED)?;
        let exit = limosa_container::exec(&context.registry(), &self.name, &self.command, self.tty);
        Ok(ExitCode::from(exit.map_err(failure)?.code()))
    }
}

fn failure(error: ExecError) -> Failure {
    let code = match &error {
        ExecError::Command { source, .. } => not_executed(source),
        _ => FAILED,
    };
    Failure::with_code(code, error)
}
