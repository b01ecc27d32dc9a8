//! A terminal of a container: pseudo-terminals (pty(7)).
//!
//! The container has the slave, number [`NUMBER`] of its own `/dev/pts`. The master is kept outside: by whoever runs or
//! restores the container in the foreground, who [joins](join()) it to the terminal that it is on, or by a [`Keeper`], a
//! process of its own that outlives Limosa and lends the master to whoever attaches.

mod join;
mod keeper;

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use limosa_kernel::namespace::{self, Kind};
use rustix::fs::{Mode, OFlags};
use rustix::termios;

pub(crate) use join::{Joined, Manner, join};
pub use keeper::{AttachError, Attached, Keep, Keeper, attach};

/// The number of a container's own terminal, the first in its `/dev/pts`.
pub(crate) const NUMBER: u32 = 0;

/// The two ends of a pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Pair {
    /// The end of whoever sits before it.
    pub outside: OwnedFd,
    /// The end of the programs that use it, one of the container's `/dev/pts`.
    pub inside: OwnedFd,
}

/// Opens a terminal of the mount namespace behind `mount`, of the size of ours.
pub(crate) fn open(mount: BorrowedFd<'_>) -> io::Result<Pair> {
    std::thread::scope(|scope| {
        // A thread of its own: it does not come back from the namespace.
        let thread = scope.spawn(|| -> io::Result<Pair> {
            namespace::unshare_directories().map_err(io::Error::other)?;
            namespace::enter(mount, Kind::Mount).map_err(io::Error::other)?;
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let outside = rustix::fs::open("/dev/ptmx", flags, Mode::empty())?;
            rustix::pty::unlockpt(&outside)?;
            let flags = (OFlags::RDWR | OFlags::NOCTTY).bits() as i32;
            let inside = limosa_kernel::terminal::open_slave(&outside, flags).map_err(io::Error::other)?;
            Ok(Pair { outside, inside })
        });
        let pair = thread.join().map_err(|_| io::Error::other("the thread that opens it panicked"))??;
        copy_size(&pair.outside);
        Ok(pair)
    })
}

/// Gives the terminal the size of ours, if we have one.
fn copy_size(outside: &OwnedFd) {
    if let Ok(size) = termios::tcgetwinsize(io::stdin()) {
        let _ = termios::tcsetwinsize(outside, size);
    }
}

/// Likewise; and whoever draws on it learns of a change, so that it draws again what this terminal never showed.
pub(crate) fn show_anew(outside: &OwnedFd) {
    if let Ok(mut size) = termios::tcgetwinsize(io::stdin()) {
        size.ws_row = size.ws_row.saturating_add(1);
        let _ = termios::tcsetwinsize(outside, size);
        copy_size(outside);
    }
}

/// Reads what the terminal has, a buffer full, or all of it if it is the last.
fn drain(outside: &OwnedFd, all: bool, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    use rustix::io::Errno;
    let mut buffer = [0_u8; 4096];
    loop {
        match rustix::io::read(outside, &mut buffer) {
            Ok(length @ 1..) => take(buffer.get(..length).unwrap_or_default())?,
            // EIO: everyone inside has closed it.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::IO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        if !all {
            return Ok(());
        }
    }
}

/// Opens the log of a container to add to it.
fn open_log(path: &std::path::Path) -> io::Result<File> {
    File::options().append(true).open(path)
}
