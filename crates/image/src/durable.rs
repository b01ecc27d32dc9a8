//! Bringing files to the disk, several at a time.
//!
//! Each fsync(2) ends with a flush of the device's cache, 1 to 4 ms where it was measured (ext4 on a virtual
//! disk), and flushes that are asked for at the same time become one. So a small checkpoint is durable two to
//! three times as fast as if its files were synchronized one after the other; `docs/format.md` has the figures.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use limosa_kernel::fault;
use rustix::fs::{Mode, OFlags};

use crate::error::WriteError;

/// How many are synchronized at once; more do not make the flushes fewer.
const MOST_THREADS: usize = 8;
/// `f_type` of tmpfs (statfs(2)), where fsync(2) does nothing and threads would cost more than they save.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A file or directory that is to survive a crash.
pub(crate) enum Unsynced<'a> {
    /// An open one.
    Open(BorrowedFd<'a>, PathBuf),
    /// One that is opened for it: there may be more blobs than descriptors.
    Below(BorrowedFd<'a>, &'a str, PathBuf),
}

/// Synchronizes all of `files`, in any order. Returns the first error.
pub(crate) fn sync_all(files: &[Unsynced<'_>]) -> Result<(), WriteError> {
    let next = AtomicUsize::new(0);
    let first_error = Mutex::new(None);
    let work = || {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = file.sync() {
                first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    let helpers = if in_memory(files) { 0 } else { files.len().min(MOST_THREADS).saturating_sub(1) };
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // Where no thread can be had, this one does all of the work.
            let _ = std::thread::Builder::new().name("sync".into()).spawn_scoped(scope, work);
        }
        work();
    });
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Synchronizes one open file or directory.
pub(crate) fn sync(file: impl AsFd, path: &Path) -> Result<(), WriteError> {
    fault::point();
    rustix::fs::fsync(file).map_err(|error| WriteError::io("fsync", path, 0, error))
}

impl Unsynced<'_> {
    fn sync(&self) -> Result<(), WriteError> {
        match self {
            Self::Open(file, path) => sync(file, path),
            Self::Below(directory, name, path) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                let file = rustix::fs::openat(directory, *name, flags, Mode::empty())
                    .map_err(|error| WriteError::io("openat", path, 0, error))?;
                sync(file, path)
            }
        }
    }
}

fn in_memory(files: &[Unsynced<'_>]) -> bool {
    let Some(Unsynced::Open(file, _) | Unsynced::Below(file, ..)) = files.first() else { return true };
    rustix::fs::fstatfs(file).is_ok_and(|filesystem| filesystem.f_type as u64 == TMPFS_MAGIC)
}
