//! Kill sweeps: `limosa` is killed at its N-th operation on the kernel (see `limosa_kernel::fault`), for many N.
//!
//! ```text
//! footprint of the source ──► limosa, killed at N ──► footprint as before? nothing traced? state whole? ──► next N
//! ```
//!
//! `LIMOSA_SWEEP=full` goes through every N (1,000 spread evenly where there are more); otherwise it is a few dozen,
//! at other places each time.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Pid;

use crate::limosa::{self, Said};
use crate::sandbox::Sandbox;
use crate::wait_for;

/// How long after Limosa's death the source may take to be as it was.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a run of `limosa` ended.
#[derive(Debug)]
pub enum Run {
    /// It was killed at its operation.
    Killed,
    /// It ended by itself: it had fewer operations, or a helper of its was the one that was killed.
    Ended(Said),
}

/// Runs `limosa` and has it killed at operation `number`.
pub fn killed_at(sandbox: &Sandbox, arguments: &[OsString], number: u64) -> Result<Run> {
    let number = OsString::from(number.to_string());
    let said = limosa::run_with(sandbox, arguments, Some(("LIMOSA_KILL_AT", &number)))?;
    Ok(if said.status.is_none() { Run::Killed } else { Run::Ended(said) })
}

/// Runs `limosa`, which must succeed, and counts its operations.
pub fn count(sandbox: &Sandbox, arguments: &[OsString]) -> Result<u64> {
    let file = sandbox.path("passed");
    let variable = ("LIMOSA_PASSED_FILE", OsStr::new(&file));
    limosa::run_with(sandbox, arguments, Some(variable))?.success("before the sweep")?;
    let text = fs::read_to_string(&file).context(
        "limosa was built without the feature 'fault': run 'cargo build --workspace --bins --features limosa/fault'",
    )?;
    Ok(text.parse()?)
}

/// Where to kill a run of `total` operations: evenly spread, beginning somewhere; each of the last `tail`, too.
pub fn points(total: u64, some: u64, tail: u64) -> BTreeSet<u64> {
    let full = std::env::var_os("LIMOSA_SWEEP").is_some_and(|value| value == "full");
    let wanted = if full { 1000 } else { some };
    let stride = total.div_ceil(wanted).max(1);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let first = 1 + u64::from(now.subsec_nanos()) % stride;
    let spread = (first..=total).step_by(stride as usize);
    let tail = if full { tail * 4 } else { tail };
    spread.chain(total.saturating_sub(tail).max(1)..=total + 1).collect()
}

/// What Limosa could leave in a process: mappings, descriptors, threads' signal masks.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint {
    mappings: Vec<String>,
    descriptors: BTreeSet<OsString>,
    masks: BTreeSet<(String, String)>,
}

impl Footprint {
    /// Looks at a process; fails where a thread of it is traced or stopped.
    pub fn of(pid: Pid) -> Result<Self> {
        let directory = format!("/proc/{}", pid.as_raw_pid());
        let maps = fs::read_to_string(format!("{directory}/maps"))?;
        let mut masks = BTreeSet::new();
        for task in fs::read_dir(format!("{directory}/task"))? {
            let task = task?;
            let status = fs::read_to_string(task.path().join("status"))?;
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.map(str::trim).with_context(|| format!("no {name} in {}", task.path().display()))
            };
            let (tracer, state) = (field("TracerPid:")?, field("State:")?);
            ensure!(tracer == "0", "{} is traced by {tracer}", task.path().display());
            ensure!(!state.starts_with(['t', 'T']), "{} is stopped", task.path().display());
            masks.insert((task.file_name().to_string_lossy().into_owned(), field("SigBlk:")?.to_owned()));
        }
        let descriptors = fs::read_dir(format!("{directory}/fd"))?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<_>>()?;
        Ok(Self { mappings: maps.lines().map(ToOwned::to_owned).collect(), descriptors, masks })
    }

    /// Waits until the process is again as it was.
    pub fn returns(&self, pid: Pid) -> Result<()> {
        let mut last = None;
        let again = wait_for("the source as it was before Limosa", PATIENCE, || {
            last = Some(Self::of(pid));
            Ok(matches!(&last, Some(Ok(now)) if now == self).then_some(()))
        });
        match (again, last) {
            (Ok(()), _) => Ok(()),
            (Err(error), Some(Ok(now))) => bail!("{error:#}: {}", self.difference(&now)),
            (Err(_), Some(Err(error))) | (Err(error), None) => Err(error),
        }
    }

    fn difference(&self, now: &Self) -> String {
        let lines = |own: &[String], other: &[String]| -> Vec<String> {
            own.iter().filter(|line| !other.contains(line)).cloned().collect()
        };
        format!(
            "mappings gone {:?}, new {:?}; descriptors {:?}, now {:?}; masks {:?}, now {:?}",
            lines(&self.mappings, &now.mappings),
            lines(&now.mappings, &self.mappings),
            self.descriptors,
            now.descriptors,
            self.masks.difference(&now.masks),
            now.masks.difference(&self.masks),
        )
    }
}

/// What unfinished checkpoints left beside `out`: a killed run leaves one at most, which the next one removes.
pub fn unfinished(out: &Path) -> Result<usize> {
    let (above, name) = (out.parent().context("no parent")?, out.file_name().context("no name")?);
    let prefix = format!(".{}.partial-", name.to_string_lossy());
    let mut count = 0;
    for entry in fs::read_dir(above)? {
        count += usize::from(entry?.file_name().to_string_lossy().starts_with(&prefix));
    }
    Ok(count)
}
