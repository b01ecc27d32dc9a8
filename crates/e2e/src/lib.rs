//! End-to-end tests of the `limosa` program.
//!
//! | module | what it gives a test |
//! | --- | --- |
//! | [`sandbox`] | namespaces of its own, and the check that nothing is left in them afterwards |
//! | [`ground`], [`contained`] | where a program runs: beside its clients, or in a container on one of two hosts |
//! | [`limosa`] | the program: `checkpoint`, `restore`, and what they said |
//! | [`target`] | a `limosa-target`, or any program with the same protocol of files |
//! | [`round_trip`] | checkpoint, restore several times, verify each time; and the refusal |
//! | [`sweep`] | `limosa` killed at its N-th operation on the kernel, and what must be whole then |
//! | [`hostile`] | checkpoints with one value replaced by what it should never be |
//! | [`rewrite`] | a checkpoint as another kernel would have made it |
//! | [`programs`] | redis, nginx, Python, bash on a terminal, PostgreSQL, each with a client that verifies state |
//!
//! The programs under test are those beside the running test in the build directory; `.config/nextest.toml` has them
//! built first.

pub mod contained;
pub mod ground;
pub mod hostile;
pub mod killed;
pub mod limosa;
pub mod programs;
pub mod rewrite;
pub mod round_trip;
pub mod sandbox;
pub mod sweep;
pub mod target;

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The program called `name` in the directory into which cargo built this test.
pub fn built(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe().context("finding this test's own file")?;
    // target/debug/deps/TEST-HASH → target/debug/NAME
    let directory = test.ancestors().nth(2).context("this test's file is in no build directory")?;
    let path = directory.join(name);
    ensure!(
        path.exists(),
        "{} is not built: run 'cargo build --workspace --bins --features limosa/fault'",
        path.display()
    );
    Ok(path)
}

/// Looks again every few milliseconds until there is something, for at most `patience`.
pub fn wait_for<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {patience:?}");
        }
        sleep(Duration::from_millis(3));
    }
}
