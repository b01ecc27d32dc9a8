//! What a process has set up beside its descriptors, and what no file shows: Landlock, keys, the watching of a directory.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::channel;

use anyhow::{Context, Result};

use crate::kinds::refused::{HERE, raw};
use crate::sys;

/// A directory that is watched by its descriptor.
pub fn notified() -> Result<OwnedFd> {
    const DN_CREATE: i32 = 4;
    let directory = File::open("/tmp")?;
    // SAFETY: numbers only. Nothing is made there that this process would be told of by a deadly signal.
    unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
        sys::check(libc::fcntl(directory.as_raw_fd(), libc::F_NOTIFY, DN_CREATE).into())?;
    }
    Ok(directory.into())
}

/// A key in a session keyring, or in that of the thread.
pub fn keys(kind: &str) -> Result<Vec<OwnedFd>> {
    if kind == "keys" {
        sys::join_session_keyring(None)?;
        sys::add_key("a key", sys::SESSION_KEYRING)?;
    } else {
        const THREAD_KEYRING: i32 = -1;
        sys::add_key("a key", THREAD_KEYRING)?;
    }
    Ok(Vec::new())
}

/// A process that may execute nothing, or a thread of it; neither is what Limosa sees of it.
pub fn landlock(kind: &str) -> Result<Vec<OwnedFd>> {
    if kind == "landlock" {
        restrict()?;
        return Ok(Vec::new());
    }
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let _ = tell.send(restrict());
        loop {
            std::thread::park();
        }
    });
    told.recv().context("the thread ended")??;
    Ok(Vec::new())
}

fn restrict() -> Result<()> {
    /// `LANDLOCK_ACCESS_FS_EXECUTE`, the first field of `struct landlock_ruleset_attr`.
    const EXECUTE: u64 = 1;
    let rules = raw(libc::SYS_landlock_create_ruleset, &[EXECUTE], [HERE, 8, 0, 0, 0])?;
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: numbers only.
    sys::check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) })?;
    Ok(())
}
