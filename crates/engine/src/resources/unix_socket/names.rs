//! Names of unix sockets at a restore: binding to them, and reaching what is bound.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use limosa_kernel::net::raw;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::net::SocketAddrUnix;

use super::rebuild::fail;
use super::{Name, SocketFile};
use crate::error::RestoreError;

/// The address under which a bound socket that we have can be reached, whatever root its path is meant below.
pub(super) fn address(name: &Name, bound: &OwnedFd) -> Result<(SocketAddrUnix, Option<OwnedFd>), RestoreError> {
    match name {
        Name::Abstract(name) => {
            Ok((SocketAddrUnix::new_abstract_name(name).map_err(fail("making an address"))?, None))
        }
        Name::Path(_) => {
            let file = raw::unix_file(bound)?;
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            Ok((SocketAddrUnix::new(path).map_err(fail("making an address"))?, Some(file)))
        }
    }
}

/// The same for a name of somebody else.
pub(super) fn address_below(
    name: &Name,
    root: BorrowedFd<'_>,
) -> Result<(SocketAddrUnix, Option<OwnedFd>), RestoreError> {
    use rustix::fs::{OFlags, ResolveFlags, openat2};
    match name {
        Name::Abstract(name) => {
            Ok((SocketAddrUnix::new_abstract_name(name).map_err(fail("making an address"))?, None))
        }
        Name::Path(path) => {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let file = openat2(root, path.as_slice(), flags, Mode::empty(), ResolveFlags::IN_ROOT);
            // A path that leads nowhere fails in connect(2), where it is reported.
            let number = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
            let address = SocketAddrUnix::new(format!("/proc/self/fd/{number}"));
            Ok((address.map_err(fail("making an address"))?, file.ok()))
        }
    }
}

/// Binds to exactly the captured name. A path is resolved by a thread whose root is the tree's, and whose working
/// directory is the one that a relative path was meant in.
/// Without a `file` the path had been removed: it is removed again.
pub(super) fn bind(
    socket: &OwnedFd,
    name: &Name,
    file: Option<&SocketFile>,
    root: BorrowedFd<'_>,
) -> Result<(), RestoreError> {
    let path = match name {
        Name::Abstract(name) => {
            let address = SocketAddrUnix::new_abstract_name(name).map_err(fail("making an address"))?;
            return rustix::net::bind(socket, &address).map_err(fail("bind"));
        }
        Name::Path(path) => path,
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<(), RestoreError> {
            limosa_kernel::namespace::unshare_directories()?;
            rustix::process::fchdir(root).map_err(fail("fchdir"))?;
            rustix::process::chroot(".").map_err(fail("chroot"))?;
            if path.first() != Some(&b'/') {
                let whole = file.map(|file| file.path.as_slice()).unwrap_or_default();
                let directory = whole.strip_suffix(path.as_slice()).filter(|directory| !directory.is_empty());
                let Some(directory) = directory else {
                    return Err(RestoreError::inconsistent("a relative path of a socket without its directory"));
                };
                rustix::process::chdir(directory).map_err(fail("chdir"))?;
            }
            bind_here(socket, path, file)
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn bind_here(socket: &OwnedFd, path: &[u8], file: Option<&SocketFile>) -> Result<(), RestoreError> {
    let address = SocketAddrUnix::new(path).map_err(fail("making an address"))?;
    if file.is_some()
        && let Ok(stat) = rustix::fs::lstat(path)
        && FileType::from_raw_mode(stat.st_mode) == FileType::Socket
    {
        // What the checkpointed socket left.
        rustix::fs::unlink(path).map_err(fail("unlink"))?;
    }
    rustix::net::bind(socket, &address).map_err(|errno| RestoreError::File {
        path: String::from_utf8_lossy(path).into_owned(),
        reason: format!("bind: {errno}"),
    })?;
    match file {
        None => rustix::fs::unlink(path).map_err(fail("unlink")),
        Some(file) => {
            rustix::fs::chmod(path, Mode::from_raw_mode(file.mode & 0o7777)).map_err(fail("chmod"))?;
            let (uid, gid) = (Uid::from_raw(file.uid), Gid::from_raw(file.gid));
            rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(fail("chown"))
        }
    }
}
