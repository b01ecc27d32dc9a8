//! Signals as something to wait for: signalfd(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::fault;
use crate::{Error, Result};

/// A descriptor, close-on-exec and not blocking, from which whoever holds it reads its own signals; bit N-1 of `mask`
/// for signal N.
pub fn signalfd(mask: u64) -> Result<OwnedFd> {
    fault::point();
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: the kernel reads a set of 8 bytes; a result that is not negative is a new descriptor that we own.
    unsafe {
        let descriptor = libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, flags);
        if descriptor < 0 {
            return Err(Error::last("signalfd4", format_args!("signals {mask:#x}")));
        }
        Ok(OwnedFd::from_raw_fd(descriptor as i32))
    }
}

/// Signals that no longer interrupt the calling thread but are read from a descriptor. Dropped, it gives the
/// thread its former signal mask back.
///
/// Make it before any other thread exists, or they may take the signals.
#[derive(Debug)]
pub struct Signals {
    descriptor: OwnedFd,
    former: libc::sigset_t,
}

impl Signals {
    /// Blocks `signals` in the calling thread and gathers them.
    pub fn gather(signals: &[i32]) -> Result<Self> {
        fault::point();
        // SAFETY: a signal set is plain data, initialized by sigemptyset and changed through live pointers.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut former: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                libc::sigaddset(&raw mut set, *signal);
            }
            let descriptor = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if descriptor < 0 {
                return Err(Error::last("signalfd", format_args!("signals {signals:?}")));
            }
            let descriptor = OwnedFd::from_raw_fd(descriptor);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut former);
            Ok(Self { descriptor, former })
        }
    }

    /// The next signal that has come, or `None`; does not wait. Poll the descriptor to wait.
    pub fn next(&self) -> Option<i32> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        // SAFETY: the buffer is live and of the given size.
        let length = unsafe { libc::read(self.descriptor.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
        let [a, b, c, d, ..] = info;
        (length == info.len() as isize).then(|| u32::from_ne_bytes([a, b, c, d]) as i32)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: `former` is the mask that pthread_sigmask stored.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.former, std::ptr::null_mut()) };
    }
}
