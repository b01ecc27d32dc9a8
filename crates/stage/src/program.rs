//! Running the real `limosa` program on the hosts.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

use crate::hosts::Host;

/// The environment variable by which the processes on the hosts, those in the containers included, are known.
pub const MARK: &str = "LIMOSA_STAGE";

/// How long one run of the program may take.
const LIMIT: Duration = Duration::from_mins(5);
/// How often whoever waits looks around.
pub const TICK: Duration = Duration::from_millis(40);

/// The program.
#[derive(Debug)]
pub struct Limosa {
    path: PathBuf,
    /// The value of [`MARK`].
    pub mark: String,
}

impl Limosa {
    /// The program at `path`, or beside this one.
    pub fn find(path: Option<PathBuf>) -> Result<Self> {
        let beside = || Ok::<_, anyhow::Error>(std::env::current_exe()?.with_file_name("limosa"));
        let path = path.map_or_else(beside, Ok)?;
        ensure!(
            path.exists(),
            "there is no {}: build it with `make build`, or name it with --limosa",
            path.display()
        );
        Ok(Self { path, mark: std::process::id().to_string() })
    }

    /// Starts `limosa ARGUMENTS` on `host`.
    pub fn start<I: IntoIterator<Item: AsRef<OsStr>>>(&self, host: &Host, arguments: I) -> Result<Running> {
        self.start_with(host, arguments, |command| command.stdin(Stdio::null()))
    }

    /// Likewise, with what `adapt` adds to the command.
    pub fn start_with<I: IntoIterator<Item: AsRef<OsStr>>>(
        &self,
        host: &Host,
        arguments: I,
        adapt: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<Running> {
        use std::os::unix::process::CommandExt;
        let arguments: Vec<_> = arguments.into_iter().map(|one| one.as_ref().to_owned()).collect();
        let what = arguments.iter().find(|one| !one.to_string_lossy().starts_with('-'));
        let what =
            format!("limosa {} on {}", what.map_or("".into(), |what| what.to_string_lossy()), host.name);
        let _there = host.place.enter()?;
        let mut command = Command::new(&self.path);
        command
            .arg("--state-dir")
            .arg(&host.state_dir)
            .args(arguments)
            .env(MARK, &self.mark)
            .env("TMPDIR", host.state_dir.parent().unwrap_or(&host.state_dir))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for this program, which then ends that one.
            .process_group(0);
        let mut child =
            adapt(&mut command).spawn().with_context(|| format!("starting {}", self.path.display()))?;
        let (sender, lines) = channel();
        let (out, err) = (child.stdout.take(), child.stderr.take());
        follow(out.context("no output")?, Line::Out, sender.clone());
        follow(err.context("no output")?, Line::Error, sender);
        Ok(Running {
            child,
            what,
            lines,
            begun: Instant::now(),
            out: String::new(),
            err: String::new(),
            ended: false,
        })
    }

    /// Runs `limosa ARGUMENTS` on `host` to its end: what it wrote to standard output. An error of `check`, which is
    /// called every [`TICK`], ends it.
    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(
        &self,
        host: &Host,
        mut check: impl FnMut() -> Result<()>,
        arguments: I,
    ) -> Result<String> {
        let mut running = self.start(host, arguments)?;
        while running.step()? {
            check()?;
        }
        running.finish()
    }
}

/// A line that the program wrote.
#[derive(Debug)]
enum Line {
    Out(String),
    Error(String),
}

fn follow(stream: impl Read + Send + 'static, kind: fn(String) -> Line, to: std::sync::mpsc::Sender<Line>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if to.send(kind(line)).is_err() {
                break;
            }
        }
    });
}

/// The program while it runs. Dropped, it is killed, which at any instant harms nobody.
#[derive(Debug)]
pub struct Running {
    child: Child,
    what: String,
    lines: Receiver<Line>,
    begun: Instant,
    out: String,
    err: String,
    ended: bool,
}

impl Running {
    /// Waits a [`TICK`] for what it writes: false once it has ended.
    pub fn step(&mut self) -> Result<bool> {
        ensure!(
            self.begun.elapsed() < LIMIT,
            "{} takes more than {} s: {}",
            self.what,
            LIMIT.as_secs(),
            self.err
        );
        let mut wait = TICK;
        loop {
            let text = match self.lines.recv_timeout(wait) {
                Ok(Line::Out(line)) => (&mut self.out, line),
                Ok(Line::Error(line)) => (&mut self.err, line),
                Err(RecvTimeoutError::Timeout) => return Ok(true),
                Err(RecvTimeoutError::Disconnected) => {
                    self.ended = true;
                    return Ok(false);
                }
            };
            text.0.push_str(&text.1);
            text.0.push('\n');
            wait = Duration::ZERO;
        }
    }

    /// Its process.
    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// How long it has been running.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The first line of standard output as JSON, once it is there.
    pub fn first<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(self.out.split_once('\n')?.0).ok()
    }

    /// The last line of standard error.
    pub fn last_error_line(&self) -> Option<&str> {
        self.err.lines().last()
    }

    /// Its standard output, now that it has ended.
    pub fn finish(mut self) -> Result<String> {
        while !self.ended {
            self.step()?;
        }
        let status = self.child.wait()?;
        if !status.success() {
            // The progress is for programs.
            let said: Vec<&str> = self.err.lines().filter(|line| !line.starts_with('{')).collect();
            bail!("{}: {status}: {}", self.what, said.join("; "));
        }
        Ok(std::mem::take(&mut self.out))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
