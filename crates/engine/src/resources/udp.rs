//! UDP sockets (udp(7)): bound, connected, members of multicast groups, and the datagrams that wait in them.
//!
//! Datagrams are read with a moving peek, which leaves them where they are, and come back as packets from their sender that go
//! over the loopback interface. So that they reach this socket and no other of its port, address or group, whatever it is bound
//! and connected to, its queue is filled first, at a free port:
//!
//! ```text
//! socket ─► a free port ─► datagrams ─► the port taken away, the queue stays ─► options, bind, connect ─► groups, options
//! ```
//!
//! Left to chance, as the protocol allows: datagrams that arrive while the tree is frozen and the queue has been read.
//!
//! Lost: what came with a queued datagram (its destination, timestamps), and, with a warning, errors not read.
//!
//! Groups are joined again on the interface of the same name, with their source filters.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};

use limosa_kernel::net::multicast::{self, Group};
use limosa_kernel::net::sockopt::{self, Phase};
use limosa_kernel::net::{inject, peek, raw, tcp_snapshot};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::network::{self, Address, OptionState};
use crate::view::DescriptionView;

/// A UDP socket.
#[derive(Debug, Serialize, Deserialize)]
pub struct Udp {
    /// Whether it is an IPv6 socket.
    pub ipv6: bool,
    /// The options that differ from a new socket's.
    pub options: Vec<OptionState>,
    /// The address it is bound to, if any.
    pub local: Option<Address>,
    /// The address it is connected to, if any.
    pub remote: Option<Address>,
    /// The multicast groups that it has joined.
    #[serde(default)]
    pub groups: Vec<Membership>,
    /// Datagrams not read, oldest first.
    pub queue: Vec<Datagram>,
}

/// A membership of a multicast group.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The name of the interface.
    pub interface: String,
    /// The address of the group.
    pub group: IpAddr,
    /// Whether packets of the sources only are received, or of all but them.
    pub include: bool,
    /// The sources.
    pub sources: Vec<IpAddr>,
}

impl Membership {
    fn join(&self, socket: &OwnedFd) -> Result<(), RestoreError> {
        let interface = raw::interface_index(socket, &self.interface).map_err(|error| {
            RestoreError::Unsupported {
                what: format!("the membership of group {} on interface {}", self.group, self.interface),
                why: format!("{}; make an interface of that name and try again", error.source),
            }
        })?;
        let group = Group { interface, address: self.group };
        let sources = self.sources.clone();
        Ok(multicast::join(socket, &multicast::Membership { group, include: self.include, sources })?)
    }
}

/// A datagram in a receive queue.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub from: Address,
    /// Its bytes.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

impl DescriptorKind for Udp {
    fn recognise(view: &DescriptionView) -> bool {
        network::kind(view).is_some_and(|kind| {
            matches!(kind.domain, libc::AF_INET | libc::AF_INET6)
                && kind.kind == libc::SOCK_DGRAM
                && kind.protocol == libc::IPPROTO_UDP
        })
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        context.network.refuse_foreign(view)?;
        warn_of_errors(view);
        let mut state = Self::read(view.descriptor.as_fd())?;
        let joined = multicast::memberships(&view.descriptor, context.network.groups(view)?)?;
        let named = joined.into_iter().map(|multicast::Membership { group, include, sources }| {
            let interface = raw::interface_name(&view.descriptor, group.interface)?;
            Ok(Membership { interface, group: group.address, include, sources })
        });
        state.groups = named.collect::<limosa_kernel::Result<_>>()?;
        Ok(state)
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        context.network.refuse_foreign(view)
    }

    fn rebuild(&self, _flags: u32, _context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        self.make()
    }
}

impl Udp {
    /// Reads a socket through any descriptor of it.
    fn read(fd: std::os::fd::BorrowedFd<'_>) -> limosa_kernel::Result<Self> {
        let local = tcp_snapshot::local_address(fd)?;
        let remote = rustix::net::getpeername(fd).ok().flatten();
        let remote = remote.and_then(|remote| SocketAddr::try_from(remote).ok());
        let queue = if local.port() == 0 { Vec::new() } else { peek::receive_queue(fd)? };
        let queue = queue.into_iter().flat_map(datagrams);
        Ok(Self {
            ipv6: local.is_ipv6(),
            options: network::to_state(sockopt::capture(fd)?),
            local: (local.port() != 0).then(|| local.into()),
            remote: remote.map(Into::into),
            groups: Vec::new(),
            queue: queue.collect(),
        })
    }

    fn make(&self) -> Result<OwnedFd, RestoreError> {
        let fail = |step| RestoreError::rebuild(format!("UDP socket at {:?}", self.local), step);
        let family = if self.ipv6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(fail("socket"))?;
        if let (Some(local), false) = (self.local, self.queue.is_empty()) {
            self.fill(&socket, local.into())?;
        }
        let options = network::from_state(&self.options);
        sockopt::apply(&socket, &options, Phase::BeforeBind)?;
        if let Some(local) = self.local {
            rustix::net::bind(&socket, &SocketAddr::from(local)).map_err(fail("bind"))?;
        }
        if let Some(remote) = self.remote {
            rustix::net::connect(&socket, &SocketAddr::from(remote)).map_err(fail("connect"))?;
        }
        self.groups.iter().try_for_each(|membership| membership.join(&socket))?;
        sockopt::apply(&socket, &options, Phase::Last)?;
        Ok(socket)
    }

    /// Puts the queue into a socket that has no port, address or options yet. On the loopback interface the packets would meet
    /// the packet lock of other connections' restore, but for their mark.
    fn fill(&self, socket: &OwnedFd, local: SocketAddr) -> Result<(), RestoreError> {
        let fail = |step| RestoreError::rebuild(format!("UDP socket at {local}"), step);
        // Room for all; the captured size is set last.
        let bytes: usize = self.queue.iter().map(|datagram| datagram.data.len() * 2 + 2048).sum();
        rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, bytes.min(1 << 30))
            .map_err(fail("setsockopt(SO_RCVBUFFORCE)"))?;
        if self.ipv6 {
            rustix::net::sockopt::set_ipv6_v6only(socket, false).map_err(fail("setsockopt(IPV6_V6ONLY)"))?;
        }
        let port = inject::give_port(socket)?;
        let kept = destination(local.ip());
        for (index, datagram) in self.queue.iter().enumerate() {
            let from = SocketAddr::from(datagram.from);
            let loopback = match from.ip().to_canonical() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            let to = SocketAddr::new(kept.unwrap_or(loopback), port);
            match inject::udp_into(socket, to, from, &datagram.data) {
                Ok(true) => {}
                Ok(false) => {
                    let dropped = self.queue.len() - index;
                    tracing::warn!(%local, dropped, "something keeps datagrams from a UDP socket over the loopback interface");
                    break;
                }
                Err(error) => tracing::warn!(%local, %from, %error, "a datagram in a UDP socket's queue is dropped"),
            }
        }
        Ok(inject::take_port(socket)?)
    }
}

/// The address that the datagrams of a socket went to, if it is bound to one of this machine's: programs can ask for it
/// (`IP_PKTINFO`). Whoever sends to one's own address sends from it.
fn destination(ip: IpAddr) -> Option<IpAddr> {
    let ip = ip.to_canonical();
    let is_own = || {
        let socket = std::net::UdpSocket::bind(match ip {
            IpAddr::V4(_) => (IpAddr::from(Ipv4Addr::UNSPECIFIED), 0),
            IpAddr::V6(_) => (IpAddr::from(Ipv6Addr::UNSPECIFIED), 0),
        })?;
        socket.connect((ip, 9))?;
        Ok::<_, std::io::Error>(socket.local_addr()?.ip() == ip)
    };
    let is_nobodys = ip.is_unspecified() || ip.is_multicast();
    (ip.is_loopback() || !is_nobodys && is_own().unwrap_or(false)).then_some(ip)
}

/// An error that the program has not been told, or a timestamp of what it sent, can be read once only.
fn warn_of_errors(view: &DescriptionView) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::new(&view.descriptor, PollFlags::empty())];
    let asked = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    if asked.is_ok() && polled[0].revents().contains(PollFlags::ERR) {
        let (pid, descriptor) = (view.process.pid, view.place);
        tracing::warn!(pid, %descriptor, "an error or timestamp of a UDP socket, not read yet, is not carried");
    }
}

/// A message of the queue as datagrams: the kernel may have joined several of one sender (`UDP_GRO`).
fn datagrams(message: peek::Message) -> Vec<Datagram> {
    let Some(from) = sender(&message.sender) else { return Vec::new() };
    match message.segment.filter(|segment| *segment < message.data.len()) {
        Some(segment) => {
            message.data.chunks(segment).map(|part| Datagram { from, data: part.to_vec() }).collect()
        }
        None => vec![Datagram { from, data: message.data }],
    }
}

/// The sender of a datagram, from `struct sockaddr_in` or `sockaddr_in6`.
fn sender(bytes: &[u8]) -> Option<Address> {
    let family = u16::from_ne_bytes(*bytes.first_chunk::<2>()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    if i32::from(family) == libc::AF_INET {
        let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
        return Some(SocketAddr::new(Ipv4Addr::from(octets).into(), port).into());
    }
    if i32::from(family) == libc::AF_INET6 {
        let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
        let scope = u32::from_ne_bytes(bytes.get(24..28)?.try_into().ok()?);
        return Some(SocketAddr::from(SocketAddrV6::new(octets.into(), port, 0, scope)).into());
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;
    use std::time::Duration;

    use limosa_kernel::namespace::{self, Kind};

    use super::*;

    #[test]
    fn a_queue_comes_back_with_its_senders() {
        let thread = std::thread::spawn(|| {
            namespace::unshare(&[Kind::Network]).expect("unshare(CLONE_NEWNET), needs root");
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
            for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
                round_trip(address);
            }
            joined_datagrams_are_parted();
        });
        thread.join().unwrap();
    }

    /// A sender gives the kernel several at once, which it leaves together for a receiver that takes them so.
    fn joined_datagrams_are_parted() {
        let (receiver, sender) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let set = |socket: &UdpSocket, name, value: i32| {
            let option = sockopt::SocketOption { level: libc::IPPROTO_UDP, name, value: value.to_ne_bytes().into() };
            sockopt::apply(socket, &[option], Phase::Last).unwrap();
        };
        set(&receiver, libc::UDP_GRO, 1);
        set(&sender, libc::UDP_SEGMENT, 1000);
        sender.send_to(&[7; 2500], receiver.local_addr().unwrap()).unwrap();
        let state = Udp::read(receiver.as_fd()).unwrap();
        let lengths: Vec<_> = state.queue.iter().map(|datagram| datagram.data.len()).collect();
        assert_eq!(lengths, [1000, 1000, 500]);
        let together = receiver.recv(&mut [0; 5000]).unwrap();
        assert_eq!(together, 2500, "the kernel has not joined them");
    }

    fn round_trip(address: &str) {
        let receiver = UdpSocket::bind(address).unwrap();
        receiver.set_broadcast(true).unwrap();
        let senders = [(); 2].map(|()| UdpSocket::bind(address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")).unwrap());
        let mut to = receiver.local_addr().unwrap();
        if to.ip().is_unspecified() {
            to.set_ip(senders[0].local_addr().unwrap().ip());
        }
        let long = vec![9; 5_000];
        let sent: [(usize, &[u8]); 3] = [(0, b"first"), (1, b""), (0, &long)];
        for (sender, data) in sent {
            senders[sender].send_to(data, to).unwrap();
        }
        let state = Udp::read(receiver.as_fd()).unwrap();
        assert_eq!(state.queue.len(), 3);
        drop(receiver);
        let again = UdpSocket::from(state.make().unwrap());
        assert!(again.broadcast().unwrap());
        again.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut buffer = vec![0; 10_000];
        for (sender, data) in sent {
            let (length, from) = again.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (data, senders[sender].local_addr().unwrap()));
        }
        // And new ones arrive.
        senders[1].send_to(b"new", to).unwrap();
        assert_eq!(again.recv_from(&mut buffer).unwrap().0, 3);
    }
}
