//! Locks on files: POSIX (fcntl(2)), of open file descriptions, and flock(2); and leases (fcntl(2), `F_SETLEASE`).
//!
//! A POSIX lock belongs to a process, the others to a description; the first process that holds a description takes
//! its locks again; of one that is only in flight, Limosa does. Taken last, because closing any descriptor of a file drops a process's POSIX locks on it.
//!
//! A lock of a description that a process outside of the tree holds, too, is refused: it would stay with that process, and
//! the restored tree could not take it again.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use limosa_kernel::proc::{FdInfo, FileId, LockAccess, LockKind, ProcDir};
use limosa_kernel::task::{self, Comparison};
use limosa_puppet::Program;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Refusal, RestoreError, Subject};
use crate::view::{DescriptionView, ProcessView};

const F_OFD_SETLK: i32 = 37;
const F_SETLEASE: i32 = 1024;
/// What to do about a lease that is refused.
const GIVE_UP: &str = "give it up (F_SETLEASE with F_UNLCK) before the checkpoint";

/// A lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    /// The descriptor through which it was taken; -1 where its description is only in flight.
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
    /// `F_SETLEASE`
    Lease,
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
                if let Some(reason) = lease_problem(lock, &link) {
                    let link = String::from_utf8_lossy(&link).into_owned();
                    let refusal = Refusal {
                        pid: process.pid,
                        subject: Subject::Descriptor { number, link },
                        reason: reason.into(),
                        remedy: GIVE_UP.into(),
                    };
                    return Err(refusal.into());
                }
                (Kind::Lease, seen)
            }
        };
        if !known {
            locks.push(FileLock::new(number, kind, lock));
        }
    }
    Ok(locks)
}

/// Why a lease cannot be carried, if it cannot.
fn lease_problem(lock: &limosa_kernel::proc::FileLock, link: &[u8]) -> Option<&'static str> {
    match lock.kind {
        LockKind::Delegation => Some("it holds a delegation of the file"),
        _ if lock.breaking => Some("its lease on the file is being broken, and it has not yet given it up"),
        // To read the file would break it.
        _ if link.ends_with(b" (deleted)") => Some("it holds a lease on a deleted file"),
        _ => None,
    }
}

/// The locks that belong to a description which is only in flight. It has no lock of a process's, which would have gone
/// when the process closed it.
pub(crate) fn in_flight(view: &DescriptionView) -> Result<Vec<FileLock>, CaptureError> {
    let mut locks = Vec::new();
    for lock in &view.info.locks {
        match lock.kind {
            LockKind::Posix => {}
            LockKind::OpenFileDescription => locks.push(FileLock::new(-1, Kind::Description, lock)),
            LockKind::Flock => locks.push(FileLock::new(-1, Kind::Flock, lock)),
            LockKind::Lease | LockKind::Delegation => {
                return Err(view.refuse("there is a lease on the file", GIVE_UP).into());
            }
        }
    }
    Ok(locks)
}

/// Refuses the locks of descriptions among `found` that a process other than those of `tree`, by PID, holds, too.
///
/// Only where there are such locks are the descriptors of all other processes looked at. Who ends meanwhile, or may not
/// be looked at (a thread of the kernel's), holds nothing.
pub(crate) fn refuse_outsiders(found: &[DescriptionView], tree: &HashSet<i32>) -> Result<(), CaptureError> {
    let locked: Vec<&DescriptionView> = found.iter().filter(|view| has_lock_of_its_own(view)).collect();
    if locked.is_empty() {
        return Ok(());
    }
    let own = std::process::id() as i32;
    let listed = std::fs::read_dir("/proc");
    let listed = listed.map_err(|source| CaptureError::Io { what: "listing /proc", pid: own, source })?;
    let pids = listed.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| *pid != own && !tree.contains(pid)) {
        let Ok(outsider) = ProcDir::open(pid) else { continue };
        for number in outsider.fds().unwrap_or_default() {
            let Ok(file) = outsider.file_id(&format!("fd/{number}")) else { continue };
            let same = |view: &&&DescriptionView| {
                let (ours, of_ours) = view.handle();
                file == (FileId { dev: view.stat.st_dev, ino: view.stat.st_ino })
                    && task::kcmp(ours, pid, Comparison::File, of_ours, number as u64)
                        .is_ok_and(std::cmp::Ordering::is_eq)
            };
            if let Some(view) = locked.iter().find(same) {
                let name = outsider.comm().unwrap_or_default();
                let reason = format!(
                    "process {pid} ({}) outside of the tree has it open, too (descriptor {number}), and with it its lock",
                    String::from_utf8_lossy(&name).trim_end()
                );
                let remedy =
                    "end that process, or checkpoint the tree that it belongs to (flock(1) has --close)";
                return Err(view.refuse(reason, remedy).into());
            }
        }
    }
    Ok(())
}

/// Whether there is a lock that belongs to the description, not to a process.
fn has_lock_of_its_own(view: &DescriptionView) -> bool {
    let of_its_own = |kind| matches!(kind, LockKind::Flock | LockKind::OpenFileDescription | LockKind::Lease);
    view.info.locks.iter().any(|lock| of_its_own(lock.kind))
}

impl FileLock {
    fn new(number: i32, kind: Kind, lock: &limosa_kernel::proc::FileLock) -> Self {
        let length = lock.end.map_or(0, |end| end.saturating_sub(lock.start).saturating_add(1));
        Self { number, kind, exclusive: lock.access == LockAccess::Write, start: lock.start, length }
    }

    /// Takes the lock of a description again that is only in flight.
    pub(crate) fn take(&self, description: &OwnedFd) -> Result<(), RestoreError> {
        let taken = match (self.kind, self.exclusive) {
            (Kind::Flock, true) => rustix::fs::flock(description, FlockOperation::NonBlockingLockExclusive),
            (Kind::Flock, false) => rustix::fs::flock(description, FlockOperation::NonBlockingLockShared),
            (Kind::Description, exclusive) => {
                return Ok(task::lock_description(description, exclusive, self.start, self.length)?);
            }
            (Kind::Posix | Kind::Lease, _) => {
                return Err(RestoreError::inconsistent(
                    "a process's lock or lease on a file that no process has open",
                ));
            }
        };
        taken.map_err(RestoreError::rebuild("a lock on a file that is in flight", "flock"))
    }

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
            Kind::Lease => {
                let kind = if self.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                let purpose = "take a lease on a file again, which no other process may have open in its way";
                program.call(purpose, libc::SYS_fcntl, [self.number.into(), F_SETLEASE.into(), kind.into()]);
            }
            Kind::Flock => {
                let operation = if self.exclusive { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
                let purpose =
                    "take the lock on a file again, which no other process may have taken meanwhile";
                program.call(purpose, libc::SYS_flock, [self.number.into(), operation.into()]);
            }
        }
    }
}
