//! Who is at the other end of a unix socket: made by the process itself, by a child under other users, by one that has
//! ended; and who sent what is queued.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, UCred, bind, listen, recvmsg,
    sendmsg, socket_with, sockopt,
};
use rustix::process::{Gid, Pid, Uid, WaitOptions, getpid, waitpid};

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys;

struct User {
    uid: u32,
    gid: u32,
    groups: &'static [u32],
}

const CLIENT: User = User { uid: 61_001, gid: 62_001, groups: &[63_001, 63_002] };
const LISTENER: User = User { uid: 61_002, gid: 62_002, groups: &[] };
const SENDER: (u32, u32) = (61_003, 62_003);

struct State {
    child: Child,
    ended: Pid,
    own: (UnixStream, UnixStream),
    /// Listened on by the process, connected to by the child.
    accepted: [UnixStream; 2],
    /// Listened on by a process that has ended.
    inherited: UnixListener,
    connected: UnixStream,
    accepted_by_inherited: UnixStream,
    /// Its queue is from the child, then from one that has ended.
    queue: (UnixStream, UnixStream),
    described: String,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let path = setting.protocol.beside("peers");
    let _ = fs::remove_file(&path);
    let abstract_name = SocketAddr::from_abstract_name(format!("limosa-peers-{}", std::process::id()))?;
    let listeners = [UnixListener::bind(&path)?, UnixListener::bind_addr(&abstract_name)?];
    let queue = UnixStream::pair()?;
    sockopt::set_socket_passcred(&queue.1, true)?;

    let child = Child::start(&setting.protocol, "client", |_| {
        let clients = as_user(&CLIENT, || {
            // Whoever connects to a path must be allowed to write to it: the target's directory is root's.
            let one = as_root_in_files(|| UnixStream::connect(&path))?;
            Ok([one, UnixStream::connect_addr(&abstract_name)?])
        })?;
        say(&queue.0, b"child")?;
        let described = describe_all(&clients)?;
        Ok(Box::new(move || {
            sys::compare_lines("peers in the child", &describe_all(&clients)?, &described)?;
            Ok(String::new())
        }))
    })?;
    let accepted = [listeners[0].accept()?.0, listeners[1].accept()?.0];

    let inherited_path = setting.protocol.beside("inherited");
    let (inherited, ended) = listen_and_end(&inherited_path, &queue.0)?;
    let connected = UnixStream::connect(&inherited_path)?;
    let accepted_by_inherited = inherited.accept()?.0;
    let mut state = State {
        child,
        ended,
        own: UnixStream::pair()?,
        accepted,
        inherited,
        connected,
        accepted_by_inherited,
        queue,
        described: String::new(),
    };
    state.check_setting()?;
    state.described = state.describe()?;
    Ok(Box::new(move || {
        sys::compare_lines("peers", &state.describe()?, &state.described)?;
        state.check_queue()?;
        state.child.verify()?;
        // A new connection sees who listens.
        let client = UnixStream::connect_addr(&abstract_name)?;
        listeners[1].accept()?;
        sys::compare_lines("a new peer", &describe(&client)?, &describe(&state.own.0)?)?;
        let client = UnixStream::connect(&inherited_path)?;
        state.inherited.accept()?;
        sys::compare_lines("a new peer", &describe(&client)?, &describe(&state.connected)?)?;
        Ok(String::new())
    }))
}

impl State {
    fn describe(&self) -> Result<String> {
        describe_all(&[
            &self.own.0,
            &self.own.1,
            &self.accepted[0],
            &self.accepted[1],
            &self.connected,
            &self.accepted_by_inherited,
        ])
    }

    /// What is compared later says what it should.
    fn check_setting(&self) -> Result<()> {
        let of = |pid: Pid, user: &User| {
            format!("process {pid}, user {}, group {}, {:?}\n", user.uid, user.gid, user.groups)
        };
        for end in &self.accepted {
            sys::compare_lines("a client", &describe(end)?, &of(self.child.pid, &CLIENT))?;
            ensure!(peer_process(end)? == self.child.pid.as_raw_pid(), "SO_PEERPIDFD is of another");
        }
        sys::compare_lines("a listener", &describe(&self.connected)?, &of(self.ended, &LISTENER))
    }

    fn check_queue(&self) -> Result<()> {
        let mut bytes = [0; 100];
        let mut space = [MaybeUninit::uninit(); 256];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let read = recvmsg(&self.queue.1, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?.bytes;
        // Another sender's bytes are another message.
        ensure!(&bytes[..read] == b"child", "{read} bytes are queued");
        let sender = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmCredentials(sender) => Some(sender),
            _ => None,
        });
        let sender = sender.context("no credentials came with a message")?;
        let seen = (sender.pid, sender.uid.as_raw(), sender.gid.as_raw());
        ensure!(seen == (self.child.pid, SENDER.0, SENDER.1), "a message came from {seen:?}");
        Ok(())
    }
}

fn describe_all(ends: &[impl AsFd]) -> Result<String> {
    ends.iter().map(describe).collect()
}

fn describe(end: impl AsFd) -> Result<String> {
    let peer = sockopt::socket_peercred(&end)?;
    let mut groups = [0_u32; 256];
    let mut length = size_of_val(&groups) as libc::socklen_t;
    let (fd, groups_pointer) = (end.as_fd().as_raw_fd(), groups.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `length` bytes to `groups`.
    sys::check(i64::from(unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, 59, groups_pointer, &raw mut length)
    }))
    .context("SO_PEERGROUPS")?;
    let groups = &groups[..length as usize / 4];
    Ok(format!("process {}, user {}, group {}, {groups:?}\n", peer.pid, peer.uid, peer.gid))
}

/// The process that `SO_PEERPIDFD` (Linux 6.5) refers to; where the kernel lacks it, that of `SO_PEERCRED`.
fn peer_process(end: impl AsFd) -> Result<i32> {
    const SO_PEERPIDFD: i32 = 77;
    let (mut number, mut length) = (-1_i32, 4);
    // SAFETY: the kernel writes four bytes to `number`.
    let answer = unsafe {
        libc::getsockopt(
            end.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut number).cast(),
            &raw mut length,
        )
    };
    if answer < 0 {
        return Ok(sockopt::socket_peercred(&end)?.pid.as_raw_pid());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(number) };
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:")).context("fdinfo of a pidfd")?;
    Ok(line.trim().parse()?)
}

/// A listening socket, on which a process called listen(2) as another user, said something, and ended.
fn listen_and_end(path: &Path, queue: &UnixStream) -> Result<(UnixListener, Pid)> {
    let _ = fs::remove_file(path);
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    let pid = sys::fork(|| {
        let done = as_user(&LISTENER, || Ok(listen(&socket, 5)?)).and_then(|()| say(queue, b"ended"));
        i32::from(done.is_err())
    })?;
    let (_, status) = waitpid(Some(pid), WaitOptions::empty())?.context("no child")?;
    ensure!(status.exit_status() == Some(0), "the listening child failed");
    Ok((UnixListener::from(socket), pid))
}

/// Sends bytes that say they are from this process and the user of [`SENDER`].
fn say(queue: &UnixStream, bytes: &[u8]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); 64];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let (uid, gid) = (Uid::from_raw(SENDER.0), Gid::from_raw(SENDER.1));
    control.push(SendAncillaryMessage::ScmCredentials(UCred { pid: getpid(), uid, gid }));
    sendmsg(queue, &[IoSlice::new(bytes)], &mut control, SendFlags::empty())?;
    Ok(())
}

/// Does something with the effective user and groups of another.
fn as_user<T>(user: &User, what: impl FnOnce() -> Result<T>) -> Result<T> {
    let become_user = |uid: u32, gid: u32, groups: &[u32]| -> Result<()> {
        let (no, groups_pointer) = (u32::MAX, groups.as_ptr());
        // SAFETY: of the raw calls one reads `groups`, the others take numbers. One thread: no other must follow.
        unsafe {
            if uid == 0 {
                sys::check(libc::syscall(libc::SYS_setresuid, no, uid, no))?;
            }
            sys::check(libc::syscall(libc::SYS_setgroups, groups.len(), groups_pointer))?;
            sys::check(libc::syscall(libc::SYS_setresgid, no, gid, no))?;
            if uid != 0 {
                sys::check(libc::syscall(libc::SYS_setresuid, no, uid, no))?;
            }
        }
        Ok(())
    };
    become_user(user.uid, user.gid, user.groups).context("becoming another user")?;
    let done = what();
    become_user(0, 0, &[]).context("becoming root again")?;
    done
}

/// Has the filesystem see root, whoever the effective user is.
fn as_root_in_files<T>(what: impl FnOnce() -> T) -> T {
    // SAFETY: takes a number; of this one thread.
    let before = unsafe { libc::setfsuid(0) };
    let done = what();
    // SAFETY: as above.
    unsafe { libc::setfsuid(before as u32) };
    done
}
