//! The guardian of several processes that are to end together if the controller is killed just now.
//!
//! Some things are done to one process after the other: letting a restored tree go, ending a checkpointed one. Killed in
//! the middle, the controller would leave half of a tree. Where the kernel does not end all of it with its first
//! process (that does a PID namespace of its own), a guardian does: a puppet that outlives the controller.
//!
//! ```text
//!   post ─► pidfds of all ─► outlives the controller, and says so ─► reads a socket whose other end only the controller has
//!                                                       its end (the controller is dead): kills all ◄─┤
//!                                                                   dismissed: is killed, one operation ◄─┘
//! ```
//!
//! It is one program without conditions. What happens depends on one thing only: whether the guardian still lives when
//! the controller ends.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use limosa_kernel::{ptrace, task};
use limosa_puppet::{Arena, Program, Resident, ResidentError, Running};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// How long the controller may take to hear from its guardian.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
const ARENA_SIZE: u64 = 64 << 20;

/// A puppet that has nothing to guard yet; it dies with the controller.
#[derive(Debug)]
pub(crate) struct Idle(Child);

/// A puppet that is about to kill processes when the controller dies, or does so already.
#[derive(Debug)]
pub(crate) struct Guardian {
    // Ended first: our death is not to be seen by it.
    child: Child,
    program: Option<Running>,
    /// Closed by our death. Nobody else may have it.
    ours: OwnedFd,
    /// Kept until the guardian has taken it.
    theirs: Option<OwnedFd>,
}

/// A child that ends, and is reaped, when it is dropped.
#[derive(Debug)]
struct Child(Resident);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = task::signal_process(self.0.pid(), libc::SIGKILL);
        let _ = ptrace::wait(self.0.pid());
    }
}

/// Memory for a guardian that has no other to share.
pub(crate) fn arena() -> Result<Arena, ResidentError> {
    Ok(Arena::new(ARENA_SIZE, |_, _| true)?)
}

impl Idle {
    /// A new one.
    pub(crate) fn new(arena: &mut Arena) -> Result<Self, ResidentError> {
        Ok(Self::from(Resident::bare_child(arena)?))
    }

    /// Posts it over `pids`, tracees or children of the caller. They are guarded once [`Guardian::is_there`] says so.
    pub(crate) fn post(mut self, arena: &mut Arena, pids: &[i32]) -> Result<Guardian, ResidentError> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| ResidentError::Start(errno.into()))?;
        let program = Some(self.0.0.start(arena, program(theirs.as_raw_fd(), pids))?);
        Ok(Guardian { child: self.0, program, ours, theirs: Some(theirs) })
    }
}

/// A bare child that has done what it was made for.
impl From<Resident> for Idle {
    fn from(puppet: Resident) -> Self {
        Self(Child(puppet))
    }
}

impl Guardian {
    /// Waits until the guardian is sure to outlive the controller: from here on, if that dies, all are killed.
    pub(crate) fn is_there(&mut self, arena: &Arena) -> Result<(), ResidentError> {
        let (puppet, started) = (&self.child.0, Instant::now());
        let lost = |how: &str| ResidentError::Died { pid: puppet.pid(), how: how.into() };
        let slice = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        loop {
            let mut poll = [PollFd::new(&self.ours, PollFlags::IN)];
            match rustix::event::poll(&mut poll, Some(&slice)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => break,
                Err(errno) => return Err(ResidentError::Start(errno.into())),
            }
            // It does not come to its end but by a call that failed.
            if let Some(running) = self.program.take_if(|running| puppet.has_finished(arena, running)) {
                puppet.finish(arena, running)?;
                return Err(lost("its program is over"));
            }
            if started.elapsed() > PATIENCE {
                return Err(ResidentError::Stuck { pid: puppet.pid() });
            }
        }
        self.theirs = None;
        match rustix::io::read(&self.ours, &mut [0]) {
            Ok(1) => Ok(()),
            _ => Err(lost("its socket is closed")),
        }
    }

    /// All are on their own: one operation on the kernel. The guardian is reaped when it is dropped.
    ///
    /// It is asleep in a read, with all signals blocked but this one, so it never gets to its next call.
    pub(crate) fn dismiss(&self) -> Result<(), ResidentError> {
        Ok(task::signal_process(self.child.0.pid(), libc::SIGKILL)?)
    }
}

/// What the guardian does. `socket` is a descriptor of the controller's.
fn program(socket: i32, pids: &[i32]) -> Program {
    let mut program = Program::new();
    let all = [0.into(), u64::from(u32::MAX).into(), 0.into()];
    program.call("close all descriptors", libc::SYS_close_range, all);
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let limit = program.words(&[most, most]);
    let arguments = [0.into(), u64::from(libc::RLIMIT_NOFILE).into(), limit.into(), 0.into()];
    program.try_call("allow as many descriptors as may be", libc::SYS_prlimit64, arguments);
    let controller = u64::from(std::process::id());
    let controller = program.call("open the controller", libc::SYS_pidfd_open, [controller.into(), 0.into()]);
    let arguments = [controller.into(), socket.into(), 0.into()];
    let socket = program.call("take the guardian's socket", libc::SYS_pidfd_getfd, arguments);
    let open =
        |pid: &i32| program.call("open a guarded process", libc::SYS_pidfd_open, [(*pid).into(), 0.into()]);
    let pidfds: Vec<_> = pids.iter().map(open).collect();
    program.call("outlive the controller", libc::SYS_prctl, [libc::PR_SET_PDEATHSIG.into(), 0.into()]);
    let byte = program.space(1);
    let word = [socket.into(), byte.into(), 1.into(), libc::MSG_NOSIGNAL.into(), 0.into(), 0.into()];
    program.try_call("say that all are guarded", libc::SYS_sendto, word);
    program.try_call("wait for the controller's end", libc::SYS_read, [socket.into(), byte.into(), 1.into()]);
    for pidfd in pidfds {
        let arguments = [pidfd.into(), libc::SIGKILL.into(), 0.into(), 0.into()];
        program.try_call("end a process", libc::SYS_pidfd_send_signal, arguments);
    }
    program.call("end", libc::SYS_exit_group, [0.into()]);
    program
}
