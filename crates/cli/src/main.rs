//! The `limosa` program: arguments, progress and reports. Everything else is in the libraries.

mod commands;
mod context;
mod progress;
mod text;
mod trace;
mod watched;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::context::Context;

/// Moves running Linux containers: checkpoint, restore and live migration.
#[derive(Debug, Parser)]
#[command(name = "limosa", version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    /// Report on standard output as JSON; logs stay on standard error.
    #[arg(long, global = true)]
    json: bool,

    /// Where containers and their files are kept.
    #[arg(long, global = true, value_name = "DIR", env = "LIMOSA_STATE_DIR",
          default_value = limosa_container::DEFAULT_STATE_DIR)]
    state_dir: PathBuf,

    /// Say more on standard error; twice for even more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: commands::Command,
}

const EXAMPLES: &str = "\
Examples:
  limosa run web --detach -- python3 -m http.server
  limosa exec web -- ps ax
  limosa checkpoint web --out /var/tmp/web && limosa restore /var/tmp/web --detach
  limosa migrate web ssh://root@b.example
  limosa stop web && limosa rm web";

fn main() -> ExitCode {
    let cli = Cli::parse();
    let context = Context { json: cli.json, state_dir: cli.state_dir, verbose: cli.verbose > 0 };
    context::start_logging(cli.verbose);
    let outcome = cli.command.execute(&context);
    #[cfg(feature = "fault")]
    report_passed();
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            // Standard error may be closed; there is nobody else to tell.
            let _ = writeln!(std::io::stderr(), "limosa: {}", causes(&failure.error));
            ExitCode::from(failure.code)
        }
    }
}

/// Tells a kill sweep how many operations on the kernel there were.
#[cfg(feature = "fault")]
fn report_passed() {
    if let Some(path) = std::env::var_os("LIMOSA_PASSED_FILE") {
        let _ = std::fs::write(path, limosa_kernel::fault::passed().to_string());
    }
}

/// An error with its causes, each once: some errors say their cause themselves.
fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
