//! A tree of processes: groups, sessions, zombies, orphans taken in by a subreaper, a stopped child, parent-death
//! signals.
//!
//! ```text
//! root (subreaper)
//! ├── same-group
//! ├── own-group ── member          (a process group of two, not in the root's)
//! ├── session ── inner             (a session of its own; inner leads a second group in it)
//! ├── orphan                       (its parent, the leader of its session, is gone)
//! ├── zombie-exited, zombie-killed (not waited for)
//! ├── stopped                      (by SIGSTOP)
//! └── bound                        (dies with its parent: SIGTERM)
//! ```

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::process::{getppid, kill_process, parent_process_death_signal, set_parent_process_death_signal};
use rustix::process::{set_child_subreaper, setpgid, setsid, waitid, waitpid};

use super::{Setting, Verify};
use crate::child::Child;
use crate::protocol::Protocol;
use crate::sys;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let protocol = &setting.protocol;
    set_child_subreaper(Some(rustix::process::getpid())).context("becoming a subreaper")?;
    let children = vec![
        Child::start(protocol, "same-group", |_| idle())?,
        Child::start(protocol, "own-group", |own| {
            setpgid(None, None).context("setpgid")?;
            let member = Child::start(own, "member", |_| idle())?;
            Ok(Box::new(move || member.verify()))
        })?,
        Child::start(protocol, "session", |own| {
            setsid().context("setsid")?;
            let inner = Child::start(own, "inner", |_| {
                setpgid(None, None).context("setpgid")?;
                idle()
            })?;
            Ok(Box::new(move || inner.verify()))
        })?,
        Child::start(protocol, "bound", |_| bound())?,
    ];
    let orphan = start_orphan(protocol)?;
    let zombies = [start_zombie(7)?, start_killed_zombie()?];
    let stopped = sys::fork(pause_for_ever)?;
    kill_process(stopped, Signal::STOP)?;
    waitpid(Some(stopped), rustix::process::WaitOptions::UNTRACED)?;

    let mut pids: Vec<Pid> = children.iter().map(|child| child.pid).collect();
    pids.extend([orphan, zombies[0], zombies[1], stopped]);
    let tree = tree(&pids)?;
    let guard = Leftovers(vec![orphan, stopped]);
    Ok(Box::new(move || {
        let _ = &guard;
        for child in &children {
            child.verify()?;
        }
        sys::compare_lines("processes", &self::tree(&pids)?, &tree)?;
        check_zombie(zombies[0], Some(7), None)?;
        check_zombie(zombies[1], None, Some(libc::SIGKILL))?;
        ensure!(rustix::process::child_subreaper()?.is_some(), "no longer a subreaper");
        check_stopped(stopped)?;
        Ok(String::new())
    }))
}

/// Children that serve no requests, ended with the target.
struct Leftovers(Vec<Pid>);

impl Drop for Leftovers {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill_process(*pid, Signal::KILL);
        }
    }
}

fn idle() -> Result<Box<Verify>> {
    Ok(Box::new(|| Ok(String::new())))
}

fn pause_for_ever() -> i32 {
    loop {
        std::thread::sleep(Duration::from_hours(1));
    }
}

fn bound() -> Result<Box<Verify>> {
    set_parent_process_death_signal(Some(Signal::TERM)).context("PR_SET_PDEATHSIG")?;
    let parent = getppid();
    Ok(Box::new(move || {
        let signal = parent_process_death_signal()?;
        ensure!(signal == Some(Signal::TERM), "the parent-death signal is {signal:?}");
        ensure!(getppid() == parent, "the parent is {:?} instead of {parent:?}", getppid());
        Ok(String::new())
    }))
}

/// A grandchild whose parent led a session and is gone: the root, as a subreaper, is its parent now.
fn start_orphan(protocol: &Protocol) -> Result<Pid> {
    let note = protocol.beside("orphan");
    let leader = sys::fork(|| {
        let _ = setsid();
        match sys::fork(pause_for_ever) {
            Ok(orphan) => i32::from(fs::write(&note, orphan.as_raw_pid().to_string()).is_err()),
            Err(_) => 1,
        }
    })?;
    waitpid(Some(leader), rustix::process::WaitOptions::empty()).context("waiting for a session's leader")?;
    let orphan = fs::read_to_string(protocol.beside("orphan")).context("no orphan was made")?;
    Pid::from_raw(orphan.trim().parse()?).context("the orphan has no process id")
}

fn start_zombie(status: i32) -> Result<Pid> {
    let pid = sys::fork(|| status)?;
    wait_without_reaping(pid)?;
    Ok(pid)
}

fn start_killed_zombie() -> Result<Pid> {
    let pid = sys::fork(pause_for_ever)?;
    kill_process(pid, Signal::KILL)?;
    wait_without_reaping(pid)?;
    Ok(pid)
}

fn wait_without_reaping(pid: Pid) -> Result<Option<rustix::process::WaitIdStatus>> {
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG)
        .with_context(|| format!("waiting for zombie {}", pid.as_raw_pid()))
        .and_then(|status| match status {
            Some(status) => Ok(Some(status)),
            // A child that was made just now may still be on its way.
            None => Ok(waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?),
        })
}

fn check_zombie(pid: Pid, status: Option<i32>, signal: Option<i32>) -> Result<()> {
    let found = wait_without_reaping(pid)?.context("a zombie is not there")?;
    ensure!(
        (found.exit_status(), found.terminating_signal()) == (status, signal),
        "zombie {} ended with status {:?}, signal {:?}",
        pid.as_raw_pid(),
        found.exit_status(),
        found.terminating_signal()
    );
    Ok(())
}

/// The stopped child goes on when it is told to, and stops again.
fn check_stopped(pid: Pid) -> Result<()> {
    kill_process(pid, Signal::CONT)?;
    for _ in 0..500 {
        if line_of(pid)?.contains(" S ") {
            kill_process(pid, Signal::STOP)?;
            waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED)?;
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    anyhow::bail!("the stopped child does not continue: {}", line_of(pid)?)
}

/// A line for each process: id, name, state, parent, group, session.
fn tree(pids: &[Pid]) -> Result<String> {
    let mut text = String::new();
    for pid in pids {
        let _ = writeln!(text, "{}", line_of(*pid)?);
    }
    Ok(text)
}

fn line_of(pid: Pid) -> Result<String> {
    let path = format!("/proc/{}/stat", pid.as_raw_pid());
    // A child that has just answered may still be between two naps (R), or wait for a page (D): look again until it
    // sleeps.
    for _ in 0..500 {
        let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let fields: Vec<_> = stat.split(' ').take(6).collect();
        if !matches!(fields.get(2), Some(&("R" | "D"))) {
            return Ok(fields.join(" "));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    anyhow::bail!("process {} does not come to rest", pid.as_raw_pid())
}
