//! A container's interface: a veth pair, `eth0` inside, the other end a port of the host's bridge.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use limosa_kernel::net::announce::announce;
use limosa_kernel::net::rtnetlink::netlink_packet_route::link::{
    LinkAttribute, LinkFlags, LinkMessage, State,
};
use limosa_kernel::net::rtnetlink::{LinkChange, Rtnetlink, Veth, link_address};

use crate::config::{Name, Network};

/// The interface's name inside the container.
pub const INTERFACE: &str = "eth0";
/// How long the kernel may take to let a link carry packets; usually it is a tenth of a millisecond.
const OPERATION: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_micros(200);

/// The name of the host's end for a container: at most 15 bytes, recognizable, not used yet.
pub(crate) fn host_name(name: &Name) -> String {
    let short: String =
        name.as_str().chars().filter(char::is_ascii_alphanumeric).take(7).collect::<String>().to_lowercase();
    format!("lm{short}{}", crate::random_hex(3))
}

/// Makes the pair and puts the host's end, down, into the bridge of the calling thread's network namespace.
pub(crate) fn create(
    network: &Network,
    host_name: &str,
    container: BorrowedFd<'_>,
    mac: Option<[u8; 6]>,
) -> Result<(), LinkError> {
    let mut host = Rtnetlink::open()?;
    let bridge = find(&mut host, &network.bridge)
        .map_err(|cause| LinkError::Bridge { bridge: network.bridge.clone(), source: cause })?;
    host.create_veth(&Veth {
        name: host_name,
        peer_name: INTERFACE,
        peer_namespace: container,
        peer_address: mac,
    })?;
    let set = (|| {
        let index = find(&mut host, host_name)?.header.index;
        host.set_link(index, LinkChange { master: Some(bridge.header.index), ..LinkChange::default() })
    })();
    if set.is_err() {
        delete(host_name);
    }
    Ok(set?)
}

/// Brings the host's end up or down: only a container that is connected can be reached.
pub(crate) fn set_up(host_name: &str, up: bool) -> Result<(), LinkError> {
    let mut host = Rtnetlink::open()?;
    let index = find(&mut host, host_name)?.header.index;
    host.set_link(index, LinkChange { up: Some(up), ..LinkChange::default() })?;
    if up { await_operation(&mut host, host_name).map(drop) } else { Ok(()) }
}

/// Waits until a link whose other end is there carries packets: the kernel lets it only some time after it says that
/// the carrier is there (`net/core/link_watch.c`), and drops until then what is sent. A lost ARP request is repeated
/// after a second.
fn await_operation(connection: &mut Rtnetlink, name: &str) -> Result<LinkMessage, LinkError> {
    let limit = Instant::now() + OPERATION;
    loop {
        let link = find(connection, name)?;
        let carrier = link.header.flags.contains(LinkFlags::LowerUp);
        let state = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::OperState(state) => Some(*state),
            _ => None,
        });
        if !carrier || state == Some(State::Up) {
            return Ok(link);
        }
        if Instant::now() > limit {
            tracing::warn!(name, ?state, "an interface is slow to carry packets");
            return Ok(link);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Deletes the pair, if it still exists in the calling thread's network namespace.
pub(crate) fn delete(host_name: &str) {
    let delete = || {
        let mut host = Rtnetlink::open()?;
        let index = find(&mut host, host_name)?.header.index;
        host.delete_link(index)
    };
    if let Err(error) = delete() {
        tracing::debug!(%error, host_name, "the veth pair is gone already");
    }
}

/// Brings up the loopback interface of the calling thread's network namespace.
pub(crate) fn loopback_up() -> limosa_kernel::Result<()> {
    let mut inside = Rtnetlink::open()?;
    let index = find(&mut inside, "lo")?.header.index;
    inside.set_link(index, LinkChange { up: Some(true), ..LinkChange::default() })
}

/// Brings up `eth0` of the calling thread's network namespace and gives it its addresses and routes.
pub(crate) fn configure(network: &Network) -> Result<(), LinkError> {
    let mut inside = Rtnetlink::open()?;
    let index = find(&mut inside, INTERFACE)?.header.index;
    inside.set_link(index, LinkChange { up: Some(true), ..LinkChange::default() })?;
    for address in &network.addresses {
        inside.add_address(index, address.address, address.prefix_length)?;
    }
    for gateway in &network.gateways {
        inside
            .add_default_route(index, *gateway)
            .map_err(|source| LinkError::Gateway { gateway: *gateway, source })?;
    }
    Ok(())
}

/// Whether the calling thread's network namespace has a link of this name.
pub(crate) fn exists(name: &str) -> bool {
    Rtnetlink::open().is_ok_and(|mut host| find(&mut host, name).is_ok())
}

/// The hardware address of `eth0` of process `pid`.
pub(crate) fn hardware_address(pid: i32) -> Result<[u8; 6], LinkError> {
    let namespace = limosa_kernel::namespace::of_process(pid, limosa_kernel::namespace::Kind::Network)?;
    inside(&namespace, || {
        let link = find(&mut Rtnetlink::open()?, INTERFACE)?;
        Ok(link_address(&link).and_then(|address| address.try_into().ok()).unwrap_or_default())
    })
}

/// Announces the addresses of `eth0` of the calling thread's network namespace on its link.
pub(crate) fn announce_all(network: &Network) -> Result<(), LinkError> {
    let mut inside = Rtnetlink::open()?;
    let link = await_operation(&mut inside, INTERFACE)?;
    let mac = link_address(&link).and_then(|address| address.try_into().ok()).unwrap_or_default();
    for address in &network.addresses {
        announce(link.header.index, mac, address.address)?;
    }
    Ok(())
}

/// Calls `action` in the network namespace behind `namespace`.
pub(crate) fn inside<T>(
    namespace: impl AsFd,
    action: impl FnOnce() -> Result<T, LinkError>,
) -> Result<T, LinkError> {
    let _guard = limosa_kernel::net::InNetns::enter(namespace)?;
    action()
}

fn find(connection: &mut Rtnetlink, name: &str) -> limosa_kernel::Result<LinkMessage> {
    let missing = || {
        let cause = std::io::Error::new(std::io::ErrorKind::NotFound, "there is no such link");
        limosa_kernel::Error::new("RTM_GETLINK", format_args!("link {name}"), cause)
    };
    connection.link(name)?.ok_or_else(missing)
}

/// A container's interface could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The bridge is not there.
    #[error(
        "cannot use bridge {bridge}: make it first, with `ip link add {bridge} type bridge`, or name another"
    )]
    Bridge {
        /// Its name.
        bridge: String,
        /// Why.
        #[source]
        source: limosa_kernel::Error,
    },
    /// The default route was refused.
    #[error(
        "cannot make {gateway} the default gateway: it must be in the subnet of one of the container's addresses"
    )]
    Gateway {
        /// The gateway.
        gateway: std::net::IpAddr,
        /// Why.
        #[source]
        source: limosa_kernel::Error,
    },
    /// Another request was refused.
    #[error(transparent)]
    Kernel(#[from] limosa_kernel::Error),
}
