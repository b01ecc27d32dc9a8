//! Stopping a whole process tree by ptrace, and letting it go.
//!
//! Every thread is seized and interrupted; lists of threads and children are read again until nothing new
//! appears. When the controller dies, the kernel detaches all of them and they run on.

mod vdso;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use limosa_kernel::proc::{ProcDir, Status, TaskState};
use limosa_kernel::ptrace::{self, WaitStatus};

use crate::error::CaptureError;
use crate::resources::registers;
use crate::twin::is_twin;

/// Longest wait for one thread to stop; only one in an uninterruptible sleep takes long.
const PATIENCE: Duration = Duration::from_secs(10);
const ROUNDS: usize = 100;

/// A frozen process.
#[derive(Debug)]
pub struct FrozenProcess {
    /// PID in the controller's PID namespace.
    pub pid: i32,
    /// Parent in the controller's PID namespace.
    pub parent: i32,
    /// `/proc/PID`.
    pub proc: ProcDir,
    /// TIDs of its stopped threads, the leader first; empty for a zombie.
    pub threads: Vec<i32>,
    /// Whether job control had stopped it.
    pub job_stopped: Option<i32>,
}

/// A tree of processes all of whose threads are stopped. Dropped, it lets them go.
#[derive(Debug)]
pub struct Frozen {
    /// Parents before children; the first is the root.
    pub processes: Vec<FrozenProcess>,
    /// Twins that killed checkpoints have left, to be reaped: with which process, and as that calls them.
    pub(crate) leftovers: Vec<(i32, i32)>,
    seized: Vec<i32>,
}

impl Frozen {
    /// Stops the tree rooted at `root`.
    pub fn stop(root: i32) -> Result<Self, CaptureError> {
        let mut frozen = Self { processes: Vec::new(), leftovers: Vec::new(), seized: Vec::new() };
        frozen.add(root, 0)?;
        frozen.gather()?;
        frozen.clear_vdso()?;
        if frozen.processes[0].threads.is_empty() {
            return Err(CaptureError::Ended { pid: root });
        }
        Ok(frozen)
    }

    /// Stops the descendants of all processes that are stopped.
    fn gather(&mut self) -> Result<(), CaptureError> {
        let mut known: HashSet<i32> = self.processes.iter().map(|process| process.pid).collect();
        for _ in 0..ROUNDS {
            let mut grown = false;
            let mut index = 0;
            while index < self.processes.len() {
                let process = &self.processes[index];
                let pid = process.pid;
                if !process.threads.is_empty() {
                    for child in process.proc.children()? {
                        if known.insert(child) {
                            self.add(child, pid)?;
                            grown = true;
                        }
                    }
                }
                index += 1;
            }
            if !grown {
                return Ok(());
            }
        }
        Err(CaptureError::Unstable { root: self.processes[0].pid })
    }

    /// Stops all threads of `pid` and adds it.
    fn add(&mut self, pid: i32, parent: i32) -> Result<(), CaptureError> {
        let proc = ProcDir::open(pid)?;
        let mut process = FrozenProcess { pid, parent, proc, threads: Vec::new(), job_stopped: None };
        let stopped = stop_threads(&mut self.seized, &mut process);
        let cannot_be_stopped = stopped.is_err() || process.threads.is_empty();
        if cannot_be_stopped && parent != 0 && process.proc.stat().is_ok_and(|stat| is_twin(&stat)) {
            // Another checkpoint reads it, or was killed.
            self.leftovers.push((parent, process.proc.status()?.own_pid()));
            return Ok(());
        }
        stopped?;
        self.processes.push(process);
        Ok(())
    }

    /// Lets all processes run on.
    pub fn release(mut self) -> Result<(), CaptureError> {
        self.detach_all();
        Ok(())
    }

    fn detach_all(&mut self) {
        for tid in self.seized.drain(..) {
            registers::let_go(tid);
            // A thread that is not stopped or is gone needs no letting go.
            if let Err(error) = ptrace::detach(tid, 0) {
                tracing::debug!(tid, %error, "detach");
            }
        }
    }

    /// The processes that have not ended yet.
    pub fn living(&self) -> Vec<i32> {
        let living = self.processes.iter().filter(|process| !process.threads.is_empty());
        living.map(|process| process.pid).collect()
    }

    /// Ends all processes, children before parents, and reaps those whose parent is in the tree; the root
    /// is left to its own parent.
    pub fn end(mut self, mut reap: impl FnMut(i32, &[i32])) -> Result<(), CaptureError> {
        let order: Vec<(i32, i32)> =
            self.processes.iter().rev().map(|process| (process.pid, process.parent)).collect();
        for (pid, _) in &order {
            let children: Vec<i32> =
                order.iter().filter(|(_, parent)| parent == pid).map(|(child, _)| *child).collect();
            if !children.is_empty() {
                reap(*pid, &children);
            }
            match limosa_kernel::task::signal_process(*pid, libc::SIGKILL) {
                Ok(()) => {}
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(process) = self.processes.iter().find(|process| process.pid == *pid) {
                await_end(&process.threads);
            }
        }
        self.seized.clear();
        Ok(())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.detach_all();
    }
}

/// Takes note of the end of each thread of a killed process: the tracer hears of it before the parent does. In any
/// order, because the last thread of a PID namespace's first process waits for all others to be noted.
fn await_end(threads: &[i32]) {
    let mut left = threads.to_vec();
    let started = Instant::now();
    while !left.is_empty() && started.elapsed() < PATIENCE {
        left.retain(|tid| matches!(ptrace::try_wait(*tid), Ok(None | Some(WaitStatus::Stopped { .. }))));
        if !left.is_empty() {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Stops all threads of the process that are not stopped yet; `seized` are those that are traced already. A zombie
/// has none.
fn stop_threads(seized: &mut Vec<i32>, process: &mut FrozenProcess) -> Result<(), CaptureError> {
    if process.proc.status()?.state == TaskState::Zombie {
        process.threads.clear();
        return Ok(());
    }
    // Those that were stopped and ran on may have ended, or be another program's by now, and run.
    process.threads.retain(|tid| ptrace::registers(*tid).is_ok());
    let started = Instant::now();
    let mut rounds = 0;
    while rounds < ROUNDS && started.elapsed() < PATIENCE {
        let fresh: Vec<i32> =
            process.proc.tasks()?.into_iter().filter(|tid| !process.threads.contains(tid)).collect();
        if fresh.is_empty() {
            // The leader's TID is the PID; the kernel lists threads in the order of their making, not always
            // with the leader first.
            process.threads.sort_unstable_by_key(|tid| (*tid != process.pid, *tid));
            return Ok(());
        }
        let mut asked = Vec::with_capacity(fresh.len());
        for tid in fresh {
            if !seized.contains(&tid) {
                match seize(tid) {
                    Ok(()) => {}
                    Err(error) if error.is_gone() => continue,
                    Err(error) => return Err(explain_seize(&process.proc, process.pid, tid, error)),
                }
                seized.push(tid);
            }
            match ptrace::interrupt(tid) {
                Err(error) if error.is_gone() => continue,
                outcome => outcome?,
            }
            asked.push(tid);
        }
        let stopped = process.threads.len();
        for tid in asked {
            if let Some(stop) = settle(tid)? {
                process.job_stopped = process.job_stopped.or(stop.job_control());
                process.threads.push(tid);
            }
        }
        if process.threads.len() > stopped {
            rounds += 1;
        } else if process.proc.status()?.state == TaskState::Zombie {
            process.threads.clear();
            return Ok(());
        } else {
            // All that are left are on their way out, which takes as long as giving back their memory.
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    Err(CaptureError::Unstable { root: process.pid })
}

/// Attaches to a thread, whose seccomp filters are not asked meanwhile where we may have that.
pub(crate) fn seize(tid: i32) -> limosa_kernel::Result<()> {
    let options = ptrace::Options::TRACE_SYSGOOD;
    ptrace::seize(tid, options | ptrace::Options::SUSPEND_SECCOMP).or_else(|_| ptrace::seize(tid, options))
}

pub(crate) struct Settled {
    signal: i32,
}

impl Settled {
    /// The stopping signal, if this is a group stop.
    fn job_control(&self) -> Option<i32> {
        (self.signal != libc::SIGTRAP).then_some(self.signal)
    }
}

/// Waits for an interrupted thread's stop. A signal that was just being delivered is delivered first: the
/// thread then stops at its handler's first instruction.
pub(crate) fn settle(tid: i32) -> Result<Option<Settled>, CaptureError> {
    loop {
        match ptrace::wait_within(tid, PATIENCE) {
            Ok(WaitStatus::Stopped { signal, event: ptrace::EVENT_STOP }) => {
                return Ok(Some(Settled { signal }));
            }
            Ok(WaitStatus::Stopped { signal, .. }) => ptrace::resume(tid, signal)?,
            Ok(WaitStatus::Exited(_) | WaitStatus::Killed(_)) => return Ok(None),
            Err(error) if error.errno() == Some(libc::ECHILD) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Says who traces the process already, where that is the reason.
fn explain_seize(proc: &ProcDir, pid: i32, tid: i32, error: limosa_kernel::Error) -> CaptureError {
    match proc.status() {
        Ok(Status { tracer_pid, .. }) if tracer_pid != 0 => crate::Refusal::process(
            pid,
            format!("its thread {tid} is traced by process {tracer_pid}"),
            "end that debugger or tracer first",
        )
        .into(),
        _ => error.into(),
    }
}
