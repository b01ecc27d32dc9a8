//! An interactive bash on a pseudo-terminal, with a pipeline in the background and one that is stopped.
//!
//! The terminal's other side is held by a `limosa-target terminal`, so that both sides are in one tree; it types
//! and reads what bash answers.

use anyhow::Result;
use rustix::process::Pid;

use super::Program;
use crate::ground::Ground;
use crate::target::Target;

/// The terminal and its shell.
pub struct Bash<'g> {
    target: Target<'g>,
}

impl<'g> Bash<'g> {
    /// Opens the terminal, starts bash on it, and has it start its jobs.
    pub fn start(ground: &'g dyn Ground) -> Result<Self> {
        Ok(Self { target: Target::start(ground, "terminal", &[])? })
    }
}

impl Program for Bash<'_> {
    fn root(&self) -> Pid {
        self.target.root()
    }

    fn verify(&mut self) -> Result<String> {
        self.target.verify()
    }
}
