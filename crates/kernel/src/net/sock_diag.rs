//! The sockets of a network namespace as the kernel lists them (`sock_diag(7)`).
//!
//! [`Diag`] asks the namespace that it was opened in: that of the calling thread ([`Diag::open`]) or that of
//! a socket in hand ([`Diag::open_for`]). Messages are read with every length checked.
//! Sources: `include/uapi/linux/{inet_diag,unix_diag}.h`; `net/unix/diag.c`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;

use super::netlink::{self, Builder, Netlink};
use super::{InNetns, raw};
use crate::{Error, Result};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Number of the protocol among netlink's.
const NETLINK_SOCK_DIAG: i32 = 4;

/// A set of states that consists of `LISTEN` alone.
const LISTEN: u32 = 1 << 10;

/// A TCP or UDP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InetSocket {
    /// The inode number of its descriptors; 0 where no process has one (being closed, or not yet accepted).
    pub inode: u64,
    /// The state's number, as in [`super::tcp_repair::State`].
    pub state: u8,
    /// This side's address.
    pub local: SocketAddr,
    /// The peer's address; unspecified with port 0 where there is none.
    pub remote: SocketAddr,
    /// Bytes not read; for a listening socket, connections not accepted.
    pub receive_queue: u32,
    /// Bytes not acknowledged; for a listening socket, the limit of `listen(2)`.
    pub send_queue: u32,
    /// The directions that are shut down.
    pub shutdown: Shutdown,
    /// Whether its segments are signed (`TCP_MD5SIG`, RFC 2385), where that was asked for. Told to whom has `CAP_NET_ADMIN`.
    pub signed: bool,
}

/// The directions of a socket that are shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shutdown {
    /// Nothing will be received any more.
    pub read: bool,
    /// Nothing can be sent any more.
    pub write: bool,
}

impl Shutdown {
    fn from_bits(bits: u8) -> Self {
        Self { read: bits & 1 != 0, write: bits & 2 != 0 }
    }
}

/// The name of a unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum UnixName {
    /// A path, as it was given to `bind(2)`: it may be relative to a directory that is not known any more.
    Path(Vec<u8>),
    /// A name in the namespace's abstract table, without its leading zero.
    Abstract(Vec<u8>),
}

impl UnixName {
    /// From `sun_path`: `None` where the socket has no name.
    pub fn from_sun_path(bytes: &[u8]) -> Option<Self> {
        if let (0, name) = bytes.split_first()? {
            return Some(Self::Abstract(name.to_vec()));
        }
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Some(Self::Path(bytes[..end].to_vec()))
    }
}

/// A unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixSocket {
    /// The inode number of its descriptors; 0 where it is not yet accepted.
    pub inode: u64,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: u8,
    /// The state's number: 1 connected, 7 not, 10 listening.
    pub state: u8,
    /// Its name.
    pub name: Option<UnixName>,
    /// Device (major << 20 | minor, as the kernel has it) and inode number (its lower 32 bits) of its path.
    pub file: Option<(u32, u32)>,
    /// The inode number of the socket it is connected to. `None` also for a connection not yet accepted
    /// (the other end has no inode).
    pub peer: Option<u64>,
    /// Listening: the inode numbers of the sockets whose connections wait to be accepted, oldest first.
    pub pending: Vec<u64>,
    /// Bytes not read (datagram: of the first one); listening: connections not accepted.
    pub receive_queue: u32,
    /// Bytes sent and not read by the peer; listening: the limit of `listen(2)`.
    pub send_queue: u32,
    /// The directions that are shut down.
    pub shutdown: Shutdown,
}

/// A channel to the listings of one network namespace.
#[derive(Debug)]
pub struct Diag {
    netlink: Netlink,
}

impl Diag {
    /// For the calling thread's namespace.
    pub fn open() -> Result<Self> {
        crate::fault::point();
        Ok(Self { netlink: Netlink::open(NETLINK_SOCK_DIAG, "sock_diag")? })
    }

    /// For the namespace that `socket` lives in. The calling thread visits it for a moment.
    pub fn open_for(socket: impl AsFd) -> Result<Self> {
        let namespace = raw::namespace(socket)?;
        let _inside = InNetns::enter(&namespace)?;
        Self::open()
    }

    /// All sockets of a family (`AF_INET`, `AF_INET6`) and protocol (`IPPROTO_TCP`, `IPPROTO_UDP`), in
    /// every state but `TIME_WAIT`, which belongs to no process.
    pub fn inet(&mut self, family: i32, protocol: i32) -> Result<Vec<InetSocket>> {
        const TIME_WAIT: u32 = 1 << 6;
        self.inet_in(!TIME_WAIT, family, protocol, 0)
    }

    /// Likewise all TCP sockets of a family, with what the kernel tells only beside `struct tcp_info`: which are signed.
    pub fn tcp_with_signatures(&mut self, family: i32) -> Result<Vec<InetSocket>> {
        const TIME_WAIT: u32 = 1 << 6;
        const INET_DIAG_INFO: u8 = 2;
        self.inet_in(!TIME_WAIT, family, libc::IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1))
    }

    /// All listening TCP sockets of a family.
    pub fn tcp_listeners(&mut self, family: i32) -> Result<Vec<InetSocket>> {
        self.inet_in(LISTEN, family, libc::IPPROTO_TCP, 0)
    }

    fn inet_in(
        &mut self,
        states: u32,
        family: i32,
        protocol: i32,
        extensions: u8,
    ) -> Result<Vec<InetSocket>> {
        let mut request = vec![family as u8, protocol as u8, extensions, 0];
        request.extend(states.to_ne_bytes());
        request.extend([0; 40]);
        // No cookie.
        request.extend([0xFF; 8]);
        let mut sockets = Vec::new();
        self.ask(&request, |payload| {
            sockets.push(parse_inet(payload)?);
            Ok(())
        })?;
        Ok(sockets)
    }

    /// All unix sockets.
    pub fn unix(&mut self) -> Result<Vec<UnixSocket>> {
        const NAME_VFS_PEER_ICONS_RQLEN: u32 = 0x1F;
        let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
        request.extend(u32::MAX.to_ne_bytes());
        request.extend([0; 4]);
        request.extend(NAME_VFS_PEER_ICONS_RQLEN.to_ne_bytes());
        request.extend([0xFF; 8]);
        let mut sockets = Vec::new();
        self.ask(&request, |payload| {
            sockets.push(parse_unix(payload)?);
            Ok(())
        })?;
        Ok(sockets)
    }

    fn ask(
        &mut self,
        request: &[u8],
        mut each: impl FnMut(&[u8]) -> std::result::Result<(), String>,
    ) -> Result<()> {
        let sequence = self.netlink.next();
        let mut builder = Builder::default();
        builder.message(SOCK_DIAG_BY_FAMILY, netlink::REQUEST | netlink::DUMP, sequence, |message| {
            message.raw(request);
        });
        self.netlink.send(&builder.finish())?;
        self.netlink.dump(|_, payload| {
            each(payload).map_err(|why| Error::malformed("recv", "a sock_diag message", why))
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> std::result::Result<u32, String> {
    let chunk = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    chunk.map(|chunk| u32::from_ne_bytes(*chunk)).ok_or_else(|| format!("{} bytes, too short", bytes.len()))
}

/// Gives bytes to the parsers of messages, of their attributes, and of sockets.
pub(super) fn feed(bytes: &[u8]) {
    let _ = parse_inet(bytes);
    let _ = parse_unix(bytes);
    for message in netlink::messages(bytes).filter_map(std::result::Result::ok) {
        let _ = netlink::attributes(message.payload).count();
        let _ = parse_inet(message.payload);
        let _ = parse_unix(message.payload);
    }
}

/// `struct inet_diag_msg`: 4 bytes, the 48 of `inet_diag_sockid`, five words; then attributes.
fn parse_inet(payload: &[u8]) -> std::result::Result<InetSocket, String> {
    const SIZE: usize = 72;
    const SHUTDOWN: u16 = 8;
    const MD5SIG: u16 = 18;
    let Some(fixed) = payload.first_chunk::<SIZE>() else {
        return Err(format!("{} bytes are no inet_diag_msg", payload.len()));
    };
    let (family, state) = (fixed[0], fixed[1]);
    let address = |port_at: usize, at: usize| {
        let port = u16::from_be_bytes([fixed[port_at], fixed[port_at + 1]]);
        let mut octets = [0; 16];
        octets.copy_from_slice(&fixed[at..at + 16]);
        if i32::from(family) == libc::AF_INET {
            let ip = Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]);
            SocketAddr::new(IpAddr::V4(ip), port)
        } else {
            SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, 0))
        }
    };
    let shutdown = netlink::attributes(&payload[SIZE..])
        .find(|(kind, _)| *kind == SHUTDOWN)
        .and_then(|(_, value)| value.first().copied())
        .unwrap_or(0);
    Ok(InetSocket {
        inode: u64::from(u32_at(fixed, 68)?),
        state,
        local: address(4, 8),
        remote: address(6, 24),
        receive_queue: u32_at(fixed, 56)?,
        send_queue: u32_at(fixed, 60)?,
        shutdown: Shutdown::from_bits(shutdown),
        signed: netlink::attributes(&payload[SIZE..]).any(|(kind, _)| kind == MD5SIG),
    })
}

/// `struct unix_diag_msg`: 16 bytes; then attributes.
fn parse_unix(payload: &[u8]) -> std::result::Result<UnixSocket, String> {
    const SIZE: usize = 16;
    let Some(fixed) = payload.first_chunk::<SIZE>() else {
        return Err(format!("{} bytes are no unix_diag_msg", payload.len()));
    };
    let mut socket = UnixSocket {
        inode: u64::from(u32_at(fixed, 4)?),
        kind: fixed[1],
        state: fixed[2],
        name: None,
        file: None,
        peer: None,
        pending: Vec::new(),
        receive_queue: 0,
        send_queue: 0,
        shutdown: Shutdown::default(),
    };
    for (kind, value) in netlink::attributes(&payload[SIZE..]) {
        match kind {
            0 => socket.name = UnixName::from_sun_path(value),
            1 => socket.file = Some((u32_at(value, 4)?, u32_at(value, 0)?)),
            2 => socket.peer = Some(u64::from(u32_at(value, 0)?)).filter(|inode| *inode != 0),
            3 => {
                let words = value.chunks_exact(4).map(|word| u32_at(word, 0).map(u64::from));
                socket.pending = words.collect::<std::result::Result<_, _>>()?;
            }
            4 => (socket.receive_queue, socket.send_queue) = (u32_at(value, 0)?, u32_at(value, 4)?),
            6 => socket.shutdown = Shutdown::from_bits(value.first().copied().unwrap_or(0)),
            _ => {}
        }
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_messages_are_refused() {
        for length in 0..72 {
            assert!(parse_inet(&vec![1; length]).is_err());
        }
        for length in 0..16 {
            assert!(parse_unix(&vec![1; length]).is_err());
        }
        // A peer attribute of two bytes.
        let mut short = vec![0; 16];
        short.extend([6, 0, 2, 0, 1, 1, 0, 0]);
        assert!(parse_unix(&short).is_err());
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            feed(&bytes);
        }
    }
}
