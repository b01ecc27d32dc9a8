//! The programs that are measured and moved: those beside this one in the build directory.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

const PATIENCE: Duration = Duration::from_mins(1);

fn built(name: &str) -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.exists(), "{} is not built: run 'make bench'", path.display());
    Ok(path)
}

/// Runs `limosa` and gives how long it took from before its fork to after its end.
pub fn limosa<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Duration> {
    time(Command::new(built("limosa")?).args(arguments))
}

/// Runs `limosa … --json` and gives what it reports.
pub fn report<S: AsRef<OsStr>>(arguments: &[S]) -> Result<serde_json::Value> {
    let mut command = Command::new(built("limosa")?);
    let output = command.args(arguments).arg("--json").stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The floor of any program: fork and exec of one that does nothing.
pub fn nothing() -> Result<Duration> {
    time(&mut Command::new("/bin/true"))
}

fn time(command: &mut Command) -> Result<Duration> {
    let begun = Instant::now();
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
    let took = begun.elapsed();
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(took)
}

/// A `limosa-target` that answers in a file.
pub struct Target {
    pid: Pid,
    result: PathBuf,
    child: Option<Child>,
}

impl Target {
    /// Starts one of `kind` and waits until it is ready.
    pub fn start(directory: &Path, kind: &str, options: &[&str]) -> Result<Self> {
        let result = directory.join(kind);
        let out = directory.join("out");
        let child = Command::new("setsid")
            .arg(built("limosa-target")?)
            .args([OsStr::new(kind), result.as_ref()])
            .args(options)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out)?)
            .stderr(fs::File::create(directory.join("err"))?)
            .spawn()
            .context("starting a target")?;
        let target = Self { pid: Pid::from_child(&child), result, child: Some(child) };
        wait_until("a target getting ready", || Ok(fs::read_to_string(&out)?.contains("ready\n")))?;
        Ok(target)
    }

    /// Its PID.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Has it check its whole state. Gives what it says.
    pub fn verify(&self) -> Result<String> {
        let with = |extension: &str| {
            let mut path = self.result.clone().into_os_string();
            path.push(extension);
            PathBuf::from(path)
        };
        let _ = fs::remove_file(&self.result);
        fs::write(with(".go.new"), "verify")?;
        fs::rename(with(".go.new"), with(".go"))?;
        wait_until("a target's answer", || Ok(self.result.exists()))?;
        let answer = fs::read_to_string(&self.result)?;
        ensure!(answer.starts_with("ok"), "the target is damaged: {answer}");
        Ok(answer)
    }

    /// Takes note that a checkpoint has ended it.
    pub fn has_ended(&mut self) -> Result<()> {
        self.child = None;
        waitpid(Some(self.pid), WaitOptions::empty()).context("waiting for the end of a target")?;
        Ok(())
    }

    /// Ends it, whoever its parent was.
    pub fn end(&mut self) -> Result<()> {
        kill_process(self.pid, Signal::KILL)?;
        self.has_ended()
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !done()? {
        if begun.elapsed() > PATIENCE {
            bail!("{what}: not within {PATIENCE:?}");
        }
        sleep(Duration::from_millis(1));
    }
    Ok(())
}
