//! A short piece of work that a `kill -9` of this process cannot interrupt.
//!
//! [`run`] executes a closure in a process of its own that shares the memory and the descriptors of the
//! caller (`CLONE_VM | CLONE_FILES | CLONE_VFORK`, the way `posix_spawn(3)` makes its child), while the calling
//! thread waits. If this process is killed meanwhile, the work goes on to its end: nothing is torn down
//! under it, because memory and descriptors live as long as their last user. It leaves the process group
//! (`setsid`), so that a signal to the group does not reach it, and blocks all signals.
//!
//! The closure must be short, must not allocate, lock or print (a thread of the dead process may have held that lock
//! for ever), and asks [`Caller::is_alive`] between its steps, to stop early with everything undone.

use std::io;

/// The process that asked for the work.
pub(crate) struct Caller {
    pid: libc::pid_t,
}

impl Caller {
    /// Whether somebody still waits for the result.
    pub(crate) fn is_alive(&self) -> bool {
        // SAFETY: getppid takes no argument and cannot fail.
        unsafe { libc::getppid() == self.pid }
    }
}

struct Job<'a, F> {
    caller: Caller,
    work: Option<F>,
    finished: &'a mut bool,
}

/// Stack of the helper: system calls and a few frames; a page is kept in reserve by the allocator's own.
const STACK: usize = 128 << 10;

/// Runs `work` beside this process. `Ok(false)`: the helper was killed before it finished;
/// the caller, which is alive, has to undo what was half done.
pub(crate) fn run<F: FnOnce(&Caller)>(work: F) -> io::Result<bool> {
    let mut finished = false;
    // SAFETY: getpid takes no argument.
    let caller = Caller { pid: unsafe { libc::getpid() } };
    let mut job = Job { caller, work: Some(work), finished: &mut finished };
    let mut stack = vec![0_u128; STACK / 16];
    let mut everything = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are owned by this frame; sigfillset initializes the first, pthread_sigmask the second.
    unsafe {
        libc::sigfillset(everything.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, everything.as_ptr(), before.as_mut_ptr());
    }
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_VFORK;
    // SAFETY: the child runs `entry` on `stack`, whose top is 16-byte aligned, with a pointer to `job`; both outlive it,
    // as CLONE_VFORK suspends this thread until the child has ended (or this whole process is being killed, and
    // then nothing frees them). It shares the suspended thread's thread-local storage, which is why only it may run.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.len());
        libc::clone(entry::<F>, top.cast(), flags, (&raw mut job).cast())
    };
    let failure = (pid < 0).then(io::Error::last_os_error);
    // SAFETY: `before` was initialized by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    if let Some(error) = failure {
        return Err(error);
    }
    reap(pid);
    drop(stack);
    Ok(finished)
}

/// Collects the helper, unless somebody else in this process waited for all children and has it already.
fn reap(pid: libc::pid_t) {
    loop {
        // SAFETY: a null status pointer is allowed. The child has no exit signal, hence __WALL.
        let answer = unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
        if answer == pid || io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return;
        }
    }
}

extern "C" fn entry<F: FnOnce(&Caller)>(job: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `run` passes a pointer to a live `Job<F>` that nobody else touches meanwhile.
    let job = unsafe { &mut *job.cast::<Job<'_, F>>() };
    // SAFETY: setsid takes no argument; a failure changes nothing that matters.
    unsafe { libc::setsid() };
    if let Some(work) = job.work.take() {
        work(&job.caller);
    }
    *job.finished = true;
    // SAFETY: ends this process only, without running the exit handlers of the shared memory.
    unsafe { libc::_exit(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shares_memory_and_descriptors_but_is_another_process() {
        let mut seen = 0;
        let finished = run(|caller| {
            assert!(caller.is_alive());
            // SAFETY: getpid takes no argument.
            seen = unsafe { libc::getpid() };
        });
        assert!(finished.unwrap());
        assert!(seen > 0 && seen != std::process::id() as i32);
    }

    #[test]
    fn a_killed_helper_is_noticed() {
        // SAFETY: the helper kills itself, by its own process id.
        let finished = run(|_| unsafe {
            libc::kill(libc::getpid(), libc::SIGKILL);
        });
        assert!(!finished.unwrap());
    }
}
