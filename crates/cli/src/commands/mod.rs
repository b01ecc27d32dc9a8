//! The subcommands, one file for each family. A new one is a file, a line in `mod`, a variant and an arm.

mod checkpoint;
mod containers;
mod exec;
mod logs;
mod migrate;
mod restore;
mod run;

use clap::Subcommand;

use crate::context::{Context, Outcome};

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Checkpoint(checkpoint::Checkpoint),
    Restore(restore::Restore),
    Migrate(migrate::Migrate),
    Receive(migrate::Receive),
    Settle(migrate::Settle),
    Run(run::Run),
    Exec(exec::Exec),
    Logs(logs::Logs),
    Ps(containers::Ps),
    Stop(containers::Stop),
    Rm(containers::Rm),
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
            Self::Run(command) => command.execute(context),
            Self::Exec(command) => command.execute(context),
            Self::Logs(command) => command.execute(context),
            Self::Ps(command) => command.execute(context),
            Self::Stop(command) => command.execute(context),
            Self::Rm(command) => command.execute(context),
        }
    }
}
