//! `limosa logs`.

use std::process::ExitCode;

use clap::Args;
use limosa_container::Name;
use serde::Serialize;

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

/// The log for a program.
#[derive(Debug, Serialize)]
struct Report {
    container: Name,
    /// What is no UTF-8 is replaced.
    log: String,
}

impl Logs {
    /// Shows the log.
    pub fn execute(self, context: &Context) -> Outcome {
        if context.json {
            return self.report(context);
        }
        let mut output = std::io::stdout().lock();
        limosa_container::copy_log(&context.registry(), &self.name, self.follow, &mut output)?;
        Ok(ExitCode::SUCCESS)
    }

    /// With --json, the whole log as one string.
    fn report(self, context: &Context) -> Outcome {
        let mut log = Vec::new();
        limosa_container::copy_log(&context.registry(), &self.name, self.follow, &mut log)?;
        let log = String::from_utf8_lossy(&log).into_owned();
        context.report(&Report { container: self.name, log }, "")?;
        Ok(ExitCode::SUCCESS)
    }
}
