//! What Limosa needs runs out: disk space, descriptors, processes, memory. What it was doing fails with an error that
//! names what there was too little of, what it worked on goes on, and nothing half-made is left.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use limosa_e2e::contained::Contained;
use limosa_e2e::ground::Ground as _;
use limosa_e2e::limosa::{self, Said, Source};
use limosa_e2e::programs::{Program, Redis};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};
use limosa_e2e::sweep::Footprint;
use limosa_e2e::target::Target;
use rustix::mount::{MountFlags, UnmountFlags};

/// What an error says where something has run out, or a limit is reached.
const SHORTAGES: [&str; 7] = [
    "No space left on device",
    "Too many open files",
    "limit of open files",
    "limit on open files",
    "Resource temporarily unavailable",
    "Cannot allocate memory",
    "descriptors are allowed here",
];

fn says_what_is_short(text: &str) -> Result<()> {
    ensure!(
        SHORTAGES.iter().any(|shortage| text.contains(shortage)),
        "the error does not say what is short: {text}"
    );
    Ok(())
}

/// A file system of `kilobytes`, until it is dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, kilobytes: u64) -> Result<Self> {
        fs::create_dir_all(&path)?;
        let options = std::ffi::CString::new(format!("size={kilobytes}k"))?;
        rustix::mount::mount("small", &path, "tmpfs", MountFlags::empty(), Some(&*options))?;
        Ok(Self(path))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Runs `limosa` after the shell commands `conditions`.
fn under(sandbox: &Sandbox, conditions: &str, arguments: &[OsString]) -> Result<Said> {
    let script = format!("{conditions}\nexec \"$0\" \"$@\"");
    let (out, err) = (sandbox.path("under.out"), sandbox.path("under.err"));
    let status = Command::new("bash")
        .args(["-c", &script])
        .arg(limosa_e2e::built("limosa")?)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .stdout(fs::File::create(&out)?)
        .stderr(fs::File::create(&err)?)
        .status()?;
    Ok(Said { status: status.code(), out: fs::read_to_string(out)?, err: fs::read_to_string(err)? })
}

fn checkpoint(target: &Target, out: &Path) -> Vec<OsString> {
    let source = format!("pid:{}", target.root().as_raw_pid());
    vec!["checkpoint".into(), source.into(), "--out".into(), out.into()]
}

fn restore(out: &Path) -> Vec<OsString> {
    vec!["restore".into(), out.into(), "--detach".into()]
}

fn size_of(directory: &Path) -> Result<u64> {
    let sizes = fs::read_dir(directory)?.map(|entry| {
        let (path, metadata) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
        if metadata.is_dir() { size_of(&path) } else { Ok(metadata.len().next_multiple_of(4096)) }
    });
    sizes.sum()
}

#[test]
fn no_space_for_a_checkpoint() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "memory", &[])?;
        // Its answers touch more of its memory.
        target.verify()?;
        let whole = sandbox.path("whole");
        limosa::checkpoint(sandbox, target.root(), &whole, Source::GoesOn, &[])?.success("checkpoint")?;
        let kilobytes = size_of(&whole)? / 1024;
        ensure!(kilobytes > 100, "a checkpoint of {kilobytes} KiB is too small for this test");
        let (mut failures, mut last) = (0, String::new());
        for tenth in 0..=20 {
            let small = Small::mount(sandbox.path("small"), 16 + kilobytes * tenth / 10)?;
            let (out, before) = (small.0.join("checkpoint"), Footprint::take()?);
            let said = limosa::run(sandbox, checkpoint(&target, &out))?;
            if said.status == Some(0) {
                ensure!(tenth >= 5, "{tenth} tenths of {kilobytes} KiB were enough");
                // Its source has ended.
                return sandbox.end_all();
            }
            failures += 1;
            last.clone_from(&said.err);
            says_what_is_short(&said.err)?;
            ensure!(
                said.err.contains(small.0.to_str().unwrap_or_default()),
                "it does not say where: {}",
                said.err
            );
            let left: Vec<_> = fs::read_dir(&small.0)?.collect();
            ensure!(left.is_empty(), "left after {tenth} tenths: {left:?}");
            before.returns()?;
            target.verify().with_context(|| format!("after {tenth} tenths"))?;
        }
        bail!("{failures} failures, and no checkpoint with twice {kilobytes} KiB: {last}")
    });
}

/// Until there are enough of something, a checkpoint fails and its source goes on, and a restore fails and leaves
/// nothing. `conditions` gives the shell commands that leave it `number` of them.
fn run_short(
    sandbox: &Sandbox,
    kind: &str,
    numbers: &[u64],
    conditions: impl Fn(u64) -> String,
) -> Result<()> {
    let target = Target::start(sandbox, kind, &[])?;
    let out = sandbox.path("short");
    let (mut failed, mut ended) = (0, false);
    for number in numbers {
        let before = Footprint::take()?;
        let said = under(sandbox, &conditions(*number), &checkpoint(&target, &out))?;
        if said.status == Some(0) {
            ended = true;
            break;
        }
        failed += 1;
        says_what_is_short(&said.err).with_context(|| format!("checkpoint with {number}"))?;
        ensure!(!out.exists(), "a checkpoint is there although it failed");
        before.returns()?;
        target.verify().with_context(|| format!("after a checkpoint with {number}"))?;
    }
    if !ended {
        limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
    }
    wait_until_alone()?;
    let (mut refused, mut restored) = (0, false);
    for number in numbers {
        let said = under(sandbox, &conditions(*number), &restore(&out))?;
        if said.status == Some(0) {
            restored = true;
            break;
        }
        refused += 1;
        says_what_is_short(&said.err).with_context(|| format!("restore with {number}"))?;
        wait_until_alone().with_context(|| format!("after a restore with {number}"))?;
    }
    if !restored {
        limosa::restore(sandbox, &out, &[])?;
    }
    target.verify()?;
    println!("{failed} checkpoints and {refused} restores failed");
    ensure!(failed + refused > 0, "nothing was short");
    target.quit()?;
    sandbox.end_all()
}

#[test]
fn too_few_descriptors() {
    let numbers: Vec<u64> = (4..40).chain((40..200).step_by(20)).collect();
    sandboxed(move |sandbox| run_short(sandbox, "pipes", &numbers, |number| format!("ulimit -n {number}")));
}

/// A control group of version 1, which the sandbox shares with the machine.
struct Group(PathBuf);

impl Group {
    fn new(controller: &str) -> Result<Self> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/{controller}/limosa-e2e-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    fn joined_with(&self, file: &str, limit: u64) -> String {
        format!("echo {limit} > {group}/{file} && echo $$ > {group}/cgroup.procs", group = self.0.display())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

#[test]
fn too_few_processes() {
    sandboxed(|sandbox| {
        let group = Group::new("pids")?;
        run_short(sandbox, "tree", &[1, 2, 3, 4, 6, 8, 10, 14, 20, 100], |number| {
            group.joined_with("pids.max", number)
        })
    });
}

/// Then a source cannot fork: its memory is stored while it is frozen, and the report says so.
#[test]
fn no_room_for_a_twin() {
    sandboxed(|sandbox| {
        let group = Group::new("pids")?;
        let target = Target::start(sandbox, "memory", &[])?;
        fs::write(group.0.join("cgroup.procs"), target.root().as_raw_pid().to_string())?;
        fs::write(group.0.join("pids.max"), "1")?;
        let out = sandbox.path("without");
        let options = ["--mode", "twin", "--json"];
        let said = limosa::checkpoint(sandbox, target.root(), &out, Source::GoesOn, &options)?;
        let said = said.success("checkpoint without room for a twin")?;
        ensure!(said.out.contains("could not fork (Resource temporarily unavailable"), "{}", said.out);
        target.verify()?;
        fs::write(group.0.join("pids.max"), "max")?;
        let with = sandbox.path("with");
        let said = limosa::checkpoint(sandbox, target.root(), &with, Source::GoesOn, &options)?;
        let said = said.success("checkpoint with room for a twin")?;
        ensure!(!said.out.contains("could not fork"), "{}", said.out);
        target.quit()?;
        for checkpoint in [out, with] {
            limosa::restore(sandbox, &checkpoint, &[])?;
            target.quit()?;
            wait_until_alone()?;
        }
        Ok(())
    });
}

/// A migration fails under each of the conditions, with redis and its clients going on, and then succeeds.
fn migrate_short(sandbox: &Sandbox, conditions: &[String]) -> Result<()> {
    let container = Contained::new(sandbox)?;
    let mut redis = Redis::start(&container, 1000)?;
    let (mut failed, mut last) = (0, None);
    for condition in conditions {
        let before = container.location();
        let outcome = container.migrate_under(condition)?;
        let context = || format!("under {condition:?}: {outcome:?}");
        container.settled().with_context(context)?;
        redis.verify().with_context(context)?;
        if let Some(error) = &outcome {
            failed += 1;
            says_what_is_short(error).with_context(context)?;
            ensure!(container.location() == before, "{}: it moved", context());
        }
        last = outcome;
    }
    println!("{failed} of {} migrations failed", conditions.len());
    ensure!(
        failed > 0 && failed < conditions.len(),
        "{failed} of {} migrations failed: {last:?}",
        conditions.len()
    );
    drop(redis);
    container.end()
}

/// The container's processes may have more descriptors than the receiver, whose hard limit `ulimit -n` lowers, too: no
/// number suffices that is below theirs (`EPERM` without `CAP_SYS_RESOURCE`). Without the limit it moves.
#[test]
fn a_receiver_with_too_few_descriptors() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        let mut redis = Redis::start(&container, 1000)?;
        for number in [6, 10, 14, 18, 22, 26, 30, 40, 60, 200] {
            let outcome = container.migrate_under(&format!("ulimit -n {number}\n"))?;
            let context = || format!("with {number} descriptors: {outcome:?}");
            container.settled().with_context(context)?;
            redis.verify().with_context(context)?;
            ensure!(container.location() == "A", "{}: it moved", context());
            says_what_is_short(outcome.as_deref().unwrap_or("no error")).with_context(context)?;
        }
        let outcome = container.migrate_under("")?;
        let context = || format!("without a limit: {outcome:?}");
        container.settled().with_context(context)?;
        redis.verify().with_context(context)?;
        ensure!(container.location() == "B", "{}: it did not move", context());
        drop(redis);
        container.end()
    });
}

#[test]
fn a_receiver_with_too_few_processes() {
    sandboxed(|sandbox| {
        let group = Group::new("pids")?;
        let conditions: Vec<String> = [2, 4, 6, 7, 8, 10, 200]
            .iter()
            .map(|number| group.joined_with("pids.max", *number) + "\n")
            .collect();
        migrate_short(sandbox, &conditions)
    });
}

/// The receiver's control group has too little memory: the kernel ends it, or it cannot start. What it had built is removed,
/// the source runs on, and the error says that the other side is gone.
#[test]
fn a_receiver_with_too_little_memory() {
    sandboxed(|sandbox| {
        let group = Group::new("memory")?;
        let container = Contained::new(sandbox)?;
        let mut redis = Redis::start(&container, 1000)?;
        let mut failed = 0;
        for mebibytes in [1, 2, 3, 4, 5, 6, 8, 10, 1024] {
            let condition = group.joined_with("memory.limit_in_bytes", mebibytes << 20) + "\n";
            let outcome = container.migrate_under(&condition)?;
            let context = || format!("with {mebibytes} MiB: {outcome:?}");
            container.settled().with_context(context)?;
            redis.verify().with_context(context)?;
            if let Some(error) = &outcome {
                failed += 1;
                println!("{}", context());
                ensure!(container.location() == "A", "{}: it moved", context());
                ensure!(error.contains("runs on here"), "{}: where it runs is not said", context());
            } else {
                ensure!(failed > 0, "{}: nothing was short", context());
                ensure!(container.location() == "B", "{}: it did not move", context());
                drop(redis);
                return container.end();
            }
        }
        bail!("all {failed} migrations failed")
    });
}

/// The state directory of the receiver has too little space: for records, for the writable layer, for the log.
#[test]
fn no_space_at_the_destination() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        let mut redis = Redis::start(&container, 1000)?;
        let big = container.seen(&container.directory().join("big"));
        fs::write(big, vec![7; 1 << 20])?;
        let mut failed = 0;
        for kilobytes in [4, 8, 12, 16, 20, 24, 28, 32, 64, 256, 1024, 8192] {
            let small = Small::mount(sandbox.path("b"), kilobytes)?;
            let outcome = container.migrate_under("")?;
            let context = || format!("with {kilobytes} KiB: {outcome:?}");
            container.settled().with_context(context)?;
            redis.verify().with_context(context)?;
            let Some(error) = &outcome else {
                ensure!(kilobytes > 1024, "{}: it had too little space", context());
                ensure!(container.location() == "B", "{}: it did not move", context());
                println!("{failed} migrations failed");
                drop(redis);
                container.end()?;
                drop(small);
                return Ok(());
            };
            failed += 1;
            says_what_is_short(error).with_context(context)?;
            ensure!(container.location() == "A", "{}: it moved", context());
        }
        bail!("all {failed} migrations failed")
    });
}
