//! POSIX message queues: with messages of several priorities, full, empty with a thread that waits for a message, opened
//! by a path, and without a name; descriptors that block and that do not.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};

use super::{Setting, Verify};
use crate::sys;

const SIZE: usize = 64;
const OWNER: (u32, u32, u32) = (0o640, 7, 8);

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let made = OFlags::RDWR | OFlags::NONBLOCK;
    let mixed = create("mixed", made, 8)?;
    for (priority, content) in MIXED_AS_SENT {
        send(&mixed, priority, content)?;
    }
    rustix::fs::fchown(
        &mixed,
        Some(rustix::fs::Uid::from_raw(OWNER.1)),
        Some(rustix::fs::Gid::from_raw(OWNER.2)),
    )?;
    rustix::fs::fchmod(&mixed, Mode::from_raw_mode(OWNER.0))?;
    // One description under two numbers, one of which stays open over execve.
    let blocking = open("mixed", OFlags::RDONLY)?;
    let twice = blocking.try_clone()?;
    rustix::io::fcntl_setfd(&twice, rustix::io::FdFlags::empty())?;

    let full = create("full", OFlags::WRONLY | OFlags::NONBLOCK, 1)?;
    send(&full, 1, b"whole")?;

    let empty = create("empty", OFlags::RDWR, 2)?;
    let waits = open("empty", OFlags::RDONLY)?;
    let (tell, told) = channel();
    std::thread::spawn(move || {
        while let Ok(message) = receive(&waits) {
            if tell.send(message).is_err() {
                break;
            }
        }
    });

    let nameless = create("nameless", OFlags::WRONLY, 3)?;
    let nameless_too = open("nameless", made)?;
    unlink("nameless")?;
    send(&nameless, 5, b"left over")?;
    // The name is another's now.
    let named = create("nameless", made, 2)?;

    let path = "/dev/mqueue/mixed";
    let by_path = if std::path::Path::new(path).exists() { Some(File::open(path)?) } else { None };

    Ok(Box::new(move || {
        let mut expected: Vec<(u32, &[u8])> = MIXED_AS_SENT.to_vec();
        expected.sort_by_key(|(priority, _)| std::cmp::Reverse(*priority));
        ensure!(attributes(&mixed)? == [i64::from(libc::O_NONBLOCK), 8, 64, 5], "{:?}", attributes(&mixed)?);
        for (priority, content) in &expected {
            let message = receive(&mixed)?;
            ensure!(message == (*priority, content.to_vec()), "{message:?} instead of priority {priority}");
        }
        ensure!(receive(&mixed).is_err(), "there is one message too many");
        for (priority, content) in MIXED_AS_SENT {
            send(&mixed, priority, content)?;
        }
        let stat = rustix::fs::fstat(&mixed)?;
        ensure!((stat.st_mode & 0o777, stat.st_uid, stat.st_gid) == OWNER, "{stat:?}");
        ensure!(attributes(&blocking)?[0] == 0, "it does not block");
        ensure!(send(&blocking, 0, b"no").is_err(), "it can be written");
        // Flags belong to the description, which two numbers share.
        set_flags(&blocking, libc::O_NONBLOCK)?;
        ensure!(attributes(&twice)?[0] == i64::from(libc::O_NONBLOCK), "they share no description");
        set_flags(&twice, 0)?;
        ensure!(!rustix::io::fcntl_getfd(&twice)?.contains(rustix::io::FdFlags::CLOEXEC), "close-on-exec");
        ensure!(
            rustix::io::fcntl_getfd(&blocking)?.contains(rustix::io::FdFlags::CLOEXEC),
            "no close-on-exec"
        );

        ensure!(send(&full, 2, b"more").is_err(), "the full queue has room");
        send(&empty, 9, b"wake up")?;
        let message = told.recv_timeout(Duration::from_secs(10)).context("the thread that waits")?;
        ensure!(message == (9, b"wake up".to_vec()), "{message:?}");

        let message = receive(&nameless_too)?;
        ensure!(message == (5, b"left over".to_vec()), "{message:?}");
        send(&nameless, 5, b"left over")?;
        ensure!(rustix::fs::fstat(&nameless)?.st_nlink == 0, "it has a name");
        ensure!(attributes(&nameless)?[..3] == [0, 3, 64], "{:?}", attributes(&nameless)?);
        ensure!(attributes(&named)?[1..] == [2, 64, 0], "{:?}", attributes(&named)?);
        if let Some(by_path) = &by_path {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", by_path.as_raw_fd()))?;
            ensure!(link.as_os_str() == path, "{}", link.display());
        }
        Ok(String::new())
    }))
}

const MIXED_AS_SENT: [(u32, &[u8]); 5] = [(0, b"a"), (7, b"b"), (7, &[9; SIZE]), (0, b""), (3, b"c")];

fn name(name: &str) -> Result<CString> {
    Ok(CString::new(format!("limosa-target-{name}"))?)
}

pub fn create(name: &str, flags: OFlags, most: i64) -> Result<OwnedFd> {
    let attributes: [i64; 8] = [0, most, SIZE as i64, 0, 0, 0, 0, 0];
    // One of an earlier target may be there: queues outlive who made them.
    let _ = unlink(name);
    call_open(name, flags | OFlags::CREATE | OFlags::EXCL, Some(&attributes))
}

fn open(name: &str, flags: OFlags) -> Result<OwnedFd> {
    call_open(name, flags, None)
}

fn call_open(queue: &str, flags: OFlags, attributes: Option<&[i64; 8]>) -> Result<OwnedFd> {
    let attributes = attributes.map_or(std::ptr::null(), std::ptr::from_ref);
    let (path, flags) = (name(queue)?, (flags | OFlags::CLOEXEC).bits());
    // SAFETY: the kernel reads a terminated name and, if there are any, attributes, which are live.
    let opened = unsafe { libc::syscall(libc::SYS_mq_open, path.as_ptr(), flags, 0o600, attributes) };
    let opened = sys::check(opened).with_context(|| format!("mq_open of {queue}"))?;
    // SAFETY: a new descriptor that we own.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) })
}

fn unlink(queue: &str) -> Result<()> {
    let path = name(queue)?;
    // SAFETY: the kernel reads a terminated name.
    sys::check(unsafe { libc::syscall(libc::SYS_mq_unlink, path.as_ptr()) })?;
    Ok(())
}

fn send(queue: &OwnedFd, priority: u32, content: &[u8]) -> Result<()> {
    let never: *const libc::timespec = std::ptr::null();
    // SAFETY: the kernel reads as many bytes as there are.
    let sent = unsafe {
        let start = content.as_ptr();
        libc::syscall(libc::SYS_mq_timedsend, queue.as_raw_fd(), start, content.len(), priority, never)
    };
    sys::check(sent).context("mq_send")?;
    Ok(())
}

fn receive(queue: &OwnedFd) -> Result<(u32, Vec<u8>)> {
    let (mut buffer, mut priority) = (vec![0_u8; SIZE], 0_u32);
    let never: *const libc::timespec = std::ptr::null();
    // SAFETY: the kernel writes at most as many bytes as there are, and the priority.
    let got = unsafe {
        let start = buffer.as_mut_ptr();
        let queue = queue.as_raw_fd();
        libc::syscall(libc::SYS_mq_timedreceive, queue, start, SIZE, &raw mut priority, never)
    };
    buffer.truncate(sys::check(got).context("mq_receive")? as usize);
    Ok((priority, buffer))
}

/// Flags, most messages, longest message, and how many wait.
fn attributes(queue: &OwnedFd) -> Result<[i64; 4]> {
    let mut attributes = [0_i64; 8];
    let nothing: *const [i64; 8] = std::ptr::null();
    // SAFETY: the kernel writes the structure.
    sys::check(unsafe {
        libc::syscall(libc::SYS_mq_getsetattr, queue.as_raw_fd(), nothing, &raw mut attributes)
    })?;
    let [flags, most, size, waiting, ..] = attributes;
    Ok([flags, most, size, waiting])
}

fn set_flags(queue: &OwnedFd, flags: i32) -> Result<()> {
    let attributes: [i64; 8] = [flags.into(), 0, 0, 0, 0, 0, 0, 0];
    let nothing: *mut [i64; 8] = std::ptr::null_mut();
    // SAFETY: the kernel reads the structure.
    sys::check(unsafe {
        libc::syscall(libc::SYS_mq_getsetattr, queue.as_raw_fd(), &raw const attributes, nothing)
    })?;
    Ok(())
}

/// Registers for a signal at the next message.
pub fn register(queue: &OwnedFd) -> Result<()> {
    // SAFETY: all fields of the structure are numbers; zeros are valid.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_SIGNAL;
    event.sigev_signo = libc::SIGURG;
    // SAFETY: the kernel reads the structure.
    sys::check(unsafe { libc::syscall(libc::SYS_mq_notify, queue.as_raw_fd(), &raw const event) })?;
    Ok(())
}
