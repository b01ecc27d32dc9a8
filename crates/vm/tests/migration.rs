//! A running redis migrates between two machines, whose kernels are their own. Its client keeps its connection.

use anyhow::{Context, Result, ensure};
use limosa_e2e::sandbox::{Sandbox, sandboxed};
use limosa_vm::kernel::Kernel;
use limosa_vm::stage::{NAME, PATIENCE, Stage, has_its_keys, start_redis, states};

/// There and back, and the client keeps its connection.
fn there_and_back(sandbox: &Sandbox, kernels: [&Kernel; 2]) -> Result<()> {
    let stage = Stage::build(sandbox)?;
    let (a, b) = (stage.boot_a(kernels[0])?, stage.boot_b(kernels[1])?);
    let counter = start_redis(&a, 8)?;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let (receiver, destination) = stage.receive(to)?;
        let context = || format!("migrating from {} to {}", from.name, to.name);
        let said =
            from.run(["limosa", "migrate", NAME, &destination])?.success("migrate").with_context(context)?;
        receiver.end(PATIENCE)?.success("receive").with_context(context)?;
        println!("{}: {}", context(), said.out.trim());
        counter.goes_on(PATIENCE).with_context(context)?;
        ensure!(states(from)?.is_empty(), "{}: it is still known on the source", context());
        ensure!(states(to)? == ["running"], "{}: it does not run on the destination", context());
        has_its_keys(to, 8).with_context(context)?;
    }
    let (count, gap) = counter.stop()?;
    println!("{count} increments, longest gap {gap:?}");
    stage.end([a, b])
}

#[test]
fn a_container_migrates_there_and_back_on_the_oldest_kernel() {
    sandboxed(|sandbox| {
        let kernel = Kernel::oldest()?;
        there_and_back(sandbox, [&kernel, &kernel])
    });
}

#[test]
fn a_container_migrates_there_and_back_on_the_newest_kernel() {
    sandboxed(|sandbox| {
        let kernel = Kernel::newest()?;
        there_and_back(sandbox, [&kernel, &kernel])
    });
}

/// The kernels' vDSOs differ, into which redis' C library keeps pointers: it asks for the time all the while.
#[test]
fn a_container_migrates_to_a_newer_kernel_and_back() {
    sandboxed(|sandbox| there_and_back(sandbox, [&Kernel::oldest()?, &Kernel::newest()?]));
}
