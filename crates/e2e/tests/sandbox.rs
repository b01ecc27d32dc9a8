//! The sandbox notices what a test leaves behind.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use limosa_e2e::sandbox::{Sandbox, processes, sandboxed};

/// The sandbox complains, and names `expected`.
fn ensure_blamed(sandbox: &Sandbox, expected: &str) -> Result<()> {
    let blame = sandbox.check_empty().err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(blame.contains(expected), "blamed for {blame:?} instead of {expected:?}");
    Ok(())
}

fn shell(command: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", command]).status()?;
    ensure!(status.success(), "{command}: {status}");
    Ok(())
}

#[test]
fn an_empty_test_is_empty() {
    sandboxed(|sandbox| {
        ensure!(processes()?.is_empty());
        sandbox.check_empty()
    });
}

#[test]
fn a_process_is_noticed() {
    sandboxed(|sandbox| {
        shell("sleep 1000 & exit 0")?;
        ensure_blamed(sandbox, "sleep 1000")?;
        sandbox.end_all()
    });
}

#[test]
fn a_file_a_mount_and_an_interface_are_noticed() {
    sandboxed(|sandbox| {
        fs::write("/tmp/left", [])?;
        ensure_blamed(sandbox, "file /tmp/left")?;
        fs::remove_file("/tmp/left")?;
        shell("mount -t tmpfs left /mnt")?;
        ensure_blamed(sandbox, "/mnt")?;
        shell("umount /mnt && ip link add left0 type veth peer left1")?;
        ensure_blamed(sandbox, "interface left0")?;
        shell("ip link delete left0 && ip netns add left")?;
        ensure_blamed(sandbox, "/run/netns")?;
        shell("ip netns delete left && umount /run/netns && rm -r /run/netns /run/mount")
    });
}

#[test]
#[should_panic(expected = "in the sandbox")]
fn a_failure_inside_is_a_failure_outside() {
    sandboxed(|_| anyhow::bail!("as it should"));
}
