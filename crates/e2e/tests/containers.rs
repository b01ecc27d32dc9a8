//! Programs in a container of `limosa run`, with clients outside that hold their connections: checkpointed, ended and
//! restored on one host, then migrated to another host and back.

use anyhow::{Context, Result, ensure};
use limosa_e2e::contained::Contained;
use limosa_e2e::programs::{Bash, Nginx, Postgres, Program, Python, Redis};
use limosa_e2e::sandbox::sandboxed;
use limosa_e2e::target::Target;

/// The clients notice nothing of a checkpoint and restore, a migration, and a migration back.
fn travel(container: &Contained, program: &mut dyn Program) -> Result<()> {
    println!("started: {}", program.verify().context("before it was moved")?);
    container.checkpoint_and_restore()?;
    println!("restored: {}", program.verify().context("restored on the same host")?);
    for _ in 0..2 {
        container.migrate()?;
        let frozen = container.frozen();
        println!("migrated, frozen {frozen:?}: {}", program.verify().context("migrated")?);
    }
    Ok(())
}

#[test]
fn redis() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        travel(&container, &mut Redis::start(&container, 2_000)?)?;
        container.end()
    });
}

#[test]
fn nginx() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        travel(&container, &mut Nginx::start(&container)?)?;
        container.end()
    });
}

#[test]
fn python() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        travel(&container, &mut Python::start(&container)?)?;
        container.end()
    });
}

/// Each time anew, monitors are told once that they have missed messages.
#[test]
fn netlink_sockets() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        let target = Target::start(&container, "netlink", &[])?;
        let told_once = || -> Result<()> {
            for wanted in ["3 monitors", "0 monitors"] {
                let said = target.verify()?;
                ensure!(said.starts_with(wanted), "{said} instead of {wanted}");
            }
            Ok(())
        };
        container.checkpoint_and_restore()?;
        told_once().context("restored on the same host")?;
        container.migrate()?;
        told_once().context("migrated")?;
        container.end()
    });
}

fn state_of(container: &Contained, kind: &str) -> Result<()> {
    let target = Target::start(container, kind, &[])?;
    container.checkpoint_and_restore()?;
    target.verify().context("restored on the same host")?;
    container.migrate()?;
    target.verify().context("migrated")?;
    Ok(())
}

#[test]
fn descriptors_in_flight() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        state_of(&container, "in-flight")?;
        container.end()
    });
}

/// The datagrams of a container once came back in the network namespace of the host, if at all.
#[test]
fn queues_of_udp_sockets() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        state_of(&container, "udp-queues")?;
        container.end()
    });
}

/// POSIX message queues are the container's: they move with their messages.
#[test]
fn message_queues() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        let target = Target::start(&container, "message-queues", &[])?;
        target.verify()?;
        container.checkpoint_and_restore()?;
        target.verify().context("restored on the same host")?;
        for _ in 0..2 {
            container.migrate()?;
            target.verify().context("migrated")?;
        }
        container.end()
    });
}

#[test]
fn bash() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        travel(&container, &mut Bash::start(&container)?)?;
        container.end()
    });
}

#[test]
fn postgres() {
    sandboxed(|sandbox| {
        let container = Contained::new(sandbox)?;
        let mut postgres = Postgres::start(&container)?;
        travel(&container, &mut postgres)?;
        println!("{}", postgres.end_load()?);
        drop(postgres);
        container.end()
    });
}
