//! The places: hosts and a client, as network namespaces without names.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::InNetns;
use limosa_kernel::net::rtnetlink::{LinkChange, Rtnetlink, Veth};

/// The bridge of each host, as `limosa run --net` names it.
pub const BRIDGE: &str = "br0";
/// The container's address, which moves with it.
pub const CONTAINER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 7);
/// Bits of the prefix of all addresses.
pub const PREFIX: u8 = 24;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 3);

/// Something with a network of its own. It is gone when the last descriptor and process of it are.
#[derive(Debug)]
pub struct Place {
    namespace: OwnedFd,
    /// Its number, as `/proc/PID/ns/net` shows it.
    pub inode: u64,
}

impl Place {
    /// A new network namespace, with nothing but its loopback interface.
    pub fn new() -> Result<Self> {
        // A thread enters the new namespace and ends; the descriptor keeps the namespace.
        let make = || {
            namespace::unshare(&[Kind::Network])?;
            let mut net = Rtnetlink::open()?;
            let loopback = index(&mut net, "lo")?;
            net.set_link(loopback, LinkChange { up: Some(true), ..LinkChange::default() })?;
            Ok::<_, anyhow::Error>(namespace::of_thread(Kind::Network)?)
        };
        let thread = std::thread::Builder::new().name("namespace".to_owned()).spawn(make)?;
        let namespace = thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
        let namespace = namespace.context("making a network namespace")?;
        let inode = std::fs::File::from(namespace.try_clone()?).metadata()?.ino();
        Ok(Self { namespace, inode })
    }

    /// Puts the calling thread there until the guard is dropped; processes that it starts meanwhile stay there.
    pub fn enter(&self) -> Result<InNetns> {
        Ok(InNetns::enter(&self.namespace)?)
    }

    /// Where it can be found while this process holds it, by other processes of the same PID namespace.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd()).into()
    }

    /// Another handle on the same place, for another thread.
    pub fn share(&self) -> Result<Self> {
        Ok(Self { namespace: self.namespace.try_clone()?, inode: self.inode })
    }
}

/// A host: a network with a bridge, and the state directory of its Limosa.
#[derive(Debug)]
pub struct Host {
    /// `A` or `B`.
    pub name: &'static str,
    /// Its network.
    pub place: Place,
    /// Its address on the bridge.
    pub address: Ipv4Addr,
    /// Where its Limosa keeps its containers.
    pub state_dir: PathBuf,
}

impl Host {
    /// The host with number `number` (1 or 2), with its bridge.
    pub fn new(name: &'static str, number: u8, state_dir: PathBuf) -> Result<Self> {
        let host = Self { name, place: Place::new()?, address: Ipv4Addr::new(10, 99, 0, number), state_dir };
        let _inside = host.place.enter()?;
        let mut net = Rtnetlink::open()?;
        net.create_bridge(BRIDGE)?;
        let bridge = index(&mut net, BRIDGE)?;
        // A bridge without an address of its own takes its ports', and changes it when a container comes or goes:
        // its neighbours would look for it in vain for a while.
        let address = vec![0x02, 0x6c, 0x6d, 0x00, 0x00, number];
        let change = LinkChange { up: Some(true), address: Some(address), ..LinkChange::default() };
        net.set_link(bridge, change)?;
        net.add_address(bridge, host.address.into(), PREFIX)?;
        Ok(host)
    }
}

/// Joins the bridges of two hosts by a cable.
pub fn join(a: &Host, b: &Host) -> Result<()> {
    {
        let _inside = a.place.enter()?;
        let mut net = Rtnetlink::open()?;
        net.create_veth(&Veth {
            name: "to-b",
            peer_name: "to-a",
            peer_namespace: &b.place.namespace,
            peer_address: None,
        })?;
        plug(&mut net, "to-b")?;
    }
    let _inside = b.place.enter()?;
    plug(&mut Rtnetlink::open()?, "to-a")
}

/// Connects the client to the bridge of a host.
pub fn join_client(client: &Place, host: &Host) -> Result<()> {
    {
        let _inside = host.place.enter()?;
        let mut net = Rtnetlink::open()?;
        net.create_veth(&Veth {
            name: "client",
            peer_name: "eth0",
            peer_namespace: &client.namespace,
            peer_address: None,
        })?;
        plug(&mut net, "client")?;
    }
    let _inside = client.enter()?;
    let mut net = Rtnetlink::open()?;
    let eth0 = index(&mut net, "eth0")?;
    net.set_link(eth0, LinkChange { up: Some(true), ..LinkChange::default() })?;
    Ok(net.add_address(eth0, CLIENT.into(), PREFIX)?)
}

/// Makes the link a port of the bridge, and brings it up.
fn plug(net: &mut Rtnetlink, name: &str) -> Result<()> {
    let (port, bridge) = (index(net, name)?, index(net, BRIDGE)?);
    Ok(net.set_link(port, LinkChange { up: Some(true), master: Some(bridge), ..LinkChange::default() })?)
}

fn index(net: &mut Rtnetlink, name: &str) -> Result<u32> {
    let link = net.link(name)?.with_context(|| format!("there is no link {name}"))?;
    Ok(link.header.index)
}
