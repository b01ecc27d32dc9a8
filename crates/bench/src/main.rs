//! `make bench`: what Limosa costs, each figure beside a floor that is measured in the same run.
//!
//! | module | what it measures |
//! | --- | --- |
//! | [`small`] | a process with a few MiB: checkpoint and restore as whole processes |
//! | [`large`] | a process with a GiB that runs on: how long it is frozen |
//!
//! What is compared is measured in turn, round by round, and the medians are compared: machines drift. It runs in a
//! PID namespace of its own (`scripts/bench`), so that restored PIDs are free and nothing outlives it.

mod figures;
mod large;
mod program;
mod small;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use figures::Row;

/// What takes seconds is done less often.
const LARGE_ROUNDS: u32 = 7;

/// Measures Limosa beside floors that are measured in the same run.
#[derive(Debug, Parser)]
#[command(after_help = "Examples:\n  make bench\n  scripts/bench --rounds 30 --json > figures.json")]
struct Arguments {
    /// How often each thing is done; the medians are compared.
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// MiB of memory of the small process.
    #[arg(long, value_name = "MIB", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    megabytes: u32,

    /// MiB of memory of the large process.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65536))]
    large: u32,

    /// Where checkpoints are written; a memory filesystem, unless the disk is to be measured, too.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    directory: PathBuf,

    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("limosa-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Measures everything; tells whether all bounds were met.
fn run(arguments: &Arguments) -> Result<bool> {
    ensure!(rustix::process::geteuid().is_root(), "not root: run 'sudo make bench'");
    // Restored trees become ours when Limosa has let them go, so that they can be ended and reaped.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let directory = tempfile::Builder::new()
        .prefix("limosa-bench.")
        .tempdir_in(&arguments.directory)
        .with_context(|| format!("making a directory in {}", arguments.directory.display()))?;
    let mut rows = small::measure(directory.path(), arguments.rounds, arguments.megabytes)?;
    rows.extend(large::measure(directory.path(), arguments.rounds.min(LARGE_ROUNDS), arguments.large)?);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", figures::table(&rows));
    }
    Ok(rows.iter().all(Row::is_met))
}
