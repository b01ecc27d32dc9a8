//! A lock on packets: nftables rules that drop them while nobody answers for a connection.
//!
//! Between the capture of a connection and its resumption a packet of the peer must find neither an application that
//! is frozen (its kernel would go on acknowledging data) nor a host without the socket (its kernel would answer `RST`).
//!
//! # A lock that cannot be left behind
//! A table made with `NFT_TABLE_F_OWNER` (Linux 5.12) belongs to the netlink socket that made it, and the kernel
//! removes it, with its rules, when that socket is closed. [`PacketLock`] owns such a socket: dropping it unlocks, and so does
//! `kill -9`. No timer, no daemon, nothing to clean up.
//!
//! When a checkpoint ends its source, the connections have to stay locked after the program has ended, until
//! they are restored: [`PacketLock::leave_behind`] puts them in a table of its own, whose set elements time out, so that
//! an abandoned checkpoint drops packets for that long at most; [`remove`] is for the restore.
//!
//! Taking the container's veth down instead would need no rules, but a killed controller would leave it down.
//!
//! ```text
//! table inet limosa-NAME (owner)
//!   set  four { ipv4 address . port . ipv4 address . port }      local, then remote
//!   set  six  { ipv6 address . port . ipv6 address . port }
//!   set  ports { port }
//!   chain in   hook input  priority -350:  mark = ours accept;  saddr… @four, @six drop   (or: drop)
//!                                          (or: tcp flags & (syn | ack) = syn, dport @ports drop)
//!   chain out  hook output priority -350:  the same, seen from the other side
//! ```
//! Format of the messages: `include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h`.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::InNetns;
use super::inject::MARK;
use super::netlink::{self, Builder, Netlink};
use crate::{Error, Result};

const NETLINK_NETFILTER: i32 = 12;
const SUBSYSTEM: u16 = 0xA00;
const NEWTABLE: u16 = SUBSYSTEM;
const GETTABLE: u16 = SUBSYSTEM + 1;
const DELTABLE: u16 = SUBSYSTEM + 2;
const NEWCHAIN: u16 = SUBSYSTEM + 3;
const NEWRULE: u16 = SUBSYSTEM + 6;
const NEWSET: u16 = SUBSYSTEM + 9;
const NEWSETELEM: u16 = SUBSYSTEM + 12;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// What the names of all of Limosa's tables begin with.
const OURS: &str = "limosa-";
const INET: u8 = 1;
/// First of the 4-byte registers.
const REGISTER: u32 = 8;
/// A netlink attribute holds 64 KiB; an element takes less than 80 bytes.
const ELEMENTS: usize = 500;

/// Which packets are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope<'a> {
    /// Every packet from and to this namespace, loopback included: for a container with a namespace of its own.
    Namespace,
    /// TCP segments of these connections, as (local, remote): for processes in the host's namespace.
    Connections(&'a [(SocketAddr, SocketAddr)]),
    /// The first TCP segments (`SYN`) of new connections to these local ports: whoever connects tries again later.
    NewConnections(&'a [u16]),
}

/// Packets are dropped as long as this exists, and no longer.
#[derive(Debug)]
pub struct PacketLock {
    netlink: Netlink,
}

impl PacketLock {
    /// Locks in the network namespace of the calling thread. `name` tells several locks apart (letters,
    /// digits, `-`).
    pub fn new(name: &str, scope: Scope<'_>) -> Result<Self> {
        crate::fault::point();
        let mut netlink = Netlink::open(NETLINK_NETFILTER, "nf_tables")?;
        create(&mut netlink, &table(name), scope, Lifetime::Owner)?;
        Ok(Self { netlink })
    }

    /// Locks in the network namespace behind a descriptor.
    pub fn within(namespace: BorrowedFd<'_>, name: &str, scope: Scope<'_>) -> Result<Self> {
        let _inside = InNetns::enter(namespace)?;
        Self::new(name, scope)
    }

    /// Locks `connections` for the time after this process, for `timeout` at most (whole milliseconds),
    /// in the network namespace of the calling thread, and gives up this lock.
    pub fn leave_behind(
        self,
        name: &str,
        connections: &[(SocketAddr, SocketAddr)],
        timeout: Duration,
    ) -> Result<()> {
        crate::fault::point();
        let mut netlink = Netlink::open(NETLINK_NETFILTER, "nf_tables")?;
        create(&mut netlink, &table(name), Scope::Connections(connections), Lifetime::Timeout(timeout))?;
        drop(self);
        Ok(())
    }

    /// Unlocks. The same as dropping it.
    pub fn release(self) {
        drop(self);
    }
}

impl AsFd for PacketLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }
}

/// Removes what [`PacketLock::leave_behind`] left under that name, in the calling thread's namespace.
/// `Ok(false)`: there was nothing.
pub fn remove(name: &str) -> Result<bool> {
    crate::fault::point();
    let mut netlink = Netlink::open(NETLINK_NETFILTER, "nf_tables")?;
    let mut batch = Batch::begin(&mut netlink);
    batch.add(DELTABLE, 0, |message| message.text(1, &table(name)));
    match batch.commit() {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn table(name: &str) -> String {
    format!("{OURS}{name}")
}

/// Names of the tables in the calling thread's namespace that are not Limosa's. None where the kernel lacks `nf_tables`.
pub fn others_tables() -> Result<Vec<String>> {
    const NAME: u16 = 1;
    /// Length of `struct nfgenmsg`.
    const HEADER: usize = 4;
    crate::fault::point();
    let mut netlink = Netlink::open(NETLINK_NETFILTER, "nf_tables")?;
    let sequence = netlink.next();
    let mut request = Builder::default();
    request
        .message(GETTABLE, netlink::REQUEST | netlink::DUMP, sequence, |message| message.raw(&[0; HEADER]));
    netlink.send(&request.finish())?;
    let mut names = Vec::new();
    let listed = netlink.dump(|_, payload| {
        let attributes = netlink::attributes(payload.get(HEADER..).unwrap_or_default());
        let found = attributes
            .filter(|(kind, _)| *kind == NAME)
            .map(|(_, name)| String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name)).into_owned());
        names.extend(found.filter(|name| !name.starts_with(OURS)));
        Ok(())
    });
    match listed {
        // Neither the subsystem nor a module with it is there.
        Err(error) if error.errno() == Some(libc::EINVAL) => Ok(Vec::new()),
        listed => listed.map(|()| names),
    }
}

#[derive(Clone, Copy)]
enum Lifetime {
    /// As long as the netlink socket that made it.
    Owner,
    /// The elements vanish after this time; the empty table stays.
    Timeout(Duration),
}

/// A transaction of `nf_tables` messages: all or nothing.
struct Batch<'a> {
    netlink: &'a mut Netlink,
    builder: Builder,
    last: u32,
}

impl<'a> Batch<'a> {
    fn begin(netlink: &'a mut Netlink) -> Self {
        let mut batch = Self { netlink, builder: Builder::default(), last: 0 };
        batch.boundary(BATCH_BEGIN);
        batch
    }

    fn boundary(&mut self, kind: u16) {
        let sequence = self.netlink.next();
        self.builder.message(kind, netlink::REQUEST, sequence, |message| {
            // struct nfgenmsg: family, version, and the subsystem (big-endian).
            message.raw(&[0, 0, 0, 10]);
        });
    }

    fn add(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Builder)) {
        self.last = self.netlink.next();
        let flags = netlink::REQUEST | netlink::ACK | flags;
        self.builder.message(kind, flags, self.last, |message| {
            message.raw(&[INET, 0, 0, 0]);
            fill(message);
        });
    }

    fn commit(mut self) -> Result<()> {
        self.boundary(BATCH_END);
        self.netlink.send(&self.builder.finish())?;
        self.netlink.acknowledged(self.last)
    }
}

fn create(netlink: &mut Netlink, table: &str, scope: Scope<'_>, lifetime: Lifetime) -> Result<()> {
    const OWNER: u32 = 2;
    let mut batch = Batch::begin(netlink);
    batch.add(NEWTABLE, netlink::CREATE, |message| {
        message.text(1, table);
        message.number(2, if matches!(lifetime, Lifetime::Owner) { OWNER } else { 0 });
    });
    for (chain, hook) in [("in", 1), ("out", 3)] {
        batch.add(NEWCHAIN, netlink::CREATE, |message| {
            message.text(1, table);
            message.text(3, chain);
            message.nested(4, |message| {
                message.number(1, hook);
                // Before connection tracking and address translation.
                message.number(2, -350_i32 as u32);
            });
            message.text(7, "filter");
        });
        rule(&mut batch, table, chain, |message| {
            meta(message, 3);
            compare(message, &MARK.to_ne_bytes());
            verdict(message, 1);
        });
    }
    match scope {
        Scope::Namespace => {
            for chain in ["in", "out"] {
                rule(&mut batch, table, chain, |message| verdict(message, 0));
            }
        }
        Scope::Connections(connections) => {
            for version in [Version::Four, Version::Six] {
                keyed(&mut batch, table, version, connections, lifetime)?;
            }
        }
        Scope::NewConnections(ports) => handshakes(&mut batch, table, ports, lifetime),
    }
    batch.commit().map_err(|error| Error::new("creating an nf_tables table", table, error.source))
}

/// What differs between the two versions of the internet protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    Four,
    Six,
}

impl Version {
    fn set(self) -> &'static str {
        if self == Self::Four { "four" } else { "six" }
    }

    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    fn protocol(self) -> u8 {
        if self == Self::Four { 2 } else { 10 }
    }

    /// Length of an address, and where source and destination lie in the header.
    fn layout(self) -> (u32, u32, u32) {
        if self == Self::Four { (4, 12, 16) } else { (16, 8, 24) }
    }

    /// The type of the set as the `nft` program shows it: address . service . address . service.
    fn key_type(self) -> u32 {
        let address = if self == Self::Four { 7 } else { 8 };
        [address, 13, address, 13].iter().fold(0, |types, kind| types * 64 + kind)
    }
}

/// One set of connections, and the two rules that look packets up in it.
fn keyed(
    batch: &mut Batch<'_>,
    table: &str,
    version: Version,
    connections: &[(SocketAddr, SocketAddr)],
    lifetime: Lifetime,
) -> Result<()> {
    let keys: Vec<Vec<u8>> = connections
        .iter()
        .filter_map(|(local, remote)| key(version, *local, *remote).transpose())
        .collect::<Result<_>>()?;
    if keys.is_empty() {
        return Ok(());
    }
    let (address, source, destination) = version.layout();
    let (id, name) = (u32::from(version.protocol()), version.set());
    set(batch, table, (name, id), (version.key_type(), 2 * address + 8), &keys, lifetime);
    // (chain, where the local address stands, its port, the remote address, its port)
    for (chain, local, local_port, remote, remote_port) in
        [("in", destination, 2, source, 0), ("out", source, 0, destination, 2)]
    {
        rule(batch, table, chain, |message| {
            meta(message, 15);
            compare(message, &[version.protocol()]);
            meta(message, 16);
            compare(message, &[libc::IPPROTO_TCP as u8]);
            let words = address / 4;
            payload(message, REGISTER, 1, local, address);
            payload(message, REGISTER + words, 2, local_port, 2);
            payload(message, REGISTER + words + 1, 1, remote, address);
            payload(message, REGISTER + 2 * words + 1, 2, remote_port, 2);
            lookup(message, (name, id));
            verdict(message, 0);
        });
    }
    Ok(())
}

/// The set of ports, and the rule that looks up where a `SYN` goes.
fn handshakes(batch: &mut Batch<'_>, table: &str, ports: &[u16], lifetime: Lifetime) {
    const PORTS: (&str, u32) = ("ports", 1);
    /// The type of the set as the `nft` program shows it: service.
    const SERVICE: u32 = 13;
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let keys: Vec<Vec<u8>> = ports.iter().map(|port| port.to_be_bytes().to_vec()).collect();
    if keys.is_empty() {
        return;
    }
    set(batch, table, PORTS, (SERVICE, 2), &keys, lifetime);
    rule(batch, table, "in", |message| {
        meta(message, 16);
        compare(message, &[libc::IPPROTO_TCP as u8]);
        payload(message, REGISTER, 2, 13, 1);
        mask(message, SYN | ACK);
        compare(message, &[SYN]);
        payload(message, REGISTER, 2, 2, 2);
        lookup(message, PORTS);
        verdict(message, 0);
    });
}

/// A set of that name, which has `id` within the batch, so that rules find it before it is committed.
fn set(
    batch: &mut Batch<'_>,
    table: &str,
    (name, id): (&str, u32),
    (key_type, key_length): (u32, u32),
    keys: &[Vec<u8>],
    lifetime: Lifetime,
) {
    const WITH_TIMEOUT: u32 = 0x10;
    batch.add(NEWSET, netlink::CREATE, |message| {
        message.text(1, table);
        message.text(2, name);
        message.number(3, if matches!(lifetime, Lifetime::Timeout(_)) { WITH_TIMEOUT } else { 0 });
        message.number(4, key_type);
        message.number(5, key_length);
        message.number(10, id);
    });
    for chunk in keys.chunks(ELEMENTS) {
        batch.add(NEWSETELEM, netlink::CREATE, |message| {
            message.text(1, table);
            message.text(2, name);
            message.number(4, id);
            message.nested(3, |message| {
                for key in chunk {
                    element(message, key, lifetime);
                }
            });
        });
    }
}

fn element(message: &mut Builder, key: &[u8], lifetime: Lifetime) {
    message.nested(1, |message| {
        message.nested(1, |message| message.attribute(1, key));
        if let Lifetime::Timeout(time) = lifetime {
            let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            message.attribute(4, &milliseconds.to_be_bytes());
        }
    });
}

/// The element of a connection: addresses and ports in registers of 4 bytes. `None`: of the other version.
fn key(version: Version, local: SocketAddr, remote: SocketAddr) -> Result<Option<Vec<u8>>> {
    let mut key = Vec::new();
    for address in [local, remote] {
        match (version, address.ip().to_canonical()) {
            (Version::Four, IpAddr::V4(ip)) => key.extend(ip.octets()),
            (Version::Six, IpAddr::V6(ip)) => key.extend(ip.octets()),
            _ => {}
        }
        key.extend(address.port().to_be_bytes());
        key.extend([0; 2]);
    }
    if local.ip().to_canonical().is_ipv4() != remote.ip().to_canonical().is_ipv4() {
        let why = format!("{local} and {remote} are of different families");
        return Err(Error::malformed("locking a connection", local, why));
    }
    let (address, _, _) = version.layout();
    Ok((key.len() == 2 * address as usize + 8).then_some(key))
}

fn rule(batch: &mut Batch<'_>, table: &str, chain: &str, expressions: impl FnOnce(&mut Builder)) {
    const APPEND: u16 = 0x800;
    batch.add(NEWRULE, netlink::CREATE | APPEND, |message| {
        message.text(1, table);
        message.text(2, chain);
        message.nested(4, expressions);
    });
}

fn expression(message: &mut Builder, name: &str, data: impl FnOnce(&mut Builder)) {
    message.nested(1, |message| {
        message.text(1, name);
        message.nested(2, data);
    });
}

/// Loads a property of the packet (mark 3, nfproto 15, l4proto 16) into the first register.
fn meta(message: &mut Builder, key: u32) {
    expression(message, "meta", |message| {
        message.number(1, REGISTER);
        message.number(2, key);
    });
}

/// Goes on with the rule if the first register equals `value`.
fn compare(message: &mut Builder, value: &[u8]) {
    expression(message, "cmp", |message| {
        message.number(1, REGISTER);
        message.number(2, 0);
        message.nested(3, |message| message.attribute(1, value));
    });
}

/// Goes on with the rule if what the first registers hold is in the set.
fn lookup(message: &mut Builder, (name, id): (&str, u32)) {
    expression(message, "lookup", |message| {
        message.text(1, name);
        message.number(2, REGISTER);
        message.number(4, id);
    });
}

/// Keeps some bits of the first register's first byte.
fn mask(message: &mut Builder, bits: u8) {
    expression(message, "bitwise", |message| {
        message.number(1, REGISTER);
        message.number(2, REGISTER);
        message.number(3, 1);
        message.nested(4, |message| message.attribute(1, &[bits]));
        message.nested(5, |message| message.attribute(1, &[0]));
    });
}

/// Loads bytes of the network (1) or transport (2) header.
fn payload(message: &mut Builder, register: u32, base: u32, offset: u32, length: u32) {
    expression(message, "payload", |message| {
        message.number(1, register);
        message.number(2, base);
        message.number(3, offset);
        message.number(4, length);
    });
}

/// Ends the rule: 0 drops the packet, 1 accepts it.
fn verdict(message: &mut Builder, code: u32) {
    expression(message, "immediate", |message| {
        message.number(1, 0);
        message.nested(2, |message| message.nested(2, |message| message.number(1, code)));
    });
}
