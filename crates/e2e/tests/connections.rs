//! Programs whose clients are outside the tree and hold their connections through checkpoint and restore.

use anyhow::{Context, Result};
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::programs::{Bash, Nginx, Postgres, Program, Python, Redis};
use limosa_e2e::sandbox::{Sandbox, sandboxed, tree, wait_until_gone};

/// The clients notice nothing: the program is left running by one checkpoint, then ended by another and restored.
fn clients_notice_nothing(sandbox: &Sandbox, program: &mut impl Program, rounds: u32) -> Result<()> {
    program.verify().context("before any checkpoint")?;
    let first = sandbox.path("first");
    limosa::checkpoint(sandbox, program.root(), &first, Source::GoesOn, &[])?.success("checkpoint")?;
    println!("left running: {}", program.verify().context("left running")?);
    for round in 0..rounds {
        let out = sandbox.path(&format!("round-{round}"));
        let processes = tree(program.root())?;
        limosa::checkpoint(sandbox, program.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
        wait_until_gone(&processes).context("after a checkpoint that ends its source")?;
        limosa::restore(sandbox, &out, &[])?;
        println!("restored: {}", program.verify().with_context(|| format!("restored, round {round}"))?);
    }
    Ok(())
}

#[test]
fn redis() {
    sandboxed(|sandbox| {
        clients_notice_nothing(sandbox, &mut Redis::start(sandbox, 2_000)?, 3)?;
        sandbox.end_all()
    });
}

#[test]
fn nginx() {
    sandboxed(|sandbox| {
        clients_notice_nothing(sandbox, &mut Nginx::start(sandbox)?, 2)?;
        sandbox.end_all()
    });
}

#[test]
fn python() {
    sandboxed(|sandbox| {
        clients_notice_nothing(sandbox, &mut Python::start(sandbox)?, 2)?;
        sandbox.end_all()
    });
}

#[test]
fn bash() {
    sandboxed(|sandbox| {
        clients_notice_nothing(sandbox, &mut Bash::start(sandbox)?, 3)?;
        sandbox.end_all()
    });
}

#[test]
fn postgres() {
    sandboxed(|sandbox| {
        let mut postgres = Postgres::start(sandbox)?;
        clients_notice_nothing(sandbox, &mut postgres, 2)?;
        println!("{}", postgres.end_load()?);
        postgres.stop()
    });
}
