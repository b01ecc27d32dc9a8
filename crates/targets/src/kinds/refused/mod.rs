//! What cannot be carried, each by the name of the option: a checkpoint must refuse it by name, and leave it alone.

mod restrictions;
mod sockets;

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use super::{Setting, Verify, message_queues};
use crate::sys;

/// Words of a structure; `perf_event_attr`, `io_uring_params` and the like have fewer.
const STRUCTURE: usize = 20;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let kind = setting.options.first().context("which object?")?.clone();
    let kept = make(setting, &kind).with_context(|| format!("making {kind}"))?;
    Ok(Box::new(move || {
        for descriptor in &kept {
            rustix::fs::fstat(descriptor)?;
        }
        Ok(String::new())
    }))
}

/// Stands for the address of the structure among the arguments of [`raw`].
const HERE: i64 = i64::MIN;

/// Makes the object; gives the descriptors that keep it.
fn make(setting: &Setting, kind: &str) -> Result<Vec<OwnedFd>> {
    let open = |path: &str| rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let descriptor = match kind {
        "io-uring" => raw(libc::SYS_io_uring_setup, &[], [4, HERE, 0, 0, 0])?,
        "userfaultfd" => raw(libc::SYS_userfaultfd, &[], [i64::from(libc::O_CLOEXEC) | 1, 0, 0, 0, 0])?,
        "fanotify" => raw(libc::SYS_fanotify_init, &[], [0, 0, 0, 0, 0])?,
        // A software event (type 1) that counts nothing (`PERF_COUNT_SW_DUMMY`), of this process, anywhere.
        "perf" => raw(libc::SYS_perf_event_open, &[1 | 112 << 32, 9], [HERE, 0, -1, -1, 0])?,
        // BPF_MAP_CREATE of an array: type, sizes of key and value, entries.
        "bpf" => raw(libc::SYS_bpf, &[2 | 4 << 32, 4 | 1 << 32], [0, HERE, (STRUCTURE * 8) as i64, 0, 0])?,
        "kvm" => open("/dev/kvm")?,
        "tun" => open("/dev/net/tun")?,
        "fuse" => open("/dev/fuse")?,
        "network-namespace" => File::open("/proc/self/ns/net")?.into(),
        "thread-file" => File::open(thread_file()?)?.into(),
        "aio" => {
            let mut context = 0_u64;
            // SAFETY: the kernel writes the context's address.
            sys::check(unsafe { libc::syscall(libc::SYS_io_setup, 16, &raw mut context) })?;
            return Ok(Vec::new());
        }
        "lease" => lease(setting)?,
        "mq-notify" => {
            let queue = message_queues::create("registered", OFlags::RDWR, 2)?;
            message_queues::register(&queue)?;
            queue
        }
        "dnotify" => restrictions::notified()?,
        "keys" | "own-keys" => return restrictions::keys(kind),
        "landlock" | "landlock-thread" => return restrictions::landlock(kind),
        "child-namespace" => return child_namespace(),
        other => return sockets::make(other),
    };
    Ok(vec![descriptor])
}

/// A call whose result is a descriptor. The structure at [`HERE`] begins with `words`.
fn raw(number: i64, words: &[u64], arguments: [i64; 5]) -> Result<OwnedFd> {
    let mut structure = [0_u64; STRUCTURE];
    structure[..words.len()].copy_from_slice(words);
    let address = structure.as_mut_ptr().expose_provenance() as i64;
    let [first, second, third, fourth, fifth] =
        arguments.map(|argument| if argument == HERE { address } else { argument });
    // SAFETY: the only address among the arguments is that of a live structure, larger than what the kernel reads or
    // writes; the result is a new descriptor.
    unsafe {
        let descriptor = sys::check(libc::syscall(number, first, second, third, fourth, fifth))?;
        Ok(OwnedFd::from_raw_fd(descriptor as i32))
    }
}

/// A file of `/proc` that tells of another thread than the first.
fn thread_file() -> Result<String> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = tell.send(rustix::thread::gettid().as_raw_pid());
        loop {
            std::thread::park();
        }
    });
    Ok(format!("/proc/self/task/{}/stat", told.recv()?))
}

fn lease(setting: &Setting) -> Result<OwnedFd> {
    const F_SETLEASE: i32 = 1024;
    let path = setting.protocol.beside("leased");
    std::fs::write(&path, "x")?;
    let file: OwnedFd = File::open(&path)?.into();
    // SAFETY: numbers only.
    let taken = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&file), F_SETLEASE, libc::F_RDLCK) };
    sys::check(taken.into())?;
    // Somebody wants to write, and has this process told by a signal that it does not hear.
    // SAFETY: a signal is ignored.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let writes = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let refused = rustix::fs::open(&path, writes, Mode::empty());
    anyhow::ensure!(refused.is_err(), "a lease is no obstacle");
    Ok(file)
}

/// A child in a network namespace of its own, which waits until its parent ends.
fn child_namespace() -> Result<Vec<OwnedFd>> {
    let (hears, end) = rustix::pipe::pipe()?;
    let (ready, set_up) = rustix::pipe::pipe()?;
    let (closed, said) = (end.try_clone()?, set_up.try_clone()?);
    sys::fork(move || {
        let mut byte = [0];
        // The parent's end must be the only one left, so that its end ends this.
        drop(closed);
        // SAFETY: this process has one thread.
        let alone =
            unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 && rustix::io::write(&said, b"x").is_ok();
        i32::from(!alone || rustix::io::read(&hears, &mut byte[..]).is_err())
    })?;
    drop(set_up);
    let mut byte = [0];
    anyhow::ensure!(rustix::io::read(&ready, &mut byte[..])? == 1, "the child has no namespace");
    Ok(vec![end])
}
