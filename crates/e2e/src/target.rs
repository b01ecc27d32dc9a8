//! Programs that verify themselves on request: `limosa-target`, and others with the same protocol of files
//! (documented in `crates/targets/src/main.rs`).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, WaitOptions, waitpid};

use crate::sandbox::{Sandbox, describe};
use crate::{built, wait_for};

const PATIENCE: Duration = Duration::from_secs(20);

/// A running program that leads a session of its own, with files as its standard descriptors.
pub struct Target {
    name: String,
    root: Pid,
    result: PathBuf,
}

impl Target {
    /// Starts a `limosa-target` of `kind` and waits until it is ready.
    pub fn start(sandbox: &Sandbox, kind: &str, options: &[&str]) -> Result<Self> {
        let result = sandbox.path(kind);
        let mut command = vec![built("limosa-target")?.into_os_string(), kind.into(), result.clone().into()];
        command.extend(options.iter().map(Into::into));
        Self::start_command(sandbox, kind, result, &command)
    }

    /// Starts `command`, which prints `ready` and answers in the file `result`.
    pub fn start_command<S: AsRef<OsStr>>(
        sandbox: &Sandbox,
        name: &str,
        result: PathBuf,
        command: &[S],
    ) -> Result<Self> {
        let (out, err) = (sandbox.path(&format!("{name}.out")), sandbox.path(&format!("{name}.err")));
        // `setsid` becomes the program (it forks only where it leads a group already).
        let child = Command::new("setsid")
            .args(command)
            .current_dir(sandbox.directory())
            .stdin(Stdio::null())
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let root = Pid::from_child(&child);
        wait_for(&format!("{name} getting ready"), PATIENCE, || {
            if waitpid(Some(root), WaitOptions::NOHANG)?.is_some() {
                bail!("{name} ended: {}", fs::read_to_string(&err)?);
            }
            Ok(fs::read_to_string(&out)?.contains("ready\n").then_some(()))
        })?;
        Ok(Self { name: name.to_owned(), root, result })
    }

    /// The process that leads it.
    pub fn root(&self) -> Pid {
        self.root
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
            let mut path = self.result.clone().into_os_string();
            path.push(extension);
            PathBuf::from(path)
        };
        let _ = fs::remove_file(&self.result);
        fs::write(path(".go.new"), request)?;
        fs::rename(path(".go.new"), path(".go"))?;
        let answer = wait_for(&format!("the answer of {}", self.name), PATIENCE, || {
            rustix::process::test_kill_process(self.root)
                .with_context(|| format!("{} is gone without an answer", self.name))?;
            Ok(fs::read_to_string(&self.result).ok())
        })
        .with_context(|| describe(self.root))?;
        match answer.trim_end().strip_prefix("ok") {
            Some(detail) => Ok(detail.trim().to_owned()),
            None => bail!("{}: {}", self.name, answer.trim_end()),
        }
    }
}
