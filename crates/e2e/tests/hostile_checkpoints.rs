//! A checkpoint can say anything, with digests that match: restore runs as root on it. Every value of real states is
//! replaced by what it should never be; planning that must end in a plan or an error, and rebuilding it in a running tree
//! or an error that leaves nothing behind: no panic, no hang, no leftover.

use std::ffi::OsStr;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use limosa_e2e::hostile::{self, State, TREE};
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::sandbox::{Sandbox, sandboxed};
use limosa_e2e::target::Target;
use limosa_engine::restore::{Options, Planned};
use limosa_image::{Checkpoint, Meta, Sink, Staging};
use rustix::mount::{MountFlags, mount_remount};

/// How many of the replacements are planned, and how many of those rebuilt in full, spread evenly. `LIMOSA_SWEEP=full` plans
/// all and rebuilds many more.
const SAMPLE: (usize, usize) = (8000, 80);
const FULL: (usize, usize) = (usize::MAX, 4000);
/// The exit status of a Rust program that panicked.
const PANICKED: Option<i32> = Some(101);

macro_rules! hostile {
    ($($name:ident: $kind:literal;)*) => {$(
        #[test]
        fn $name() {
            sandboxed(|sandbox| all_of(sandbox, $kind));
        }
    )*};
}

hostile! {
    a_tree: "tree";
    events: "events";
    files: "files";
    unix_sockets: "sockets-unix";
    descriptors_in_flight: "in-flight";
    netlink: "netlink";
    udp: "udp-queues";
    shared_memory: "memory-shared";
    timers: "timers";
}

fn all_of(sandbox: &Sandbox, kind: &str) -> Result<()> {
    // The sandbox's memory filesystems stay writable; the machine's files are not to be hit by what hostile states ask for.
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "")?;
    let outcome = with_all(sandbox, kind);
    mount_remount("/", MountFlags::BIND, "")?;
    outcome
}

fn with_all(sandbox: &Sandbox, kind: &str) -> Result<()> {
    let target = Target::start(sandbox, kind, &[])?;
    let original = sandbox.path("original");
    limosa::checkpoint(sandbox, target.root(), &original, Source::Ends, &[])?.success("checkpoint")?;
    sandbox.end_all()?;
    let original = Checkpoint::open(&original)?;
    let state = State::of(&original)?;
    let mut cases = Vec::new();
    for number in 0..state.len() {
        cases.extend(state.replacements(number).into_iter().map(|value| (number, value)));
    }
    let full = std::env::var_os("LIMOSA_SWEEP").is_some_and(|value| value == "full");
    let (planned, rebuilt) = if full { FULL } else { SAMPLE };
    let cases: Vec<_> = cases.iter().step_by(cases.len().div_ceil(planned)).collect();
    let step = cases.len().div_ceil(rebuilt);
    let begun = Instant::now();
    let mut failures = Vec::new();
    for (index, (number, value)) in cases.iter().enumerate() {
        // What CBOR cannot say, a checkpoint cannot say either.
        let Ok(bytes) = state.with(*number, value) else { continue };
        let context = || format!("value {number} of the state of '{kind}' replaced by {value:.80?}");
        let mut outcome = plan(&bytes);
        if index % step == step / 2 {
            outcome = outcome.and(rebuild(sandbox, &original, &bytes));
        }
        failures.extend(outcome.with_context(context).err().map(|error| format!("{error:#}\n")));
    }
    ensure!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.concat());
    println!("{kind}: {} replacements in {:?}", cases.len(), begun.elapsed());
    Ok(())
}

/// Plans and explains a restore, which touches nothing.
fn plan(state: &[u8]) -> Result<()> {
    let mut staging = Staging::new()?;
    staging.state(TREE, state)?;
    let checkpoint = staging.into_checkpoint(Meta::new("hostile", Vec::new()))?;
    let planned = catch_unwind(AssertUnwindSafe(|| {
        // An error is as good as a plan.
        let _ = Planned::new(&checkpoint, Options::default()).and_then(|planned| planned.explain());
    }));
    ensure!(planned.is_ok(), "planning it panics");
    Ok(())
}

/// Restores it, and ends what came of that. A tree that fails may leave no process.
fn rebuild(sandbox: &Sandbox, original: &Checkpoint, state: &[u8]) -> Result<()> {
    let hostile: PathBuf = sandbox.path("hostile");
    hostile::write(original, state, &hostile)?;
    let begun = Instant::now();
    let said = limosa::run(sandbox, [OsStr::new("restore"), "--detach".as_ref(), hostile.as_ref()])?;
    ensure!(said.status != PANICKED, "restore panics: {}", said.err);
    ensure!(said.status.is_some(), "restore was ended by a signal: {}", said.err);
    ensure!(begun.elapsed() < Duration::from_secs(20), "restore took {:?}: {}", begun.elapsed(), said.err);
    if said.status == Some(0) {
        sandbox.end_all()?;
    } else {
        ensure!(!said.err.trim().is_empty(), "restore fails without a word");
        limosa_e2e::sandbox::wait_until_alone().with_context(|| format!("after: {}", said.err))?;
    }
    fs::remove_dir_all(&hostile)?;
    Ok(())
}
