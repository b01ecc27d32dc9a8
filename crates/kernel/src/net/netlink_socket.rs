//! Netlink sockets of programs (`netlink(7)`): addresses, memberships, overruns; and the families of generic netlink.
//!
//! Sources: `net/netlink/af_netlink.c`, `net/netlink/genetlink.c`; `include/uapi/linux/{netlink,genetlink}.h`.

use std::os::fd::AsFd;

use rustix::net::SendFlags;
use rustix::net::netlink::SocketAddrNetlink;

use super::netlink::{self, Builder, Netlink};
use super::raw;
use crate::{Error, Result};

const SOL_NETLINK: i32 = 270;
const NOOP: u16 = 1;

/// The address of a netlink socket: a port ID (0 for the kernel, or for none) and a set of the first 32 groups.
pub type Address = (u32, u32);

fn address(found: Option<rustix::net::SocketAddrAny>) -> Address {
    let found = found.and_then(|found| SocketAddrNetlink::try_from(found).ok());
    found.map_or((0, 0), |found| (found.pid(), found.groups()))
}

/// The socket's own port ID; 0 while it has none.
pub fn port(socket: impl AsFd) -> Result<u32> {
    let name = raw::name(&socket);
    let found = rustix::net::getsockname(socket).map_err(|source| Error::new("getsockname", name, source))?;
    Ok(address(Some(found)).0)
}

/// Where it sends what is sent to nobody in particular; the kernel, unless connect(2) has set it.
pub fn peer(socket: impl AsFd) -> Result<Address> {
    let name = raw::name(&socket);
    let found = rustix::net::getpeername(socket).map_err(|source| Error::new("getpeername", name, source))?;
    Ok(address(found))
}

/// Gives the socket that port ID, which must be free.
pub fn bind(socket: impl AsFd, port: u32) -> Result<()> {
    crate::fault::point();
    rustix::net::bind(socket, &SocketAddrNetlink::new(port, 0))
        .map_err(|source| Error::new("bind", format_args!("netlink port ID {port}"), source))
}

/// Sets where it sends.
pub fn connect(socket: impl AsFd, (port, groups): Address) -> Result<()> {
    crate::fault::point();
    rustix::net::connect(socket, &SocketAddrNetlink::new(port, groups))
        .map_err(|source| Error::new("connect", format_args!("netlink port ID {port}"), source))
}

/// The numbers of the multicast groups that it has joined.
pub fn memberships(socket: impl AsFd) -> Result<Vec<u32>> {
    const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
    crate::fault::point();
    let fd = socket.as_fd();
    let mut set = vec![0; 8 << 10];
    let length = raw::get_bytes(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, &mut set)
        .map_err(|source| Error::new("getsockopt(NETLINK_LIST_MEMBERSHIPS)", raw::name(fd), source))?;
    let numbers = set[..length].iter().zip(0_u32..).flat_map(|(byte, at)| {
        (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| at * 8 + bit + 1)
    });
    Ok(numbers.collect())
}

/// Joins a multicast group.
pub fn join(socket: impl AsFd, group: u32) -> Result<()> {
    const NETLINK_ADD_MEMBERSHIP: i32 = 1;
    crate::fault::point();
    raw::set_bytes(socket.as_fd(), SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group.to_ne_bytes()).map_err(
        |source| Error::new("setsockopt(NETLINK_ADD_MEMBERSHIP)", format_args!("group {group}"), source),
    )
}

/// Has a new socket with that port ID report, once, that messages for it were lost (`ENOBUFS`), as the kernel does when its
/// queue is full: so the queue is filled, and the kernel asked for one more. What fills it are messages of type `NLMSG_NOOP`
/// that are not from the kernel, for both of which programs ignore them. The size of its receive buffer is left the smallest.
///
/// Needs `CAP_NET_ADMIN`. It must not be connected.
pub fn overrun(socket: impl AsFd, port: u32) -> Result<()> {
    /// A few fill the smallest buffer.
    const MOST: usize = 64;
    crate::fault::point();
    let fd = socket.as_fd();
    let failed = |step| move |source| Error::new(step, format_args!("netlink port ID {port}"), source);
    raw::set_bytes(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &[0; 4])
        .map_err(|source| Error::new("setsockopt(SO_RCVBUFFORCE)", raw::name(fd), source))?;
    let filler = Netlink::open(raw::kind(fd)?.protocol, "a message for another socket")?;
    let message = |flags| {
        let mut builder = Builder::default();
        builder.message(NOOP, flags, 0, |_| {});
        builder.finish()
    };
    let to = SocketAddrNetlink::new(port, 0);
    for _ in 0..MOST {
        match rustix::net::sendto(&filler, &message(0), SendFlags::DONTWAIT, &to) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => break,
            Err(source) => return Err(failed("sendto(a full queue)")(source)),
        }
    }
    // The acknowledgement finds no room.
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(fd, &message(netlink::ACK), SendFlags::DONTWAIT, &kernel)
        .map_err(failed("sendto(the kernel)"))?;
    Ok(())
}

/// A family of generic netlink. The kernel numbers families and groups as they come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// The type of its messages.
    pub id: u16,
    /// Its multicast groups: names and numbers.
    pub groups: Vec<(String, u32)>,
}

/// The families of generic netlink.
pub fn families() -> Result<Vec<Family>> {
    const NETLINK_GENERIC: i32 = 16;
    const CONTROL: u16 = 16;
    const GET_FAMILY: u8 = 3;
    crate::fault::point();
    let mut netlink = Netlink::open(NETLINK_GENERIC, "families of generic netlink")?;
    let sequence = netlink.next();
    let mut builder = Builder::default();
    builder.message(CONTROL, netlink::REQUEST | netlink::DUMP, sequence, |message| {
        message.raw(&[GET_FAMILY, 1, 0, 0]);
    });
    netlink.send(&builder.finish())?;
    let mut families = Vec::new();
    netlink.dump(|_, payload| {
        let family = parse_family(payload).ok_or_else(|| {
            Error::malformed("recv", "a family of generic netlink", "it has no name or number")
        })?;
        families.push(family);
        Ok(())
    })?;
    Ok(families)
}

/// `struct genlmsghdr` (4 bytes) and attributes.
fn parse_family(payload: &[u8]) -> Option<Family> {
    const ID: u16 = 1;
    const NAME: u16 = 2;
    const GROUPS: u16 = 7;
    const GROUP_NAME: u16 = 1;
    const GROUP_ID: u16 = 2;
    let attributes = payload.get(4..)?;
    let find =
        |bytes, wanted| netlink::attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let text = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
    };
    let group = |bytes| {
        let number = find(bytes, GROUP_ID)?.first_chunk::<4>()?;
        Some((text(find(bytes, GROUP_NAME)?), u32::from_ne_bytes(*number)))
    };
    let groups = find(attributes, GROUPS).unwrap_or_default();
    Some(Family {
        name: text(find(attributes, NAME)?),
        id: u16::from_ne_bytes(*find(attributes, ID)?.first_chunk::<2>()?),
        groups: netlink::attributes(groups).filter_map(|(_, value)| group(value)).collect(),
    })
}

/// Gives bytes to the parser, for fuzzing.
pub(super) fn feed(bytes: &[u8]) {
    let _ = parse_family(bytes);
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv};

    use super::*;

    fn socket(protocol: u32) -> OwnedFd {
        let protocol = std::num::NonZeroU32::new(protocol).map(rustix::net::Protocol::from_raw);
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
            .unwrap()
    }

    #[test]
    fn an_overrun_is_told_once_and_leaves_messages_that_are_ignored() {
        for protocol in [0, 4, 15, 16] {
            let socket = socket(protocol);
            bind(&socket, 0).unwrap();
            let port = port(&socket).unwrap();
            assert_ne!(port, 0);
            overrun(&socket, port).unwrap();
            let mut polled = [PollFd::new(&socket, PollFlags::IN)];
            poll(&mut polled, None).unwrap();
            assert!(polled[0].revents().contains(PollFlags::IN | PollFlags::ERR), "protocol {protocol}");
            let mut buffer = [0; 100];
            let mut read = || {
                recv(&socket, &mut buffer[..], RecvFlags::DONTWAIT)
                    .map(|(_, length)| u32::from_ne_bytes([buffer[4], buffer[5], 0, 0]) as usize + length)
            };
            assert_eq!(read(), Err(rustix::io::Errno::NOBUFS), "protocol {protocol}");
            let mut ignored = 0;
            while let Ok(kind_and_length) = read() {
                assert_eq!(kind_and_length, 16 + usize::from(NOOP));
                ignored += 1;
            }
            assert!((1..8).contains(&ignored), "{ignored} messages with protocol {protocol}");
            assert_eq!(read(), Err(rustix::io::Errno::AGAIN));
        }
    }

    #[test]
    fn memberships_are_listed() {
        let socket = socket(0);
        assert_eq!(memberships(&socket).unwrap(), []);
        for group in [1, 5, 33] {
            join(&socket, group).unwrap();
        }
        assert_eq!(memberships(&socket).unwrap(), [1, 5, 33]);
        assert_eq!((port(&socket).unwrap(), peer(&socket).unwrap()), (0, (0, 0)));
        connect(&socket, (77, 8)).unwrap();
        assert_eq!(peer(&socket).unwrap(), (77, 8));
    }

    #[test]
    fn the_control_family_is_listed() {
        let families = families().unwrap();
        let control = families.iter().find(|family| family.name == "nlctrl").unwrap();
        assert_eq!((control.id, control.groups.as_slice()), (16, &[("notify".to_owned(), 16)][..]));
    }
}
