//! Links, addresses, routes and neighbours of a network namespace (rtnetlink(7)), synchronously.
//!
//! A [`Rtnetlink`] belongs to the network namespace its thread was in when it was opened. The messages are
//! those of `netlink-packet-route`; what is often needed has a method of its own, everything else goes
//! through [`Rtnetlink::change`] and [`Rtnetlink::dump`].

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeader, AddressHeaderFlags, AddressMessage,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkHeader, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

pub use {netlink_packet_core, netlink_packet_route};

use crate::fault;
use crate::{Error, Result};

/// A connection to the kernel's network configuration of one network namespace.
#[derive(Debug)]
pub struct Rtnetlink {
    socket: Socket,
    sequence: u32,
}

/// A veth pair to be made (veth(4)).
#[derive(Debug)]
pub struct Veth<'a, Fd> {
    /// Name of the end that stays in this namespace.
    pub name: &'a str,
    /// Name of the other end.
    pub peer_name: &'a str,
    /// The namespace of the other end.
    pub peer_namespace: Fd,
    /// Its hardware address; chosen by the kernel if `None`.
    pub peer_address: Option<[u8; 6]>,
}

/// A change to a link: what is `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub struct LinkChange {
    /// Administratively up or down.
    pub up: Option<bool>,
    /// Index of the bridge (or other controller) it becomes a port of; 0 for none.
    pub master: Option<u32>,
    /// Maximum transmission unit, bytes.
    pub mtu: Option<u32>,
    /// Hardware address.
    pub address: Option<Vec<u8>>,
    /// Name.
    pub name: Option<String>,
}

impl Rtnetlink {
    /// Opens a connection in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        fault::point();
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            // The kernel then keeps its dumps to what was asked for, and explains its refusals.
            socket.set_netlink_get_strict_chk(true)?;
            Ok(Self { socket, sequence: 0 })
        };
        open().map_err(|source: std::io::Error| {
            Error::new("socket(NETLINK_ROUTE)", "network configuration", source)
        })
    }

    /// All links.
    pub fn links(&mut self) -> Result<Vec<LinkMessage>> {
        let messages = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), "links")?;
        Ok(messages
            .into_iter()
            .filter_map(
                |message| if let RouteNetlinkMessage::NewLink(link) = message { Some(link) } else { None },
            )
            .collect())
    }

    /// The link called `name`, or `None`.
    pub fn link(&mut self, name: &str) -> Result<Option<LinkMessage>> {
        Ok(self.links()?.into_iter().find(|link| link_name(link) == Some(name)))
    }

    /// All addresses of all links.
    pub fn addresses(&mut self) -> Result<Vec<AddressMessage>> {
        let messages = self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), "addresses")?;
        Ok(messages
            .into_iter()
            .filter_map(|message| {
                if let RouteNetlinkMessage::NewAddress(address) = message { Some(address) } else { None }
            })
            .collect())
    }

    /// All routes of all tables.
    pub fn routes(&mut self) -> Result<Vec<RouteMessage>> {
        let messages = self.dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()), "routes")?;
        Ok(messages
            .into_iter()
            .filter_map(
                |message| if let RouteNetlinkMessage::NewRoute(route) = message { Some(route) } else { None },
            )
            .collect())
    }

    /// All rules that choose a routing table.
    pub fn rules(&mut self) -> Result<Vec<RuleMessage>> {
        let messages = self.dump(RouteNetlinkMessage::GetRule(RuleMessage::default()), "rules")?;
        Ok(messages
            .into_iter()
            .filter_map(
                |message| if let RouteNetlinkMessage::NewRule(rule) = message { Some(rule) } else { None },
            )
            .collect())
    }

    /// All neighbours (ARP and NDP entries).
    pub fn neighbours(&mut self) -> Result<Vec<NeighbourMessage>> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        Ok(self
            .dump(request, "neighbours")?
            .into_iter()
            .filter_map(|message| {
                if let RouteNetlinkMessage::NewNeighbour(neighbour) = message {
                    Some(neighbour)
                } else {
                    None
                }
            })
            .collect())
    }

    /// Makes a veth pair, both ends down.
    pub fn create_veth<Fd: AsFd>(&mut self, veth: &Veth<'_, Fd>) -> Result<()> {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(veth.peer_name.to_owned()),
            LinkAttribute::NetNsFd(veth.peer_namespace.as_fd().as_raw_fd()),
        ];
        peer.attributes.extend(veth.peer_address.map(|address| LinkAttribute::Address(address.to_vec())));
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(veth.name.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.change(
            RouteNetlinkMessage::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
            &format!("veth {}", veth.name),
        )
    }

    /// Makes a bridge, down.
    pub fn create_bridge(&mut self, name: &str) -> Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.change(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL, &format!("bridge {name}"))
    }

    /// Changes the link with number `index`.
    pub fn set_link(&mut self, index: u32, change: LinkChange) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header = LinkHeader { index, ..LinkHeader::default() };
        if let Some(up) = change.up {
            link.header.change_mask = LinkFlags::Up;
            link.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        }
        link.attributes.extend(change.master.map(LinkAttribute::Controller));
        link.attributes.extend(change.mtu.map(LinkAttribute::Mtu));
        link.attributes.extend(change.address.map(LinkAttribute::Address));
        link.attributes.extend(change.name.map(LinkAttribute::IfName));
        self.change(RouteNetlinkMessage::SetLink(link), 0, &format!("link {index}"))
    }

    /// Deletes the link with number `index`; of a veth pair both ends go.
    pub fn delete_link(&mut self, index: u32) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header = LinkHeader { index, ..LinkHeader::default() };
        self.change(RouteNetlinkMessage::DelLink(link), 0, &format!("link {index}"))
    }

    /// Gives the link with number `index` an address. An IPv6 address skips duplicate address detection:
    /// it works at once, and a migrated one exists on the source until the hand-over.
    pub fn add_address(&mut self, index: u32, address: IpAddr, prefix_length: u8) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header = AddressHeader {
            family: family(address),
            prefix_len: prefix_length,
            index,
            ..AddressHeader::default()
        };
        message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
        match address {
            IpAddr::V4(address) if prefix_length < 31 => {
                let host_bits = u32::MAX.checked_shr(prefix_length.into()).unwrap_or(0);
                let broadcast = (u32::from(address) | host_bits).into();
                message.attributes.push(AddressAttribute::Broadcast(broadcast));
            }
            IpAddr::V4(_) => {}
            IpAddr::V6(_) => {
                message.header.flags = AddressHeaderFlags::Nodad;
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        let object = format!("address {address}/{prefix_length} on link {index}");
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL, &object)
    }

    /// Adds a default route through `gateway` on the link with number `index`.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> Result<()> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family(gateway),
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Boot,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes =
            vec![RouteAttribute::Gateway(RouteAddress::from(gateway)), RouteAttribute::Oif(index)];
        self.add_route(message)
    }

    /// Adds a route.
    pub fn add_route(&mut self, route: RouteMessage) -> Result<()> {
        let object = format!("route {:?}", route.attributes);
        self.change(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_EXCL, &object)
    }

    /// Adds a neighbour, or replaces the one with the same address.
    pub fn set_neighbour(&mut self, neighbour: NeighbourMessage) -> Result<()> {
        let object = format!("neighbour {:?}", neighbour.attributes);
        self.change(RouteNetlinkMessage::NewNeighbour(neighbour), NLM_F_CREATE | NLM_F_REPLACE, &object)
    }

    /// Sends one request to change something, `flags` being `NLM_F_CREATE` and the like, and waits for the
    /// kernel's answer. `object` names what is changed, for messages.
    pub fn change(&mut self, request: RouteNetlinkMessage, flags: u16, object: &str) -> Result<()> {
        let operation = operation(&request);
        self.exchange(request, NLM_F_REQUEST | NLM_F_ACK | flags, operation, object).map(drop)
    }

    /// Sends one request for a list, and returns it whole. `object` names what is listed, for messages.
    ///
    /// # Errors
    /// `EINTR` if the list changed during each of several attempts to read it.
    #[allow(clippy::needless_pass_by_value)] // Made for the call, as all requests are.
    pub fn dump(&mut self, request: RouteNetlinkMessage, object: &str) -> Result<Vec<RouteNetlinkMessage>> {
        const ATTEMPTS: u32 = 16;
        let operation = operation(&request);
        for _ in 0..ATTEMPTS {
            if let Some(list) =
                self.exchange(request.clone(), NLM_F_REQUEST | NLM_F_DUMP, operation, object)?
            {
                return Ok(list);
            }
        }
        Err(Error::new(operation, object, std::io::Error::from_raw_os_error(libc::EINTR)))
    }

    /// Sends a request and gathers the answers to it: `None` if they are a list that changed meanwhile, so
    /// that something may be missing.
    fn exchange(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
        operation: &'static str,
        object: &str,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>> {
        fault::point();
        let error = |source: std::io::Error| Error::new(operation, object, source);
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map_err(error)?;

        let mut answers = Vec::new();
        let mut consistent = true;
        loop {
            let (datagram, _) = self.socket.recv_from_full().map_err(error)?;
            for message in parse(&datagram) {
                let message = message.map_err(|why| Error::malformed(operation, object, why))?;
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Error(refusal) if refusal.code.is_some() => {
                        return Err(error(refusal.to_io()));
                    }
                    // An "error" of code 0 is the acknowledgement.
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                        return Ok(consistent.then_some(answers));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The messages of a datagram; an item that is an error ends it.
fn parse(
    mut rest: &[u8],
) -> impl Iterator<Item = std::result::Result<NetlinkMessage<RouteNetlinkMessage>, String>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut rest);
        let message = NetlinkMessage::deserialize(bytes).map_err(|cause| cause.to_string());
        if let Ok(message) = &message {
            let length = (message.header.length as usize).next_multiple_of(4).max(16);
            rest = bytes.get(length..).unwrap_or_default();
        }
        Some(message)
    })
}

/// What of a datagram's messages can be understood, for tests of what is made of them.
#[doc(hidden)]
pub fn parse_answers(datagram: &[u8]) -> Vec<RouteNetlinkMessage> {
    let messages = parse(datagram).filter_map(std::result::Result::ok);
    let inner = messages.filter_map(|message| match message.payload {
        NetlinkPayload::InnerMessage(answer) => Some(answer),
        _ => None,
    });
    inner.collect()
}

/// The name of a link.
pub fn link_name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// The hardware address of a link.
pub fn link_address(link: &LinkMessage) -> Option<&[u8]> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => Some(address.as_slice()),
        _ => None,
    })
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn operation(message: &RouteNetlinkMessage) -> &'static str {
    match message {
        RouteNetlinkMessage::NewLink(_) => "RTM_NEWLINK",
        RouteNetlinkMessage::SetLink(_) => "RTM_SETLINK",
        RouteNetlinkMessage::DelLink(_) => "RTM_DELLINK",
        RouteNetlinkMessage::GetLink(_) => "RTM_GETLINK",
        RouteNetlinkMessage::NewAddress(_) => "RTM_NEWADDR",
        RouteNetlinkMessage::GetAddress(_) => "RTM_GETADDR",
        RouteNetlinkMessage::NewRoute(_) => "RTM_NEWROUTE",
        RouteNetlinkMessage::GetRoute(_) => "RTM_GETROUTE",
        RouteNetlinkMessage::GetRule(_) => "RTM_GETRULE",
        RouteNetlinkMessage::NewNeighbour(_) => "RTM_NEWNEIGH",
        RouteNetlinkMessage::GetNeighbour(_) => "RTM_GETNEIGH",
        _ => "rtnetlink",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel says of this namespace's links, addresses, routes and rules, each message by itself.
    fn real_messages() -> Vec<Vec<u8>> {
        let mut netlink = Rtnetlink::open().expect("a socket");
        let mut all = Vec::new();
        for request in [
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            RouteNetlinkMessage::GetRoute(RouteMessage::default()),
            RouteNetlinkMessage::GetRule(RuleMessage::default()),
        ] {
            for answer in netlink.dump(request, "everything").expect("a list") {
                let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(answer));
                message.finalize();
                let mut bytes = vec![0; message.buffer_len()];
                message.serialize(&mut bytes);
                all.push(bytes);
            }
        }
        assert!(!all.is_empty(), "not even a loopback device");
        all
    }

    #[test]
    fn real_messages_with_damage_anywhere_never_panic() {
        for bytes in real_messages() {
            assert_eq!(parse_answers(&bytes).len(), 1);
            for at in 0..bytes.len() {
                for wrong in [0, 1, 4, 0x7F, 0x80, 0xFF, bytes[at].wrapping_add(1), bytes[at] ^ 0x10] {
                    let mut damaged = bytes.clone();
                    damaged[at] = wrong;
                    let _ = parse_answers(&damaged);
                }
                let _ = parse_answers(&bytes[..at]);
            }
        }
    }

    proptest! {
        /// Random bytes behind a header that is whole, so that they are looked at.
        #[test]
        fn arbitrary_bytes_never_panic(kind in 16_u16..120, payload: Vec<u8>, bytes: Vec<u8>) {
            let _ = parse_answers(&bytes);
            let mut message = (payload.len() as u32 + 16).to_ne_bytes().to_vec();
            message.extend(kind.to_ne_bytes());
            message.extend([0; 10]);
            message.extend(payload);
            let _ = parse_answers(&message);
        }
    }
}
