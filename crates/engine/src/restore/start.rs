//! The start: our stub leaves every process, and every thread gets its registers.

use limosa_kernel::proc::ProcDir;
use limosa_kernel::ptrace::{self, Options, WaitStatus};
use limosa_kernel::task;

use super::Nursery;
use crate::error::RestoreError;
use crate::state::{Life, Thread, Tree};

/// A thread of the tree, as Limosa sees it.
struct Actor<'a> {
    tid: i32,
    thread: &'a Thread,
}

/// Gives all threads their registers, then lets all of them go.
pub(crate) fn start_all(tree: &Tree, nursery: &mut Nursery) -> Result<(), RestoreError> {
    let mut actors = Vec::new();
    for (index, process) in tree.processes.iter().enumerate() {
        if let Life::Alive(body) = &process.life {
            let pid = nursery.puppets[index].pid();
            let threads = stop_threads(pid, &body.threads)?;
            leave(nursery, pid)?;
            if body.stopped.is_some() {
                task::signal_process(pid, libc::SIGSTOP)?;
            }
            actors.extend(threads);
        }
    }
    for actor in &actors {
        actor.thread.state.finish(actor.tid)?;
    }
    // From here on the tree runs; there is no way back that would not be seen.
    nursery.released = true;
    for actor in &actors {
        ptrace::detach(actor.tid, 0)?;
    }
    Ok(())
}

/// Seizes and stops all threads of a puppet process. They die with us until they are let go.
fn stop_threads<'a>(pid: i32, threads: &'a [Thread]) -> Result<Vec<Actor<'a>>, RestoreError> {
    let proc = ProcDir::open(pid)?;
    let mut actors = Vec::with_capacity(threads.len());
    for tid in proc.tasks()? {
        let own = if threads.len() == 1 {
            threads[0].tid
        } else {
            proc.task(tid)?.status()?.ns_pid.last().copied().unwrap_or(tid)
        };
        let thread = threads.iter().find(|thread| thread.tid == own).ok_or_else(|| {
            RestoreError::inconsistent(format!("process {pid} has a thread {own} too many"))
        })?;
        let options = Options::EXIT_KILL | Options::TRACE_SYSGOOD;
        ptrace::seize(tid, options | Options::SUSPEND_SECCOMP).or_else(|_| ptrace::seize(tid, options))?;
        ptrace::interrupt(tid)?;
        actors.push(Actor { tid, thread });
    }
    if actors.len() != threads.len() {
        return Err(RestoreError::inconsistent(format!("process {pid} lacks a thread")));
    }
    for actor in &actors {
        await_stop(actor.tid)?;
    }
    Ok(actors)
}

fn await_stop(tid: i32) -> Result<WaitStatus, RestoreError> {
    match ptrace::wait(tid)? {
        status @ WaitStatus::Stopped { .. } => Ok(status),
        status => {
            Err(limosa_puppet::ResidentError::Died { pid: tid, how: format!("{status:?} at its start") }
                .into())
        }
    }
}

/// The leader unmaps the arena, our stub included, and stops before it returns to user mode: no instruction of
/// ours or its own runs after that.
fn leave(nursery: &Nursery, pid: i32) -> Result<(), RestoreError> {
    let mut registers = ptrace::registers(pid)?;
    registers.rip = nursery.arena.syscall_address();
    registers.rax = libc::SYS_munmap as u64;
    registers.orig_rax = u64::MAX;
    registers.rdi = nursery.arena.base();
    registers.rsi = nursery.arena.size();
    ptrace::set_registers(pid, &registers)?;
    // Entry and exit of the call, then a stop on the way back to user mode, where the kernel looks at what
    // interrupted system calls want.
    for _ in 0..2 {
        ptrace::resume_to_syscall(pid)?;
        await_stop(pid)?;
    }
    let result = ptrace::registers(pid)?.rax as i64;
    if result != 0 {
        let source = std::io::Error::from_raw_os_error(-result as i32);
        return Err(RestoreError::Rebuild {
            object: format!("process {pid}"),
            step: "munmap of the stub",
            source,
        });
    }
    ptrace::interrupt(pid)?;
    ptrace::resume(pid, 0)?;
    await_stop(pid)?;
    Ok(())
}
