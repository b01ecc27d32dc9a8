//! A Python program with threads, subprocesses and pipes, which verifies itself like a `limosa-target`.

use std::fs;

use anyhow::Result;
use rustix::process::Pid;

use super::Program;
use crate::sandbox::Sandbox;
use crate::target::Target;

/// The running program.
pub struct Python {
    target: Target,
}

impl Python {
    /// Starts Debian's Python with the script beside this file.
    pub fn start(sandbox: &Sandbox) -> Result<Self> {
        let script = sandbox.path("workers.py");
        fs::write(&script, include_str!("workers.py"))?;
        let result = sandbox.path("python");
        let command = ["/usr/bin/python3".as_ref(), script.as_os_str(), result.as_os_str()];
        let target = Target::start_command(sandbox, "python", result.clone(), &command)?;
        Ok(Self { target })
    }
}

impl Python {
    /// The program as a target, for round trips.
    pub fn into_target(self) -> Target {
        self.target
    }
}

impl Program for Python {
    fn root(&self) -> Pid {
        self.target.root()
    }

    fn verify(&mut self) -> Result<String> {
        self.target.verify()
    }
}
