//! Locks on files that several processes have to do with: locks of one process against another's, and locks of open
//! file descriptions that only a child still holds. Another child asks who holds what.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let path = setting.protocol.beside("locked");
    fs::write(&path, sys::pattern(1000, 1))?;
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    // One description, locked as a whole and in part; the parent closes its descriptor of it.
    let handed_on = open()?;
    flock(&handed_on, FlockOperation::LockExclusive).context("flock")?;
    lock(&handed_on, libc::F_OFD_SETLK, libc::F_WRLCK, 900..950)?;
    // Another, through which both processes take locks of their own; what they share they read.
    let shared = open()?;
    let (kept, of_child) = (handed_on.try_clone()?, shared.try_clone()?);
    let child = Child::start(&setting.protocol, "holder", move |_| {
        lock(&of_child, libc::F_SETLK, libc::F_WRLCK, 20..30)?;
        lock(&of_child, libc::F_SETLK, libc::F_RDLCK, 150..250)?;
        Ok(Box::new(move || {
            let _held = (&kept, &of_child);
            Ok(String::new())
        }))
    })?;
    drop(handed_on);
    let leases = [(libc::F_RDLCK, "leased"), (libc::F_WRLCK, "leased-alone")]
        .map(|(kind, name)| lease(&setting.protocol.beside(name), kind));
    let [read_lease, write_lease] = leases;
    let (read_lease, write_lease) = (read_lease?, write_lease?);
    // Now: to close any descriptor of the file drops this process's locks.
    lock(&shared, libc::F_SETLK, libc::F_WRLCK, 0..10)?;
    lock(&shared, libc::F_SETLK, libc::F_RDLCK, 100..200)?;
    Ok(Box::new(move || {
        child.verify()?;
        // Closing a file would drop this process's locks: whoever asks is another.
        let asked = path.clone();
        let asker =
            sys::fork(move || i32::from(check(&asked).inspect_err(|error| eprintln!("{error:#}")).is_err()))?;
        let ended = rustix::process::waitpid(Some(asker), rustix::process::WaitOptions::empty())?;
        ensure!(ended.is_some_and(|(_, status)| status.exit_status() == Some(0)), "locks are missing");
        lock(&shared, libc::F_SETLK, libc::F_WRLCK, 0..10)?;
        for (file, kind) in [(&read_lease, libc::F_RDLCK), (&write_lease, libc::F_WRLCK)] {
            // SAFETY: numbers only.
            let held = unsafe { libc::fcntl(file.as_raw_fd(), F_GETLEASE) };
            ensure!(held == kind, "the lease is {held}, not {kind}");
        }
        Ok(String::new())
    }))
}

const F_SETLEASE: i32 = 1024;
const F_GETLEASE: i32 = 1025;

/// A file of its own with a lease on it.
fn lease(path: &Path, kind: i32) -> Result<File> {
    fs::write(path, "leased")?;
    let file = File::open(path)?;
    // SAFETY: numbers only.
    sys::check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETLEASE, kind) }.into()).context("F_SETLEASE")?;
    Ok(file)
}

fn lock(file: &File, command: i32, kind: i32, range: std::ops::Range<i64>) -> Result<()> {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: range.start,
        l_len: range.end - range.start,
        l_pid: 0,
    };
    // SAFETY: the kernel reads the structure.
    sys::check(i64::from(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) }))
        .with_context(|| format!("locking {range:?}"))?;
    Ok(())
}

/// Whether a process without locks finds taken what is taken, and free what is free.
fn check(path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let taken = flock(&file, FlockOperation::NonBlockingLockExclusive);
    ensure!(taken == Err(Errno::WOULDBLOCK), "the whole file is not locked: {taken:?}");
    for (range, written, read) in [
        (0..10, false, false),
        (10..20, true, true),
        (20..30, false, false),
        (100..120, false, true),
        (220..240, false, true),
        (900..950, false, false),
        (950..960, true, true),
    ] {
        for (kind, expected) in [(libc::F_RDLCK, read), (libc::F_WRLCK, written)] {
            let free = lock(&file, libc::F_SETLK, kind, range.clone()).is_ok();
            ensure!(free == expected, "{range:?} is free for kind {kind}: {free}");
        }
    }
    Ok(())
}
