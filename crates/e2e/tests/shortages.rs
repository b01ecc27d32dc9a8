//! What Limosa needs runs out: disk space, descriptors, processes, memory. What it was doing fails with an error that
//! names what there was too little of, what it worked on goes on, and nothing half-made is left.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use limosa_e2e::contained::Contained;
use limosa_e2e::ground::Ground as _;
use limosa_e2e::limosa::{self, Said, Source};
use limosa_e2e::programs::{Program, Redis};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};
use limosa_e2e::sweep::{Footprint, unfinished};
use limosa_e2e::target::Target;
use rustix::mount::{MountFlags, UnmountFlags};

/// What an error says where something has run out, or a limit is reached.
const SHORTAGES: [&str; 11] = [
    "No space left on device",
    "Too many open files",
    "limit of open files",
    "limit on open files",
    "Resource temporarily unavailable",
    "Cannot allocate memory",
    "memory allocation of",
    "limit on address space",
    "failed to map segment from shared object",
    "full control group",
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
    run_short_by(sandbox, kind, &[], numbers, conditions)
}

/// The same with more options of the checkpoint. Where there is too little memory the kernel may end Limosa, which then says
/// nothing: the source goes on all the same, and nothing is left but an unfinished checkpoint, which the next one removes.
fn run_short_by(
    sandbox: &Sandbox,
    kind: &str,
    options: &[&str],
    numbers: &[u64],
    conditions: impl Fn(u64) -> String,
) -> Result<()> {
    let says_it = |said: &Said| match said.status {
        None => Ok(()),
        Some(_) => says_what_is_short(&said.err),
    };
    let target = Target::start(sandbox, kind, &[])?;
    // Its threads are there then.
    target.verify()?;
    let out = sandbox.path("short");
    let (mut failed, mut ended) = (0, false);
    for number in numbers {
        let before = Footprint::take()?;
        let mut arguments = checkpoint(&target, &out);
        arguments.extend(options.iter().map(OsString::from));
        let said = under(sandbox, &conditions(*number), &arguments)?;
        if said.status == Some(0) {
            ended = true;
            break;
        }
        failed += 1;
        println!("checkpoint with {number}: {:?} {}", said.status, said.err.trim());
        says_it(&said).with_context(|| format!("checkpoint with {number}"))?;
        ensure!(!out.exists(), "a checkpoint is there although it failed");
        let unfinished = unfinished(&out)?;
        ensure!(unfinished <= usize::from(said.status.is_none()), "{unfinished} unfinished checkpoints");
        before.returns().with_context(|| format!("after a checkpoint with {number}"))?;
        target.verify().with_context(|| format!("after a checkpoint with {number}"))?;
    }
    // One that leaves its source running has not ended it.
    if !ended || options.contains(&"--leave-running") {
        let _ = fs::remove_dir_all(&out);
        limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
    }
    ensure!(unfinished(&out)? == 0, "unfinished checkpoints remain");
    wait_until_alone()?;
    let (mut refused, mut restored) = (0, false);
    for number in numbers {
        let said = under(sandbox, &conditions(*number), &restore(&out))?;
        if said.status == Some(0) {
            restored = true;
            break;
        }
        refused += 1;
        println!("restore with {number}: {:?} {}", said.status, said.err.trim());
        says_it(&said).with_context(|| format!("restore with {number}"))?;
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

/// The kernel ends Limosa or what it builds, where reclaiming does not help. What a checkpoint writes counts, too: here it goes
/// into memory.
fn too_little_memory(sandbox: &Sandbox, options: &[&str]) -> Result<()> {
    let group = Group::new("memory")?;
    let kibibytes = [256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 1 << 20];
    run_short_by(sandbox, "memory", options, &kibibytes, |number| {
        group.joined_with("memory.limit_in_bytes", number << 10)
    })
}

#[test]
fn too_little_memory_for_a_checkpoint_and_a_restore() {
    sandboxed(|sandbox| too_little_memory(sandbox, &["--mode", "stop"]));
}

#[test]
fn too_little_memory_for_a_checkpoint_from_twins() {
    sandboxed(|sandbox| too_little_memory(sandbox, &["--mode", "twin", "--leave-running"]));
}

/// Calls fail with `ENOMEM`, and allocations do.
#[test]
fn too_little_address_space() {
    let kibibytes = [2000, 4000, 6000, 8000, 12000, 16000, 24000, 32000, 64000, 128_000];
    sandboxed(move |sandbox| run_short(sandbox, "tree", &kibibytes, |number| format!("ulimit -v {number}")));
}

/// A target in a group of which all memory is used but a little.
fn in_a_full_group(sandbox: &Sandbox, kind: &str, mode: &str) -> Result<()> {
    let group = Group::new("memory")?;
    let (program, result) = (limosa_e2e::built("limosa-target")?, sandbox.path(kind));
    let join = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.0.display());
    let command = [OsStr::new("sh"), "-c".as_ref(), join.as_ref(), program.as_os_str(), kind.as_ref()];
    let command = [&command[..], &[result.as_os_str()]].concat();
    let target = Target::start_command(sandbox, kind, result.clone(), &command)?;
    target.verify()?;
    let number = |file: &str| -> Result<u64> {
        let text = fs::read_to_string(group.0.join(file))?;
        let number = text.lines().find_map(|line| line.rsplit(' ').next()?.parse().ok());
        number.with_context(|| format!("{file}: {text:?}"))
    };
    let kills = || -> Result<u64> {
        let text = fs::read_to_string(group.0.join("memory.oom_control"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(line.context("no count of killed processes")?.parse()?)
    };
    let (out, mut failed) = (sandbox.path("full"), 0);
    let arguments = ["--mode", mode];
    for spare in [0, 64, 1024, 1152, 1280, 1536, 2048, 3072] {
        let limit = number("memory.usage_in_bytes")? + (spare << 10);
        fs::write(group.0.join("memory.limit_in_bytes"), limit.to_string())?;
        let before = Footprint::take()?;
        let said = limosa::checkpoint(sandbox, target.root(), &out, Source::GoesOn, &arguments)?;
        let context = || format!("{spare} KiB are left, {mode}: {said:?}");
        before.returns().with_context(context)?;
        // Its answer takes memory, too, which is not Limosa's fault.
        fs::write(group.0.join("memory.limit_in_bytes"), "-1")?;
        target.verify().with_context(context)?;
        if said.status == Some(0) {
            limosa_image::verify(&out).with_context(context)?;
            fs::remove_dir_all(&out)?;
        } else {
            failed += 1;
            says_what_is_short(&said.err).with_context(context)?;
            ensure!(!out.exists(), "{}: half a checkpoint", context());
        }
    }
    println!("{mode}: {failed} checkpoints failed; the kernel ended {} processes", kills()?);
    limosa::checkpoint(sandbox, target.root(), &out, Source::GoesOn, &arguments)?.success("with enough")?;
    target.quit()?;
    sandbox.end_all()
}

#[test]
fn a_source_in_a_full_control_group() {
    sandboxed(|sandbox| in_a_full_group(sandbox, "writers", "stop"));
}

/// What it writes meanwhile costs as much again: that is taken from the twin, not from the source.
#[test]
fn a_source_in_a_full_control_group_from_a_twin() {
    sandboxed(|sandbox| in_a_full_group(sandbox, "writers", "twin"));
}

/// Without that hierarchy nothing can seal the source for the hand-over. Found before anything is frozen or sent.
#[test]
fn no_control_groups_of_version_2() {
    sandboxed(|sandbox| {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let unified =
            mounts.lines().find(|line| line.contains(" - cgroup2 ")).context("no such hierarchy here")?;
        let place = PathBuf::from(unified.split(' ').nth(4).context("no mount point")?);
        rustix::mount::unmount(&place, UnmountFlags::empty())?;
        let outcome = without_version_2(sandbox);
        rustix::mount::mount("cgroup2", &place, "cgroup2", MountFlags::RELATIME, None)?;
        outcome
    });
}

fn without_version_2(sandbox: &Sandbox) -> Result<()> {
    let container = Contained::new(sandbox)?;
    let target = Target::start(&container, "heartbeat", &[])?;
    let refused = container.migrate_under("")?.context("it migrated")?;
    ensure!(refused.contains("mount -t cgroup2"), "no remedy: {refused}");
    ensure!(!refused.contains("frozen, sending"), "it was frozen before: {refused}");
    container.settled()?;
    target.verify()?;
    ensure!(container.location() == "A", "it moved");
    container.end()
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
