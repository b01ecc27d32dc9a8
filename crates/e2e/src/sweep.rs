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
use crate::sandbox::{Sandbox, describe, processes};
use crate::wait_for;

/// How long after Limosa's death the source may take to be as it was.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a run of `limosa` ended.
#[derive(Debug)]
pub enum Run {
    /// It was killed at its operation.
    Killed,
    /// It ended by itself: it had fewer operations.
    Ended(Said),
}

/// Runs `limosa` and has it killed at operation `number`. How many a run has depends a little on what the scheduler does:
/// one that ends by itself must have had fewer.
pub fn killed_at(sandbox: &Sandbox, arguments: &[OsString], number: u64) -> Result<Run> {
    let file = sandbox.path("passed");
    let _ = fs::remove_file(&file);
    let at = OsString::from(number.to_string());
    let variables = [("LIMOSA_KILL_AT", at.as_os_str()), ("LIMOSA_PASSED_FILE", file.as_os_str())];
    let said = limosa::run_with(sandbox, arguments, variables)?;
    if said.status.is_none() {
        return Ok(Run::Killed);
    }
    let had = counted(&file)?;
    ensure!(had < number, "a run of {had} operations was not killed at operation {number}: {said:?}");
    Ok(Run::Ended(said))
}

/// Runs `limosa`, which must succeed, and counts its operations.
pub fn count(sandbox: &Sandbox, arguments: &[OsString]) -> Result<u64> {
    let file = sandbox.path("passed");
    limosa::run_with(sandbox, arguments, [("LIMOSA_PASSED_FILE", OsStr::new(&file))])?
        .success("before the sweep")?;
    counted(&file)
}

/// How many operations a run had.
fn counted(file: &Path) -> Result<u64> {
    let text = fs::read_to_string(file).context(
        "limosa was built without the feature 'fault': run 'cargo build --workspace --bins --features limosa/fault'",
    )?;
    Ok(text.parse()?)
}

/// Where to kill a run of `total` operations: evenly spread, beginning somewhere; each of the last `tail`, too, and some
/// beyond: how many operations a run has depends a little on what the scheduler does.
pub fn points(total: u64, some: u64, tail: u64) -> BTreeSet<u64> {
    let full = std::env::var_os("LIMOSA_SWEEP").is_some_and(|value| value == "full");
    let wanted = if full { 1000 } else { some };
    let stride = total.div_ceil(wanted).max(1);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let first = 1 + u64::from(now.subsec_nanos()) % stride;
    let spread = (first..=total).step_by(stride as usize);
    let tail = if full { tail * 4 } else { tail };
    spread.chain(total.saturating_sub(tail).max(1)..=total + tail / 4).collect()
}

/// What Limosa could leave behind in the sandbox: processes of its own, and in each process mappings, descriptors,
/// threads' signal masks and stops.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint {
    things: BTreeSet<String>,
    /// The same of threads and processes that job control has stopped. They cannot leave the code of a killed visit until
    /// they run again.
    stopped: BTreeSet<String>,
}

impl Footprint {
    /// Looks at all processes of the sandbox; fails where a thread is traced.
    pub fn take() -> Result<Self> {
        let (mut things, mut stopped) = (BTreeSet::new(), BTreeSet::new());
        for pid in processes()? {
            let mut own = BTreeSet::new();
            if look_at(pid, &mut own).with_context(|| describe(pid))? {
                things.insert(format!("{} is stopped", pid.as_raw_pid()));
                stopped.extend(own);
            } else {
                things.extend(own);
            }
        }
        Ok(Self { things, stopped })
    }

    /// Whether nothing is new, and nothing gone but what programs open for a moment.
    fn is_again(&self, now: &Self) -> bool {
        now.things.is_subset(&self.things)
            && self.things.difference(&now.things).all(|thing| thing.contains(" descriptor "))
    }

    /// Fails unless the stopped processes are as they were at `first`.
    pub fn stopped_are_as(&self, first: &Self) -> Result<()> {
        let new: Vec<_> = self.stopped.symmetric_difference(&first.stopped).collect();
        ensure!(new.is_empty(), "in stopped processes: {new:#?}");
        Ok(())
    }

    /// Waits until all processes are again as they were.
    pub fn returns(&self) -> Result<()> {
        let mut last = None;
        let again = wait_for("the source as it was before Limosa", PATIENCE, || {
            last = Some(Self::take());
            Ok(matches!(&last, Some(Ok(now)) if self.is_again(now)).then_some(()))
        });
        match (again, last) {
            (Ok(()), _) => Ok(()),
            (Err(error), Some(Ok(now))) => {
                let gone: Vec<_> = self.things.difference(&now.things).collect();
                let new: Vec<_> = now.things.difference(&self.things).collect();
                bail!("{error:#}: gone {gone:#?}, new {new:#?}")
            }
            (Err(_), Some(Err(error))) | (Err(error), None) => Err(error),
        }
    }
}

/// Adds all that one process has, each with its PID; gives whether it is stopped.
fn look_at(pid: Pid, things: &mut BTreeSet<String>) -> Result<bool> {
    let number = pid.as_raw_pid();
    let directory = format!("/proc/{number}");
    let stat = fs::read_to_string(format!("{directory}/stat"))?;
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    if let ["Z", parent, ..] = fields[..] {
        // Limosa's own helpers are reaped by process 1, which is the test, at its end.
        if parent != "1" {
            let name = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map(|(name, _)| name);
            things.insert(format!("{number} zombie {} of {parent}", name.unwrap_or_default()));
        }
        return Ok(false);
    }
    let mut stopped = false;
    // As smaps calls mappings that a userfaultfd watches.
    let smaps = fs::read_to_string(format!("{directory}/smaps"))?;
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    let watched = flags.filter(|flags| flags.split(' ').any(|flag| ["uw", "um"].contains(&flag))).count();
    ensure!(watched == 0, "{watched} mappings of process {number} are watched");
    let maps = fs::read_to_string(format!("{directory}/maps"))?;
    things.extend(maps.lines().map(|line| format!("{number} maps {line}")));
    for task in fs::read_dir(format!("{directory}/task"))? {
        let task = task?;
        let status = fs::read_to_string(task.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).with_context(|| format!("no {name} in {}", task.path().display()))
        };
        let (tracer, state, mask) = (field("TracerPid:")?, field("State:")?, field("SigBlk:")?);
        ensure!(tracer == "0", "{} is traced by {tracer}", task.path().display());
        stopped |= state.starts_with('T');
        things.insert(format!("{} blocks {mask}", task.path().display()));
    }
    for entry in fs::read_dir(format!("{directory}/fd"))? {
        things.insert(format!("{number} descriptor {}", entry?.file_name().to_string_lossy()));
    }
    Ok(stopped)
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
