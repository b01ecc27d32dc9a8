//! Locks on files: POSIX (fcntl(2)), of open file descriptions, and flock(2).
//!
//! A POSIX lock belongs to a process, the others to a description; the first process that holds a description takes
//! its locks again. Taken last, because closing any descriptor of a file drops a process's POSIX locks on it.

use limosa_kernel::proc::{FdInfo, LockAccess, LockKind};
use limosa_puppet::Program;
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Refusal, Subject};
use crate::view::ProcessView;

const F_OFD_SETLK: i32 = 37;

/// A lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    /// The descriptor through which it was taken.
    pub number: i32,
    /// What kind.
    pub kind: Kind,
    /// Whether it is exclusive.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Bytes; 0 to the end of the file, wherever that is.
    pub length: u64,
}

/// Kinds of locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `F_SETLK`
    Posix,
    /// `F_OFD_SETLK`
    Description,
    /// `flock`
    Flock,
}

/// The locks that are to be taken again through a descriptor. `seen_here` and `seen` say whether this process and
/// whether any has had a descriptor of the same description already.
pub fn capture(
    process: &ProcessView,
    number: i32,
    info: &FdInfo,
    seen_here: bool,
    seen: bool,
) -> Result<Vec<FileLock>, CaptureError> {
    let mut locks = Vec::new();
    for lock in &info.locks {
        let (kind, known) = match lock.kind {
            LockKind::Posix => (Kind::Posix, seen_here),
            LockKind::OpenFileDescription => (Kind::Description, seen),
            LockKind::Flock => (Kind::Flock, seen),
            LockKind::Lease | LockKind::Delegation => {
                let link = process.proc.fd_link(number)?;
                let link = String::from_utf8_lossy(&link).into_owned();
                let refusal = Refusal {
                    pid: process.pid,
                    subject: Subject::Descriptor { number, link },
                    reason: "it holds a lease on the file".into(),
                    remedy: "give it up (F_SETLEASE with F_UNLCK) before the checkpoint".into(),
                };
                return Err(refusal.into());
            }
        };
        if !known {
            let length = lock.end.map_or(0, |end| end.saturating_sub(lock.start).saturating_add(1));
            let exclusive = lock.access == LockAccess::Write;
            locks.push(FileLock { number, kind, exclusive, start: lock.start, length });
        }
    }
    Ok(locks)
}

impl FileLock {
    /// Adds the call that takes the lock again; it fails if another process has taken it meanwhile.
    pub fn rebuild(&self, program: &mut Program) {
        let range = |program: &mut Program, command: i32| {
            let kind = if self.exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as u64;
            // struct flock: 16-bit type and origin, start, length, process.
            let lock = program.words(&[kind, self.start, self.length, 0]);
            let arguments = [self.number.into(), command.into(), lock.into()];
            let purpose = "take a lock on a file again, which no other process may have taken meanwhile";
            program.call(purpose, libc::SYS_fcntl, arguments);
        };
        match self.kind {
            Kind::Posix => range(program, libc::F_SETLK),
            Kind::Description => range(program, F_OFD_SETLK),
            Kind::Flock => {
                let operation = if self.exclusive { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
                let purpose =
                    "take the lock on a file again, which no other process may have taken meanwhile";
                program.call(purpose, libc::SYS_flock, [self.number.into(), operation.into()]);
            }
        }
    }
}
