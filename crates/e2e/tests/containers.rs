//! Programs in a container of `limosa run`, with clients outside that hold their connections: checkpointed, ended and
//! restored on one host, then migrated to another host and back.

use anyhow::{Context, Result};
use limosa_e2e::contained::Contained;
use limosa_e2e::programs::{Bash, Nginx, Postgres, Program, Python, Redis};
use limosa_e2e::sandbox::sandboxed;

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
