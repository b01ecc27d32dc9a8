//! Members of multicast groups: IPv4 on the loopback interface, of any source, of one, of all but one, also of IPv6 sockets;
//! IPv6 on the interface that the option names, which has the addresses [`SIX_SOURCES`].

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys;

const SOURCES: [Ipv4Addr; 2] = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)];
const ANY: Ipv4Addr = Ipv4Addr::new(239, 77, 1, 1);
const ONE: Ipv4Addr = Ipv4Addr::new(239, 77, 1, 2);
const ALL_BUT_ONE: Ipv4Addr = Ipv4Addr::new(239, 77, 1, 3);
const NONE: Ipv4Addr = Ipv4Addr::new(239, 77, 1, 4);
const SIX_SOURCES: [Ipv6Addr; 2] = [SIX_SOURCE, Ipv6Addr::new(0xFD77, 0, 0, 0, 0, 0, 0, 2)];
const SIX_SOURCE: Ipv6Addr = Ipv6Addr::new(0xFD77, 0, 0, 0, 0, 0, 0, 1);
const SIX: Ipv6Addr = Ipv6Addr::new(0xFF02, 0, 0, 0, 0, 0, 0x77, 1);
const SIX_BLOCKED: Ipv6Addr = Ipv6Addr::new(0xFF02, 0, 0, 0, 0, 0, 0x77, 2);
/// From `linux/in.h` and `linux/in6.h`.
const MCAST_BLOCK_SOURCE: i32 = 43;
const IPV6_MULTICAST_ALL: i32 = 29;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let interface = setting.options.first().context("which interface?")?.clone();
    let four = UdpSocket::bind("0.0.0.0:0")?;
    for group in [ANY, ALL_BUT_ONE] {
        four.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST)?;
    }
    // struct ip_mreq_source: group, interface, source.
    let source = |group: Ipv4Addr| [group, Ipv4Addr::LOCALHOST, SOURCES[1]].map(|ip| ip.octets()).concat();
    sys::set_option(&four, libc::IPPROTO_IP, libc::IP_BLOCK_SOURCE, &source(ALL_BUT_ONE))?;
    sys::set_option(&four, libc::IPPROTO_IP, libc::IP_ADD_SOURCE_MEMBERSHIP, &source(ONE))?;
    let six = UdpSocket::bind("[::]:0")?;
    let index = index(&interface)?;
    six.join_multicast_v6(&SIX, index)?;
    six.join_multicast_v6(&SIX_BLOCKED, index)?;
    let blocked = block(index, SIX_BLOCKED, SIX_SOURCES[1]);
    sys::set_option(&six, libc::IPPROTO_IPV6, MCAST_BLOCK_SOURCE, &blocked)?;
    sys::set_option(&six, libc::IPPROTO_IP, libc::IP_ADD_SOURCE_MEMBERSHIP, &source(ONE))?;
    for socket in [&four, &six] {
        // Only groups that the socket itself has joined.
        sys::set_option(socket, libc::IPPROTO_IP, libc::IP_MULTICAST_ALL, &0_i32.to_ne_bytes())?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    }
    sys::set_option(&six, libc::IPPROTO_IPV6, IPV6_MULTICAST_ALL, &0_i32.to_ne_bytes())?;
    // Others are members, too, or nothing at all would arrive for a group that a restore has forgotten.
    let other = UdpSocket::bind("0.0.0.0:0")?;
    other.join_multicast_v4(&NONE, &Ipv4Addr::LOCALHOST)?;
    Ok(Box::new(move || {
        let _held = &other;
        let [first, second] = SOURCES;
        check(
            &four,
            &[
                (first, ANY, true),
                (second, ANY, true),
                (first, ONE, false),
                (second, ONE, true),
                (first, ALL_BUT_ONE, true),
                (second, ALL_BUT_ONE, false),
                (first, NONE, false),
            ],
        )
        .context("an IPv4 socket")?;
        check(&six, &[(first, ONE, false), (second, ONE, true), (first, ANY, false)])
            .context("IPv4 groups of an IPv6 socket")?;
        check_six(&six, &interface).context("an IPv6 socket")?;
        Ok(String::new())
    }))
}

/// `struct group_source_req`: interface, then group and source, each a `sockaddr_storage`.
fn block(index: u32, group: Ipv6Addr, source: Ipv6Addr) -> Vec<u8> {
    let mut request = vec![0; 8 + 2 * 128];
    request[..4].copy_from_slice(&index.to_ne_bytes());
    for (at, address) in [(8, group), (136, source)] {
        request[at..at + 2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        request[at + 8..at + 24].copy_from_slice(&address.octets());
    }
    request
}

/// Sends to groups from sources; what is not to arrive is followed by a datagram that is.
fn check(member: &UdpSocket, expected: &[(Ipv4Addr, Ipv4Addr, bool)]) -> Result<()> {
    let port = member.local_addr()?.port();
    let last = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    for (source, group, arrives) in expected {
        let sender = UdpSocket::bind((*source, 0))?;
        let through = Ipv4Addr::LOCALHOST.octets();
        sys::set_option(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &through)?;
        sender.send_to(b"to the group", (*group, port))?;
        last.send_to(b"to the socket", (Ipv4Addr::LOCALHOST, port))?;
        let arrived = first_of_two(member)?;
        ensure!(arrived == *arrives, "from {source} to {group}: {arrived} instead of {arrives}");
    }
    Ok(())
}

fn check_six(member: &UdpSocket, interface: &str) -> Result<()> {
    let port = member.local_addr()?.port();
    let [first, second] = SIX_SOURCES;
    let last = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
    for (source, group, arrives) in
        [(first, SIX, true), (second, SIX, true), (first, SIX_BLOCKED, true), (second, SIX_BLOCKED, false)]
    {
        let sender = UdpSocket::bind((source, 0))?;
        let through = index(interface)?.to_ne_bytes();
        sys::set_option(&sender, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, &through)?;
        sender.send_to(b"to the group", (group, port))?;
        last.send_to(b"to the socket", (Ipv6Addr::LOCALHOST, port))?;
        let arrived = first_of_two(member)?;
        ensure!(arrived == arrives, "from {source} to {group}: {arrived} instead of {arrives}");
    }
    Ok(())
}

/// The interface's index, which may be another one after a restore.
fn index(interface: &str) -> Result<u32> {
    Ok(rustix::net::netdevice::name_to_index(UdpSocket::bind("0.0.0.0:0")?, interface)?)
}

/// Whether the datagram to the group comes before the one to the socket, which is the last.
fn first_of_two(member: &UdpSocket) -> Result<bool> {
    let mut buffer = [0; 100];
    let mut receive = || -> Result<(bool, SocketAddr)> {
        let (length, from) = member.recv_from(&mut buffer).context("waiting for the last datagram")?;
        Ok((&buffer[..length] == b"to the group", from))
    };
    let (to_group, _) = receive()?;
    ensure!(!to_group || !receive()?.0, "a datagram to a group came twice");
    Ok(to_group)
}
