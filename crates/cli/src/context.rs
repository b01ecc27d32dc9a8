//! What every subcommand gets, and what it gives back.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;

use limosa_container::Registry;
use serde::Serialize;
use tracing_subscriber::filter::LevelFilter;

/// The global options.
#[derive(Debug)]
pub struct Context {
    /// Whether reports are JSON.
    pub json: bool,
    /// Where containers are kept.
    pub state_dir: PathBuf,
    /// Whether reports for a person say all they could.
    pub verbose: bool,
}

impl Context {
    /// The containers of this host.
    pub fn registry(&self) -> Registry {
        Registry::new(&self.state_dir)
    }

    /// Writes one line to standard output at once, for whoever waits for it: as JSON if asked for.
    pub fn announce(&self, line: &impl Serialize, text: impl fmt::Display) -> anyhow::Result<()> {
        let mut output = io::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut output, line)?;
            writeln!(output)?;
        } else {
            writeln!(output, "{text}")?;
        }
        Ok(output.flush()?)
    }

    /// Writes the report of a subcommand to standard output: as JSON if asked for, otherwise as `text`.
    pub fn report(&self, report: &impl Serialize, text: impl fmt::Display) -> anyhow::Result<()> {
        // Standard output writes each line by itself; a report of a hundred lines would take a millisecond.
        let whole = if self.json { serde_json::to_string_pretty(report)? + "\n" } else { text.to_string() };
        let mut output = io::stdout().lock();
        output.write_all(whole.as_bytes())?;
        Ok(output.flush()?)
    }
}

/// A subcommand that failed: why, and the exit status.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: anyhow::Error,
    /// The exit status.
    pub code: u8,
}

impl Failure {
    /// A failure with an exit status of its own.
    pub fn with_code(code: u8, error: impl Into<anyhow::Error>) -> Self {
        Self { error: error.into(), code }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), code: 1 }
    }
}

/// What a subcommand gives back.
pub type Outcome = Result<std::process::ExitCode, Failure>;

/// Sends log messages to standard error: warnings, or more with each `-v`.
pub fn start_logging(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).with_target(false).init();
}
