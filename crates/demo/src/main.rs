//! `limosa-demo`: a running redis moves between two hosts and back, while a client keeps counting.
//!
//! The hosts are those of the `limosa-stage` crate. One client connection stays open over all migrations. At the end the
//! program checks by itself that nothing is left.

mod counter;
mod data;
mod display;
mod figures;
mod interrupt;
mod inventory;
mod migration;
mod resp;
mod stage;
mod summary;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use limosa_stage::Limosa;

use crate::display::Display;
use crate::interrupt::{Interrupt, Interrupted};
use crate::stage::Stage;
use crate::summary::Summary;

/// Moves a running redis between two hosts and back, while a client keeps counting in it.
#[derive(Debug, Parser)]
#[command(name = "limosa-demo", version, max_term_width = 100, after_help = EXAMPLES)]
struct Options {
    /// Data in redis, MiB.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    megabytes: u64,

    /// Migrations in a row: A → B → A → B …
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Seconds of counting before, between and after the migrations [default: 8, from three rounds on 0.2].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pause: Option<Duration>,

    /// The summary on standard output as JSON.
    #[arg(long)]
    json: bool,

    /// The limosa program [default: the one beside this program].
    #[arg(long, value_name = "FILE")]
    limosa: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  limosa-demo
  limosa-demo --megabytes 1000
  limosa-demo --rounds 100 --megabytes 20 --json

Exit status: 0 if nothing was lost and nothing is left behind, 1 otherwise, 130 after Ctrl-C.";

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it must be a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

impl Options {
    fn pause(&self) -> Duration {
        let usual = if self.rounds <= 2 { Duration::from_secs(8) } else { Duration::from_millis(200) };
        self.pause.unwrap_or(usual)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(code) => code,
        Err(error) => {
            // Standard error may be closed; there is nobody else to tell.
            let _ = writeln!(std::io::stderr(), "limosa-demo: {error:#}");
            ExitCode::from(if error.is::<Interrupted>() { 130 } else { 1 })
        }
    }
}

/// Plays the demo, cleans up whatever came of it, and looks for what is left.
fn run(options: &Options) -> Result<ExitCode> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "not root: the demo makes network namespaces and moves a container between them (sudo make demo)"
    );
    let interrupt = Interrupt::new()?;
    let limosa = Limosa::find(options.limosa.clone())?;
    let display = Display::new();
    let mut stage = Stage::build(limosa, interrupt)?;
    let played = play(options, &mut stage, &display);
    if played.is_err() {
        display.note("cleaning up");
    }
    let left = stage.clear().context("cleaning up")?;
    if let Err(error) = played {
        for one in &left {
            display.note(&format!("left behind: {one}"));
        }
        return Err(error);
    }
    let mut summary = played?;
    summary.left_behind = left;
    display.end();
    summary.show(options.json)?;
    Ok(if summary.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts redis, fills it, and migrates it as often as asked for.
fn play(options: &Options, stage: &mut Stage, display: &Display) -> Result<Summary> {
    display.step("making two hosts, A and B, and a client: network namespaces joined by bridges");
    stage.connect_hosts()?;
    display.step("limosa run on A: redis-server in a container, 10.99.0.7");
    stage.start_redis()?;
    let mut summary = Summary::new(options.megabytes);
    summary.load_seconds = stage.load(options.megabytes, display)?;
    stage.start_counting()?;
    display.step("the client counts: one TCP connection, one INCR after the other");
    summary.baseline = stage.count(options.pause(), display)?;
    for round in 0..options.rounds {
        let migration = migration::migrate(stage, round, options.rounds, display)?;
        summary.migrations.push(migration);
        stage.count(options.pause(), display)?;
    }
    summary.client = stage.stop_counting()?;
    Ok(summary)
}
