//! `TCP_REPAIR`: the switches by which the kernel lets the state of a TCP socket be read and written.
//!
//! In repair mode a socket sends nothing, `connect(2)` succeeds without a packet, closing is silent, and the
//! sequence numbers, queues, options and windows can be read, and be written while they are new.
//! An application that meets its socket in this mode gets errors from `send(2)` and `recv(2)`:
//! for sockets in use go through [`super::tcp_snapshot`], which keeps the mode short and ends it whatever happens.
//!
//! Two side effects: turning the mode on and off changes `SO_REUSEADDR` (the caller puts it back), and the
//! selected queue stays selected after the mode is left (without an effect).
//! Source: `net/ipv4/tcp.c` (`do_tcp_setsockopt`, `tcp_repair_options_est`, `tcp_peek_sndq`).
//! All calls that change something need `CAP_NET_ADMIN` in the user namespace of the socket's network namespace.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::raw;
use crate::{Error, Result};

pub(super) const TCP: i32 = libc::IPPROTO_TCP;
const TCP_REPAIR_OPTIONS: i32 = 22;

/// Whether a socket is in repair mode, and how it leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// In repair mode.
    On,
    /// Out of it, with a window probe that makes the peer say what it has received.
    Off,
    /// Out of it without a packet (Linux 4.20).
    OffSilently,
}

/// Turns repair mode on or off.
pub fn set_mode(fd: impl AsFd, mode: Mode) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    mode_unchecked(fd, mode).map_err(|source| Error::new("setsockopt(TCP_REPAIR)", raw::name(fd), source))
}

/// [`set_mode`] without a fault point and without allocation.
pub(super) fn mode_unchecked(fd: BorrowedFd<'_>, mode: Mode) -> io::Result<()> {
    let value = match mode {
        Mode::On => 1,
        Mode::Off => 0,
        Mode::OffSilently => -1,
    };
    raw::set_int(fd, TCP, libc::TCP_REPAIR, value)
}

/// Whether the socket is in repair mode.
pub fn in_repair(fd: impl AsFd) -> Result<bool> {
    let fd = fd.as_fd();
    let value = raw::get_int(fd, TCP, libc::TCP_REPAIR)
        .map_err(|source| Error::new("getsockopt(TCP_REPAIR)", raw::name(fd), source))?;
    Ok(value != 0)
}

/// The queue that reading, writing and [`sequence`] mean in repair mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Queue {
    /// Neither.
    None = 0,
    /// What came from the peer and was not read.
    Receive = 1,
    /// What was written and is not acknowledged.
    Send = 2,
}

/// Selects a queue; the socket must be in repair mode.
pub fn select_queue(fd: impl AsFd, queue: Queue) -> Result<()> {
    let fd = fd.as_fd();
    raw::set_int(fd, TCP, libc::TCP_REPAIR_QUEUE, queue as i32)
        .map_err(|source| Error::new("setsockopt(TCP_REPAIR_QUEUE)", raw::name(fd), source))
}

/// The sequence number after the last byte (or `FIN`) of the selected queue.
pub fn sequence(fd: impl AsFd) -> Result<u32> {
    let fd = fd.as_fd();
    raw::get_int(fd, TCP, libc::TCP_QUEUE_SEQ)
        .map(|value| value as u32)
        .map_err(|source| Error::new("getsockopt(TCP_QUEUE_SEQ)", raw::name(fd), source))
}

/// Sets the sequence number at which the selected queue starts; the socket must not be connected yet.
pub fn set_sequence(fd: impl AsFd, value: u32) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    raw::set_int(fd, TCP, libc::TCP_QUEUE_SEQ, value as i32)
        .map_err(|source| Error::new("setsockopt(TCP_QUEUE_SEQ)", raw::name(fd), source))
}

/// The windows of a connection (`struct tcp_repair_window`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Window {
    /// Sequence number of the segment that last changed the send window.
    pub snd_wl1: u32,
    /// Bytes that the peer accepts beyond what it has acknowledged.
    pub snd_wnd: u32,
    /// The largest send window seen.
    pub max_window: u32,
    /// Bytes that this side has promised to accept.
    pub rcv_wnd: u32,
    /// The next sequence number expected when that promise was made.
    pub rcv_wup: u32,
}

impl Window {
    pub(super) const SIZE: usize = 20;

    pub(super) fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { snd_wl1: word(0), snd_wnd: word(4), max_window: word(8), rcv_wnd: word(12), rcv_wup: word(16) }
    }

    fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let words = [self.snd_wl1, self.snd_wnd, self.max_window, self.rcv_wnd, self.rcv_wup];
        for (slot, word) in bytes.chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// The windows of a socket in repair mode.
pub fn window(fd: impl AsFd) -> Result<Window> {
    let fd = fd.as_fd();
    let mut bytes = [0; Window::SIZE];
    raw::get_bytes(fd, TCP, libc::TCP_REPAIR_WINDOW, &mut bytes)
        .map_err(|source| Error::new("getsockopt(TCP_REPAIR_WINDOW)", raw::name(fd), source))?;
    Ok(Window::from_bytes(&bytes))
}

/// Sets the windows of a socket in repair mode. The kernel refuses (`EINVAL`) windows that do not fit the
/// receive sequence number.
pub fn set_window(fd: impl AsFd, window: &Window) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    raw::set_bytes(fd, TCP, libc::TCP_REPAIR_WINDOW, &window.to_bytes())
        .map_err(|source| Error::new("setsockopt(TCP_REPAIR_WINDOW)", raw::name(fd), source))
}

/// What the two sides agreed on in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The largest segment the peer accepts, in bytes.
    pub mss: u16,
    /// Window scaling: shifts of the windows that the peer sends and that this side sends, 14 at most.
    pub window_scale: Option<(u8, u8)>,
    /// Selective acknowledgements are permitted.
    pub sack: bool,
    /// Both sides send timestamps.
    pub timestamps: bool,
}

/// Sets what was agreed on, on a socket in repair mode that is connected and has sent nothing.
pub fn set_options(fd: impl AsFd, options: &Options) -> Result<()> {
    // Kinds of TCP options: RFC 9293, 2018, 7323. The kernel takes (kind, value) pairs.
    const MSS: u32 = 2;
    const WINDOW: u32 = 3;
    const SACK: u32 = 4;
    const TIMESTAMP: u32 = 8;
    crate::fault::point();
    let fd = fd.as_fd();
    let mut pairs = vec![(MSS, u32::from(options.mss))];
    if let Some((send, receive)) = options.window_scale {
        pairs.push((WINDOW, u32::from(send) | u32::from(receive) << 16));
    }
    if options.sack {
        pairs.push((SACK, 0));
    }
    if options.timestamps {
        pairs.push((TIMESTAMP, 0));
    }
    let bytes: Vec<u8> =
        pairs.iter().flat_map(|(kind, value)| [kind.to_ne_bytes(), value.to_ne_bytes()].concat()).collect();
    raw::set_bytes(fd, TCP, TCP_REPAIR_OPTIONS, &bytes)
        .map_err(|source| Error::new("setsockopt(TCP_REPAIR_OPTIONS)", raw::name(fd), source))
}

/// The clock of the timestamps that this side sends (RFC 7323); its lowest bit says (Linux 6.7) whether
/// it counts microseconds.
pub fn timestamp(fd: impl AsFd) -> Result<u32> {
    let fd = fd.as_fd();
    raw::get_int(fd, TCP, libc::TCP_TIMESTAMP)
        .map(|value| value as u32)
        .map_err(|source| Error::new("getsockopt(TCP_TIMESTAMP)", raw::name(fd), source))
}

/// Lets the clock of timestamps go on from `value`; the socket must be in repair mode.
pub fn set_timestamp(fd: impl AsFd, value: u32) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    raw::set_int(fd, TCP, libc::TCP_TIMESTAMP, value as i32)
        .map_err(|source| Error::new("setsockopt(TCP_TIMESTAMP)", raw::name(fd), source))
}

/// The state of a TCP socket (RFC 9293, 3.3.2; the numbers are the kernel's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Both directions open.
    Established = 1,
    /// Connecting.
    SynSent = 2,
    /// Connecting from both sides at once.
    SynReceived = 3,
    /// Closed for writing; the `FIN` is not acknowledged.
    FinWait1 = 4,
    /// Closed for writing; the `FIN` is acknowledged.
    FinWait2 = 5,
    /// All over, waiting for late segments.
    TimeWait = 6,
    /// No connection.
    Close = 7,
    /// The peer has closed.
    CloseWait = 8,
    /// Both have closed, the peer first; our `FIN` is not acknowledged.
    LastAck = 9,
    /// Waiting for connections.
    Listen = 10,
    /// Both have closed at once; our `FIN` is not acknowledged.
    Closing = 11,
}

impl State {
    /// The state of that number, if there is one.
    pub fn from_number(number: u8) -> Option<Self> {
        use State::{
            Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynReceived,
            SynSent, TimeWait,
        };
        let all = [
            Established,
            SynSent,
            SynReceived,
            FinWait1,
            FinWait2,
            TimeWait,
            Close,
            CloseWait,
            LastAck,
            Listen,
            Closing,
        ];
        all.into_iter().find(|state| *state as u8 == number)
    }

    /// Whether this side has sent a `FIN` that counts in the send sequence number.
    pub fn fin_sent(self) -> bool {
        matches!(self, Self::FinWait1 | Self::FinWait2 | Self::LastAck | Self::Closing)
    }

    /// Whether this side's `FIN` is still in the send queue.
    pub fn fin_queued(self) -> bool {
        matches!(self, Self::FinWait1 | Self::LastAck | Self::Closing)
    }

    /// Whether the peer's `FIN` has come, which counts in the receive sequence number.
    pub fn fin_received(self) -> bool {
        matches!(self, Self::CloseWait | Self::LastAck | Self::Closing)
    }
}

/// What `TCP_INFO` tells that matters here. Readable in any mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// The state.
    pub state: State,
    /// Window scaling, as in [`Options::window_scale`].
    pub window_scale: Option<(u8, u8)>,
    /// Selective acknowledgements are permitted.
    pub sack: bool,
    /// Both sides send timestamps.
    pub timestamps: bool,
    /// Explicit congestion notification was agreed on (it cannot be restored, and is not missed).
    pub ecn: bool,
    /// The largest segment that is sent now.
    pub snd_mss: u32,
    /// Listening: connections not yet accepted. Otherwise: segments not yet acknowledged.
    pub unacked: u32,
    /// Listening: the limit of `listen(2)`. Otherwise: segments selectively acknowledged.
    pub sacked: u32,
}

/// Reads `TCP_INFO`.
pub fn info(fd: impl AsFd) -> Result<Info> {
    let fd = fd.as_fd();
    let mut bytes = [0_u8; 64];
    let length = raw::get_bytes(fd, TCP, libc::TCP_INFO, &mut bytes)
        .map_err(|source| Error::new("getsockopt(TCP_INFO)", raw::name(fd), source))?;
    // Offsets in struct tcp_info, include/uapi/linux/tcp.h.
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let (state, options, scales) = (bytes[0], bytes[5], bytes[6]);
    match State::from_number(state) {
        Some(state) if length >= 32 => Ok(Info {
            state,
            window_scale: (options & 4 != 0).then_some((scales & 15, scales >> 4)),
            sack: options & 2 != 0,
            timestamps: options & 1 != 0,
            ecn: options & 8 != 0,
            snd_mss: word(16),
            unacked: word(24),
            sacked: word(28),
        }),
        _ => {
            let why = format!("state {state} in {length} bytes");
            Err(Error::malformed("getsockopt(TCP_INFO)", raw::name(fd), why))
        }
    }
}
