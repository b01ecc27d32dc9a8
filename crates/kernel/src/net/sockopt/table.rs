//! Which options there are, for which sockets, and what their values look like.
//!
//! Every option of `SOL_SOCKET`, `IPPROTO_IP`, `IPPROTO_IPV6`, `IPPROTO_TCP` and `IPPROTO_UDP` that can be read and set is in
//! the table, or in the list of those left out in [`super`]. Numbers without a name in the `libc` crate are from
//! `asm-generic/socket.h`, `linux/in.h`, `linux/in6.h` and `linux/tcp.h`.

use super::Phase;

/// What the value of an option looks like.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// An int; the value that a new socket has.
    Int(i32),
    /// An int; a new socket has what its namespace's settings say, and this where nobody has changed them.
    Tuned(i32),
    /// A struct of this many bytes, all zero in a new socket.
    Bytes(usize),
    /// A number of this many bytes, all ones in a new socket.
    Ones(usize),
    /// A struct of at most this many bytes, empty in a new socket.
    Blob(usize),
    /// A name of at most this many bytes, empty in a new socket.
    Text(usize),
    /// The congestion control: a name, whose default is the namespace's.
    Algorithm,
    /// The size of a buffer: the kernel doubles what is set, and marks it as fixed by the user.
    Buffer { force: i32 },
    /// The index of an interface, 0 in a new socket; a checkpoint has its name, as the index is another one elsewhere.
    Interface { big_endian: bool },
    /// A classic BPF program.
    Filter,
    /// The largest segment; while there is a connection the kernel tells that one's.
    SegmentSize,
}

/// Which sockets have an option.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Any,
    /// IPv4, and IPv6 sockets for what they send to mapped addresses.
    Inet,
    Inet6,
    Tcp,
    Udp,
    /// UDP over IPv6.
    Udp6,
    Unix,
    Netlink,
    /// Unix and netlink.
    Credentials,
}

pub(super) struct Known {
    pub(super) level: i32,
    pub(super) name: i32,
    pub(super) label: &'static str,
    pub(super) family: Family,
    pub(super) shape: Shape,
    pub(super) phase: Phase,
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

use Family::{Any, Credentials, Inet, Inet6, Netlink, Tcp, Udp, Udp6, Unix};
use Phase::{BeforeBind, Last};
use Shape::{Algorithm, Blob, Buffer, Bytes, Filter, Int, Interface, Ones, SegmentSize, Text, Tuned};

pub(super) const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
pub(super) const TCP: i32 = libc::IPPROTO_TCP;
const NETLINK: i32 = 270;
const UDP: i32 = libc::IPPROTO_UDP;

/// `SO_BUF_LOCK` (Linux 5.14): which buffer sizes the user fixed. Source: `asm-generic/socket.h`.
pub(super) const SO_BUF_LOCK: i32 = 72;

#[rustfmt::skip]
pub(super) static TABLE: &[Known] = &[
    known(SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR", Any, Int(0), BeforeBind),
    known(SOCKET, libc::SO_REUSEPORT, "SO_REUSEPORT", Any, Int(0), BeforeBind),
    known(SOCKET, libc::SO_BINDTODEVICE, "SO_BINDTODEVICE", Inet, Text(15), BeforeBind),
    known(SOCKET, libc::SO_MARK, "SO_MARK", Inet, Int(0), BeforeBind),
    known(SOCKET, libc::SO_DEBUG, "SO_DEBUG", Any, Int(0), Last),
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
    known(SOCKET, libc::SO_PASSCRED, "SO_PASSCRED", Credentials, Int(0), Last),
    known(SOCKET, libc::SO_PASSSEC, "SO_PASSSEC", Credentials, Int(0), Last),
    known(SOCKET, 76, "SO_PASSPIDFD", Credentials, Int(0), Last),
    known(SOCKET, 83, "SO_PASSRIGHTS", Unix, Int(1), Last),
    known(SOCKET, 84, "SO_INQ", Unix, Int(0), Last),
    // Each of these sets a flag that the others read; the order keeps the strongest.
    known(SOCKET, libc::SO_TIMESTAMP, "SO_TIMESTAMP", Any, Int(0), Last),
    known(SOCKET, libc::SO_TIMESTAMPNS, "SO_TIMESTAMPNS", Any, Int(0), Last),
    known(SOCKET, libc::SO_TIMESTAMPING, "SO_TIMESTAMPING", Any, Bytes(8), Last),
    known(SOCKET, 63, "SO_TIMESTAMP_NEW", Any, Int(0), Last),
    known(SOCKET, 64, "SO_TIMESTAMPNS_NEW", Any, Int(0), Last),
    known(SOCKET, 65, "SO_TIMESTAMPING_NEW", Any, Bytes(8), Last),
    known(SOCKET, libc::SO_RXQ_OVFL, "SO_RXQ_OVFL", Any, Int(0), Last),
    known(SOCKET, libc::SO_SELECT_ERR_QUEUE, "SO_SELECT_ERR_QUEUE", Inet, Int(0), Last),
    known(SOCKET, libc::SO_ZEROCOPY, "SO_ZEROCOPY", Inet, Int(0), Last),
    known(SOCKET, 75, "SO_RCVMARK", Inet, Int(0), Last),
    known(SOCKET, 82, "SO_RCVPRIORITY", Inet, Int(0), Last),
    known(SOCKET, libc::SO_WIFI_STATUS, "SO_WIFI_STATUS", Inet, Int(0), Last),
    known(SOCKET, libc::SO_NOFCS, "SO_NOFCS", Inet, Int(0), Last),
    known(SOCKET, libc::SO_BUSY_POLL, "SO_BUSY_POLL", Inet, Tuned(0), Last),
    known(SOCKET, 69, "SO_PREFER_BUSY_POLL", Inet, Int(0), Last),
    known(SOCKET, libc::SO_MAX_PACING_RATE, "SO_MAX_PACING_RATE", Inet, Ones(8), Last),
    known(SOCKET, libc::SO_TXTIME, "SO_TXTIME", Inet, Bytes(8), Last),
    known(SOCKET, libc::SO_ATTACH_FILTER, "SO_ATTACH_FILTER", Any, Filter, Last),
    // After the filter, which it makes final.
    known(SOCKET, libc::SO_LOCK_FILTER, "SO_LOCK_FILTER", Any, Int(0), Last),
    known(NETLINK, 3, "NETLINK_PKTINFO", Netlink, Int(0), Last),
    known(NETLINK, 4, "NETLINK_BROADCAST_ERROR", Netlink, Int(0), Last),
    known(NETLINK, 5, "NETLINK_NO_ENOBUFS", Netlink, Int(0), Last),
    known(NETLINK, 8, "NETLINK_LISTEN_ALL_NSID", Netlink, Int(0), Last),
    known(NETLINK, 10, "NETLINK_CAP_ACK", Netlink, Int(0), Last),
    known(NETLINK, 11, "NETLINK_EXT_ACK", Netlink, Int(0), Last),
    known(NETLINK, 12, "NETLINK_GET_STRICT_CHK", Netlink, Int(0), Last),
    known(IP, libc::IP_FREEBIND, "IP_FREEBIND", Inet, Int(0), BeforeBind),
    known(IP, libc::IP_TRANSPARENT, "IP_TRANSPARENT", Inet, Int(0), BeforeBind),
    known(IP, 24, "IP_BIND_ADDRESS_NO_PORT", Inet, Int(0), BeforeBind),
    known(IP, 51, "IP_LOCAL_PORT_RANGE", Inet, Int(0), BeforeBind),
    known(IP, libc::IP_TOS, "IP_TOS", Inet, Int(0), BeforeBind),
    known(IP, libc::IP_TTL, "IP_TTL", Inet, Tuned(64), BeforeBind),
    known(IP, libc::IP_MINTTL, "IP_MINTTL", Inet, Int(0), Last),
    known(IP, libc::IP_MTU_DISCOVER, "IP_MTU_DISCOVER", Inet, Tuned(1), Last),
    known(IP, libc::IP_RECVERR, "IP_RECVERR", Inet, Int(0), Last),
    known(IP, libc::IP_PKTINFO, "IP_PKTINFO", Inet, Int(0), Last),
    known(IP, libc::IP_RECVTTL, "IP_RECVTTL", Inet, Int(0), Last),
    known(IP, libc::IP_RECVTOS, "IP_RECVTOS", Inet, Int(0), Last),
    known(IP, libc::IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR", Inet, Int(0), Last),
    known(IP, libc::IP_OPTIONS, "IP_OPTIONS", Inet, Blob(40), BeforeBind),
    known(IP, libc::IP_RECVOPTS, "IP_RECVOPTS", Inet, Int(0), Last),
    known(IP, libc::IP_RETOPTS, "IP_RETOPTS", Inet, Int(0), Last),
    known(IP, libc::IP_PASSSEC, "IP_PASSSEC", Inet, Int(0), Last),
    known(IP, libc::IP_CHECKSUM, "IP_CHECKSUM", Inet, Int(0), Last),
    known(IP, 25, "IP_RECVFRAGSIZE", Inet, Int(0), Last),
    known(IP, 26, "IP_RECVERR_RFC4884", Inet, Int(0), Last),
    known(IP, libc::IP_UNICAST_IF, "IP_UNICAST_IF", Inet, Interface { big_endian: true }, BeforeBind),
    known(IP, libc::IP_MULTICAST_IF, "IP_MULTICAST_IF", Udp, Bytes(4), BeforeBind),
    known(IP, libc::IP_MULTICAST_TTL, "IP_MULTICAST_TTL", Udp, Int(1), Last),
    known(IP, libc::IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP", Udp, Int(1), Last),
    known(IP, libc::IP_MULTICAST_ALL, "IP_MULTICAST_ALL", Udp, Int(1), Last),
    known(IP6, libc::IPV6_V6ONLY, "IPV6_V6ONLY", Inet6, Tuned(0), BeforeBind),
    known(IP6, 78, "IPV6_FREEBIND", Inet6, Int(0), BeforeBind),
    known(IP6, libc::IPV6_TRANSPARENT, "IPV6_TRANSPARENT", Inet6, Int(0), BeforeBind),
    known(IP6, libc::IPV6_TCLASS, "IPV6_TCLASS", Inet6, Int(0), BeforeBind),
    known(IP6, libc::IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS", Inet6, Tuned(64), BeforeBind),
    known(IP6, libc::IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER", Inet6, Int(1), Last),
    known(IP6, libc::IPV6_RECVERR, "IPV6_RECVERR", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVTCLASS, "IPV6_RECVTCLASS", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_2292PKTINFO, "IPV6_2292PKTINFO", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_2292HOPOPTS, "IPV6_2292HOPOPTS", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_2292DSTOPTS, "IPV6_2292DSTOPTS", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_2292RTHDR, "IPV6_2292RTHDR", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_2292HOPLIMIT, "IPV6_2292HOPLIMIT", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_FLOWINFO, "IPV6_FLOWINFO", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_FLOWINFO_SEND, "IPV6_FLOWINFO_SEND", Inet6, Int(0), BeforeBind),
    known(IP6, 31, "IPV6_RECVERR_RFC4884", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVHOPOPTS, "IPV6_RECVHOPOPTS", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVRTHDR, "IPV6_RECVRTHDR", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVDSTOPTS, "IPV6_RECVDSTOPTS", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_RECVPATHMTU, "IPV6_RECVPATHMTU", Inet6, Int(0), Last),
    known(IP6, 74, "IPV6_RECVORIGDSTADDR", Inet6, Int(0), Last),
    known(IP6, 77, "IPV6_RECVFRAGSIZE", Inet6, Int(0), Last),
    known(IP6, libc::IPV6_HOPOPTS, "IPV6_HOPOPTS", Inet6, Blob(2048), BeforeBind),
    known(IP6, libc::IPV6_RTHDR, "IPV6_RTHDR", Inet6, Blob(2048), BeforeBind),
    known(IP6, libc::IPV6_RTHDRDSTOPTS, "IPV6_RTHDRDSTOPTS", Inet6, Blob(2048), BeforeBind),
    known(IP6, libc::IPV6_DSTOPTS, "IPV6_DSTOPTS", Inet6, Blob(2048), BeforeBind),
    known(IP6, libc::IPV6_DONTFRAG, "IPV6_DONTFRAG", Inet6, Int(0), Last),
    known(IP6, 70, "IPV6_AUTOFLOWLABEL", Inet6, Tuned(1), BeforeBind),
    // IPV6_PREFER_SRC_PUBTMP_DEFAULT and IPV6_PREFER_SRC_HOME.
    known(IP6, 72, "IPV6_ADDR_PREFERENCES", Inet6, Int(0x500), BeforeBind),
    known(IP6, 73, "IPV6_MINHOPCOUNT", Inet6, Int(0), Last),
    known(IP6, 76, "IPV6_UNICAST_IF", Inet6, Interface { big_endian: true }, BeforeBind),
    known(IP6, libc::IPV6_MULTICAST_IF, "IPV6_MULTICAST_IF", Udp6, Interface { big_endian: false }, BeforeBind),
    known(IP6, 29, "IPV6_MULTICAST_ALL", Udp6, Int(1), Last),
    known(IP6, libc::IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS", Udp6, Int(1), Last),
    known(IP6, libc::IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP", Udp6, Int(1), Last),
    known(TCP, libc::TCP_CONGESTION, "TCP_CONGESTION", Tcp, Algorithm, BeforeBind),
    known(TCP, libc::TCP_MAXSEG, "TCP_MAXSEG", Tcp, SegmentSize, BeforeBind),
    known(TCP, libc::TCP_NODELAY, "TCP_NODELAY", Tcp, Int(0), Last),
    known(TCP, libc::TCP_CORK, "TCP_CORK", Tcp, Int(0), Last),
    known(TCP, libc::TCP_KEEPIDLE, "TCP_KEEPIDLE", Tcp, Tuned(7200), Last),
    known(TCP, libc::TCP_KEEPINTVL, "TCP_KEEPINTVL", Tcp, Tuned(75), Last),
    known(TCP, libc::TCP_KEEPCNT, "TCP_KEEPCNT", Tcp, Tuned(9), Last),
    known(TCP, libc::TCP_SYNCNT, "TCP_SYNCNT", Tcp, Tuned(6), BeforeBind),
    known(TCP, libc::TCP_LINGER2, "TCP_LINGER2", Tcp, Tuned(60), Last),
    known(TCP, libc::TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT", Tcp, Int(0), Last),
    known(TCP, libc::TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT", Tcp, Int(0), Last),
    known(TCP, libc::TCP_FASTOPEN, "TCP_FASTOPEN", Tcp, Int(0), Last),
    known(TCP, libc::TCP_FASTOPEN_CONNECT, "TCP_FASTOPEN_CONNECT", Tcp, Int(0), Last),
    known(TCP, 25, "TCP_NOTSENT_LOWAT", Tcp, Int(0), Last),
    known(TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, "TCP_THIN_LINEAR_TIMEOUTS", Tcp, Int(0), Last),
    known(TCP, 36, "TCP_INQ", Tcp, Int(0), Last),
    known(TCP, libc::TCP_SAVE_SYN, "TCP_SAVE_SYN", Tcp, Int(0), Last),
    known(TCP, 34, "TCP_FASTOPEN_NO_COOKIE", Tcp, Int(0), BeforeBind),
    known(TCP, 37, "TCP_TX_DELAY", Tcp, Int(0), Last),
    known(TCP, 44, "TCP_RTO_MAX_MS", Tcp, Tuned(120_000), Last),
    known(TCP, 45, "TCP_RTO_MIN_US", Tcp, Tuned(200_000), Last),
    known(TCP, 46, "TCP_DELACK_MAX_US", Tcp, Tuned(200_000), Last),
    known(UDP, libc::UDP_CORK, "UDP_CORK", Udp, Int(0), Last),
    known(UDP, libc::UDP_SEGMENT, "UDP_SEGMENT", Udp, Int(0), Last),
    known(UDP, libc::UDP_GRO, "UDP_GRO", Udp, Int(0), Last),
    known(UDP, 101, "UDP_NO_CHECK6_TX", Udp, Int(0), Last),
    known(UDP, 102, "UDP_NO_CHECK6_RX", Udp, Int(0), Last),
];
