//! One migration: `limosa receive` on one host, `limosa migrate` on the other, and what the client saw of it.

use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::counter::Seen;
use crate::display::Display;
use crate::stage::Stage;

/// One migration, as it went.
#[derive(Debug, Serialize)]
pub struct Migration {
    /// From which host.
    pub from: &'static str,
    /// To which.
    pub to: &'static str,
    /// From start to end of `limosa migrate`, seconds.
    pub seconds: f64,
    /// What `limosa migrate` reported.
    pub report: Report,
    /// What the client saw meanwhile.
    pub client: Seen,
    /// Seconds it took to read all data back and compare them.
    pub verify_seconds: f64,
}

impl Migration {
    /// From the freeze until the container ran on the other host, milliseconds.
    pub fn frozen_ms(&self) -> f64 {
        self.report.frozen_us as f64 / 1000.0
    }
}

/// The report of `limosa migrate --json`, as far as it is shown here.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Microseconds from the freeze until the container ran on the other host.
    pub frozen_us: u64,
    /// Processes moved.
    pub processes: u64,
    /// Threads moved.
    pub threads: u64,
    /// Open files, sockets and the like moved.
    pub descriptions: u64,
    /// Mappings moved.
    pub mappings: u64,
    /// Bytes of memory moved.
    pub page_bytes: u64,
    /// Its phases.
    pub phases: Vec<Phase>,
}

/// A phase of a migration.
#[derive(Debug, Serialize, Deserialize)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// Microseconds it took.
    pub duration_us: u64,
}

/// A line of `--progress json`.
#[derive(Deserialize)]
struct Progress {
    phase: String,
    bytes: u64,
}

/// Migrates redis to the other host, and verifies its data there. `round` counts from 0.
pub fn migrate(stage: &mut Stage, round: u32, rounds: u32, display: &Display) -> Result<Migration> {
    let (from, to) = (stage.here().name, stage.there().name);
    let title = format!("migration {} of {rounds}, {from} → {to}", round + 1);
    display.step(&title);
    let (receiver, destination) = stage.receive().context("waiting for the destination's ticket")?;
    stage.open_window()?;
    let begun = Instant::now();
    let mut sender = stage.migrate_to(&destination)?;
    while sender.step()? {
        stage.interrupt.check()?;
        let (activity, detail) = describe(sender.last_error_line());
        display.live(activity, &detail, stage.live());
    }
    let text = sender.finish().with_context(|| title.clone())?;
    let seconds = begun.elapsed().as_secs_f64();
    receiver.finish().with_context(|| title.clone())?;
    stage.moved();
    // The gap ends with the first reply from the other host.
    let client = stage.end_window()?;
    let report: Report = serde_json::from_str(&text).context("reading the report of limosa migrate")?;
    display.note(&format!(
        "  {} runs on {to}: frozen {:.1} ms, the client's longest gap {:.1} ms",
        stage.name(),
        report.frozen_us as f64 / 1000.0,
        client.longest_gap_ms
    ));
    let verified = Instant::now();
    stage.verify(display)?;
    let verify_seconds = verified.elapsed().as_secs_f64();
    Ok(Migration { from, to, seconds, report, client, verify_seconds })
}

/// Words for a line of progress.
fn describe(line: Option<&str>) -> (&'static str, String) {
    let Some(progress) = line.and_then(|line| serde_json::from_str::<Progress>(line).ok()) else {
        return ("checking both hosts", String::new());
    };
    let activity = match progress.phase.as_str() {
        "negotiating" => "agreeing with the destination",
        "copying" => "running: its memory is on its way",
        "sending" => "frozen: memory, sockets and files are on their way",
        "preparing" => "frozen: the destination builds",
        "handing-over" => "frozen: handing over",
        "settling" => "connection lost: asking for the outcome",
        _ => "over",
    };
    (activity, format!(", {:.1} MiB", progress.bytes as f64 / 1_048_576.0))
}
