//! `limosa logs`.

use std::process::ExitCode;

use clap::Args;
use limosa_container::Name;

use crate::context::{Context, Outcome};

/// Show what a container has written to its standard output and error.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa logs web\n  limosa logs --follow web")]
pub struct Logs {
    /// The container.
    name: Name,

    /// Go on until the container ends.
    #[arg(long, short)]
    follow: bool,
}

impl Logs {
    /// Shows the log.
    pub fn execute(self, context: &Context) -> Outcome {
        let mut output = std::io::stdout().lock();
        limosa_container::copy_log(&context.registry(), &self.name, self.follow, &mut output)?;
        Ok(ExitCode::SUCCESS)
    }
}
