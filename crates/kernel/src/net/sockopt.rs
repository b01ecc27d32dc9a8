//! Socket options as data: which ones exist for a kind of socket, reading them, setting them again.
//!
//! The list is an allowlist in both directions. [`capture`] reads the options in it and keeps those that
//! differ from what a new socket has; [`apply`] refuses any other (a checkpoint is hostile input: a
//! `SO_ATTACH_BPF` or `TCP_ULP` smuggled into it must not be executed), and checks lengths before the kernel does.
//! Options that have to be set before `bind(2)` or `connect(2)` to have their effect are of the
//! [`Phase::BeforeBind`]; the others are set when the socket is what it should be.
//!
//! Left out on purpose: `TCP_QUICKACK` (the momentary state of delayed acknowledgements, not a setting),
//! `TCP_WINDOW_CLAMP` (the kernel's own estimate unless set), `SO_INCOMING_CPU` (a CPU of this machine),
//! `SO_PEEK_OFF` (part of the queue's state, see the rooms), memberships of multicast groups (see
//! [`super::multicast`]). Sources: `socket(7)`, `ip(7)`, `ipv6(7)`, `tcp(7)`, `udp(7)`; `net/core/sock.c`.

use std::os::fd::{AsFd, BorrowedFd};

use super::raw::{self, Kind};
use crate::{Error, Result};

/// One option with its value, as `getsockopt(2)` gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOption {
    /// `SOL_SOCKET`, `IPPROTO_TCP`…
    pub level: i32,
    /// The option's number at that level.
    pub name: i32,
    /// The value in the machine's byte order.
    pub value: Vec<u8>,
}

/// When an option has to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Before the socket gets its address and its peer.
    BeforeBind,
    /// When the socket has its address and its queues.
    Last,
}

/// What the value of an option looks like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// An int; the value that a new socket has.
    Int(i32),
    /// A struct of this many bytes, all zero in a new socket.
    Bytes(usize),
    /// A name of at most this many bytes, empty in a new socket.
    Text(usize),
    /// The congestion control: a name, whose default is the namespace's.
    Algorithm,
    /// The size of a buffer: the kernel doubles what is set, and marks it as fixed by the user.
    Buffer { force: i32 },
}

/// Which sockets have an option.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Any,
    /// IPv4, and IPv6 sockets for what they send to mapped addresses.
    Inet,
    Inet6,
    Tcp,
    Udp,
    /// UDP over IPv6.
    Udp6,
    Unix,
}

struct Known {
    level: i32,
    name: i32,
    label: &'static str,
    family: Family,
    shape: Shape,
    phase: Phase,
}

const fn known(
    level: i32,
    name: i32,
    label: &'static str,
    family: Family,
    shape: Shape,
    phase: Phase,
) -> Known {
    Known { level, name, label, family, shape, phase }
}

use Family::{Any, Inet, Inet6, Tcp, Udp, Udp6, Unix};
use Phase::{BeforeBind, Last};
use Shape::{Algorithm, Buffer, Bytes, Int, Text};

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;

/// `SO_BUF_LOCK` (Linux 5.14): which buffer sizes the user fixed. Source: `asm-generic/socket.h`.
const SO_BUF_LOCK: i32 = 72;

#[rustfmt::skip]
static TABLE: &[Known] = &[
    known(SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR", Any, Int(0), BeforeBind),
    known(SOCKET, libc::SO_REUSEPORT, "SO_REUSEPORT", Any, Int(0), BeforeBind),
    known(SOCKET, libc::SO_BINDTODEVICE, "SO_BINDTODEVICE", Inet, Text(15), BeforeBind),
    known(SOCKET, libc::SO_MARK, "SO_MARK", Inet, Int(0), BeforeBind),
    known(SOCKET, libc::SO_PRIORITY, "SO_PRIORITY", Any, Int(0), Last),
    known(SOCKET, libc::SO_SNDBUF, "SO_SNDBUF", Any, Buffer { force: libc::SO_SNDBUFFORCE }, Last),
    known(SOCKET, libc::SO_RCVBUF, "SO_RCVBUF", Any, Buffer { force: libc::SO_RCVBUFFORCE }, Last),
    // After the buffers, whose setting it undoes.
    known(SOCKET, SO_BUF_LOCK, "SO_BUF_LOCK", Any, Int(0), Last),
    known(SOCKET, libc::SO_KEEPALIVE, "SO_KEEPALIVE", Any, Int(0), Last),
    known(SOCKET, libc::SO_LINGER, "SO_LINGER", Any, Bytes(8), Last),
    known(SOCKET, libc::SO_RCVTIMEO, "SO_RCVTIMEO", Any, Bytes(16), Last),
    known(SOCKET, libc::SO_SNDTIMEO, "SO_SNDTIMEO", Any, Bytes(16), Last),
    known(SOCKET, libc::SO_RCVLOWAT, "SO_RCVLOWAT", Any, Int(1), Last),
    known(SOCKET, libc::SO_BROADCAST, "SO_BROADCAST", Any, Int(0), Last),
    known(SOCKET, libc::SO_OOBINLINE, "SO_OOBINLINE", Any, Int(0), Last),
    known(SOCKET, libc::SO_DONTROUTE, "SO_DONTROUTE", Inet, Int(0), Last),
    known(SOCKET, libc::SO_NO_CHECK, "SO_NO_CHECK", Inet, Int(0), Last),
    known(SOCKET, libc::SO_PASSCRED, "SO_PASSCRED", Unix, Int(0), Last),
    known(SOCKET, libc::SO_PASSSEC, "SO_PASSSEC", Unix, Int(0), Last),
    known(SOCKET, 76, "SO_PASSPIDFD", Unix, Int(0), Last),
    known(SOCKET, 83, "SO_PASSRIGHTS", Unix, Int(1), Last),
    // Each of the three sets a flag that the others read; the order keeps the strongest.
    known(SOCKET, libc::SO_TIMESTAMP, "SO_TIMESTAMP", Any, Int(0), Last),
    known(SOCKET, libc::SO_TIMESTAMPNS, "SO_TIMESTAMPNS", Any, Int(0), Last),
    known(SOCKET, libc::SO_TIMESTAMPING, "SO_TIMESTAMPING", Any, Bytes(8), Last),
    known(SOCKET, 63, "SO_TIMESTAMP_NEW", Any, Int(0), Last),
    known(SOCKET, 64, "SO_TIMESTAMPNS_NEW", Any, Int(0), Last),
    known(SOCKET, libc::SO_RXQ_OVFL, "SO_RXQ_OVFL", Any, Int(0), Last),
    known(SOCKET, libc::SO_SELECT_ERR_QUEUE, "SO_SELECT_ERR_QUEUE", Inet, Int(0), Last),
    known(SOCKET, libc::SO_ZEROCOPY, "SO_ZEROCOPY", Inet, Int(0), Last),
    known(SOCKET, 75, "SO_RCVMARK", Inet, Int(0), Last),
    known(IP, libc::IP_FREEBIND, "IP_FREEBIND", Inet, Int(0), BeforeBind),
    known(IP, libc::IP_TRANSPARENT, "IP_TRANSPARENT", Inet, Int(0), BeforeBind),
    known(IP, 24, "IP_BIND_ADDRESS_NO_PORT", Inet, Int(0), BeforeBind),
    known(IP, 51, "IP_LOCAL_PORT_RANGE", Inet, Int(0), BeforeBind),
    known(IP, libc::IP_TOS, "IP_TOS", Inet, Int(0), BeforeBind),
    known(IP, libc::IP_TTL, "IP_TTL", Inet, Int(64), BeforeBind),
    known(IP, libc::IP_MINTTL, "IP_MINTTL", Inet, Int(0), Last),
    known(IP, libc::IP_MTU_DISCOVER, "IP_MTU_DISCOVER", Inet, Int(1), Last),
    known(IP, libc::IP_RECVERR, "IP_RECVERR", Inet, Int(0), Last),
    known(IP, libc::IP_PKTINFO, "IP_PKTINFO", Inet, Int(0), Last),
    known(IP, libc::IP_RECVTTL, "IP_RECVTTL", Inet, Int(0), Last),
    known(IP, libc::IP_RECVTOS, "IP_RECVTOS", Inet, Int(0), Last),
    known(IP, libc::IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR", Inet, Int(0), Last),
    known(IP, libc::IP_MULTICAST_TTL, "IP_MULTICAST_TTL", Udp, Int(1), Last),
    known(IP, libc::IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP", Udp, Int(1), Last),
    known(IP, libc::IP_MULTICAST_ALL, "IP_MULTICAST_ALL", Udp, Int(1), Last),
    known(IP6, libc::IPV6_V6ONLY, "IPV6_V6ONLY", Inet6, Int(0), BeforeBind),
    known(IP6, 78, "IPV6_FREEBIND", Inet6, Int(0), BeforeBind),
    known(IP6, libc::IPV6_TRANSPARENT, "IPV6_TRANSPARENT", Inet6, Int(0), BeforeBind),
    known(IP6, libc::IPV6_TCLASS, "IPV6_TCLASS", Inet6, Int(0), BeforeBind),
    known(IP6, libc::IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS", Inet6, Int(64), BeforeBind),
    known(IP6, libc::IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER", Inet6, Int(1), Last),
    known(IP6, libc::IPV6_RECVERR, "IPV6_RECVERR", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVTCLASS, "IPV6_RECVTCLASS", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS", Udp6, Int(1), Last),
    known(IP6, libc::IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP", Udp6, Int(1), Last),
    known(TCP, libc::TCP_CONGESTION, "TCP_CONGESTION", Tcp, Algorithm, BeforeBind),
    known(TCP, libc::TCP_NODELAY, "TCP_NODELAY", Tcp, Int(0), Last),
    known(TCP, libc::TCP_CORK, "TCP_CORK", Tcp, Int(0), Last),
    known(TCP, libc::TCP_KEEPIDLE, "TCP_KEEPIDLE", Tcp, Int(7200), Last),
    known(TCP, libc::TCP_KEEPINTVL, "TCP_KEEPINTVL", Tcp, Int(75), Last),
    known(TCP, libc::TCP_KEEPCNT, "TCP_KEEPCNT", Tcp, Int(9), Last),
    known(TCP, libc::TCP_SYNCNT, "TCP_SYNCNT", Tcp, Int(6), BeforeBind),
    known(TCP, libc::TCP_LINGER2, "TCP_LINGER2", Tcp, Int(60), Last),
    known(TCP, libc::TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT", Tcp, Int(0), Last),
    known(TCP, libc::TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT", Tcp, Int(0), Last),
    known(TCP, libc::TCP_FASTOPEN, "TCP_FASTOPEN", Tcp, Int(0), Last),
    known(TCP, libc::TCP_FASTOPEN_CONNECT, "TCP_FASTOPEN_CONNECT", Tcp, Int(0), Last),
    known(TCP, 25, "TCP_NOTSENT_LOWAT", Tcp, Int(-1), Last),
    known(TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, "TCP_THIN_LINEAR_TIMEOUTS", Tcp, Int(0), Last),
    known(TCP, 36, "TCP_INQ", Tcp, Int(0), Last),
    known(UDP, libc::UDP_CORK, "UDP_CORK", Udp, Int(0), Last),
    known(UDP, libc::UDP_SEGMENT, "UDP_SEGMENT", Udp, Int(0), Last),
    known(UDP, libc::UDP_GRO, "UDP_GRO", Udp, Int(0), Last),
    known(UDP, 101, "UDP_NO_CHECK6_TX", Udp, Int(0), Last),
    known(UDP, 102, "UDP_NO_CHECK6_RX", Udp, Int(0), Last),
];

impl Known {
    fn applies(&self, kind: Kind) -> bool {
        let inet = matches!(kind.domain, libc::AF_INET | libc::AF_INET6);
        match self.family {
            Any => true,
            Inet => inet,
            Inet6 => kind.domain == libc::AF_INET6,
            Tcp => inet && kind.protocol == libc::IPPROTO_TCP,
            Udp => inet && kind.protocol == libc::IPPROTO_UDP,
            Udp6 => kind.domain == libc::AF_INET6 && kind.protocol == libc::IPPROTO_UDP,
            Unix => kind.domain == libc::AF_UNIX,
        }
    }

    /// Reads the option; `None` where it has a new socket's value or this kernel or socket lacks it.
    fn read(&self, fd: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
        let mut buffer = [0; 64];
        let room = match self.shape {
            Int(_) | Buffer { .. } => 4,
            Bytes(length) => length,
            // IFNAMSIZ is what the kernel insists on; names of algorithms are as long.
            Text(_) | Algorithm => 16,
        };
        let length = match raw::get_bytes(fd, self.level, self.name, &mut buffer[..room]) {
            Ok(length) => length,
            Err(source)
                if matches!(
                    source.raw_os_error(),
                    Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTCONN)
                ) =>
            {
                return Ok(None);
            }
            Err(source) => return Err(self.error("getsockopt", fd, source)),
        };
        let value = &buffer[..length];
        let usual = match self.shape {
            Int(default) => value == default.to_ne_bytes(),
            Bytes(_) => value.iter().all(|byte| *byte == 0),
            Text(_) => value.iter().all(|byte| *byte == 0),
            Algorithm | Buffer { .. } => false,
        };
        let value = match self.shape {
            Text(_) | Algorithm => value.split(|byte| *byte == 0).next().unwrap_or_default(),
            _ => value,
        };
        Ok((!usual).then(|| value.to_vec()))
    }

    fn write(&self, fd: BorrowedFd<'_>, value: &[u8]) -> Result<()> {
        let set = |name, value: &[u8]| {
            raw::set_bytes(fd, self.level, name, value).map_err(|source| self.error("setsockopt", fd, source))
        };
        match self.shape {
            Buffer { force } => {
                let Ok(bytes) = <[u8; 4]>::try_from(value) else { return Err(self.length(value.len())) };
                self.write_buffer(fd, force, i32::from_ne_bytes(bytes))
            }
            Int(_) if value.len() != 4 => Err(self.length(value.len())),
            Bytes(length) if value.len() != length => Err(self.length(value.len())),
            Text(most) if value.len() > most => Err(self.length(value.len())),
            Algorithm if value.len() > 15 => Err(self.length(value.len())),
            // A new socket has the namespace's algorithm, which need not be among those an
            // unprivileged user may choose: leave it when it is the same.
            Algorithm if self.read(fd)?.as_deref() == Some(value) => Ok(()),
            // Linux keeps half the timestamping flags (the second word is a PHC's number).
            Int(_) | Bytes(_) | Text(_) | Algorithm => set(self.name, value),
        }
    }

    /// The kernel doubles what it is given; `SO_SNDBUFFORCE` is not bound by `wmem_max`.
    fn write_buffer(&self, fd: BorrowedFd<'_>, force: i32, doubled: i32) -> Result<()> {
        if raw::get_int(fd, self.level, self.name).ok() == Some(doubled) {
            return Ok(());
        }
        if doubled < 0 {
            return Err(Error::malformed("setsockopt", self.label, format!("negative size {doubled}")));
        }
        raw::set_int(fd, self.level, force, doubled / 2)
            .or_else(|_| raw::set_int(fd, self.level, self.name, doubled / 2))
            .map_err(|source| self.error("setsockopt", fd, source))
    }

    fn error(&self, operation: &'static str, fd: BorrowedFd<'_>, source: std::io::Error) -> Error {
        Error::new(operation, format!("{} of {}", self.label, raw::name(fd)), source)
    }

    fn length(&self, length: usize) -> Error {
        Error::malformed("setsockopt", self.label, format!("a value of {length} bytes is not of its length"))
    }
}

/// The options of a socket that differ from a new socket's, in the order in which [`apply`] sets them.
///
/// The sizes of its buffers and the name of its congestion control are always among them.
pub fn capture(fd: impl AsFd) -> Result<Vec<SocketOption>> {
    crate::fault::point();
    let fd = fd.as_fd();
    let kind = raw::kind(fd)?;
    let mut options = Vec::new();
    for known in TABLE.iter().filter(|known| known.applies(kind)) {
        if let Some(value) = known.read(fd)? {
            options.push(SocketOption { level: known.level, name: known.name, value });
        }
    }
    // Without the lock bits the kernel would take the sizes set at restore for the user's own wish.
    if !options.iter().any(|option| (option.level, option.name) == (SOCKET, SO_BUF_LOCK)) {
        options.push(SocketOption { level: SOCKET, name: SO_BUF_LOCK, value: vec![0; 4] });
    }
    Ok(options)
}

/// Sets those of `options` that belong to `phase`, in the order of the table, whatever their own.
///
/// Errors: an option that is not in the allowlist or not one of this kind of socket, a value of the wrong
/// length, or what `setsockopt(2)` says.
pub fn apply(fd: impl AsFd, options: &[SocketOption], phase: Phase) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    let kind = raw::kind(fd)?;
    for option in options {
        let known = TABLE
            .iter()
            .any(|known| (known.level, known.name) == (option.level, option.name) && known.applies(kind));
        if !known {
            let what = format!("option {} of level {}", option.name, option.level);
            return Err(Error::malformed("setsockopt", what, "not an option that may be restored"));
        }
    }
    for known in TABLE.iter().filter(|known| known.phase == phase) {
        let wanted = options.iter().find(|option| (option.level, option.name) == (known.level, known.name));
        if let Some(option) = wanted {
            known.write(fd, &option.value)?;
        }
    }
    Ok(())
}

/// The name of an option of the table: `SO_KEEPALIVE`.
pub fn label(option: &SocketOption) -> Option<&'static str> {
    let known = TABLE.iter().find(|known| (known.level, known.name) == (option.level, option.name))?;
    Some(known.label)
}

/// The upper layer protocol of a TCP socket (`tls`, `mptcp`), if it has one: such a socket cannot be repaired.
pub fn upper_layer(fd: impl AsFd) -> Option<String> {
    let mut buffer = [0; 16];
    let length = raw::get_bytes(fd.as_fd(), TCP, libc::TCP_ULP, &mut buffer).ok()?;
    let name = buffer[..length].split(|byte| *byte == 0).next()?;
    (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
}

/// The reading offset of `MSG_PEEK` (`SO_PEEK_OFF`), -1 where it is not used.
pub fn peek_offset(fd: impl AsFd) -> Result<i32> {
    let fd = fd.as_fd();
    raw::get_int(fd, SOCKET, libc::SO_PEEK_OFF)
        .map_err(|source| Error::new("getsockopt(SO_PEEK_OFF)", raw::name(fd), source))
}

/// Sets the reading offset of `MSG_PEEK`; -1 turns it off.
pub fn set_peek_offset(fd: impl AsFd, offset: i32) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    raw::set_int(fd, SOCKET, libc::SO_PEEK_OFF, offset)
        .map_err(|source| Error::new("setsockopt(SO_PEEK_OFF)", raw::name(fd), source))
}
