//! userfaultfd(2) as a watch on writes: the `WP_ASYNC` mode (Linux 6.7), in which nobody is ever woken or kept waiting.
//!
//! The kernel itself resolves the fault of a first write to a protected page and notes that the page was written;
//! `PAGEMAP_SCAN` tells ([`crate::pagemap`]). A userfaultfd belongs to the address space of the process that made it,
//! whoever holds the descriptor: closed, all registrations and protections are gone from there.
//! (Documentation/admin-guide/mm/userfaultfd.rst, "Write Protect Notifications".)

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use linux_raw_sys::general::{UFFD_API, UFFD_FEATURE_WP_ASYNC, uffdio_api, uffdio_range, uffdio_register};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};

use crate::{Error, Result, fault};

/// The flags with which a process is to make one: `O_CLOEXEC`, and `UFFD_USER_MODE_ONLY`, which anybody may ask for.
/// (Faults of the kernel on behalf of the process are resolved like any other: nothing is handed to user space.)
pub const FLAGS: i32 = libc::O_CLOEXEC | 1;

/// `UFFDIO_REGISTER_MODE_WP`
const WRITE_PROTECT: u64 = 2;

/// Watches which pages of an address space are written. Dropped, nothing of it is left there; until all protections are gone
/// (measured: 38 ms for a GiB of small pages) what faults there waits.
#[derive(Debug)]
pub struct WriteWatch(OwnedFd);

impl WriteWatch {
    /// Takes a userfaultfd that was just made, by whatever process.
    ///
    /// # Errors
    /// `EINVAL` where the kernel has no `WP_ASYNC`.
    pub fn begin(userfaultfd: OwnedFd) -> Result<Self> {
        let mut api =
            uffdio_api { api: u64::from(UFFD_API), features: u64::from(UFFD_FEATURE_WP_ASYNC), ioctls: 0 };
        let watch = Self(userfaultfd);
        fault::point();
        // SAFETY: the ioctl reads and writes the struct it is given.
        let result = unsafe { libc::ioctl(watch.0.as_raw_fd(), libc::Ioctl::from(UFFDIO_API), &raw mut api) };
        watch.check("ioctl(UFFDIO_API)", result).map(|()| watch)
    }

    /// Watches the mappings in `range`, which must be whole pages. Watching one again changes nothing.
    ///
    /// A mapping that lies in it only in part is cut in two, and mremap(2) refuses to move what consists of two: the process
    /// must stand still from the look at its mappings until here.
    ///
    /// # Errors
    /// Among others: `ENOMEM` where nothing is mapped, `EBUSY` where another userfaultfd has a mapping, `EINVAL` for one
    /// that cannot be watched.
    pub fn add(&self, range: Range<u64>) -> Result<()> {
        let length = range.end.saturating_sub(range.start);
        let range = uffdio_range { start: range.start, len: length };
        let mut register = uffdio_register { range, mode: WRITE_PROTECT, ioctls: 0 };
        fault::point();
        // SAFETY: the ioctl reads and writes the struct it is given; in `WP_ASYNC` mode a registration changes nothing
        // that the watched process could see.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::Ioctl::from(UFFDIO_REGISTER), &raw mut register) };
        self.check("ioctl(UFFDIO_REGISTER)", result)
    }

    fn check(&self, operation: &'static str, result: i32) -> Result<()> {
        match result {
            0 => Ok(()),
            _ => Err(Error::new(operation, "a userfaultfd", std::io::Error::last_os_error())),
        }
    }
}
