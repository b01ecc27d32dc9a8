//! An interactive bash on a pseudo-terminal of which this process holds the other side. In the shell: a pipeline in the
//! background, a stopped one, and a variable. A check types and reads like a person.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcgetpgrp, tcgetsid, tcgetwinsize, tcsetwinsize};

use super::{Setting, Verify};
use crate::sys;

const PATIENCE: Duration = Duration::from_secs(10);
const SIZE: Winsize = Winsize { ws_row: 43, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
/// How long the shell may take from showing a prompt to reading.
const SETTLING: Duration = Duration::from_millis(500);
/// What a keyboard sends for ^Z.
const SUSPEND: &str = "\x1a";

struct Terminal {
    master: OwnedFd,
    shell: Pid,
    ticks: PathBuf,
    round: u64,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    tcsetwinsize(&master, SIZE)?;
    let shell = sys::fork(|| {
        let error = become_shell(&master);
        eprintln!("limosa-target: starting bash: {error:#}");
        1
    })?;
    let ticks = setting.protocol.beside("ticks");
    let mut terminal = Terminal { master, shell, ticks, round: 0 };
    terminal.command("kept=whole")?;
    terminal.command(&format!("T={}", terminal.ticks.display()))?;
    terminal.command("while :; do echo tick; sleep 0.05; done | cat >> $T &")?;
    terminal.send("cat | cat\n")?;
    terminal.meet("once\n", "once", 2)?;
    terminal.suspend()?;
    std::thread::sleep(SETTLING);
    let described = terminal.describe()?;
    Ok(Box::new(move || {
        // The shell changes the settings back to its own a moment after its prompt.
        let deadline = Instant::now() + SETTLING;
        while terminal.describe()? != described && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        sys::compare_lines("the terminal", &terminal.describe()?, &described)?;
        terminal.check()?;
        Ok(String::new())
    }))
}

/// Only returns where it fails.
fn become_shell(master: &OwnedFd) -> anyhow::Error {
    let open = || -> Result<OwnedFd> {
        rustix::process::setsid()?;
        // As terminal emulators do it. The kernel leaves O_CLOEXEC in the open file description's own flags, where it
        // looks as if the shell's standard streams were closed on exec.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(master, flags)?;
        rustix::process::ioctl_tiocsctty(&slave)?;
        Ok(slave)
    };
    let mut bash = Command::new("bash");
    bash.args(["--norc", "--noprofile", "-i"]).env("TERM", "dumb").env("PS1", "> ").env("HISTFILE", "");
    match open().and_then(|slave| Ok((slave.try_clone()?, slave.try_clone()?, slave))) {
        Ok((input, output, errors)) => bash.stdin(input).stdout(output).stderr(errors),
        Err(error) => return error,
    };
    bash.exec().into()
}

impl Terminal {
    /// Session, foreground group, size, and settings, while the shell is at its prompt.
    fn describe(&self) -> Result<String> {
        let size = tcgetwinsize(&self.master)?;
        let session = tcgetsid(&self.master)?;
        let settings = tcgetattr(&self.master)?;
        // The shell takes the terminal back shortly after a job has stopped.
        let foreground = self.foreground(|group| group == self.shell)?;
        Ok(format!("{size:?}\nsession {session:?}\nforeground {foreground:?}\n{settings:?}\n"))
    }

    fn check(&mut self) -> Result<()> {
        let size = self.command("stty size")?;
        ensure!(size.contains("43 132"), "the shell sees a terminal of size {size:?}");
        ensure!(!size.contains("Stopped"), "the shell announces a job again that it knows: {size:?}");
        let kept = self.command("echo v=$kept")?;
        ensure!(kept.contains("v=whole"), "the shell's variable is {kept:?}");
        let controlling = self.command("echo t=$((6*7)) > /dev/tty")?;
        ensure!(controlling.contains("t=42"), "/dev/tty does not lead to the terminal: {controlling:?}");
        let jobs = self.command("jobs")?;
        ensure!(jobs.contains("Running") && jobs.contains("Stopped"), "the shell's jobs are {jobs:?}");

        let ticks = fs::metadata(&self.ticks)?.len();
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(&self.ticks)?.len() == ticks {
            ensure!(Instant::now() < deadline, "the pipeline in the background stands still");
            std::thread::sleep(Duration::from_millis(20));
        }

        // The stopped pipeline goes on: what is typed is echoed, and comes again through both cats.
        self.send("fg %2\n")?;
        self.read_until("cat | cat")?;
        self.round += 1;
        let word = format!("word-{}", self.round);
        self.meet(&format!("{word}\n"), &word, 2)?;
        self.suspend()
    }

    /// Waits until the group in the foreground is as wanted.
    fn foreground(&self, wanted: impl Fn(Pid) -> bool) -> Result<Pid> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let group = tcgetpgrp(&self.master)?;
            if wanted(group) {
                return Ok(group);
            }
            ensure!(Instant::now() < deadline, "process group {group:?} stays in the foreground");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Types a command; gives everything that the terminal shows until it is done.
    fn command(&mut self, line: &str) -> Result<String> {
        self.round += 1;
        let round = self.round;
        // What is typed and echoed must not look like what is printed.
        self.send(&format!("{line}\necho end-$(({round}+1000))-\n"))?;
        self.read_until(&format!("end-{}-", round + 1000)).with_context(|| format!("after typing {line:?}"))
    }

    /// Types ^Z until the shell says that its job has stopped.
    fn suspend(&mut self) -> Result<()> {
        self.send(SUSPEND)?;
        self.read_until("Stopped").context("after ^Z")?;
        self.command(":").map(drop)
    }

    /// Types `text` and waits until `word` was shown `times`.
    fn meet(&mut self, text: &str, word: &str, times: usize) -> Result<()> {
        // What is typed while the shell still reads lines in its own way is lost to the job.
        self.foreground(|group| group != self.shell)?;
        self.send(text)?;
        for _ in 0..times {
            self.read_until(word)?;
        }
        Ok(())
    }

    fn send(&self, text: &str) -> Result<()> {
        let written = rustix::io::write(&self.master, text.as_bytes()).context("typing")?;
        ensure!(written == text.len(), "the terminal took only {written} bytes of {text:?}");
        Ok(())
    }

    /// Reads byte for byte, so that what comes after `end` stays in the terminal.
    fn read_until(&self, end: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut shown = Vec::new();
        while !shown.ends_with(end.as_bytes()) {
            let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let mut byte = [0];
            if poll(&mut [PollFd::new(&self.master, PollFlags::IN)], Some(&wait))? == 1 {
                ensure!(rustix::io::read(&self.master, &mut byte[..])? == 1, "the terminal hung up");
                shown.extend(byte);
            } else if Instant::now() > deadline {
                bail!("the terminal does not show {end:?}, but {:?}", String::from_utf8_lossy(&shown));
            }
        }
        Ok(String::from_utf8_lossy(&shown).into_owned())
    }
}

/// The shell hands the hang-up on to its jobs.
impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = kill_process_group(self.shell, Signal::HUP);
    }
}
