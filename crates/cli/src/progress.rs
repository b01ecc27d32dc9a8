//! A migration's progress on standard error: a live line on a terminal, a line for each phase elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_migrate::{Phase, Progress, Watch};

/// Shows what is told about the migration called `title`; nothing if the report is for a program.
pub fn watch(title: String, quiet: bool) -> Watch<'static> {
    if quiet {
        return limosa_migrate::unwatched();
    }
    if std::io::stderr().is_terminal() { live(title) } else { lines(title) }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Negotiating => "negotiating",
        Phase::Sending => "frozen, sending",
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
        if shown.replace(progress.phase) != Some(progress.phase) {
            let seconds = begun.elapsed().as_secs_f64();
            // Standard error may be closed; the migration goes on.
            let _ = writeln!(std::io::stderr(), "{seconds:7.3} s  {title}: {}", describe(progress));
        }
    })
}

fn describe(progress: &Progress) -> String {
    let bytes = progress.counters.bytes_sent.max(progress.counters.bytes_received);
    format!("{}, {:.1} MiB", name(progress.phase), bytes as f64 / 1_048_576.0)
}
