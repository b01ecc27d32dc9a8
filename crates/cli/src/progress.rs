//! A migration's progress on standard error: a live line on a terminal, a line for each phase elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_migrate::{Phase, Progress, Watch};
use serde::Serialize;

/// How often a program is told within one phase.
const INTERVAL: Duration = Duration::from_millis(20);

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A live line on a terminal, plain lines elsewhere; with --json nothing.
    #[default]
    Auto,
    /// A JSON object a line, for programs: phase, bytes, elapsed_us, round, left.
    Json,
}

/// Shows what is told about the migration called `title`; nothing if only the report, for a program, is wanted.
pub fn watch(title: String, form: Form, json: bool) -> Watch<'static> {
    match form {
        Form::Json => objects(),
        Form::Auto if json => limosa_migrate::unwatched(),
        Form::Auto if std::io::stderr().is_terminal() => live(title),
        Form::Auto => lines(title),
    }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Negotiating => "negotiating",
        Phase::Copying => "running, copying its memory",
        Phase::Sending => "frozen, sending",
        Phase::Receiving => "receiving",
        Phase::Preparing => "frozen, destination builds",
        Phase::HandingOver => "frozen, handing over",
        Phase::Settling => "connection lost, asking for the outcome",
        Phase::Over => "done",
    }
}

fn live(title: String) -> Watch<'static> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.set_prefix(title);
    bar.enable_steady_tick(Duration::from_millis(80));
    Box::new(move |progress: &Progress| {
        bar.set_message(describe(progress));
        if progress.phase == Phase::Over {
            bar.finish_and_clear();
        }
    })
}

fn lines(title: String) -> Watch<'static> {
    let mut shown = None;
    let begun = Instant::now();
    Box::new(move |progress: &Progress| {
        let now = (progress.phase, progress.round);
        if shown.replace(now) != Some(now) {
            let seconds = begun.elapsed().as_secs_f64();
            // Standard error may be closed; the migration goes on.
            let _ = writeln!(std::io::stderr(), "{seconds:7.3} s  {title}: {}", describe(progress));
        }
    })
}

/// One report, for a program.
#[derive(Serialize)]
struct Told {
    phase: Phase,
    /// Bytes that the connection has carried.
    bytes: u64,
    /// Microseconds since the beginning.
    elapsed_us: u64,
    /// In the phase `copying`: how many times now.
    #[serde(skip_serializing_if = "Option::is_none")]
    round: Option<u32>,
    /// In the phase `copying`: bytes that had been written again when that began.
    #[serde(skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
}

fn objects() -> Watch<'static> {
    let mut shown = None;
    let begun = Instant::now();
    let mut last = begun;
    Box::new(move |progress: &Progress| {
        let now = (progress.phase, progress.round);
        if shown.replace(now) == Some(now) && last.elapsed() < INTERVAL {
            return;
        }
        last = Instant::now();
        let elapsed_us = begun.elapsed().as_micros() as u64;
        let (round, left) =
            (progress.round.map(|(number, _)| number), progress.round.and_then(|(_, left)| left));
        let told = Told { phase: progress.phase, bytes: bytes(progress), elapsed_us, round, left };
        if let Ok(line) = serde_json::to_string(&told) {
            // As above.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    })
}

/// The bytes of the direction in which the container goes.
fn bytes(progress: &Progress) -> u64 {
    progress.counters.bytes_sent.max(progress.counters.bytes_received)
}

fn describe(progress: &Progress) -> String {
    let mib = |bytes| bytes as f64 / 1_048_576.0;
    let round = match progress.round {
        Some((number, Some(left))) => format!(", round {number} of {:.1} MiB", mib(left)),
        Some((number, None)) => format!(", round {number}"),
        None => String::new(),
    };
    format!("{}{round}, {:.1} MiB", name(progress.phase), mib(bytes(progress)))
}
