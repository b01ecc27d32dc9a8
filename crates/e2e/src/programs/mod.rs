//! Real programs, each with clients that verify its state while it is frozen, moved and thawed.
//!
//! Each runs wherever its [`Ground`] is. The clients are threads or children of the test, outside of what is
//! checkpointed, and keep their connections through it.

mod bash;
mod nginx;
mod postgres;
mod python;
mod redis;

pub use bash::Bash;
pub use nginx::Nginx;
pub use postgres::Postgres;
pub use python::Python;
pub use redis::{Client as RedisClient, PORT as REDIS_PORT, Redis};

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Result;
use rustix::process::Pid;

use crate::ground::{Ground, check_alive};
use crate::wait_for;

/// A program with clients.
pub trait Program {
    /// The process that leads the tree.
    fn root(&self) -> Pid;

    /// Has the clients use the program and checks all that can be known of its state; says what was done. To be called
    /// before and after whatever is done to the program, any number of times.
    fn verify(&mut self) -> Result<String>;
}

/// Connects one of the clients to the program `name`, started as `root`, as soon as it listens.
fn connect(ground: &dyn Ground, name: &str, root: Pid, port: u16) -> Result<TcpStream> {
    let address = SocketAddr::from((ground.address(), port));
    let _among = ground.among_clients()?;
    wait_for(&format!("{name} listening on {address}"), Duration::from_secs(20), || {
        check_alive(ground, name, root)?;
        Ok(TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok())
    })
}
