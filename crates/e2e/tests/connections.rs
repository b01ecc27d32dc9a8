//! Programs whose clients are outside the tree and hold their connections through checkpoint and restore.

use anyhow::{Context, Result};
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::programs::{Program, Redis};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};

/// The clients of a redis notice nothing: left running by one checkpoint, ended by another and restored.
fn redis_with_clients(sandbox: &Sandbox) -> Result<()> {
    let mut redis = Redis::start(sandbox, 2_000)?;
    redis.verify()?;
    let first = sandbox.path("first");
    limosa::checkpoint(sandbox, redis.root(), &first, Source::GoesOn, &[])?.success("checkpoint")?;
    println!("left running: {}", redis.verify().context("left running")?);
    for round in 0..3 {
        let out = sandbox.path(&format!("round-{round}"));
        limosa::checkpoint(sandbox, redis.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
        wait_until_alone()?;
        limosa::restore(sandbox, &out, &[])?;
        println!("restored: {}", redis.verify().with_context(|| format!("restored, round {round}"))?);
    }
    sandbox.end_all()
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn clients_of_redis_notice_nothing() {
    sandboxed(|sandbox| redis_with_clients(sandbox));
}
