//! Job control: processes that were stopped are stopped again, and parents that know of it are not told again. A shell
//! would announce the job a second time.
//!
//! In a checkpoint it is [`Body::stopped`] and [`Body::stop_unreported`].

use std::collections::HashSet;

use limosa_kernel::{ptrace, task};
use limosa_puppet::{Data, Outcome, Program};

use crate::error::RestoreError;
use crate::restore::{Inside, Nursery, await_stop};
use crate::state::{Body, Life, Process, Tree};

/// `siginfo_t`, bytes.
const SIGINFO: usize = 128;

/// Asks a process which of its stopped `children` it has yet to hear of. To look does not take the news away.
pub(crate) fn ask(children: &[i32], program: &mut Program) -> Vec<(i32, Data)> {
    let options = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    let ask_for = |child: &i32| {
        let news = program.space(SIGINFO);
        let arguments = [libc::P_PID.into(), (*child).into(), news.into(), options.into(), 0.into()];
        // Without news, and where it cannot be asked for, `si_signo` is 0.
        program.try_call("ask for a child's stop", libc::SYS_waitid, arguments);
        (*child, news)
    };
    children.iter().map(ask_for).collect()
}

/// Adds those children that there is news of.
pub(crate) fn answers(asked: &[(i32, Data)], outcome: &Outcome, unreported: &mut HashSet<i32>) {
    let signo = |news: Data| outcome.word(news, 0) as u32;
    unreported.extend(asked.iter().filter(|(_, news)| signo(*news) != 0).map(|(child, _)| *child));
}

/// Stops the process `pid`, whose threads are all in ptrace stops, as SIGSTOP does. They stay in ptrace stops, and run
/// no instruction on the way.
pub(crate) fn stop(pid: i32, threads: &[i32]) -> Result<(), RestoreError> {
    task::signal_process(pid, libc::SIGSTOP)?;
    for tid in threads {
        // The first thread takes the signal, which stops it for us before it acts; the others follow.
        ptrace::resume(*tid, 0)?;
        while let ptrace::WaitStatus::Stopped { signal, event: 0 } = await_stop(*tid)? {
            ptrace::resume(*tid, signal)?;
        }
    }
    Ok(())
}

/// Has `process`, whose PID is `pid` outside, wait for the stops of its children that it knew of, and takes the SIGCHLD
/// that came with them. All of its signals are blocked yet.
pub(crate) fn take_note(
    tree: &Tree,
    process: &Process,
    body: &Body,
    pid: i32,
    nursery: &mut Nursery,
) -> Result<(), RestoreError> {
    let known = |body: &Body| body.stopped.is_some() && !body.stop_unreported;
    let children =
        tree.processes.iter().filter(|child| child.parent == process.pid && child.pid != process.pid);
    let stopped: Vec<i32> = children
        .filter(|child| matches!(&child.life, Life::Alive(body) if known(body)))
        .map(|child| child.pid)
        .collect();
    if stopped.is_empty() {
        return Ok(());
    }
    let mut inside = Inside::new(pid, &mut nursery.arena);
    for child in stopped {
        let options = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
        let arguments = [u64::from(libc::P_PID), child as u64, 0, options as u64, 0, 0];
        inside.call("wait for a stopped child", libc::SYS_waitid, arguments)?;
    }
    // A SIGCHLD that was pending before swallowed the new one, and stays.
    let leader = body.threads.first().map(|thread| &thread.state.signals);
    if !leader.is_some_and(|signals| signals.has_pending(libc::SIGCHLD)) {
        let set = inside.bytes(&(1_u64 << (libc::SIGCHLD - 1)).to_ne_bytes())?;
        let now = inside.bytes(&[0; 16])?;
        inside.try_call(libc::SYS_rt_sigtimedwait, [set, 0, now, 8, 0, 0])?;
    }
    Ok(())
}
