//! An interactive bash on a pseudo-terminal, with a pipeline in the background and one that is stopped.
//!
//! The terminal's other side is held by a `limosa-target terminal`, so that both sides are in one tree; it types
//! and reads what bash answers.

use anyhow::Result;
use rustix::process::Pid;

use super::Program;
use crate::sandbox::Sandbox;
use crate::target::Target;

/// The terminal and its shell.
pub struct Bash {
    target: Target,
}

impl Bash {
    /// Opens the terminal, starts bash on it, and has it start its jobs.
    pub fn start(sandbox: &Sandbox) -> Result<Self> {
        Ok(Self { target: Target::start(sandbox, "terminal", &[])? })
    }
}

impl Program for Bash {
    fn root(&self) -> Pid {
        self.target.root()
    }

    fn verify(&mut self) -> Result<String> {
        self.target.verify()
    }
}
