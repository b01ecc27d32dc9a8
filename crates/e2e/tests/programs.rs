//! The real programs with their clients, without Limosa: each starts, is verified twice, and leaves nothing.

use anyhow::Result;
use limosa_e2e::programs::{Bash, Nginx, Postgres, Program, Python, Redis};
use limosa_e2e::sandbox::{Sandbox, sandboxed};

fn verify_twice(mut program: impl Program) -> Result<()> {
    for _ in 0..2 {
        println!("{}", program.verify()?);
    }
    Ok(())
}

fn alone(sandbox: &Sandbox, program: impl Program) -> Result<()> {
    verify_twice(program)?;
    sandbox.end_all()
}

#[test]
fn redis() {
    sandboxed(|sandbox| alone(sandbox, Redis::start(sandbox, 20_000)?));
}

#[test]
fn nginx() {
    sandboxed(|sandbox| alone(sandbox, Nginx::start(sandbox)?));
}

#[test]
fn python() {
    sandboxed(|sandbox| alone(sandbox, Python::start(sandbox)?));
}

#[test]
fn bash() {
    sandboxed(|sandbox| alone(sandbox, Bash::start(sandbox)?));
}

#[test]
fn postgres() {
    sandboxed(|sandbox| {
        let mut postgres = Postgres::start(sandbox)?;
        for _ in 0..2 {
            println!("{}", postgres.verify()?);
        }
        println!("{}", postgres.end_load()?);
        postgres.stop()
    });
}
