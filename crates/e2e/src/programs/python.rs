//! A Python program with threads, subprocesses and pipes, which verifies itself like a `limosa-target`.

use std::fs;

use anyhow::Result;
use rustix::process::Pid;

use super::Program;
use crate::ground::Ground;
use crate::target::Target;

/// The running program.
pub struct Python<'g> {
    target: Target<'g>,
}

impl<'g> Python<'g> {
    /// Starts Debian's Python with the script beside this file.
    pub fn start(ground: &'g dyn Ground) -> Result<Self> {
        let script = ground.directory().join("workers.py");
        fs::write(ground.seen(&script), include_str!("workers.py"))?;
        let result = ground.directory().join("python");
        let command = ["/usr/bin/python3".as_ref(), script.as_os_str(), result.as_os_str()];
        let target = Target::start_command(ground, "python", result.clone(), &command)?;
        Ok(Self { target })
    }

    /// The program as a target, for round trips.
    pub fn into_target(self) -> Target<'g> {
        self.target
    }
}

impl Program for Python<'_> {
    fn root(&self) -> Pid {
        self.target.root()
    }

    fn verify(&mut self) -> Result<String> {
        self.target.verify()
    }
}
