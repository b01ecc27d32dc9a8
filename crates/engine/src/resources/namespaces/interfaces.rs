//! The network namespace of a container: what it has set up there itself (network_namespaces(7), rtnetlink(7)).
//!
//! Its interfaces, `lo` and `eth0`, are there before the tree is born; this room gives them their size and addresses,
//! and puts back routes, permanent neighbours and the settings of `/proc/sys/net`. Other interfaces, routing rules and
//! packet filters are refused, so that none is lost in silence.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::InNetns;
use limosa_kernel::net::nft;
use limosa_kernel::net::rtnetlink::netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage,
};
use limosa_kernel::net::rtnetlink::netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use limosa_kernel::net::rtnetlink::netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use limosa_kernel::net::rtnetlink::netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
};
use limosa_kernel::net::rtnetlink::netlink_packet_route::rule::RuleAttribute;
use limosa_kernel::net::rtnetlink::netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use limosa_kernel::net::rtnetlink::{LinkChange, Rtnetlink, link_name};
use serde::{Deserialize, Serialize};

use super::settings::{self, Setting};
use crate::error::{CaptureError, Refusal, RestoreError};
use crate::view::ProcessView;

/// The interfaces that every container has.
const OF_SHELL: [&str; 2] = ["lo", "eth0"];
/// Priorities of the rules that every namespace has: local, main and default table.
const RULES: [u32; 3] = [0, 32766, 32767];

/// Flags of netlink(7) for something new.
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
/// `MAX_ADDR_LEN`: longest hardware address, bytes.
const HARDWARE_MAX: usize = 32;

/// What a container has set up in its network namespace.
#[derive(Debug, Serialize, Deserialize)]
pub struct Interfaces {
    /// By name.
    pub links: BTreeMap<String, Link>,
    /// Routes that the kernel did not make by itself.
    pub routes: Vec<Route>,
    /// Neighbours that never age.
    pub neighbours: Vec<Neighbour>,
    /// The values below `/proc/sys/net`.
    pub settings: Vec<Setting>,
}

/// An interface.
#[derive(Debug, Serialize, Deserialize)]
pub struct Link {
    /// Whether it is up.
    pub up: bool,
    /// Maximum transmission unit, bytes.
    pub mtu: u32,
    /// Permanent addresses.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Serialize, Deserialize)]
pub struct Address {
    /// The address itself.
    pub local: IpAddr,
    /// That of the other end of a link between two, if it is not the same.
    pub peer: Option<IpAddr>,
    /// Length of the prefix.
    pub prefix: u8,
    /// IPv4: the address of all on the link.
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*`
    pub scope: u8,
    /// IPv4: its label, by custom that of the interface and more.
    pub label: Option<String>,
}

/// A route, as rtnetlink(7) has it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Whether it is one of IPv6.
    pub six: bool,
    /// Where it leads to; none for everywhere.
    pub destination: Option<IpAddr>,
    /// Length of that prefix.
    pub prefix: u8,
    /// Through which neighbour.
    pub gateway: Option<IpAddr>,
    /// Over which interface.
    pub link: Option<String>,
    /// The source address that is preferred.
    pub source: Option<IpAddr>,
    /// `RT_TABLE_*`
    pub table: u32,
    /// `RTPROT_*`
    pub protocol: u8,
    /// `RT_SCOPE_*`
    pub scope: u8,
    /// `RTN_*`
    pub kind: u8,
    /// Its metric.
    pub priority: Option<u32>,
    /// Whether the gateway is on the link whatever the addresses say.
    pub on_link: bool,
}

/// A neighbour.
#[derive(Debug, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub hardware: serde_bytes::ByteBuf,
    /// The interface.
    pub link: String,
}

impl Interfaces {
    /// What is in the network namespace of the container whose root process is `root`, whose settings these are.
    pub fn capture(root: &ProcessView, settings: Vec<Setting>) -> Result<Self, CaptureError> {
        let refuse = |reason: String, remedy: &str| -> CaptureError {
            Refusal::process(root.pid, reason, remedy).into()
        };
        let _inside = InNetns::enter(namespace::of_process(root.pid, Kind::Network)?)?;
        let mut netlink = Rtnetlink::open()?;
        let mut names = BTreeMap::new();
        let mut links = BTreeMap::new();
        for message in netlink.links()? {
            let name = link_name(&message).unwrap_or_default().to_owned();
            if !OF_SHELL.contains(&name.as_str()) {
                let reason = format!("its network namespace has an interface {name}, which it made itself");
                return Err(refuse(reason, "delete that interface (ip link del)"));
            }
            names.insert(message.header.index, name.clone());
            links.insert(name, link(&message));
        }
        for message in netlink.addresses()? {
            if let Some(address) = Address::of(&message)
                && let Some(link) = names.get(&message.header.index).and_then(|name| links.get_mut(name))
            {
                link.addresses.push(address);
            }
        }
        let mut routes = Vec::new();
        for message in netlink.routes()?.iter().filter(|message| is_own(message)) {
            let route = Route::of(message, &names).ok_or_else(|| {
                let reason = format!(
                    "its network namespace has a route that is not carried: {:?}",
                    message.attributes
                );
                refuse(reason, "delete that route (ip route del)")
            })?;
            routes.push(route);
        }
        let neighbours =
            netlink.neighbours()?.iter().filter_map(|message| Neighbour::of(message, &names)).collect();
        for rule in netlink.rules()? {
            let priority = rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Priority(priority) => Some(*priority),
                _ => None,
            });
            if !RULES.contains(&priority.unwrap_or(0)) {
                let reason = format!("its network namespace has a routing rule: {:?}", rule.attributes);
                return Err(refuse(reason, "delete that rule (ip rule del)"));
            }
        }
        if let Some(filter) = packet_filter(root)? {
            let reason = format!("its network namespace has a packet filter ({filter})");
            return Err(refuse(reason, "remove it (nft flush ruleset, iptables -F)"));
        }
        Ok(Self { links, routes, neighbours, settings })
    }

    /// Puts everything back in the network namespace of the calling thread, which is new.
    pub fn rebuild(&self) -> Result<(), RestoreError> {
        settings::write(&self.settings)?;
        let mut netlink = Rtnetlink::open()?;
        let mut numbers = BTreeMap::new();
        for message in netlink.links()? {
            numbers.extend(link_name(&message).map(|name| (name.to_owned(), message.header.index)));
        }
        for (name, link) in &self.links {
            // A container without a network here has no eth0.
            let Some(index) = numbers.get(name) else { continue };
            netlink.set_link(
                *index,
                LinkChange { mtu: Some(link.mtu), up: Some(link.up), ..LinkChange::default() },
            )?;
            for address in &link.addresses {
                // The kernel gives an interface that goes up addresses of its own.
                let object = format!("address {} of {name}", address.local);
                let request = RouteNetlinkMessage::NewAddress(address.message(*index));
                tolerate_present(netlink.change(request, NLM_F_CREATE | NLM_F_EXCL, &object))?;
            }
        }
        // Those that lead straight to a link first: gateways are found by them.
        let (direct, through): (Vec<_>, Vec<_>) =
            self.routes.iter().partition(|route| route.gateway.is_none());
        for route in direct.into_iter().chain(through) {
            if let Some(message) = route.message(&numbers) {
                tolerate_present(netlink.add_route(message))?;
            }
        }
        for neighbour in &self.neighbours {
            if neighbour.hardware.len() > HARDWARE_MAX {
                return Err(RestoreError::inconsistent(
                    "a hardware address that is longer than there are any",
                ));
            }
            if let Some(index) = numbers.get(&neighbour.link) {
                netlink.set_neighbour(neighbour.message(*index))?;
            }
        }
        Ok(())
    }
}

fn tolerate_present(made: limosa_kernel::Result<()>) -> limosa_kernel::Result<()> {
    match made {
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        made => made,
    }
}

fn link(message: &LinkMessage) -> Link {
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Link { up: message.header.flags.contains(LinkFlags::Up), mtu: mtu.unwrap_or(1500), addresses: Vec::new() }
}

impl Address {
    /// An address that was given; none for one that a router announced, which it will announce again.
    fn of(message: &AddressMessage) -> Option<Self> {
        let (mut address, mut local, mut broadcast, mut label, mut flags) = (None, None, None, None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Address(found) => address = Some(*found),
                AddressAttribute::Local(found) => local = Some(*found),
                AddressAttribute::Broadcast(found) => broadcast = Some(*found),
                AddressAttribute::Label(found) => label = Some(found.clone()),
                AddressAttribute::Flags(found) => flags = Some(*found),
                _ => {}
            }
        }
        if !flags?.contains(AddressFlags::Permanent) {
            return None;
        }
        let own = local.or(address)?;
        let peer = address.filter(|address| *address != own);
        let (prefix, scope) = (message.header.prefix_len, message.header.scope.into());
        Some(Self { local: own, peer, prefix, broadcast, scope, label })
    }

    /// The message that adds it. An IPv6 address skips duplicate address detection, and works at once.
    fn message(&self, index: u32) -> AddressMessage {
        let (family, flags) = match self.local {
            IpAddr::V4(_) => (AddressFamily::Inet, AddressFlags::empty()),
            IpAddr::V6(_) => (AddressFamily::Inet6, AddressFlags::Nodad),
        };
        let mut message = AddressMessage::default();
        message.header.family = family;
        message.header.prefix_len = self.prefix;
        message.header.scope = self.scope.into();
        message.header.index = index;
        let address = self.peer.unwrap_or(self.local);
        message.attributes = vec![AddressAttribute::Local(self.local), AddressAttribute::Address(address)];
        message.attributes.push(AddressAttribute::Flags(flags));
        message.attributes.extend(self.broadcast.map(AddressAttribute::Broadcast));
        // The kernel takes labels of less than 16 bytes.
        let label = self.label.clone().filter(|label| label.len() < 16);
        message.attributes.extend(label.map(AddressAttribute::Label));
        message
    }
}

/// Whether somebody made the route: not the kernel with an address, nor a router's announcement.
fn is_own(message: &RouteMessage) -> bool {
    let made_by_itself = [RouteProtocol::Kernel, RouteProtocol::Ra, RouteProtocol::IcmpRedirect];
    !made_by_itself.contains(&message.header.protocol) && !message.header.flags.contains(RouteFlags::Cloned)
}

/// The packet filter that the namespace has, if it has one.
fn packet_filter(root: &ProcessView) -> Result<Option<String>, CaptureError> {
    if let Some(table) = nft::others_tables()?.first() {
        return Ok(Some(format!("nftables table {table}")));
    }
    for list in ["net/ip_tables_names", "net/ip6_tables_names", "net/arp_tables_names"] {
        // Not there where the module is not loaded.
        let names = root.proc.read(list).unwrap_or_default();
        if let Some(table) = names.split(|byte| *byte == b'\n').find(|name| !name.is_empty()) {
            return Ok(Some(format!("iptables table {}", String::from_utf8_lossy(table))));
        }
    }
    Ok(None)
}

impl Route {
    /// The route of a message; none where it has more to it than is carried.
    fn of(message: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<Self> {
        let RouteHeader { source_prefix_length, tos, .. } = message.header;
        if source_prefix_length != 0 || tos != 0 {
            return None;
        }
        let mut route = Self {
            six: message.header.address_family == AddressFamily::Inet6,
            destination: None,
            prefix: message.header.destination_prefix_length,
            gateway: None,
            link: None,
            source: None,
            table: message.header.table.into(),
            protocol: message.header.protocol.into(),
            scope: message.header.scope.into(),
            kind: message.header.kind.into(),
            priority: None,
            on_link: message.header.flags.contains(RouteFlags::Onlink),
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => route.destination = Some(ip(address)?),
                RouteAttribute::Gateway(address) => route.gateway = Some(ip(address)?),
                RouteAttribute::PrefSource(address) => route.source = Some(ip(address)?),
                RouteAttribute::Oif(index) => route.link = Some(names.get(index)?.clone()),
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Priority(priority) => route.priority = Some(*priority),
                // What the kernel adds when it is asked.
                RouteAttribute::CacheInfo(_) | RouteAttribute::Preference(_) => {}
                _ => return None,
            }
        }
        Some(route)
    }

    /// The message that adds it; none where its interface is not there.
    fn message(&self, numbers: &BTreeMap<String, u32>) -> Option<RouteMessage> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: if self.six { AddressFamily::Inet6 } else { AddressFamily::Inet },
            destination_prefix_length: self.prefix,
            protocol: self.protocol.into(),
            scope: self.scope.into(),
            kind: self.kind.into(),
            flags: if self.on_link { RouteFlags::Onlink } else { RouteFlags::empty() },
            ..RouteHeader::default()
        };
        let mut attributes = vec![RouteAttribute::Table(self.table)];
        attributes.extend(self.destination.map(|address| RouteAttribute::Destination(address.into())));
        attributes.extend(self.gateway.map(|address| RouteAttribute::Gateway(address.into())));
        attributes.extend(self.source.map(|address| RouteAttribute::PrefSource(address.into())));
        attributes.extend(self.priority.map(RouteAttribute::Priority));
        if let Some(link) = &self.link {
            attributes.push(RouteAttribute::Oif(*numbers.get(link)?));
        }
        message.attributes = attributes;
        Some(message)
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

impl Neighbour {
    /// The neighbour of a message, if it never ages.
    fn of(message: &NeighbourMessage, names: &BTreeMap<u32, String>) -> Option<Self> {
        if message.header.state != NeighbourState::Permanent {
            return None;
        }
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
            _ => None,
        })?;
        let hardware = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => Some(bytes.clone()),
            _ => None,
        })?;
        let link = names.get(&message.header.ifindex)?.clone();
        Some(Self { address, hardware: hardware.into(), link })
    }

    fn message(&self, index: u32) -> NeighbourMessage {
        let (family, address) = match self.address {
            IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
        };
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(address),
            NeighbourAttribute::LinkLayerAddress(self.hardware.to_vec()),
        ];
        message
    }
}

#[cfg(test)]
mod tests {
    use limosa_kernel::net::rtnetlink::parse_answers;
    use proptest::prelude::*;

    use super::*;

    fn names() -> BTreeMap<u32, String> {
        BTreeMap::from([(1, "lo".to_owned()), (2, "eth0".to_owned())])
    }

    fn numbers() -> BTreeMap<String, u32> {
        names().into_iter().map(|(number, name)| (name, number)).collect()
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
    }

    fn maybe<T: std::fmt::Debug>(inner: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
        proptest::option::of(inner)
    }

    prop_compose! {
        /// What a checkpoint can say of a route, whether it makes sense or not.
        fn route()(
            six: bool, prefix: u8, table: u32, protocol: u8, scope: u8, kind: u8, on_link: bool,
            destination in maybe(address()), gateway in maybe(address()), source in maybe(address()),
            link in maybe(prop_oneof!["lo", "eth0", ".*"]), priority: Option<u32>,
        ) -> Route {
            Route { six, destination, prefix, gateway, link, source, table, protocol, scope, kind, priority, on_link }
        }
    }

    /// A request as it is sent to the kernel.
    fn sent(message: RouteNetlinkMessage) -> Vec<u8> {
        use limosa_kernel::net::rtnetlink::netlink_packet_core::{
            NetlinkHeader, NetlinkMessage, NetlinkPayload,
        };
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    proptest! {
        /// Routes of hostile checkpoints become messages; those that a kernel could have sent come back as they were.
        #[test]
        fn any_route_becomes_a_message(route in route()) {
            let known = route.link.as_ref().is_none_or(|link| numbers().contains_key(link));
            let message = route.message(&numbers());
            prop_assert_eq!(message.is_some(), known);
            let Some(message) = message else { return Ok(()) };
            let bytes = sent(RouteNetlinkMessage::NewRoute(message));
            for answer in parse_answers(&bytes) {
                let RouteNetlinkMessage::NewRoute(answer) = answer else { continue };
                let fits = |address: Option<IpAddr>| address.is_none_or(|address| address.is_ipv6() == route.six);
                if fits(route.destination) && fits(route.gateway) && fits(route.source) {
                    let read = Route::of(&answer, &names());
                    prop_assert_eq!(read.as_ref(), Some(&route));
                }
            }
        }

        #[test]
        fn any_address_and_neighbour_becomes_a_message(
            local in address(), peer in maybe(address()), prefix: u8, broadcast: Option<[u8; 4]>, scope: u8,
            label: Option<String>, hardware in proptest::collection::vec(any::<u8>(), 0..=HARDWARE_MAX),
        ) {
            let address = Address { local, peer, prefix, broadcast: broadcast.map(Ipv4Addr::from), scope, label };
            sent(RouteNetlinkMessage::NewAddress(address.message(1)));
            let neighbour = Neighbour { address: local, hardware: hardware.into(), link: "lo".to_owned() };
            sent(RouteNetlinkMessage::NewNeighbour(neighbour.message(1)));
        }

        /// Whatever the kernel answers, it is understood or left out.
        #[test]
        fn any_answer_is_understood_or_left_out(kind in 16_u16..32, payload: Vec<u8>) {
            let mut bytes = (payload.len() as u32 + 16).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(payload);
            for answer in parse_answers(&bytes) {
                match answer {
                    RouteNetlinkMessage::NewAddress(message) => drop(Address::of(&message)),
                    RouteNetlinkMessage::NewRoute(message) => drop(Route::of(&message, &names())),
                    RouteNetlinkMessage::NewNeighbour(message) => drop(Neighbour::of(&message, &names())),
                    RouteNetlinkMessage::NewLink(message) => drop(link(&message)),
                    _ => {}
                }
            }
        }
    }
}
