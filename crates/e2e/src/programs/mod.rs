//! Real programs, each with clients that verify its state while it is frozen, moved and thawed.
//!
//! All start in the sandbox's directory, on ports and sockets of the sandbox. Their clients are threads or children of
//! the test, outside of the tree that is checkpointed, and keep their connections through it.

mod bash;
mod nginx;
mod postgres;
mod python;
mod redis;

pub use bash::Bash;
pub use nginx::Nginx;
pub use postgres::Postgres;
pub use python::Python;
pub use redis::{PORT as REDIS_PORT, Redis};

use std::ffi::OsStr;
use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Pid;

use crate::wait_for;

/// A program with clients.
pub trait Program {
    /// The process that leads the tree.
    fn root(&self) -> Pid;

    /// Has the clients use the program and checks all that can be known of its state; says what was done. To be called
    /// before and after whatever is done to the program, any number of times.
    fn verify(&mut self) -> Result<String>;
}

/// Starts a program in a session of its own, with files in `directory` as its standard output and error.
fn start<S: AsRef<OsStr>>(directory: &Path, name: &str, command: &[S]) -> Result<Child> {
    let log = File::create(directory.join(format!("{name}.log")))?;
    Command::new("setsid")
        .args(command)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {name}"))
}

/// Connects as soon as `child` listens.
fn connect(name: &str, child: &mut Child, address: SocketAddr) -> Result<TcpStream> {
    wait_for(&format!("{name} listening on {address}"), Duration::from_secs(20), || {
        if let Some(status) = child.try_wait()? {
            bail!("{name} ended: {status}");
        }
        Ok(TcpStream::connect(address).ok())
    })
}
