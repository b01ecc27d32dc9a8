//! Packets handed to a local socket as if its peer had sent them.
//!
//! A raw socket sends to a local address, so the packet goes over the loopback interface to the socket, and
//! never leaves the machine. Used at restore for what no system call can put into a socket: a `FIN`
//! that had been received, the acknowledgement of our `FIN`, datagrams of a UDP receive queue.
//! All these packets carry [`MARK`], which the packet lock of [`super::nft`] lets through.
//! Needs `CAP_NET_RAW` and `CAP_NET_ADMIN`. Formats: RFC 791, 8200, 9293, 768; `raw(7)`.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::raw;
use crate::{Error, Result};

/// The firewall mark of packets made here: "limo".
pub const MARK: u32 = 0x6C69_6D6F;

/// A TCP segment without data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub sequence: u32,
    pub acknowledgement: u32,
    pub fin: bool,
    /// As it stands in the header, scaled.
    pub window: u16,
}

/// Delivers a TCP segment from `remote` to the socket at `local`.
pub(super) fn tcp(local: SocketAddr, remote: SocketAddr, segment: &Segment) -> Result<()> {
    const FIN: u8 = 1;
    const ACK: u8 = 16;
    let mut header = Vec::with_capacity(20);
    header.extend(remote.port().to_be_bytes());
    header.extend(local.port().to_be_bytes());
    header.extend(segment.sequence.to_be_bytes());
    header.extend(segment.acknowledgement.to_be_bytes());
    header.extend([5 << 4, if segment.fin { FIN | ACK } else { ACK }]);
    header.extend(segment.window.to_be_bytes());
    header.extend([0; 4]);
    deliver(local, remote, libc::IPPROTO_TCP as u8, header, 16)
}

/// Delivers a UDP datagram from `remote` to the socket at `local`.
pub fn udp(local: SocketAddr, remote: SocketAddr, data: &[u8]) -> Result<()> {
    crate::fault::point();
    let Ok(length) = u16::try_from(data.len() + 8) else {
        let why = format!("{} bytes do not fit a datagram", data.len());
        return Err(Error::malformed("sendto(raw UDP)", local, why));
    };
    let mut packet = Vec::with_capacity(data.len() + 8);
    packet.extend(remote.port().to_be_bytes());
    packet.extend(local.port().to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0; 2]);
    packet.extend(data);
    deliver(local, remote, libc::IPPROTO_UDP as u8, packet, 6)
}

/// Gives a new UDP socket a free port at every address, which [`take_port`] can take away again.
///
/// A socket that sends and is not bound gets a port first, and whatever then becomes of the datagram: this one has no port to go
/// to. Source: `inet_send_prepare`, `udp_sendmsg`.
pub fn give_port(socket: impl AsFd) -> Result<u16> {
    crate::fault::point();
    let fd = socket.as_fd();
    let loopback = match raw::kind(fd)?.domain {
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        _ => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    };
    let nowhere = SocketAddr::new(loopback, 0);
    let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
    match (rustix::net::sendto(fd, b"", flags, &nowhere), port(fd)?) {
        (_, 1..) => port(fd),
        (Err(error), 0) => Err(Error::new("sendto(port 0)", raw::name(fd), error)),
        (Ok(_), 0) => Err(Error::malformed("sendto(port 0)", raw::name(fd), "it got no port")),
    }
}

/// Takes the port of [`give_port`] away: what is in the queue stays there, and the socket can be bound. Source: `__udp_disconnect`,
/// `udp_lib_unhash`.
pub fn take_port(socket: impl AsFd) -> Result<()> {
    crate::fault::point();
    let fd = socket.as_fd();
    rustix::net::connect_unspec(fd)
        .map_err(|error| Error::new("connect(AF_UNSPEC)", raw::name(fd), error))?;
    match port(fd)? {
        0 => Ok(()),
        port => Err(Error::malformed("connect(AF_UNSPEC)", raw::name(fd), format!("it keeps port {port}"))),
    }
}

fn port(fd: BorrowedFd<'_>) -> Result<u16> {
    let failed = |error| Error::new("getsockname", raw::name(fd), error);
    let address = rustix::net::getsockname(fd).map_err(failed)?;
    SocketAddr::try_from(address).map(|address| address.port()).map_err(failed)
}

/// [`udp`], and waits until the datagram is in the queue of `socket`, which nobody reads. Tells whether it has come; if not,
/// something keeps it away, such as a packet filter.
pub fn udp_into(socket: impl AsFd, local: SocketAddr, remote: SocketAddr, data: &[u8]) -> Result<bool> {
    /// The network's soft interrupt may be left to a thread that has to wait for its turn.
    const PATIENCE: Duration = Duration::from_secs(1);
    let fd = socket.as_fd();
    let before = queued(fd)?;
    udp(local, remote, data)?;
    let started = Instant::now();
    while queued(fd)? <= before {
        if started.elapsed() > PATIENCE {
            return Ok(false);
        }
        std::thread::yield_now();
    }
    Ok(true)
}

/// The memory of what is in a socket's queue: the first word of `SO_MEMINFO`.
fn queued(fd: BorrowedFd<'_>) -> Result<u32> {
    const SO_MEMINFO: i32 = 55;
    let mut words = [0; 36];
    raw::get_bytes(fd, libc::SOL_SOCKET, SO_MEMINFO, &mut words)
        .map_err(|source| Error::new("getsockopt(SO_MEMINFO)", raw::name(fd), source))?;
    Ok(u32::from_ne_bytes([words[0], words[1], words[2], words[3]]))
}

fn deliver(
    local: SocketAddr,
    remote: SocketAddr,
    protocol: u8,
    mut payload: Vec<u8>,
    checksum: usize,
) -> Result<()> {
    let failed = |source: io::Error| Error::new("sendto(raw packet)", local, source);
    let (to, from) = (local.ip().to_canonical(), remote.ip().to_canonical());
    let pseudo = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [&from.octets()[..], &to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [&from.octets()[..], &to.octets()].concat(),
        _ => {
            return Err(Error::malformed(
                "sendto(raw packet)",
                local,
                format!("{remote} is of another family"),
            ));
        }
    };
    let length = payload.len() as u32;
    let mut sum = sum(&pseudo, 0);
    sum = self::sum(&length.to_be_bytes(), sum);
    sum = self::sum(&[0, protocol], sum);
    sum = self::sum(&payload, sum);
    let folded = match !fold(sum) {
        // In UDP, zero means "no checksum".
        0 => u16::MAX,
        value => value,
    };
    payload[checksum..checksum + 2].copy_from_slice(&folded.to_be_bytes());
    let packet = match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => ipv6(from, to, protocol, &payload),
        _ => ipv4(&pseudo, protocol, &payload),
    };
    let socket = open(to.is_ipv6()).map_err(failed)?;
    rustix::net::sendto(&socket, &packet, rustix::net::SendFlags::empty(), &SocketAddr::new(to, 0))
        .map_err(|error| failed(error.into()))?;
    Ok(())
}

/// A raw socket that takes whole packets, with our mark.
fn open(six: bool) -> io::Result<OwnedFd> {
    let domain = if six { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    raw::set_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, MARK as i32)?;
    debug_assert!(socket.as_raw_fd() >= 0);
    Ok(socket)
}

fn ipv4(addresses: &[u8], protocol: u8, payload: &[u8]) -> Vec<u8> {
    // The kernel fills in the identification and the header's checksum. A packet that is longer than
    // 65,535 bytes cannot come here: UDP's length was checked.
    let total = (20 + payload.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(addresses);
    packet.extend(payload);
    packet
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([protocol, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// Adds 16-bit big-endian words (RFC 1071); at most 64 KiB, so 64 bits never overflow.
fn sum(bytes: &[u8], start: u64) -> u64 {
    bytes.chunks(2).fold(start, |sum, pair| {
        sum + (u64::from(pair[0]) << 8) + u64::from(pair.get(1).copied().unwrap_or(0))
    })
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}
