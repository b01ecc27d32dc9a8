//! One of the two machines of a migration loses its power in the middle. In the end one copy runs, or none where it died
//! with its machine; or it is not known, and then the source stands still.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_e2e::sandbox::sandboxed;
use limosa_e2e::wait_for;
use limosa_vm::kernel::Kernel;
use limosa_vm::machine::{Machine, Running};
use limosa_vm::stage::{NAME, PATIENCE, Stage, has_its_keys, is_sealed, start_redis, states};

/// What the source says while it sends, the destination builds, and the container is handed over.
const SENDING: &str = "frozen, sending";
const BUILDING: &str = "frozen, destination builds";
const HANDING_OVER: &str = "frozen, handing over";
/// More than it takes to notice that a peer is silent (15 s).
const SILENCE: Duration = Duration::from_secs(40);
/// Enough data to be in the middle of it for a while.
const MUCH: u64 = 40;

/// Starts a migration from `a`, and waits until it is as far as `phase`.
fn migrate_until<'machine>(
    a: &'machine Machine,
    destination: &str,
    phase: &str,
) -> Result<Running<'machine>> {
    let sender = a.begin(["limosa", "migrate", NAME, destination])?;
    sender.err(PATIENCE, |text| text.contains(phase).then_some(()))?;
    Ok(sender)
}

/// The source goes on when its destination loses its power, also several times, and then migrates to the next.
#[test]
fn a_destination_that_loses_its_power_leaves_the_source_running() {
    sandboxed(|sandbox| {
        let (kernel, stage) = (Kernel::oldest()?, Stage::build(sandbox)?);
        let a = stage.boot_a(&kernel)?;
        let counter = start_redis(&a, MUCH)?;
        for phase in [SENDING, BUILDING] {
            let b = stage.boot_b(&kernel)?;
            let (_, destination) = stage.receive(&b)?;
            let sender = migrate_until(&a, &destination, phase)?;
            b.kill()?;
            let said = sender.end(PATIENCE)?;
            let context = || format!("killed at {phase:?}: {said:?}");
            ensure!(said.status == Some(1), "{}", context());
            counter.goes_on(PATIENCE).with_context(context)?;
            ensure!(states(&a)? == ["running"], "{}", context());
        }
        let b = stage.boot_b(&kernel)?;
        let (receiver, destination) = stage.receive(&b)?;
        a.run(["limosa", "migrate", NAME, &destination])?.success("migrate")?;
        receiver.end(PATIENCE)?.success("receive")?;
        counter.goes_on(PATIENCE)?;
        has_its_keys(&b, MUCH)?;
        let (count, gap) = counter.stop()?;
        println!("{count} increments, longest gap {gap:?}");
        stage.end([a, b])
    });
}

/// Nobody can say what the destination has done: the source stands still, and its controller's death changes nothing.
#[test]
fn a_destination_that_loses_its_power_in_the_hand_over_leaves_the_source_frozen() {
    sandboxed(|sandbox| {
        let (kernel, stage) = (Kernel::oldest()?, Stage::build(sandbox)?);
        let (a, b) = (stage.boot_a(&kernel)?, stage.boot_b(&kernel)?);
        let counter = start_redis(&a, 1)?;
        let (_, destination) = stage.receive(&b)?;
        let sender = migrate_until(&a, &destination, HANDING_OVER)?;
        b.kill()?;
        sender.err(PATIENCE, |text| text.contains("asking for the outcome").then_some(()))?;
        ensure!(is_sealed(&a)?, "undecided, and not frozen");
        sender.kill()?;
        sender.end(PATIENCE)?;
        ensure!(
            counter.is_silent(Duration::from_secs(5)),
            "it runs though nobody knows whether it runs elsewhere"
        );
        std::thread::sleep(Duration::from_secs(5));
        ensure!(counter.is_silent(Duration::from_secs(10)), "it was let go by the death of its controller");
        ensure!(is_sealed(&a)? && states(&a)? == ["frozen"], "undecided: {:?}", states(&a)?);
        drop(counter);
        stage.end([a])
    });
}

/// The destination discards what it has, and is as good as new.
#[test]
fn a_source_that_loses_its_power_before_the_hand_over_leaves_nothing_behind() {
    sandboxed(|sandbox| {
        let (kernel, stage) = (Kernel::oldest()?, Stage::build(sandbox)?);
        let b = stage.boot_b(&kernel)?;
        // Directories that are empty are nothing.
        let look = "ls -d /sys/fs/cgroup/limosa /var/lib/limosa/containers/* 2>/dev/null || true; \
            ip -o link | cut -d: -f2; pidof redis-server || true";
        let before = b.shell(look)?;
        for phase in [SENDING, BUILDING] {
            let a = stage.boot_a(&kernel)?;
            let counter = start_redis(&a, MUCH)?;
            // One that has said that it is ready stays for so long, because the source may come back with a question.
            let (receiver, destination) = stage.receive_with(&b, &["--answer-for", "5"])?;
            migrate_until(&a, &destination, phase)?;
            a.kill()?;
            let said = receiver.end(SILENCE)?;
            ensure!(said.status == Some(1) && said.err.contains("it stays with the source"), "{said:?}");
            ensure!(states(&b)?.is_empty(), "killed at {phase:?}: {:?}", states(&b)?);
            let mut now = String::new();
            let as_before = wait_for("the destination as it was before", PATIENCE, || {
                now = b.shell(look)?;
                Ok((now == before).then_some(()))
            });
            as_before.with_context(|| format!("killed at {phase:?}: {before:?} before, {now:?} now"))?;
            drop(counter);
        }
        stage.end([b])
    });
}

/// The container runs on the destination, and the client goes on as if nothing had happened.
#[test]
fn a_source_that_loses_its_power_after_the_hand_over_is_not_missed() {
    sandboxed(|sandbox| {
        let (kernel, stage) = (Kernel::oldest()?, Stage::build(sandbox)?);
        let (a, b) = (stage.boot_a(&kernel)?, stage.boot_b(&kernel)?);
        let counter = start_redis(&a, 1)?;
        let (receiver, destination) = stage.receive(&b)?;
        let _sender = a.begin(["limosa", "migrate", NAME, &destination])?;
        receiver.out(PATIENCE, |text| text.contains("runs here").then_some(()))?;
        a.kill()?;
        counter.goes_on(PATIENCE)?;
        receiver.end(PATIENCE)?.success("receive")?;
        ensure!(states(&b)? == ["running"], "{:?}", states(&b)?);
        has_its_keys(&b, 1)?;
        let (count, gap) = counter.stop()?;
        println!("{count} increments, longest gap {gap:?}");
        stage.end([b])
    });
}
