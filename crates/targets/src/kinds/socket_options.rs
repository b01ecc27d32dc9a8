//! Options of sockets: of every kind one with many options set. All that `getsockopt(2)` tells of them must be the same after
//! a restore, also what this program does not know of.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SocketType};

use super::{Setting, Verify};
use crate::sys;

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;

/// What is set on every internet socket: level, name, value.
const SET: &[(i32, i32, i32)] = &[
    (SOCKET, libc::SO_DEBUG, 1),
    (SOCKET, libc::SO_BUSY_POLL, 7),
    (SOCKET, libc::SO_WIFI_STATUS, 1),
    (SOCKET, libc::SO_NOFCS, 1),
    (IP, libc::IP_RECVOPTS, 1),
    (IP, libc::IP_RETOPTS, 1),
    (IP, libc::IP_CHECKSUM, 1),
    (IP, libc::IP_TTL, 64),
];
const SET_UDP: &[(i32, i32, i32)] = &[
    (SOCKET, libc::SO_TIMESTAMPNS, 1),
    (IP, 25, 1),
    (IP, libc::IP_MULTICAST_TTL, 5),
    (IP, libc::IP_MULTICAST_LOOP, 0),
    (UDP, libc::UDP_SEGMENT, 1000),
    (UDP, libc::UDP_GRO, 1),
    (UDP, 101, 1),
];
const SET_SIX: &[(i32, i32, i32)] = &[
    (IP6, libc::IPV6_2292PKTINFO, 1),
    (IP6, libc::IPV6_2292RTHDR, 1),
    (IP6, libc::IPV6_FLOWINFO, 1),
    (IP6, libc::IPV6_RECVHOPOPTS, 1),
    (IP6, libc::IPV6_RECVRTHDR, 1),
    (IP6, libc::IPV6_RECVDSTOPTS, 1),
    (IP6, libc::IPV6_RECVPATHMTU, 1),
    (IP6, libc::IPV6_DONTFRAG, 1),
    // IPV6_AUTOFLOWLABEL, IPV6_ADDR_PREFERENCES (temporary addresses), IPV6_MINHOPCOUNT.
    (IP6, 70, 0),
    (IP6, 72, 1),
    (IP6, 73, 3),
];
const SET_TCP: &[(i32, i32, i32)] = &[
    (TCP, libc::TCP_KEEPIDLE, 7200),
    (TCP, libc::TCP_SAVE_SYN, 1),
    (TCP, 34, 1),
    (TCP, 37, 2000),
    (TCP, libc::TCP_MAXSEG, 1000),
];

/// `linux/filter.h`: a program that accepts everything (`BPF_RET | BPF_K`, all bytes).
const ACCEPT_ALL: [u8; 8] = [6, 0, 0, 0, 0xFF, 0xFF, 0, 0];

/// What is not a setting: errors, sizes of what is queued, identities, the momentary state of a connection, estimates.
const LEFT_OUT: &[(i32, i32)] = &[
    (SOCKET, libc::SO_ERROR),
    (SOCKET, libc::SO_GET_FILTER),
    (SOCKET, libc::SO_MEMINFO),
    (SOCKET, libc::SO_COOKIE),
    (SOCKET, libc::SO_PEERSEC),
    (SOCKET, libc::SO_PEERGROUPS),
    (SOCKET, libc::SO_INCOMING_CPU),
    (SOCKET, libc::SO_INCOMING_NAPI_ID),
    // SO_NETNS_COOKIE, SO_PEERPIDFD (which opens a descriptor)
    (SOCKET, 71),
    (SOCKET, 77),
    (IP, libc::IP_MTU),
    (IP6, libc::IPV6_2292PKTOPTIONS),
    (IP6, libc::IPV6_MTU),
    (IP6, libc::IPV6_PATHMTU),
    (TCP, libc::TCP_WINDOW_CLAMP),
    (TCP, libc::TCP_INFO),
    (TCP, libc::TCP_QUICKACK),
    (TCP, libc::TCP_REPAIR),
    (TCP, libc::TCP_REPAIR_QUEUE),
    (TCP, libc::TCP_QUEUE_SEQ),
    (TCP, libc::TCP_TIMESTAMP),
    (TCP, libc::TCP_CC_INFO),
    (TCP, libc::TCP_SAVED_SYN),
    (TCP, libc::TCP_ZEROCOPY_RECEIVE),
    (TCP, libc::TCP_REPAIR_WINDOW),
    (TCP, libc::TCP_FASTOPEN_KEY),
];
/// What is not a setting once there is a connection: the multicast options hold what came with the peer's packets, and
/// bind(2) to an IPv6 address sets `IPV6_V6ONLY` itself.
const OF_CONNECTIONS: &[(i32, i32)] = &[
    (TCP, libc::TCP_MAXSEG),
    (IP, libc::IP_MULTICAST_TTL),
    (IP6, libc::IPV6_MULTICAST_IF),
    (IP6, libc::IPV6_MULTICAST_HOPS),
    (IP6, libc::IPV6_V6ONLY),
];
const LEVELS: &[(i32, i32)] = &[(SOCKET, 100), (IP, 60), (IP6, 80), (TCP, 60), (UDP, 120)];

struct Sockets {
    named: Vec<(&'static str, OwnedFd)>,
}

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let mut sockets = Sockets { named: Vec::new() };
    for (name, family, address) in [
        ("UDP over IPv4", AddressFamily::INET, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        ("UDP over IPv6", AddressFamily::INET6, SocketAddr::from((Ipv6Addr::LOCALHOST, 0))),
    ] {
        let socket = UdpSocket::bind(address)?;
        set_all(&socket, family, SET_UDP).context(name)?;
        sys::set_option(&socket, IP, libc::IP_MULTICAST_IF, &Ipv4Addr::LOCALHOST.octets())?;
        sockets.named.push((name, socket.into()));
    }
    for (name, family, address) in [
        ("TCP over IPv4", AddressFamily::INET, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        ("TCP over IPv6", AddressFamily::INET6, SocketAddr::from((Ipv6Addr::LOCALHOST, 0))),
    ] {
        let plain = TcpListener::bind(address)?;
        let client = TcpStream::connect(plain.local_addr()?)?;
        let (server, _) = plain.accept()?;
        let idle = rustix::net::socket(family, SocketType::STREAM, None)?;
        let listening = rustix::net::socket(family, SocketType::STREAM, None)?;
        for socket in [&idle, &listening] {
            set_all(socket, family, SET_TCP).context(name)?;
        }
        rustix::net::bind(&listening, &address)?;
        rustix::net::listen(&listening, 5)?;
        set_all(&client, family, &[(TCP, 37, 2000)]).context("connected")?;
        let more: [OwnedFd; 4] = [plain.into(), client.into(), server.into(), listening];
        sockets.named.extend(more.into_iter().chain([idle]).map(|socket| (name, socket)));
    }
    let (one, other) = UnixDatagram::pair()?;
    attach_filter(&one)?;
    sockets.named.extend([("unix", one.into()), ("unix", other.into())]);
    let described = sockets.describe()?;
    ensure!(described.contains("filter [06, 00"), "no filter in {described}");
    Ok(Box::new(move || {
        sys::compare_lines("options", &sockets.describe()?, &described)?;
        Ok(String::new())
    }))
}

fn set_all(socket: &(impl AsRawFd + AsFd), family: AddressFamily, more: &[(i32, i32, i32)]) -> Result<()> {
    let six = if family == AddressFamily::INET6 { SET_SIX } else { &[] };
    for (level, name, value) in SET.iter().chain(six).chain(more) {
        sys::set_option(socket, *level, *name, &value.to_ne_bytes())?;
    }
    sys::set_option(socket, SOCKET, libc::SO_MAX_PACING_RATE, &123_456_789_u64.to_ne_bytes())?;
    // The loopback interface, which is the first of every namespace, as a number in network byte order.
    sys::set_option(socket, IP, libc::IP_UNICAST_IF, &1_u32.to_be_bytes())?;
    // No operation, four times.
    sys::set_option(socket, IP, libc::IP_OPTIONS, &[1, 1, 1, 1])?;
    if family == AddressFamily::INET6 {
        sys::set_option(socket, IP6, 76, &1_u32.to_be_bytes())?;
        // A header of eight bytes: six of padding (PadN).
        sys::set_option(socket, IP6, libc::IPV6_DSTOPTS, &[0, 0, 1, 4, 0, 0, 0, 0])?;
    }
    attach_filter(socket)?;
    sys::set_option(socket, SOCKET, libc::SO_LOCK_FILTER, &1_i32.to_ne_bytes())
}

fn attach_filter(socket: &impl AsRawFd) -> Result<()> {
    // struct sock_fprog: the number of instructions, and where they are.
    let place = ACCEPT_ALL.as_ptr().expose_provenance() as u64;
    let program = [1_u64.to_ne_bytes(), place.to_ne_bytes()].concat();
    sys::set_option(socket, SOCKET, libc::SO_ATTACH_FILTER, &program)
}

impl Sockets {
    /// Every option that can be read, in hexadecimal.
    fn describe(&self) -> Result<String> {
        let mut text = String::new();
        for (index, (name, socket)) in self.named.iter().enumerate() {
            let socket = socket.as_fd();
            for (level, end) in LEVELS {
                for option in (0..*end).filter(|option| !LEFT_OUT.contains(&(*level, *option))) {
                    if OF_CONNECTIONS.contains(&(*level, option)) && connected(socket) {
                        continue;
                    }
                    if let Some(value) = sys::option(socket, *level, option, 64) {
                        writeln!(text, "{name} ({index}) level {level} option {option}: {value:02x?}")?;
                    }
                }
            }
            // Its length is a number of instructions: room for eight.
            if let Some(program) = sys::option(socket, SOCKET, libc::SO_GET_FILTER, 8) {
                writeln!(text, "{name} ({index}) filter {program:02x?}")?;
            }
        }
        Ok(text)
    }
}

fn connected(socket: BorrowedFd<'_>) -> bool {
    rustix::net::getpeername(socket).is_ok()
}
