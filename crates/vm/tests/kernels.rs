//! Checkpoint and restore on the oldest and the newest kernel that are installed, with all capabilities.
//!
//! The tests that run in the machine are those of `crates/e2e`, the same files.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_e2e::sandbox::{Sandbox, sandboxed};
use limosa_vm::kernel::Kernel;
use limosa_vm::machine::Machine;

/// Python is too much for an initramfs; Debian's kernels have no guard regions yet (Linux 6.13).
const ROUND_TRIPS: [&str; 2] = ["--skip=python", "--skip=memory_guarded"];
const PROTECTION_KEYS: [&str; 3] = ["--ignored", "--exact", "protection_keys"];
/// Under emulation, with the whole list in one run.
const WHOLE_LIST: Duration = Duration::from_mins(10);

fn boots(sandbox: &Sandbox, kernel: &Kernel) -> Result<()> {
    let machine = Machine::boot(sandbox, kernel)?;
    ensure!(machine.shell("uname -r")?.trim() == kernel.release);
    println!("{}", machine.run(["limosa", "check"])?.success("check")?.out);
    Ok(())
}

/// Runs a file of tests in a machine, each test in a sandbox there.
fn passes(sandbox: &Sandbox, kernel: &Kernel, tests: &str, arguments: &[&str]) -> Result<()> {
    let machine = Machine::boot(sandbox, kernel)?;
    let mut command = vec![format!("/suite/deps/{tests}"), "--test-threads=1".to_owned()];
    command.extend(arguments.iter().map(|&argument| argument.to_owned()));
    let said = machine.begin(command)?.end(WHOLE_LIST)?;
    let summary = said.out.lines().find(|line| line.starts_with("test result: "));
    let summary = summary.with_context(|| format!("no result: {said:?}"))?;
    println!("{tests} on {}: {summary}", kernel.release);
    ensure!(said.status == Some(0), "{tests} on {}:\n{}{}", kernel.release, said.out, said.err);
    ensure!(!summary.contains(" 0 passed"), "no test called so in {tests}");
    Ok(())
}

#[test]
fn the_oldest_kernel_boots() {
    sandboxed(|sandbox| boots(sandbox, &Kernel::oldest()?));
}

#[test]
fn the_newest_kernel_boots() {
    sandboxed(|sandbox| boots(sandbox, &Kernel::newest()?));
}

#[test]
fn a_redis_keeps_its_clients_on_the_oldest_kernel() {
    sandboxed(|sandbox| passes(sandbox, &Kernel::oldest()?, "connections", &["--exact", "redis"]));
}

#[test]
fn a_redis_keeps_its_clients_on_the_newest_kernel() {
    sandboxed(|sandbox| passes(sandbox, &Kernel::newest()?, "connections", &["--exact", "redis"]));
}

/// The emulated processor has protection keys, whatever this machine's has.
#[test]
fn protection_keys_on_the_oldest_kernel() {
    sandboxed(|sandbox| passes(sandbox, &Kernel::oldest()?, "round_trips", &PROTECTION_KEYS));
}

#[test]
fn protection_keys_on_the_newest_kernel() {
    sandboxed(|sandbox| passes(sandbox, &Kernel::newest()?, "round_trips", &PROTECTION_KEYS));
}

#[test]
fn round_trips_on_the_oldest_kernel() {
    sandboxed(|sandbox| passes(sandbox, &Kernel::oldest()?, "round_trips", &ROUND_TRIPS));
}

#[test]
fn round_trips_on_the_newest_kernel() {
    sandboxed(|sandbox| passes(sandbox, &Kernel::newest()?, "round_trips", &ROUND_TRIPS));
}
