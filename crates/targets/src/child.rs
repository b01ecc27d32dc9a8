//! Forked children that answer the same requests as their parent.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Pid;

use crate::kinds::Verify;
use crate::protocol::{Protocol, Request};
use crate::sys;

/// How long a child may take to answer, on an emulated machine with other work, too.
const PATIENCE: Duration = Duration::from_secs(30);

/// A child process that serves requests of its own.
pub struct Child {
    /// Its process id, in its parent's PID namespace.
    pub pid: Pid,
    protocol: Protocol,
    name: String,
}

impl Child {
    /// Forks. In the child `set_up` runs, and then what it returned answers each request; the parent goes on when the
    /// child is set up. Call it before any thread exists.
    pub fn start(
        parent: &Protocol,
        name: &str,
        set_up: impl FnOnce(&Protocol) -> Result<Box<Verify>>,
    ) -> Result<Self> {
        let protocol = Protocol::new(parent.beside(name));
        let pid = sys::fork(|| serve(&protocol, set_up)).context("fork")?;
        let child = Self { pid, protocol, name: name.to_owned() };
        child.verify().with_context(|| format!("setting up child {name}"))?;
        Ok(child)
    }

    /// Has the child check its state.
    pub fn verify(&self) -> Result<String> {
        self.protocol.ask(Request::Verify, PATIENCE).with_context(|| format!("child {}", self.name))
    }
}

/// A target that exits takes its children with it.
impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.protocol.ask(Request::Quit, PATIENCE);
    }
}

/// A child's life: the first request is answered by its own setting up, which is its first check.
fn serve(protocol: &Protocol, set_up: impl FnOnce(&Protocol) -> Result<Box<Verify>>) -> i32 {
    let mut verify = match set_up(protocol) {
        Ok(verify) => verify,
        Err(error) => {
            protocol.wait();
            let _ = protocol.answer(&Err(error.context("setting up")));
            return 1;
        }
    };
    loop {
        let request = protocol.wait();
        if protocol.answer(&verify()).is_err() {
            return 1;
        }
        if request == Request::Quit {
            return 0;
        }
    }
}
