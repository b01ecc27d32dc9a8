//! Programs that verify themselves on request: `limosa-target`, and others with the same protocol of files
//! (documented in `crates/targets/src/main.rs`).

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, WaitOptions, waitpid};

use crate::ground::{Ground, check_alive};
use crate::sandbox::describe;
use crate::{built, wait_for};

/// Longer than a target waits for its own children.
const PATIENCE: Duration = Duration::from_secs(40);

/// A running program that leads a session of its own, with files as its standard descriptors.
pub struct Target<'g> {
    name: String,
    ground: &'g dyn Ground,
    root: Pid,
    result: PathBuf,
}

impl<'g> Target<'g> {
    /// Starts a `limosa-target` of `kind` and waits until it is ready.
    pub fn start(ground: &'g dyn Ground, kind: &str, options: &[&str]) -> Result<Self> {
        let program = ground.program(&built("limosa-target")?)?;
        let result = ground.directory().join(kind);
        let mut command = vec![program.as_os_str(), kind.as_ref(), result.as_os_str()];
        command.extend(options.iter().map(OsStr::new));
        Self::start_command(ground, kind, result.clone(), &command)
    }

    /// Starts `command`, which prints `ready` and answers in the file `result`, as it knows it.
    pub fn start_command(
        ground: &'g dyn Ground,
        name: &str,
        result: PathBuf,
        command: &[&OsStr],
    ) -> Result<Self> {
        let root = ground.start(name, command)?;
        let out = ground.directory().join(format!("{name}.out"));
        wait_for(&format!("{name} getting ready"), PATIENCE, || {
            check_alive(ground, name, root)?;
            let said = fs::read_to_string(ground.seen(&out)).unwrap_or_default();
            Ok(said.contains("ready\n").then_some(()))
        })?;
        Ok(Self { name: name.to_owned(), ground, root, result })
    }

    /// The process that leads it.
    pub fn root(&self) -> Pid {
        self.ground.root(self.root)
    }

    /// Has it check its whole state; gives the detail of its answer.
    pub fn verify(&self) -> Result<String> {
        self.ask("verify")
    }

    /// Has it check its state once more and end, and takes its exit status.
    pub fn quit(&self) -> Result<String> {
        let detail = self.ask("quit")?;
        let ended = wait_for(&format!("the end of {}", self.name), PATIENCE, || {
            Ok(waitpid(Some(self.root), WaitOptions::NOHANG)?)
        })?;
        match ended.1.exit_status() {
            Some(0) => Ok(detail),
            status => bail!("{} ended with status {status:?}", self.name),
        }
    }

    fn ask(&self, request: &str) -> Result<String> {
        let path = |extension: &str| {
            let mut path = self.ground.seen(&self.result).into_os_string();
            path.push(extension);
            PathBuf::from(path)
        };
        let _ = fs::remove_file(path(""));
        fs::write(path(".go.new"), request)?;
        fs::rename(path(".go.new"), path(".go"))?;
        let answer = wait_for(&format!("the answer of {}", self.name), PATIENCE, || {
            rustix::process::test_kill_process(self.root())
                .with_context(|| format!("{} is gone without an answer", self.name))?;
            Ok(fs::read_to_string(path("")).ok())
        })
        .with_context(|| describe(self.root()))?;
        match answer.trim_end().strip_prefix("ok") {
            Some(detail) => Ok(detail.trim().to_owned()),
            None => bail!("{}: {}", self.name, answer.trim_end()),
        }
    }
}
