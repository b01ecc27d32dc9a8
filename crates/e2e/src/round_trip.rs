//! What every kind of target goes through.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::limosa::{self, Source};
use crate::sandbox::{Sandbox, wait_until_alone};
use crate::target::Target;

/// How often the same checkpoint is restored.
const RESTORES: usize = 3;

/// A target of `kind`: a checkpoint that leaves it running, from its processes' twins, another that ends it, and restores of both, each of
/// which must be whole, with the same PID, and checkable more than once.
pub fn round_trip(sandbox: &Sandbox, kind: &str, options: &[&str]) -> Result<()> {
    round_trip_of(sandbox, &Target::start(sandbox, kind, options)?)
}

/// [`round_trip`] of a target that runs already.
pub fn round_trip_of(sandbox: &Sandbox, target: &Target) -> Result<()> {
    target.verify().context("before any checkpoint")?;

    let first = sandbox.path("first");
    limosa::checkpoint(sandbox, target.root(), &first, Source::GoesOn, &["--mode", "twin"])?
        .success("checkpoint --leave-running --mode twin")?;
    for _ in 0..2 {
        target.verify().context("in the source, left running by a checkpoint")?;
    }
    let second = sandbox.path("second");
    limosa::checkpoint(sandbox, target.root(), &second, Source::Ends, &[])?.success("checkpoint")?;
    wait_until_alone().context("after a checkpoint that ends its source")?;

    for checkpoint in [&first, &second] {
        for number in 1..=RESTORES {
            let context = || format!("restore {number} of {}", checkpoint.display());
            let root = limosa::restore(sandbox, checkpoint, &[]).with_context(context)?;
            ensure!(root == target.root(), "{}: process {root:?} instead of {:?}", context(), target.root());
            target.verify().with_context(context)?;
            if number < RESTORES {
                target.verify().with_context(context)?;
                sandbox.end_all()?;
            } else {
                target.quit().with_context(context)?;
                sandbox.end_all()?;
            }
        }
    }
    Ok(())
}

/// A target that cannot be carried: the checkpoint fails, names the process and one of `words`, leaves no directory,
/// and the target goes on unharmed.
pub fn refused(sandbox: &Sandbox, kind: &str, options: &[&str], words: &[&str]) -> Result<()> {
    let target = Target::start(sandbox, kind, options)?;
    let out = sandbox.path("refused");
    let said = limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?;
    ensure!(said.status.is_some_and(|status| status != 0), "not refused: {said:?}");
    let pid = target.root().as_raw_pid().to_string();
    ensure!(said.err.contains(&pid), "the refusal does not name process {pid}: {}", said.err);
    ensure!(words.iter().any(|word| said.err.contains(word)), "none of {words:?} in: {}", said.err);
    ensure!(fs::metadata(&out).is_err(), "a refused checkpoint left {}", out.display());
    target.verify().context("in the source, after a refusal")?;
    target.quit()?;
    Ok(())
}
