//! Checkpoints whose memory is stored while the source runs on.

use std::fs;

use anyhow::{Context, Result, ensure};
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::sandbox::{Sandbox, sandboxed};
use limosa_e2e::target::Target;

/// How often a target that writes at full speed goes through it; `LIMOSA_SWEEP=full` makes it 200 times.
fn cycles() -> usize {
    if std::env::var_os("LIMOSA_SWEEP").is_some_and(|value| value == "full") { 200 } else { 8 }
}

/// Each checkpoint is restored, and what comes back is the source of the next.
fn cycle(sandbox: &Sandbox, mode: &str, options: &[&str]) -> Result<()> {
    let target = Target::start(sandbox, "writers", options)?;
    for number in 1..=cycles() {
        let context = || format!("cycle {number}");
        let out = sandbox.path("cycle");
        let said =
            limosa::checkpoint(sandbox, target.root(), &out, Source::GoesOn, &["--mode", mode, "--json"])
                .with_context(context)?;
        let said = said.success("checkpoint").with_context(context)?;
        ensure!(said.out.contains(&format!(r#""mode": "{mode}""#)), "{}: {}", context(), said.out);
        target.verify().context("in the source").with_context(context)?;
        sandbox.end_all()?;
        limosa::restore(sandbox, &out, &[]).with_context(context)?;
        target.verify().context("after the restore").with_context(context)?;
        fs::remove_dir_all(&out)?;
    }
    target.quit()?;
    sandbox.end_all()
}

#[test]
fn memory_that_is_written_at_full_speed() {
    sandboxed(|sandbox| cycle(sandbox, "twin", &[]));
}

#[test]
fn memory_that_is_mapped_moved_and_given_back_meanwhile() {
    sandboxed(|sandbox| cycle(sandbox, "twin", &["churn"]));
}

#[test]
fn memory_that_is_written_at_full_speed_between_rounds() {
    sandboxed(|sandbox| cycle(sandbox, "precopy", &[]));
}

#[test]
fn memory_that_is_mapped_moved_and_given_back_between_rounds() {
    sandboxed(|sandbox| cycle(sandbox, "precopy", &["churn"]));
}

/// The tree is stopped twice, to be watched and to be frozen: a call that the first stop has interrupted is restarted by
/// restart_syscall(2), of which a restore can make nothing. redis died of it, in a wait of its allocator's thread.
#[test]
fn calls_that_sleep_through_both_stops_of_a_precopy() {
    sandboxed(|sandbox| {
        for options in [&[][..], &["epoll_wait"]] {
            let target = Target::start(sandbox, "sleeps", options)?;
            let out = sandbox.path("sleeping");
            limosa::checkpoint(sandbox, target.root(), &out, Source::GoesOn, &["--mode", "precopy"])?
                .success("checkpoint")?;
            target.verify().context("in the source")?;
            sandbox.end_all()?;
            limosa::restore(sandbox, &out, &[])?;
            target.verify().context("after the restore")?;
            target.quit()?;
            sandbox.end_all()?;
            fs::remove_dir_all(&out)?;
        }
        Ok(())
    });
}
