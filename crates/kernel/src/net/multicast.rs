//! Memberships of multicast groups (`ip(7)`, `ipv6(7)`; RFC 3376, RFC 3678).
//!
//! No call lists those of a socket. `/proc/net/igmp` and `/proc/net/igmp6` list the groups of every interface of a
//! network namespace, whoever joined them, and `getsockopt(MCAST_MSFILTER)` of a socket that has not joined one of
//! them fails with `EADDRNOTAVAIL`: so each is asked for. IPv6 sockets may be members of IPv4 groups, too.
//!
//! ```text
//! struct group_filter   0 interface (u32)   8 group (sockaddr_storage)   136 mode   140 number of sources   144 sources
//! struct group_req      0 interface (u32)   8 group (sockaddr_storage)
//! ```
//!
//! Not seen: memberships on interfaces that are gone, which have no effect.
//! Sources: `net/ipv4/igmp.c` (`ip_mc_gsfget`, `igmp_mc_seq_show`), `net/ipv6/mcast.c`, `include/uapi/linux/in.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};

use super::{InNetns, raw};
use crate::{Error, Result};

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
const MCAST_EXCLUDE: u32 = 0;
const MCAST_INCLUDE: u32 = 1;

/// `sizeof(struct sockaddr_storage)`
const STORAGE: usize = 128;
const GROUP: usize = 8;
const MODE: usize = GROUP + STORAGE;
const COUNT: usize = MODE + 4;
const SOURCES: usize = COUNT + 4;
/// More than any setting of `igmp_max_msf` and `mld_max_msf` that makes sense; a limit against hostile checkpoints.
const MOST_SOURCES: usize = 4096;

/// A group on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The interface's index.
    pub interface: u32,
    /// The address of the group.
    pub address: IpAddr,
}

/// A socket's membership of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// The group.
    pub group: Group,
    /// Whether packets of the sources only are received, or of all but them.
    pub include: bool,
    /// The sources.
    pub sources: Vec<IpAddr>,
}

/// The groups of all interfaces of the network namespace that `socket` lives in. The calling thread visits it.
pub fn groups(socket: impl AsFd) -> Result<Vec<Group>> {
    let namespace = raw::namespace(socket)?;
    let _inside = InNetns::enter(&namespace)?;
    let mut groups = Vec::new();
    for (path, parse) in
        [("/proc/thread-self/net/igmp", parse_igmp as Parse), ("/proc/thread-self/net/igmp6", parse_igmp6)]
    {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            // A kernel without multicast, or without IPv6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(source) => return Err(Error::new("read", path, source)),
        };
        let parsed = parse(&String::from_utf8_lossy(&text));
        groups.extend(parsed.map_err(|line| Error::malformed("read", path, format!("the line {line:?}")))?);
    }
    Ok(groups)
}

/// Gives text to both parsers.
pub(super) fn feed(text: &str) {
    let _ = parse_igmp(text);
    let _ = parse_igmp6(text);
}

type Parse = fn(&str) -> std::result::Result<Vec<Group>, String>;

/// A line for each interface, whose first word is its index; then, behind tabs, one for each of its groups, whose first
/// word is the address as the machine's word.
fn parse_igmp(text: &str) -> std::result::Result<Vec<Group>, String> {
    let mut groups = Vec::new();
    let mut interface = 0;
    for line in text.lines().skip(1).filter(|line| !line.is_empty()) {
        let first = line.split_whitespace().next().unwrap_or_default();
        if line.starts_with('\t') {
            let address = u32::from_str_radix(first, 16).map_err(|_| line.to_owned())?;
            groups.push(Group { interface, address: Ipv4Addr::from(address.to_ne_bytes()).into() });
        } else {
            interface = first.parse().map_err(|_| line.to_owned())?;
        }
    }
    Ok(groups)
}

/// A line for each group: the index and name of the interface, the address in 32 digits.
fn parse_igmp6(text: &str) -> std::result::Result<Vec<Group>, String> {
    let group = |line: &str| {
        let mut words = line.split_whitespace();
        let interface = words.next()?.parse().ok()?;
        let address = words.nth(1).filter(|word| word.len() == 32)?;
        let address = Ipv6Addr::from_bits(u128::from_str_radix(address, 16).ok()?);
        Some(Group { interface, address: address.into() })
    };
    text.lines()
        .filter(|line| !line.is_empty())
        .map(|line| group(line).ok_or_else(|| line.to_owned()))
        .collect()
}

/// Which of `groups` the socket has joined, and how.
pub fn memberships(socket: impl AsFd, groups: &[Group]) -> Result<Vec<Membership>> {
    crate::fault::point();
    let fd = socket.as_fd();
    let six = raw::kind(fd)?.domain == libc::AF_INET6;
    let mine = groups.iter().filter(|group| six || group.address.is_ipv4());
    let found = mine.filter_map(|group| membership(fd, *group).transpose());
    found.collect()
}

/// How the socket has joined a group, if it has.
fn membership(fd: BorrowedFd<'_>, group: Group) -> Result<Option<Membership>> {
    let mut room = 16;
    loop {
        let mut buffer = vec![0; SOURCES + room * STORAGE];
        write_group(&mut buffer, group);
        put(&mut buffer, COUNT, room as u32);
        match raw::get_bytes(fd, level(group), MCAST_MSFILTER, &mut buffer) {
            Ok(_) => {}
            // Not a member; or a protocol whose sockets cannot be one (of TCP over IPv6).
            Err(source)
                if matches!(
                    source.raw_os_error(),
                    Some(libc::EADDRNOTAVAIL | libc::ENODEV | libc::ENOPROTOOPT | libc::EINVAL)
                ) =>
            {
                return Ok(None);
            }
            Err(source) => return Err(fail("getsockopt(MCAST_MSFILTER)", group, source)),
        }
        let count = word(&buffer, COUNT) as usize;
        if count > room {
            room = count.min(MOST_SOURCES);
            if count > room {
                let why = format!("it has {count} sources, more than {MOST_SOURCES}");
                return Err(Error::malformed("getsockopt(MCAST_MSFILTER)", group.address, why));
            }
            continue;
        }
        let sources = (0..count).filter_map(|index| address(&buffer[SOURCES + index * STORAGE..]));
        return Ok(Some(Membership {
            group,
            include: word(&buffer, MODE) == MCAST_INCLUDE,
            sources: sources.collect(),
        }));
    }
}

/// Makes the socket a member of a group.
pub fn join(socket: impl AsFd, membership: &Membership) -> Result<()> {
    crate::fault::point();
    let (fd, group) = (socket.as_fd(), membership.group);
    let sources = &membership.sources;
    if sources.len() > MOST_SOURCES
        || sources.iter().any(|source| source.is_ipv4() != group.address.is_ipv4())
        || !group.address.is_multicast()
    {
        let why = format!("{sources:?} cannot be the sources of this multicast group");
        return Err(Error::malformed("setsockopt(MCAST_MSFILTER)", group.address, why));
    }
    let mut request = vec![0; MODE];
    write_group(&mut request, group);
    raw::set_bytes(fd, level(group), MCAST_JOIN_GROUP, &request)
        .map_err(|source| fail("setsockopt(MCAST_JOIN_GROUP)", group, source))?;
    if sources.is_empty() && !membership.include {
        return Ok(());
    }
    request.resize(SOURCES + sources.len() * STORAGE, 0);
    put(&mut request, MODE, if membership.include { MCAST_INCLUDE } else { MCAST_EXCLUDE });
    put(&mut request, COUNT, sources.len() as u32);
    for (index, source) in sources.iter().enumerate() {
        write_address(&mut request[SOURCES + index * STORAGE..], *source);
    }
    raw::set_bytes(fd, level(group), MCAST_MSFILTER, &request)
        .map_err(|source| fail("setsockopt(MCAST_MSFILTER)", group, source))
}

fn level(group: Group) -> i32 {
    if group.address.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

fn fail(operation: &'static str, group: Group, source: std::io::Error) -> Error {
    Error::new(operation, format!("group {} on interface {}", group.address, group.interface), source)
}

fn put(buffer: &mut [u8], at: usize, word: u32) {
    buffer[at..at + 4].copy_from_slice(&word.to_ne_bytes());
}

fn word(buffer: &[u8], at: usize) -> u32 {
    buffer[at..].first_chunk().map_or(0, |chunk| u32::from_ne_bytes(*chunk))
}

fn write_group(buffer: &mut [u8], group: Group) {
    put(buffer, 0, group.interface);
    write_address(&mut buffer[GROUP..], group.address);
}

/// `struct sockaddr_in` and `sockaddr_in6`: the address is 4 and 8 bytes behind the family.
fn write_address(storage: &mut [u8], address: IpAddr) {
    let (family, at, octets) = match address {
        IpAddr::V4(four) => (libc::AF_INET, 4, four.octets().to_vec()),
        IpAddr::V6(six) => (libc::AF_INET6, 8, six.octets().to_vec()),
    };
    storage[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    storage[at..at + octets.len()].copy_from_slice(&octets);
}

fn address(storage: &[u8]) -> Option<IpAddr> {
    match i32::from(u16::from_ne_bytes(*storage.first_chunk()?)) {
        libc::AF_INET => storage[4..].first_chunk::<4>().map(|octets| IpAddr::from(*octets)),
        libc::AF_INET6 => storage[8..].first_chunk::<16>().map(|octets| IpAddr::from(*octets)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    const IGMP: &str = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
        1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
        14\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn listings_are_read() {
        let groups = parse_igmp(IGMP).unwrap();
        let four = |interface, last| Group { interface, address: Ipv4Addr::new(224, 0, 0, last).into() };
        assert_eq!(groups, [four(1, 1), four(14, 251), four(14, 1)]);
        let six = "4    eth0            ff0200000000000000000001ff000002     1 00000004 0\n";
        let address = "ff02::1:ff00:2".parse().unwrap();
        assert_eq!(parse_igmp6(six).unwrap(), [Group { interface: 4, address }]);
        assert!(parse_igmp6("4 eth0 ff02\n").is_err() && parse_igmp("\n\t\tnot hexadecimal\n").is_err());
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_listings_never_panic(text: String) {
            feed(&text);
        }
    }

    #[test]
    fn a_socket_tells_its_groups_only() {
        let loopback = 1;
        let group = |address: &str| Group { interface: loopback, address: address.parse().unwrap() };
        let source = |address: &str| -> IpAddr { address.parse().unwrap() };
        let (one, other) = (UdpSocket::bind("[::]:0").unwrap(), UdpSocket::bind("[::]:0").unwrap());
        let many = (1..=10).map(|last| source(&format!("fe80::{last}"))).collect();
        let mut joined = [
            Membership { group: group("239.77.1.1"), include: false, sources: Vec::new() },
            Membership { group: group("239.77.1.2"), include: true, sources: vec![source("127.0.0.1")] },
            Membership { group: group("ff02::77:1"), include: false, sources: many },
        ];
        for membership in &joined {
            join(&one, membership).unwrap();
        }
        let elsewhere = Membership { group: group("239.77.1.3"), include: false, sources: Vec::new() };
        join(&other, &elsewhere).unwrap();
        let groups = groups(&one).unwrap();
        let mut seen = memberships(&one, &groups).unwrap();
        for list in [&mut seen[..], &mut joined] {
            list.sort_by_key(|membership| membership.group.address);
            for membership in list {
                membership.sources.sort();
            }
        }
        assert_eq!(seen, joined);
        assert_eq!(memberships(&other, &groups).unwrap(), [elsewhere]);
    }
}
