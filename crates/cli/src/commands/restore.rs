//! `limosa restore`.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use limosa_container::{Changes, Restored};
use limosa_engine::resources::processor;
use limosa_engine::{Report, Times, restore};
use limosa_image::Checkpoint;
use limosa_kernel::signals::Signals;
use limosa_kernel::task;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use rustix::termios::{self, OptionalActions, Termios};
use serde::Serialize;

use crate::commands::posted::Posted;
use crate::context::{Context, Failure, Outcome};
use crate::text;
use crate::trace::Trace;
use crate::watched::{self, Reading};

/// Start again what a checkpoint holds.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa restore /var/tmp/ck\n  \
    limosa restore /var/tmp/ck --detach --pidfile /run/ck.pid\n  \
    limosa restore /var/tmp/ck --external log=/var/log/job.log\n  \
    limosa restore /var/tmp/ck --external tty=$(tty)\n  \
    limosa restore /var/tmp/ck --explain | less")]
pub struct Restore {
    /// The checkpoint's directory.
    dir: PathBuf,

    /// The container's name here, if it is to be another one.
    #[arg(long)]
    name: Option<limosa_container::Name>,

    /// Return when the tree runs; otherwise wait, pass signals on to it, and pass on its exit status. The terminal of a
    /// container that has one is then connected to this one; with this option, `limosa attach` does that.
    #[arg(long)]
    detach: bool,

    /// Write the root's PID to FILE.
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,

    /// The directory that becomes the tree's root; for a container, the directory of its read-only layer here.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Where the file is that the checkpoint calls KEY. May be given several times.
    #[arg(long, value_name = "KEY=PATH", value_parser = super::key_and_path)]
    external: Vec<(String, PathBuf)>,

    /// What this processor must have.
    #[arg(long, value_enum, default_value_t)]
    cpu: super::Cpu,

    /// Print what would be done, down to each system call in the new processes, and do nothing.
    #[arg(long)]
    explain: bool,

    #[command(flatten)]
    trace: Trace,
}

/// The report of a restore.
#[derive(Debug, Serialize)]
struct Done {
    pid: i32,
    #[serde(flatten)]
    times: Times,
    #[serde(flatten)]
    report: Report,
}

impl Restore {
    /// Restores.
    pub fn execute(self, context: &Context) -> Outcome {
        self.trace.prepare()?;
        let mut report = Report::default();
        let checkpoint = report.phase("open", |_| Checkpoint::open(&self.dir))?;
        if self.explain {
            return explain(context, &checkpoint, self.cpu.into());
        }
        super::require_root("restore", 1)?;
        let signals = watched::hold_back();
        let (checkpoint, reading) = Reading::watch(checkpoint, signals);
        let lent = if self.detach || self.external.is_empty() { None } else { Lent::take()? };
        if !limosa_container::holds_container(&checkpoint) {
            let root = self.process_tree(&checkpoint, &reading, lent.as_ref(), &mut report)?;
            return self.conclude(context, root, report, |root| wait_for(root, signals));
        }
        let (restored, terminal) = self.container(context, &checkpoint, &reading, &mut report)?;
        self.conclude(context, restored.pid, report, |root| {
            let Some(master) = terminal else { return wait_for(root, signals) };
            let fate = limosa_container::join_restored(&context.registry(), &restored, &master)?;
            super::terminal::say_fate(&restored.name, fate.as_deref());
            wait_for(root, None)
        })
    }

    fn process_tree(
        &self,
        checkpoint: &Checkpoint,
        reading: &Reading,
        lent: Option<&Lent>,
        report: &mut Report,
    ) -> Result<i32, Failure> {
        if self.name.is_some() {
            return Err(anyhow::anyhow!("--name is for containers; this is a process tree").into());
        }
        let options = restore::Options {
            root: self.root.clone(),
            detached: self.detach,
            externals: self.external.iter().cloned().collect(),
            processor: self.cpu.into(),
            ..restore::Options::default()
        };
        let planned = report.phase("plan", |_| restore::Planned::new(checkpoint, options))?;
        let loaded = planned.build(report);
        let loaded = reading.conclude(loaded)?;
        if let Some(lent) = lent {
            lent.give(loaded.root());
        }
        self.write_pidfile(loaded.root())?;
        Ok(loaded.start(report).inspect_err(|_| self.remove_pidfile())?.root)
    }

    fn container(
        &self,
        context: &Context,
        checkpoint: &Checkpoint,
        reading: &Reading,
        report: &mut Report,
    ) -> Result<(Restored, Option<OwnedFd>), Failure> {
        let registry = context.registry();
        let changes = Changes {
            name: self.name.clone(),
            rootfs: self.root.as_ref().map(std::path::absolute).transpose()?,
            externals: self.external.iter().cloned().collect(),
            processor: self.cpu.into(),
        };
        let prepared = limosa_container::prepare(&registry, checkpoint, changes, report);
        let mut prepared = reading.conclude(prepared)?;
        let keep = |master, pid, name: &limosa_container::Name| {
            super::terminal::have_kept(context, master, pid, name)
        };
        let terminal = if self.detach {
            prepared.have_terminal_kept(&keep)?;
            None
        } else {
            prepared.take_terminal()
        };
        let _guard = Posted::over_restored(context, prepared.name())?;
        self.write_pidfile(prepared.pid())?;
        let restored = prepared.start(&registry, report).inspect_err(|_| self.remove_pidfile())?;
        Ok((restored, terminal))
    }

    /// Before anything runs: a restore whose PID nobody learns is worse than none.
    fn write_pidfile(&self, pid: i32) -> anyhow::Result<()> {
        let Some(path) = &self.pidfile else { return Ok(()) };
        let text = format!("{pid}\n");
        std::fs::write(path, text)
            .with_context(|| format!("nothing was restored: writing {}", path.display()))
    }

    fn remove_pidfile(&self) {
        if let Some(path) = &self.pidfile {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Reports, and waits for the root's end if that is wanted.
    fn conclude(
        self,
        context: &Context,
        root: i32,
        report: Report,
        wait: impl FnOnce(i32) -> Outcome,
    ) -> Outcome {
        self.trace.write(&report);
        let whole_us = report.elapsed_us();
        let times = Times {
            first_instruction_us: report.end_us("start"),
            last_page_us: report.last_page_us(),
            whole_us,
            ..Times::default()
        };
        let done = Done { pid: root, times, report };
        let text = format!(
            "process {} runs: {} processes, {} threads, {} of memory\n{}",
            done.pid,
            done.report.processes,
            done.report.threads,
            text::size(done.report.page_bytes),
            text::times(&done.times, &done.report, context.verbose),
        );
        context.report(&done, text)?;
        if self.detach {
            return Ok(ExitCode::SUCCESS);
        }
        wait(root)
    }
}

/// Our terminal, lent to a tree that was a job of a shell elsewhere. Dropped, it is ours again as it was.
struct Lent {
    former: Termios,
    /// While this lives, the terminal can be taken back from the background.
    _signals: Signals,
}

impl Lent {
    /// Notes how our terminal is, if we have one.
    fn take() -> anyhow::Result<Option<Self>> {
        let input = std::io::stdin();
        if !input.is_terminal() {
            return Ok(None);
        }
        let signals = Signals::gather(&[Signal::TTOU.as_raw()])?;
        Ok(Some(Self { former: termios::tcgetattr(&input)?, _signals: signals }))
    }

    /// Puts the process group of `pid` in the foreground. In another session there is nothing to lend.
    fn give(&self, pid: i32) {
        let group = Pid::from_raw(pid).and_then(|pid| rustix::process::getpgid(Some(pid)).ok());
        if let Some(group) = group
            && let Err(error) = termios::tcsetpgrp(std::io::stdin(), group)
        {
            tracing::debug!(%error, "the terminal is not lent");
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let _ = termios::tcsetpgrp(std::io::stdin(), rustix::process::getpgrp());
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.former);
    }
}

/// Prints the plan.
fn explain(context: &Context, checkpoint: &Checkpoint, processor: processor::Rule) -> Outcome {
    let options = restore::Options { processor, ..restore::Options::default() };
    let plan = restore::Planned::new(checkpoint, options)?.explain()?;
    context.report(&plan, &plan)?;
    Ok(ExitCode::SUCCESS)
}

/// Waits for the root and passes on its exit status; 128 + N if signal N ended it. Signals that come meanwhile go to the
/// root; the second kills it.
fn wait_for(pid: i32, signals: Option<&Signals>) -> Outcome {
    use limosa_kernel::ptrace::{WaitStatus, wait};
    if let Some(signals) = signals {
        pass_on(pid, signals)?;
    }
    loop {
        match wait(pid)? {
            WaitStatus::Exited(status) => return Ok(ExitCode::from(status as u8)),
            WaitStatus::Killed(signal) => return Ok(ExitCode::from(128 + signal as u8)),
            WaitStatus::Stopped { .. } => {}
        }
    }
}

/// Passes signals on to `pid` until that ends.
fn pass_on(pid: i32, signals: &Signals) -> anyhow::Result<()> {
    let pidfd = task::pidfd_open(pid)?;
    let mut sent = false;
    loop {
        let mut polled = [PollFd::new(&pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(anyhow::Error::new(errno).context("waiting for the restored tree")),
        }
        if !polled[0].revents().is_empty() {
            return Ok(());
        }
        while let Some(signal) = signals.next() {
            let signal = if sent { Signal::KILL.as_raw() } else { signal };
            sent = true;
            // It may have ended just now.
            let _ = task::signal_process(pid, signal);
        }
    }
}
