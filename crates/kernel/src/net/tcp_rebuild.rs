//! A TCP connection made again from a [`Snapshot`], without the peer noticing.
//!
//! ```text
//! rebuild: socket → TCP_REPAIR on → sequence numbers (minus queues, minus FINs) → bind → connect (silent)
//!          → options, timestamp → receive queue → sent part of the send queue → FINs → windows
//! resume:  TCP_REPAIR off → unsent part → unsent FIN
//! probe:   a window probe makes the peer say where it is; its answer sets both sides going
//! ```
//! [`rebuild`] sends nothing; the connection can be thrown away again silently. After [`resume`] it needs nobody any
//! more: the kernel sends what has to be sent, as soon as packets pass. That they pass is what [`probe`] tells it: else
//! it would find out by its timers, a second later.
//!
//! A `FIN` of ours is made by `shutdown(2)` in repair mode: the kernel takes it as sent. A `FIN` of the peer, and
//! the peer's acknowledgement of ours, are handed to the socket by a raw packet from the loopback interface.
//!
//! | state | how it comes back |
//! | --- | --- |
//! | `ESTABLISHED` | connected, both queues |
//! | `FIN_WAIT1` | + our `FIN`, which is sent again by the retransmission timer |
//! | `FIN_WAIT2` | + our `FIN` and its acknowledgement |
//! | `CLOSE_WAIT` | + the peer's `FIN` |
//! | `LAST_ACK` | + the peer's `FIN`, then ours |
//! | `CLOSING` | + our `FIN`, then the peer's |
//! | `SYN_SENT` | not in repair: `connect(2)` again with the same initial sequence number, at [`resume`] |
//! | `SYN_RECV` | refused: no descriptor of it exists but in a simultaneous open |
//! | `TIME_WAIT`, `CLOSE` | a descriptor shows a closed socket: nothing to carry |
//!
//! Lost, and not missed by the peer: the congestion window and round-trip estimates (slow start begins anew),
//! ECN (not used any more), segments received out of order (the peer sends them again).

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::inject::{self, Segment};
use super::raw;
use super::tcp_repair::{self, Mode, Queue, State, Window};
use super::tcp_snapshot::Snapshot;
use crate::{Error, Result};

/// How long a raw packet on the loopback interface may take to be handled; usually it is at once.
const DELIVERY: Duration = Duration::from_secs(2);

/// A connection that is whole but silent: still in repair mode (not so `SYN_SENT`, which is not begun).
#[derive(Debug)]
pub struct Rebuilt {
    /// The socket.
    pub socket: OwnedFd,
}

/// Makes the connection of `snapshot` again in the calling thread's network namespace.
///
/// `prepare` sets the options that have to be set before the socket is bound. The local address must exist
/// (or `IP_FREEBIND` be set), and no other socket may have these two addresses (`EADDRNOTAVAIL`).
/// `SO_REUSEADDR` is forced on meanwhile; set the options of the last phase after [`resume`].
pub fn rebuild(snapshot: &Snapshot, prepare: impl FnOnce(BorrowedFd<'_>) -> Result<()>) -> Result<Rebuilt> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
    crate::fault::point();
    let family = if snapshot.local.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|source| Error::new("socket", describe(snapshot), source))?;
    let fd = socket.as_fd();
    prepare(fd)?;
    tcp_repair::set_mode(fd, Mode::On)?;
    start_queues(fd, snapshot)?;
    bind(fd, &snapshot.local).map_err(|source| Error::new("bind", describe(snapshot), source))?;
    if snapshot.state == State::SynSent {
        // The sequence number set above is kept by the handshake that `resume` begins.
        tcp_repair::set_mode(fd, Mode::OffSilently)?;
        return Ok(Rebuilt { socket });
    }
    limit_segments(fd, snapshot.options.mss)?;
    connect(fd, &snapshot.remote).map_err(|source| Error::new("connect", describe(snapshot), source))?;
    tcp_repair::set_options(fd, &snapshot.options)?;
    if snapshot.options.timestamps {
        tcp_repair::set_timestamp(fd, snapshot.timestamp)?;
    }
    let sent = snapshot.send_queue.len().checked_sub(snapshot.unsent).ok_or_else(|| {
        Error::malformed("rebuilding", describe(snapshot), "more unsent bytes than the send queue has")
    })?;
    fill(fd, Queue::Receive, &snapshot.receive_queue)?;
    fill(fd, Queue::Send, &snapshot.send_queue[..sent])?;
    close_directions(fd, snapshot)?;
    tcp_repair::set_window(fd, &snapshot.window)?;
    Ok(Rebuilt { socket })
}

/// Lets the connection live: leaves repair mode and queues what was never sent.
///
/// Whether packets pass already does not matter. `reuse_address` is the socket's own `SO_REUSEADDR`.
pub fn resume(fd: impl AsFd, snapshot: &Snapshot, reuse_address: bool) -> Result<()> {
    let fd = fd.as_fd();
    if snapshot.state != State::SynSent {
        tcp_repair::set_mode(fd, Mode::OffSilently)?;
    }
    set_reuse_address(fd, reuse_address)?;
    if snapshot.state == State::SynSent {
        return begin_connecting(fd, snapshot.remote);
    }
    let sent = snapshot.send_queue.len().saturating_sub(snapshot.unsent);
    write_all(fd, &snapshot.send_queue[sent..], libc::SO_SNDBUF, libc::SO_SNDBUFFORCE)?;
    if snapshot.fin_unsent {
        shut(fd, rustix::net::Shutdown::Write)?;
    }
    if snapshot.read_shut {
        shut(fd, rustix::net::Shutdown::Read)?;
    }
    Ok(())
}

/// Asks the peer where it is, now that packets pass. It sends again what it believes to be lost, and what waits
/// here goes out.
pub fn probe(fd: impl AsFd, reuse_address: bool) -> Result<()> {
    let fd = fd.as_fd();
    // Leaving repair mode sends the probe, also of a socket that is not in it.
    tcp_repair::set_mode(fd, Mode::Off)?;
    set_reuse_address(fd, reuse_address)
}

fn set_reuse_address(fd: BorrowedFd<'_>, on: bool) -> Result<()> {
    raw::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, i32::from(on))
        .map_err(|source| Error::new("setsockopt(SO_REUSEADDR)", raw::name(fd), source))
}

fn describe(snapshot: &Snapshot) -> String {
    format!("TCP connection {} to {}", snapshot.local, snapshot.remote)
}

/// Both queues begin so that they end at the captured numbers when they are filled.
fn start_queues(fd: BorrowedFd<'_>, snapshot: &Snapshot) -> Result<()> {
    let state = snapshot.state;
    let received = snapshot.receive_queue.len() as u32 + u32::from(state.fin_received());
    // A SYN that was sent counts one, too.
    let syn = u32::from(state == State::SynSent);
    let written = snapshot.send_queue.len() as u32 + u32::from(state.fin_sent()) + syn;
    tcp_repair::select_queue(fd, Queue::Receive)?;
    tcp_repair::set_sequence(fd, snapshot.receive_sequence.wrapping_sub(received))?;
    tcp_repair::select_queue(fd, Queue::Send)?;
    tcp_repair::set_sequence(fd, snapshot.send_sequence.wrapping_sub(written))
}

/// `TCP_REPAIR_OPTIONS` notes the peer's segment size but does not shorten the segments at once; the
/// user's limit at the time of `connect(2)` does. It has no effect later.
fn limit_segments(fd: BorrowedFd<'_>, mss: u16) -> Result<()> {
    if !(88..=32_767).contains(&mss) {
        return Ok(());
    }
    raw::set_int(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG, i32::from(mss))
        .map_err(|source| Error::new("setsockopt(TCP_MAXSEG)", raw::name(fd), source))
}

fn fill(fd: BorrowedFd<'_>, queue: Queue, data: &[u8]) -> Result<()> {
    tcp_repair::select_queue(fd, queue)?;
    let (buffer, force) = match queue {
        Queue::Receive => (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
        _ => (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
    };
    write_all(fd, data, buffer, force)
}

/// Writes all of `data` without waiting. The buffer grows first as far as the data with its overhead can need:
/// the caller sets the captured size afterwards.
fn write_all(fd: BorrowedFd<'_>, data: &[u8], buffer: i32, force: i32) -> Result<()> {
    /// The kernel takes a receive queue in one allocation for each write.
    const CHUNK: usize = 32 << 10;
    crate::fault::point();
    let failed = |source: io::Error| Error::new("send(queue)", raw::name(fd), source);
    if data.is_empty() {
        return Ok(());
    }
    let room = i32::try_from(data.len() * 2 + (256 << 10)).unwrap_or(i32::MAX / 2);
    if raw::get_int(fd, libc::SOL_SOCKET, buffer).map_err(failed)? < room * 2 {
        raw::set_int(fd, libc::SOL_SOCKET, force, room).map_err(failed)?;
    }
    let mut rest = data;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        match raw::send(fd, chunk, libc::MSG_DONTWAIT).map_err(failed)? {
            0 => return Err(failed(io::ErrorKind::WriteZero.into())),
            written => rest = &rest[written.min(rest.len())..],
        }
    }
    Ok(())
}

/// The `FIN`s that the state implies, ours in repair mode, the peer's as packets.
fn close_directions(fd: BorrowedFd<'_>, snapshot: &Snapshot) -> Result<()> {
    let state = snapshot.state;
    let ours = state.fin_sent() && !snapshot.fin_unsent;
    // The order decides the state: CLOSING and FIN_WAIT begin with our FIN, LAST_ACK with the peer's.
    let ours_first = matches!(state, State::FinWait1 | State::FinWait2 | State::Closing);
    if ours && ours_first {
        shut(fd, rustix::net::Shutdown::Write)?;
    }
    if state == State::FinWait2 {
        deliver(fd, snapshot, false, State::FinWait2)?;
    }
    if state.fin_received() {
        let reached = if ours && ours_first { State::Closing } else { State::CloseWait };
        deliver(fd, snapshot, true, reached)?;
    }
    if ours && !ours_first {
        tcp_repair::select_queue(fd, Queue::Send)?;
        shut(fd, rustix::net::Shutdown::Write)?;
    }
    Ok(())
}

fn shut(fd: BorrowedFd<'_>, how: rustix::net::Shutdown) -> Result<()> {
    rustix::net::shutdown(fd, how).map_err(|source| Error::new("shutdown", raw::name(fd), source))
}

/// Hands the socket a packet of its peer and waits until its state is `reached`.
fn deliver(fd: BorrowedFd<'_>, snapshot: &Snapshot, fin: bool, reached: State) -> Result<()> {
    tcp_repair::select_queue(fd, Queue::Send)?;
    let written = tcp_repair::sequence(fd)?;
    tcp_repair::select_queue(fd, Queue::Receive)?;
    let sequence = tcp_repair::sequence(fd)?;
    tcp_repair::select_queue(fd, Queue::Send)?;
    // A FIN beyond the promised window would be dropped: open it for the packet. The captured windows follow.
    let open = snapshot.window.rcv_wnd.max(64 << 10);
    tcp_repair::set_window(fd, &Window { rcv_wnd: open, rcv_wup: sequence, ..snapshot.window_at(sequence) })?;
    let unacknowledged = snapshot.send_queue.len() as u32 + u32::from(snapshot.state.fin_queued());
    let scale = snapshot.options.window_scale.map_or(0, |(send, _)| u32::from(send.min(14)));
    let segment = Segment {
        sequence,
        acknowledgement: if fin { snapshot.send_sequence.wrapping_sub(unacknowledged) } else { written },
        fin,
        window: u16::try_from(snapshot.window.snd_wnd >> scale).unwrap_or(u16::MAX),
    };
    inject::tcp(snapshot.local, snapshot.remote, &segment)?;
    let limit = Instant::now() + DELIVERY;
    while tcp_repair::info(fd)?.state != reached {
        if Instant::now() > limit {
            let why = format!("a packet of the peer did not bring it to {reached:?}");
            return Err(Error::malformed("sendto(raw TCP)", describe(snapshot), why));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

impl Snapshot {
    /// The captured windows with a last update that fits an earlier receive sequence number.
    fn window_at(&self, sequence: u32) -> Window {
        Window { snd_wl1: sequence.wrapping_sub(1), ..self.window }
    }
}

fn begin_connecting(fd: BorrowedFd<'_>, remote: SocketAddr) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| Error::new("fcntl(F_GETFL)", raw::name(fd), e))?;
    let set = |flags| {
        rustix::fs::fcntl_setfl(fd, flags).map_err(|e| Error::new("fcntl(F_SETFL)", raw::name(fd), e))
    };
    set(flags | rustix::fs::OFlags::NONBLOCK)?;
    let answer = rustix::net::connect(fd, &remote);
    set(flags)?;
    match answer {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(()),
        Err(source) => Err(Error::new("connect", remote, source)),
    }
}
