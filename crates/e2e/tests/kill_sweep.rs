//! `limosa` killed at its operations on the kernel: what it worked on must not notice.
//!
//! The normal run kills at a few dozen points of each kind; `make sweep` at all (or 1,000).

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use limosa_e2e::contained::Contained;
use limosa_e2e::killed::{Fate, Side};
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::programs::{Program, REDIS_PORT, Redis};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};
use limosa_e2e::sweep::{Footprint, Run, count, killed_at, points, unfinished};
use limosa_e2e::target::Target;
use limosa_e2e::wait_for;
use rustix::process::{Pid, WaitOptions, waitpid};

fn checkpoint_arguments(root: Pid, out: &Path, source: Source) -> Vec<OsString> {
    let mut arguments = vec!["checkpoint".into(), format!("pid:{}", root.as_raw_pid()).into()];
    arguments.extend(["--out".into(), out.into()]);
    if source == Source::GoesOn {
        arguments.push("--leave-running".into());
    }
    arguments
}

/// `limosa checkpoint --leave-running` of the process `root`, killed at many points; after each `verify` must find it
/// whole. At the end a checkpoint is made and nothing unfinished is left.
fn sweep_leaving_running(
    sandbox: &Sandbox,
    root: Pid,
    mode: &str,
    some: u64,
    mut verify: impl FnMut() -> Result<String>,
) -> Result<()> {
    let out = sandbox.path("swept");
    let mut arguments = checkpoint_arguments(root, &out, Source::GoesOn);
    arguments.extend(["--mode".into(), mode.into()]);
    verify().context("before the sweep")?;
    let total = count(sandbox, &arguments)?;
    fs::remove_dir_all(&out)?;
    let (points, mut kills) = (points(total, some, 5), 0);
    let at_first = Footprint::take()?;
    for number in &points {
        let footprint = Footprint::take()?;
        let run = killed_at(sandbox, &arguments, *number)?;
        let context = || format!("limosa {run:?} at operation {number} of {total}");
        kills += u64::from(matches!(run, Run::Killed));
        footprint.returns().with_context(context)?;
        verify().with_context(context)?;
        ensure!(unfinished(&out)? <= 1, "{}: {} unfinished checkpoints", context(), unfinished(&out)?);
        if out.exists() {
            limosa_image::verify(&out).with_context(context)?;
            fs::remove_dir_all(&out)?;
        }
    }
    limosa::run(sandbox, &arguments)?.success("checkpoint after the sweep")?;
    limosa_image::verify(&out)?;
    ensure!(unfinished(&out)? == 0, "unfinished checkpoints remain");
    // What could not run until now, being stopped, has been freed of what killed runs left in it.
    Footprint::take()?.stopped_are_as(&at_first)?;
    println!("{total} operations, {} points, {kills} kills; {}", points.len(), verify()?);
    // Each that was not killed had fewer operations than that ([`killed_at`]).
    ensure!(kills >= points.len() as u64 * 4 / 5, "only {kills} of {} runs were killed", points.len());
    Ok(())
}

/// The same of a target of `kind`.
fn sweep_target(sandbox: &Sandbox, kind: &str, mode: &str) -> Result<()> {
    let target = Target::start(sandbox, kind, &[])?;
    sweep_leaving_running(sandbox, target.root(), mode, 50, || target.verify())?;
    target.quit()?;
    sandbox.end_all()
}

#[test]
fn checkpoint_of_twenty_threads() {
    sandboxed(|sandbox| sweep_target(sandbox, "threads", "stop"));
}

/// The twins that a killed Limosa leaves end and are reaped.
#[test]
fn checkpoint_of_twenty_threads_from_a_twin() {
    sandboxed(|sandbox| sweep_target(sandbox, "threads", "twin"));
}

/// No message is lost.
#[test]
fn checkpoint_of_message_queues() {
    sandboxed(|sandbox| sweep_target(sandbox, "message-queues", "stop"));
}

/// A killed Limosa watches no memory any more, and has left no descriptor of a userfaultfd.
#[test]
fn checkpoint_of_twenty_threads_by_rounds() {
    sandboxed(|sandbox| sweep_target(sandbox, "threads", "precopy"));
}

#[test]
fn checkpoint_of_a_tree_by_rounds() {
    sandboxed(|sandbox| sweep_target(sandbox, "tree", "precopy"));
}

/// Groups, sessions, zombies, orphans, a stopped child.
#[test]
fn checkpoint_of_a_tree() {
    sandboxed(|sandbox| sweep_target(sandbox, "tree", "twin"));
}

/// A connection over which a counter is incremented, one request after the other, until the test is done.
fn increment(port: u16, done: &AtomicBool) -> Result<(u64, Duration)> {
    let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", port))?);
    stream.get_ref().set_nodelay(true)?;
    // Redis's own check counts the keys of the other database.
    stream.get_mut().write_all(b"SELECT 1\r\n")?;
    let (mut count, mut gap, mut reply) = (0, Duration::ZERO, String::new());
    stream.read_line(&mut reply)?;
    while !done.load(Ordering::SeqCst) {
        let sent = Instant::now();
        stream.get_mut().write_all(b"INCR busy\r\n")?;
        reply.clear();
        stream.read_line(&mut reply)?;
        count += 1;
        gap = gap.max(sent.elapsed());
        ensure!(reply == format!(":{count}\r\n"), "increment {count} gave {reply:?}");
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok((count, gap))
}

#[test]
fn checkpoint_of_redis_with_clients() {
    sandboxed(|sandbox| {
        let mut redis = Redis::start(sandbox, 2000)?;
        let (root, done) = (redis.root(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let busy = scope.spawn(|| increment(REDIS_PORT, &done));
            let swept = sweep_leaving_running(sandbox, root, "twin", 50, || redis.verify());
            done.store(true, Ordering::SeqCst);
            let (count, gap) = busy.join().expect("the client does not panic")?;
            println!("{count} increments on a busy connection, largest gap {gap:?}");
            swept
        })?;
        drop(redis);
        sandbox.end_all()
    });
}

/// Before the rename the source runs on and nothing is there; after it the checkpoint is there and whole, and the source
/// has ended, all of it, or runs on, all of it. `moments` operations, about, lie between the rename and the end.
fn sweep_ending_source(sandbox: &Sandbox, kind: &str, moments: u64) -> Result<()> {
    let out = sandbox.path("swept");
    let target = Target::start(sandbox, kind, &[])?;
    let total = count(sandbox, &checkpoint_arguments(target.root(), &out, Source::Ends))?;
    fs::remove_dir_all(&out)?;
    sandbox.end_all()?;
    let mut target = Target::start(sandbox, kind, &[])?;
    let (mut kills, mut complete, mut ended) = (0, 0, 0);
    let planned = points(total, 15, 40 + moments);
    // Which numbers the operations between the rename and the source's end have varies from run to run by some: it
    // goes on around there until one was hit.
    let around_the_end = (0..100 + moments).map(|turn| total + 4 - turn % (16 + moments));
    for (turn, number) in planned.iter().copied().chain(around_the_end).enumerate() {
        if turn >= planned.len() && complete > ended && ended > 0 {
            break;
        }
        let arguments = checkpoint_arguments(target.root(), &out, Source::Ends);
        let run = killed_at(sandbox, &arguments, number)?;
        kills += u64::from(matches!(run, Run::Killed));
        let context = || format!("limosa {run:?} at operation {number} of {total}");
        if out.exists() {
            complete += 1;
            limosa_image::verify(&out).with_context(context)?;
            fs::remove_dir_all(&out)?;
            // A source that was killed may still be on its way out.
            let root = Some(target.root());
            let gone =
                wait_for("its end", Duration::from_millis(300), || Ok(waitpid(root, WaitOptions::NOHANG)?));
            if gone.is_ok() {
                ended += 1;
                wait_until_alone().with_context(context)?;
                target = Target::start(sandbox, kind, &[])?;
            } else {
                target.verify().with_context(context)?;
            }
        } else {
            ensure!(waitpid(Some(target.root()), WaitOptions::NOHANG)?.is_none(), "{}: ended", context());
            target.verify().with_context(context)?;
        }
    }
    println!("{total} operations, {kills} kills; {complete} complete checkpoints, {ended} sources ended");
    ensure!(complete > ended && ended > 0, "the sweep missed the end: {complete} complete, {ended} ended");
    sandbox.end_all()
}

#[test]
fn checkpoint_that_ends_its_source() {
    sandboxed(|sandbox| sweep_ending_source(sandbox, "threads", 0));
}

/// Its processes are ended one after the other: all of them, also when Limosa is killed at one of them.
#[test]
fn checkpoint_that_ends_a_tree() {
    sandboxed(|sandbox| sweep_ending_source(sandbox, "tree", 130));
}

/// Killed restores of a checkpoint of `kind` leave nothing, or, at the very end, the whole tree.
fn sweep_restore(sandbox: &Sandbox, kind: &str, some: u64, tail: u64) -> Result<()> {
    let out = sandbox.path("swept");
    let target = Target::start(sandbox, kind, &[])?;
    limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
    wait_until_alone()?;
    let arguments = vec!["restore".into(), out.clone().into(), "--detach".into()];
    // Waiting for a process to end takes some operations, or many.
    let mut total = u64::MAX;
    for _ in 0..3 {
        total = total.min(count(sandbox, &arguments)?);
        sandbox.end_all()?;
    }
    let (mut kills, mut whole) = (0, 0);
    let points = points(total, some, tail);
    for number in &points {
        let run = killed_at(sandbox, &arguments, *number)?;
        let context = || format!("limosa {run:?} at operation {number} of {total}");
        kills += u64::from(matches!(run, Run::Killed));
        // A run that was not killed has restored the tree.
        let left =
            if matches!(run, Run::Killed) { wait_until_alone().err() } else { Some(anyhow!("no kill")) };
        if let Some(left) = left {
            target.verify().with_context(context).with_context(|| format!("{left:#}"))?;
            whole += 1;
            sandbox.end_all().with_context(context)?;
        }
        sandbox.check_empty().with_context(context)?;
    }
    println!("{total} operations, {} points, {kills} kills; {whole} trees complete", points.len());
    limosa::restore(sandbox, &out, &[])?;
    target.verify()?;
    target.quit()?;
    sandbox.end_all()
}

#[test]
fn restore_of_twenty_threads() {
    sandboxed(|sandbox| sweep_restore(sandbox, "threads", 50, 10));
}

/// In the host's namespaces each process is let go by itself: all of them, or none.
#[test]
fn restore_of_a_tree() {
    sandboxed(|sandbox| sweep_restore(sandbox, "tree", 40, 24));
}

/// Migrations of a redis in a container with clients outside, one after the other, of each of which one side is killed:
/// after each there is one copy, on one of the hosts, which the clients still talk to and find whole, and nothing else.
fn sweep_migration(sandbox: &Sandbox, side: Side, some: u64) -> Result<()> {
    let container = Contained::new(sandbox)?;
    let mut redis = Redis::start(&container, 1000)?;
    let mut total = u64::MAX;
    for _ in 0..2 {
        let failed = container.migrate_with(side, Fate::Counted)?;
        ensure!(failed.is_none(), "without a kill: {failed:?}");
        container.settled()?;
        total = total.min(container.counted()?);
    }
    redis.verify().context("before the sweep")?;
    let (points, mut kills, mut moves) = (points(total, some, 5), 0, 0);
    for number in &points {
        let before = container.location();
        let failed = container.migrate_with(side, Fate::Killed(*number))?;
        let context = || format!("{side:?} killed at operation {number} of {total}: {failed:?}");
        kills += u64::from(failed.is_some());
        container.settled().with_context(context)?;
        moves += u64::from(container.location() != before);
        redis.verify().with_context(context)?;
    }
    println!(
        "{total} operations, {} points, {kills} kills; moved {moves} times: {}",
        points.len(),
        redis.verify()?
    );
    // One that is killed when it has told the other side that the container runs has not failed: about one in eight of all.
    let wanted = (points.len() as u64).saturating_sub(12).min(points.len() as u64 * 4 / 5);
    ensure!(kills >= wanted, "only {kills} of {} were killed", points.len());
    drop(redis);
    container.end()
}

#[test]
fn migration_whose_source_is_killed() {
    sandboxed(|sandbox| sweep_migration(sandbox, Side::Source, 35));
}

#[test]
fn migration_whose_receiver_is_killed() {
    sandboxed(|sandbox| sweep_migration(sandbox, Side::Destination, 35));
}

/// Its guard answers the source on the same port, with the same ticket.
#[test]
fn migration_whose_listener_is_killed() {
    sandboxed(|sandbox| sweep_migration(sandbox, Side::Listener, 35));
}

/// `limosa checkpoint NAME --leave-running`, killed: the container runs on, whole, and nothing of Limosa is left in it.
fn sweep_container_checkpoint(sandbox: &Sandbox, mode: &str) -> Result<()> {
    let container = Contained::new(sandbox)?;
    let target = Target::start(&container, "tree", &[])?;
    target.verify().context("before the sweep")?;
    let out = sandbox.path("swept");
    let path = out.to_str().context("a path that is not UTF-8")?;
    let arguments = ["checkpoint", Contained::NAME, "--out", path, "--leave-running", "--mode", mode];
    let (had, failed) = container.kill_at(&arguments, u64::MAX)?;
    ensure!(failed.is_none(), "without a kill: {failed:?}");
    let total = had.context("limosa was built without the feature 'fault'")?;
    fs::remove_dir_all(&out)?;
    let (points, mut kills) = (points(total, 40, 5), 0);
    for number in &points {
        let footprint = Footprint::take()?;
        let (had, failed) = container.kill_at(&arguments, *number)?;
        let context = || format!("killed at operation {number} of {total} ({had:?} if not): {failed:?}");
        kills += u64::from(had.is_none());
        container.settled().with_context(context)?;
        footprint.returns().with_context(context)?;
        target.verify().with_context(context)?;
        ensure!(unfinished(&out)? <= 1, "{}: {} unfinished checkpoints", context(), unfinished(&out)?);
        if out.exists() {
            limosa_image::verify(&out).with_context(context)?;
            fs::remove_dir_all(&out)?;
        }
    }
    println!("{total} operations, {} points, {kills} kills", points.len());
    ensure!(kills >= points.len() as u64 * 4 / 5, "only {kills} of {} were killed", points.len());
    container.limosa(&arguments)?;
    limosa_image::verify(&out)?;
    ensure!(unfinished(&out)? == 0, "unfinished checkpoints remain");
    container.end()
}

#[test]
fn checkpoint_of_a_container() {
    sandboxed(|sandbox| sweep_container_checkpoint(sandbox, "stop"));
}

#[test]
fn checkpoint_of_a_container_from_twins() {
    sandboxed(|sandbox| sweep_container_checkpoint(sandbox, "twin"));
}

/// `limosa restore` of a container, killed: the container is there, whole, or nothing of it is.
#[test]
fn restore_of_a_container() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        let target = Target::start(&container, "threads", &[])?;
        let out = sandbox.path("swept");
        let path = out.to_str().context("a path that is not UTF-8")?;
        container.limosa(&["checkpoint", Contained::NAME, "--out", path])?;
        ensure!(!container.is_there()?, "the source is there after its checkpoint");
        let arguments = ["restore", path, "--detach"];
        let mut total = u64::MAX;
        for _ in 0..2 {
            let (had, failed) = container.kill_at(&arguments, u64::MAX)?;
            ensure!(failed.is_none() && container.is_there()?, "without a kill: {failed:?}");
            total = total.min(had.context("limosa was built without the feature 'fault'")?);
            container.remove()?;
        }
        let (points, mut kills, mut whole) = (points(total, 40, 12), 0, 0);
        for number in &points {
            let (had, failed) = container.kill_at(&arguments, *number)?;
            let context = || format!("killed at operation {number} of {total} ({had:?} if not): {failed:?}");
            kills += u64::from(had.is_none());
            if container.is_there().with_context(context)? {
                target.verify().with_context(context)?;
                whole += 1;
                container.remove().with_context(context)?;
            } else {
                ensure!(had.is_none(), "{}: it ended well, and nothing is there", context());
            }
        }
        println!("{total} operations, {} points, {kills} kills; {whole} containers whole", points.len());
        ensure!(kills >= points.len() as u64 * 4 / 5, "only {kills} of {} were killed", points.len());
        container.limosa(&arguments)?;
        ensure!(container.is_there()?, "it was not restored");
        target.verify()?;
        container.end()
    });
}

/// A parent, children and a grandchild that share most of their memory by fork: read from frozen processes and from twins.
#[test]
fn checkpoint_of_memory_shared_by_fork() {
    sandboxed(|sandbox| sweep_target(sandbox, "memory-forked", "stop"));
}

#[test]
fn checkpoint_of_memory_shared_by_fork_from_twins() {
    sandboxed(|sandbox| sweep_target(sandbox, "memory-forked", "twin"));
}

#[test]
fn restore_of_memory_shared_by_fork() {
    sandboxed(|sandbox| sweep_restore(sandbox, "memory-forked", 40, 16));
}
