//! The start: our stub leaves every process, and every thread gets its registers.

use limosa_kernel::proc::ProcDir;
use limosa_kernel::ptrace::{self, Options, WaitStatus};

use super::{Inside, Nursery, is_alive};
use crate::error::RestoreError;
use crate::guardian::Guardian;
use crate::resources::job_control;
use crate::state::{Life, Thread, Tree};

/// A thread of the tree, as Limosa sees it.
pub(crate) struct Actor<'a> {
    tid: i32,
    thread: &'a Thread,
}

/// A tree that is complete, all threads of which are stopped.
pub(crate) struct Still<'a> {
    actors: Vec<Actor<'a>>,
    /// Before the commit it waits; after it it is dead and not yet reaped.
    guardian: Option<Guardian>,
}

/// Gives all threads their registers.
pub(crate) fn make_ready<'a>(tree: &'a Tree, nursery: &mut Nursery) -> Result<Still<'a>, RestoreError> {
    let guardian = post_guardian(tree, nursery)?;
    let mut stopped = Vec::new();
    for (index, process) in tree.processes.iter().enumerate() {
        if let Life::Alive(body) = &process.life {
            let threads = stop_threads(nursery.puppets[index].pid(), &body.threads)?;
            filter(&threads, nursery)?;
            stopped.push((process, body, nursery.puppets[index].pid(), threads));
        }
    }
    // Children before parents, which take note of what job control did to their children.
    for (process, body, pid, threads) in stopped.iter().rev() {
        job_control::take_note(tree, process, body, *pid, nursery)?;
        leave(nursery, *pid)?;
        if body.stopped.is_some() {
            let tids: Vec<i32> = threads.iter().map(|actor| actor.tid).collect();
            job_control::stop(*pid, &tids)?;
        }
        body.late.finish(*pid)?;
    }
    let actors: Vec<Actor> = stopped.into_iter().flat_map(|(_, _, _, threads)| threads).collect();
    for actor in &actors {
        actor.thread.state.finish(actor.tid)?;
    }
    Ok(Still { actors, guardian })
}

/// In the host's PID namespace, the guardian of a tree with several processes.
fn post_guardian(tree: &Tree, nursery: &mut Nursery) -> Result<Option<Guardian>, RestoreError> {
    let Some(idle) = nursery.guardian.take() else { return Ok(None) };
    let alive = (0..tree.processes.len()).filter(|index| is_alive(tree, *index));
    let pids: Vec<i32> = alive.map(|index| nursery.puppets[index].pid()).collect();
    Ok(Some(idle.post(&mut nursery.arena, &pids)?))
}

impl Still<'_> {
    /// From one operation to the next the whole tree stays, whatever becomes of us: before it, our death ends all of it;
    /// after it, our death lets all of it go (as ptrace does with what is attached).
    pub(crate) fn commit(mut self, nursery: &mut Nursery) -> Result<Self, RestoreError> {
        let root = nursery.puppets[0].pid();
        if let Some(guardian) = &mut self.guardian {
            guardian.is_there(&nursery.arena)?;
        }
        // Without a guardian the root's leader goes on dying with us, and with it all of its process and of a PID
        // namespace that it leads.
        for actor in self.actors.iter().filter(|actor| self.guardian.is_some() || actor.tid != root) {
            ptrace::set_options(actor.tid, Options::empty())?;
        }
        match &self.guardian {
            Some(guardian) => guardian.dismiss()?,
            None => ptrace::set_options(root, Options::empty())?,
        }
        nursery.released = true;
        Ok(self)
    }

    /// Lets all threads run.
    pub(crate) fn let_go(self) {
        for actor in &self.actors {
            match ptrace::detach(actor.tid, 0) {
                // What was let go before may have ended it.
                Err(error) if !error.is_gone() => tracing::warn!(%error, "a thread goes on when Limosa ends"),
                _ => {}
            }
        }
    }
}

/// Seizes the leaders of all puppet processes, which run on, and die with us from now on. Until here they die with
/// their parents, but that ends where a process gets its own parent-death signal or changes its user.
pub(crate) fn seize_leaders(tree: &Tree, nursery: &Nursery) -> Result<(), RestoreError> {
    for (index, process) in tree.processes.iter().enumerate() {
        if let Life::Alive(body) = &process.life {
            seize(nursery.puppets[index].pid(), &body.threads[0])?;
        }
    }
    Ok(())
}

fn seize(tid: i32, thread: &Thread) -> limosa_kernel::Result<()> {
    let options = Options::EXIT_KILL | Options::TRACE_SYSGOOD;
    ptrace::seize(tid, options | Options::SUSPEND_SECCOMP).or_else(|error| {
        // Without it the filters would judge what is left to be done.
        if thread.state.seccomp.is_on() { Err(error) } else { ptrace::seize(tid, options) }
    })
}

/// Stops all threads of a puppet process, of which the leader is seized already. They die with us until they are let go.
fn stop_threads(pid: i32, threads: &[Thread]) -> Result<Vec<Actor<'_>>, RestoreError> {
    let proc = ProcDir::open(pid)?;
    let mut actors = Vec::with_capacity(threads.len());
    for tid in proc.tasks()? {
        let own = if threads.len() == 1 { threads[0].tid } else { proc.task(tid)?.status()?.own_pid() };
        let thread = threads.iter().find(|thread| thread.tid == own).ok_or_else(|| {
            RestoreError::inconsistent(format!("process {pid} has a thread {own} too many"))
        })?;
        // The leader is seized already.
        if tid != pid {
            seize(tid, thread)?;
        }
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

pub(crate) fn await_stop(tid: i32) -> Result<WaitStatus, RestoreError> {
    match ptrace::wait(tid)? {
        status @ WaitStatus::Stopped { .. } => Ok(status),
        status => {
            Err(limosa_puppet::ResidentError::Died { pid: tid, how: format!("{status:?} at its start") }
                .into())
        }
    }
}

/// Installs seccomp in the threads that have it, and takes from them the capability that this took.
fn filter(actors: &[Actor], nursery: &mut Nursery) -> Result<(), RestoreError> {
    for actor in actors.iter().filter(|actor| actor.thread.state.seccomp.is_on()) {
        let mut inside = Inside::new(actor.tid, &mut nursery.arena);
        actor.thread.state.seccomp.install(&mut inside)?;
        actor.thread.state.credentials.drop_what_seccomp_needed(&mut inside)?;
        inside.park()?;
    }
    Ok(())
}

/// The leader unmaps the arena, our stub included, and stops before it returns to user mode: no instruction of
/// ours or its own runs after that.
fn leave(nursery: &mut Nursery, pid: i32) -> Result<(), RestoreError> {
    let arguments = [nursery.arena.base(), nursery.arena.size(), 0, 0, 0, 0];
    let mut leader = Inside::new(pid, &mut nursery.arena);
    leader.call("munmap of the stub", libc::SYS_munmap, arguments)?;
    leader.park()
}
