//! The whole state of established TCP connections, read from outside and without leaving a trace.
//!
//! # Why repair mode is needed, and what happens when the controller dies in it
//! Addresses, state, options and the receive queue can be read of any socket. Sequence numbers, the send queue and the
//! windows can be read in `TCP_REPAIR` only. Repair mode is a property of the *socket*: closing the duplicate that
//! switched it on does not end it, and an application that meets its own socket in this mode gets `EPERM` from
//! `recv(2)` and `EINVAL` from `send(2)`. A controller killed there would break a connection that
//! it only wanted to look at. A guard process that undoes this when the controller has gone would come too late:
//! the target, traced by the controller, runs again at the same moment.
//!
//! So [`take`] keeps repair mode out of the controller. Everything that needs no repair mode is read first.
//! Then a helper process (see `guarded`), which shares memory and descriptors but not the fate of the controller,
//! goes through all sockets: mode on, two sequence numbers, send queue, windows, mode off,
//! `SO_REUSEADDR` as it was; about ten system calls, a few microseconds each socket. It stops after the current
//! socket when the controller is dead, and the nftables lock, whose owner is a descriptor that the helper shares, falls
//! only after it. If the helper is the one that is killed, the controller, which waits for it, puts the sockets
//! in order while the target is still frozen.
//!
//! What remains: both killed within those microseconds (a `kill -9` of a whole cgroup); and a controller killed while
//! the helper reads one very large send queue (about 0.3 ms per MiB), when a thread of the target calls `recv` on
//! that socket before the helper is done. Reading `struct tcp_sock` with a BPF iterator would close this too.
//!
//! The connection should be locked (see [`super::nft`]) and its owner frozen; a change in
//! between is noticed and is [`SnapshotError::Changing`].

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use super::sock_diag::Diag;
use super::tcp_repair::{self, Info, Mode, Options, Queue, State, TCP, Window};
use super::{raw, sockopt};
use crate::Error;
use crate::guarded;

/// One connection as plain data: all that the kernel needs to continue it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The state; never `Listen`, `Close`, `TimeWait` or `SynReceived`.
    pub state: State,
    /// This side's address.
    pub local: SocketAddr,
    /// The peer's address.
    pub remote: SocketAddr,
    /// The sequence number after the last byte written (and after our `FIN`, in the states that have one).
    pub send_sequence: u32,
    /// The sequence number after the last byte received in order (and after the peer's `FIN`).
    pub receive_sequence: u32,
    /// What was written and is not acknowledged, oldest byte first.
    pub send_queue: Vec<u8>,
    /// How many bytes at the end of `send_queue` were never sent.
    pub unsent: usize,
    /// Our `FIN` is in the send queue and was never sent.
    pub fin_unsent: bool,
    /// What was received in order and not read.
    pub receive_queue: Vec<u8>,
    /// What was agreed on in the handshake.
    pub options: Options,
    /// The clock of this side's timestamps, where they are used.
    pub timestamp: u32,
    /// The windows.
    pub window: Window,
    /// Reading was shut down by this side (`SHUT_RD`).
    pub read_shut: bool,
}

/// Why a connection could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A call failed.
    #[error(transparent)]
    Kernel(#[from] Error),
    /// The socket is in a state without a connection to read.
    #[error("{socket} is in state {state:?}, which is not a connection that can be read")]
    State {
        /// The socket.
        socket: String,
        /// Its state.
        state: State,
    },
    /// Urgent data is pending, which repair mode cannot put back.
    #[error(
        "{socket} has unread urgent data (MSG_OOB), which cannot be carried; let the application read it first"
    )]
    UrgentData {
        /// The socket.
        socket: String,
    },
    /// kTLS or another protocol sits on the connection, with state that cannot be read.
    #[error(
        "{socket} has the upper layer protocol {name}, whose state the kernel does not give out; turn it off in the application"
    )]
    UpperLayer {
        /// The socket.
        socket: String,
        /// The protocol's name.
        name: String,
    },
    /// Bytes came or went while the socket was read.
    #[error("{socket} changed while it was read; lock its packets and freeze its owner first")]
    Changing {
        /// The socket.
        socket: String,
    },
    /// The helper that reads in repair mode was killed; the sockets are back in order.
    #[error("the helper that reads {socket} in repair mode was killed from outside; try again")]
    HelperKilled {
        /// The socket.
        socket: String,
    },
}

/// How far the helper came with a socket.
const UNTOUCHED: u8 = 0;
const IN_REPAIR: u8 = 1;
const DONE: u8 = 2;

/// One socket's part of the helper's work.
struct Job<'a> {
    fd: BorrowedFd<'a>,
    info: Info,
    reuse_address: i32,
    pending: Pending,
    receive_queue: Vec<u8>,
    timestamp: u32,
    progress: AtomicU8,
    seen: io::Result<Seen>,
    send_queue: Vec<u8>,
}

/// Bytes waiting in a socket; equal before and after, or it was not at rest.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Pending {
    unread: usize,
    unacknowledged: usize,
    unsent: usize,
}

/// What only repair mode shows.
#[derive(Clone, Copy, Default)]
struct Seen {
    receive_sequence: u32,
    send_sequence: u32,
    window: Window,
    mss: u16,
    send_queue: usize,
}

/// Reads the connections of all `sockets`, in one short run of the helper.
///
/// The outer error is that the helper could not be started; the inner ones belong to one socket each.
pub fn take(sockets: &[BorrowedFd<'_>]) -> Result<Vec<Result<Snapshot, SnapshotError>>, Error> {
    crate::fault::point();
    let mut jobs: Vec<Result<Job<'_>, SnapshotError>> = sockets.iter().map(|fd| prepare(*fd)).collect();
    let finished = guarded::run(|caller| {
        for job in jobs.iter_mut().flatten() {
            if !caller.is_alive() {
                return;
            }
            look(job);
        }
    })
    .map_err(|source| Error::new("clone(CLONE_VM)", "the helper that reads TCP connections", source))?;
    crate::fault::point();
    if !finished {
        for job in jobs.iter().flatten().filter(|job| job.progress.load(Ordering::SeqCst) == IN_REPAIR) {
            // The state before is known; a failure leaves what `finish` reports for every socket.
            let _ = leave(job.fd, job.reuse_address);
        }
    }
    Ok(jobs.into_iter().map(|job| finish(job?)).collect())
}

/// Fails for what [`take`] refuses of a connection, without touching it: its owner may run.
pub fn examine(fd: BorrowedFd<'_>) -> Result<(), SnapshotError> {
    can_be_read(fd).map(drop)
}

fn can_be_read(fd: BorrowedFd<'_>) -> Result<Info, SnapshotError> {
    use State::{CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, SynSent};
    let info = tcp_repair::info(fd)?;
    if !matches!(info.state, Established | FinWait1 | FinWait2 | CloseWait | LastAck | Closing | SynSent) {
        return Err(SnapshotError::State { socket: raw::name(fd), state: info.state });
    }
    if let Some(name) = sockopt::upper_layer(fd) {
        return Err(SnapshotError::UpperLayer { socket: raw::name(fd), name });
    }
    if has_urgent_data(fd) {
        return Err(SnapshotError::UrgentData { socket: raw::name(fd) });
    }
    Ok(info)
}

fn prepare(fd: BorrowedFd<'_>) -> Result<Job<'_>, SnapshotError> {
    let info = can_be_read(fd)?;
    let pending = pending(fd)?;
    let reuse_address = raw::get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)
        .map_err(|source| Error::new("getsockopt(SO_REUSEADDR)", raw::name(fd), source))?;
    let receive_queue = peek_receive_queue(fd, pending.unread)?;
    let timestamp = if info.timestamps { tcp_repair::timestamp(fd)? } else { 0 };
    // The kernel copies whole segments: one that is acknowledged in part appears from its start.
    let room = pending.unacknowledged + (64 << 10);
    let send_queue = if pending.unacknowledged == 0 { Vec::new() } else { vec![0; room] };
    Ok(Job {
        fd,
        info,
        // 2 is a socket found in repair mode, where the setting before is lost.
        reuse_address: i32::from(reuse_address == 1),
        pending,
        receive_queue,
        timestamp,
        progress: AtomicU8::new(UNTOUCHED),
        seen: Ok(Seen::default()),
        send_queue,
    })
}

/// In the helper: reads one socket in repair mode. Allocates nothing.
fn look(job: &mut Job<'_>) {
    job.progress.store(IN_REPAIR, Ordering::SeqCst);
    let seen = tcp_repair::mode_unchecked(job.fd, Mode::On)
        .and_then(|()| look_in_repair(job.fd, &mut job.send_queue, job.pending.unacknowledged > 0));
    let left = leave(job.fd, job.reuse_address);
    job.seen = seen.and_then(|seen| left.map(|()| seen));
    job.progress.store(DONE, Ordering::SeqCst);
}

fn look_in_repair(fd: BorrowedFd<'_>, send_queue: &mut [u8], has_data: bool) -> io::Result<Seen> {
    let mut seen = Seen::default();
    raw::set_int(fd, TCP, libc::TCP_REPAIR_QUEUE, Queue::Receive as i32)?;
    seen.receive_sequence = raw::get_int(fd, TCP, libc::TCP_QUEUE_SEQ)? as u32;
    // From here on a write of the application would be queued and sent later, so it would not even notice.
    raw::set_int(fd, TCP, libc::TCP_REPAIR_QUEUE, Queue::Send as i32)?;
    seen.send_sequence = raw::get_int(fd, TCP, libc::TCP_QUEUE_SEQ)? as u32;
    let mut window = [0; Window::SIZE];
    raw::get_bytes(fd, TCP, libc::TCP_REPAIR_WINDOW, &mut window)?;
    seen.window = Window::from_bytes(&window);
    // In repair mode this is what the peer announced, not the current estimate.
    seen.mss = raw::get_int(fd, TCP, libc::TCP_MAXSEG)?.clamp(0, i32::from(u16::MAX)) as u16;
    if has_data {
        seen.send_queue = raw::receive(fd, send_queue, libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
    }
    Ok(seen)
}

fn leave(fd: BorrowedFd<'_>, reuse_address: i32) -> io::Result<()> {
    tcp_repair::mode_unchecked(fd, Mode::OffSilently)?;
    raw::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse_address)
}

fn finish(job: Job<'_>) -> Result<Snapshot, SnapshotError> {
    let socket = || raw::name(job.fd);
    if job.progress.load(Ordering::SeqCst) != DONE {
        return Err(SnapshotError::HelperKilled { socket: socket() });
    }
    let seen =
        job.seen.map_err(|source| Error::new("reading in TCP_REPAIR mode", raw::name(job.fd), source))?;
    let state = job.info.state;
    if pending(job.fd)? != job.pending || tcp_repair::info(job.fd)?.state != state {
        return Err(SnapshotError::Changing { socket: socket() });
    }
    let fin_queued = usize::from(state.fin_queued());
    let fin_unsent = fin_queued == 1 && job.pending.unsent > 0;
    let unacknowledged = job.pending.unacknowledged.saturating_sub(fin_queued);
    let Some(start) = seen.send_queue.checked_sub(unacknowledged) else {
        return Err(SnapshotError::Changing { socket: socket() });
    };
    let send_queue = job.send_queue[start..seen.send_queue].to_vec();
    Ok(Snapshot {
        state,
        local: local_address(job.fd)?,
        remote: remote_address(job.fd)?,
        send_sequence: seen.send_sequence,
        receive_sequence: seen.receive_sequence,
        unsent: job.pending.unsent.saturating_sub(usize::from(fin_unsent)).min(send_queue.len()),
        send_queue,
        fin_unsent,
        receive_queue: job.receive_queue,
        options: Options {
            mss: seen.mss,
            window_scale: job.info.window_scale,
            sack: job.info.sack,
            timestamps: job.info.timestamps,
        },
        timestamp: job.timestamp,
        window: seen.window,
        read_shut: !state.fin_received() && read_shut(job.fd)?,
    })
}

/// Bytes in the queues of a connection. The send queue counts a `FIN` as a byte.
fn pending(fd: BorrowedFd<'_>) -> Result<Pending, Error> {
    let read = |request| {
        raw::ioctl_int(fd, request)
            .map(|value| value.max(0) as usize)
            .map_err(|source| Error::new("ioctl(SIOCOUTQ)", raw::name(fd), source))
    };
    Ok(Pending {
        unread: read(raw::SIOCINQ)?,
        unacknowledged: read(raw::SIOCOUTQ)?,
        unsent: read(raw::SIOCOUTQNSD)?,
    })
}

fn peek_receive_queue(fd: BorrowedFd<'_>, unread: usize) -> Result<Vec<u8>, SnapshotError> {
    if unread == 0 {
        return Ok(Vec::new());
    }
    let offset = sockopt::peek_offset(fd).unwrap_or(-1);
    if offset > 0 {
        // Peeking would begin there and move it. Seen with no known program on TCP.
        let why = format!("SO_PEEK_OFF is {offset}");
        return Err(Error::malformed("recv(MSG_PEEK)", raw::name(fd), why).into());
    }
    let mut queue = vec![0; unread];
    let length = raw::receive(fd, &mut queue, libc::MSG_PEEK | libc::MSG_DONTWAIT)
        .map_err(|source| Error::new("recv(MSG_PEEK)", raw::name(fd), source))?;
    if offset == 0 {
        sockopt::set_peek_offset(fd, 0)?;
    }
    if length == unread { Ok(queue) } else { Err(SnapshotError::Changing { socket: raw::name(fd) }) }
}

fn has_urgent_data(fd: BorrowedFd<'_>) -> bool {
    let mut byte = [0];
    matches!(raw::receive(fd, &mut byte, libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT), Ok(1))
}

/// Whether reading is shut down, by `poll(2)`: the kernel shows it as `POLLRDHUP`.
fn read_shut(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
        .map_err(|source| Error::new("poll", raw::name(fd), source))?;
    Ok(polled[0].revents().contains(PollFlags::RDHUP))
}

/// The address that a socket is bound to (`getsockname(2)`).
pub fn local_address(fd: BorrowedFd<'_>) -> Result<SocketAddr, Error> {
    let any = rustix::net::getsockname(fd).map_err(|e| Error::new("getsockname", raw::name(fd), e))?;
    SocketAddr::try_from(any).map_err(|e| Error::new("getsockname", raw::name(fd), e))
}

/// The address that a socket is connected to (`getpeername(2)`); of one that is still connecting, what the
/// listing of its namespace says, as `getpeername(2)` does not.
pub fn remote_address(fd: BorrowedFd<'_>) -> Result<SocketAddr, Error> {
    match rustix::net::getpeername(fd) {
        Ok(Some(any)) => SocketAddr::try_from(any).map_err(|e| Error::new("getpeername", raw::name(fd), e)),
        Ok(None) | Err(rustix::io::Errno::NOTCONN) => {
            let (kind, inode) = (raw::kind(fd)?, raw::inode(fd)?);
            let listed = Diag::open_for(fd)?.inet(kind.domain, kind.protocol)?;
            let found = listed.iter().find(|socket| socket.inode == inode && socket.remote.port() != 0);
            found
                .map(|socket| socket.remote)
                .ok_or_else(|| Error::new("getpeername", raw::name(fd), rustix::io::Errno::NOTCONN))
        }
        Err(source) => Err(Error::new("getpeername", raw::name(fd), source)),
    }
}

/// Ends a connection on this side only: no packet is sent, and its addresses are free at once.
///
/// For the source after its connection has gone elsewhere. Afterwards the socket is closed, whoever has it open.
pub fn abandon(fd: BorrowedFd<'_>) -> Result<(), Error> {
    tcp_repair::set_mode(fd, Mode::On)?;
    rustix::net::connect_unspec(fd).map_err(|source| Error::new("connect(AF_UNSPEC)", raw::name(fd), source))
}
