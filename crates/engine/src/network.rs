//! The sockets of a tree as a whole: the packet lock over its connections, and what is read of all sockets at once.
//!
//! ```text
//! capture:  frozen ─► lock packets ─► snapshot all connections ─► rooms ─► … ─► release: unlock, run on
//!                                                                          └─► end: kill, abandon the sockets silently,
//!                                                                              leave a lock that times out (host's namespace)
//! restore:  lock packets ─► rebuild, in repair mode ─► … ─► leave repair mode ─► commit: the tree stays, whatever becomes
//!                                                           of us ─► interface up ─► unlock, probe the peers ─► run
//! ```
//!
//! The lock belongs to a descriptor of Limosa's and falls with it, also by `kill -9` (see `limosa_kernel::net::nft`);
//! sockets are in repair mode for microseconds only, under the hands of a process that outlives Limosa
//! (see `limosa_kernel::net::tcp_snapshot`). So at a checkpoint nothing has to be undone.
//! While the tree is being killed, Limosa's duplicates keep its sockets open: no `FIN` is sent, and they are
//! abandoned without a packet afterwards.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use limosa_kernel::net::InNetns;
use limosa_kernel::net::flow_labels::{self, Leased};
use limosa_kernel::net::multicast::{self, Group};
use limosa_kernel::net::nft::{self, PacketLock, Scope};
use limosa_kernel::net::raw::{self, Kind};
use limosa_kernel::net::sock_diag::{Diag, UnixName, UnixSocket};
use limosa_kernel::net::sockopt::{self, Foreign, SocketOption};
use limosa_kernel::net::tcp_repair::{self, State};
use limosa_kernel::net::tcp_snapshot::{self, Snapshot, SnapshotError};
use limosa_kernel::proc::NsKind;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Options, TcpConnections, Unaccepted};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// How long packets of connections whose source has ended are dropped, waiting for the restore. Longer than
/// any peer goes on trying.
const LEFT_BEHIND: Duration = Duration::from_hours(24);

/// An internet address as it stands in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The IP address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
    /// IPv6 flow information.
    #[serde(default)]
    pub flow: u32,
    /// IPv6 scope: the index of an interface.
    #[serde(default)]
    pub scope: u32,
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        let (flow, scope) = match address {
            SocketAddr::V4(_) => (0, 0),
            SocketAddr::V6(six) => (six.flowinfo(), six.scope_id()),
        };
        Self { ip: address.ip(), port: address.port(), flow, scope }
    }
}

impl From<Address> for SocketAddr {
    fn from(address: Address) -> Self {
        match address.ip {
            IpAddr::V4(ip) => Self::new(ip.into(), address.port),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, address.port, address.flow, address.scope).into(),
        }
    }
}

/// A socket option as it stands in a checkpoint; those that may be restored are listed in
/// `limosa_kernel::net::sockopt`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OptionState {
    /// `SOL_SOCKET`, `IPPROTO_TCP`…
    pub level: i32,
    /// The option's number.
    pub name: i32,
    /// The value in the machine's byte order.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// Options for a checkpoint.
pub(crate) fn to_state(options: Vec<SocketOption>) -> Vec<OptionState> {
    options
        .into_iter()
        .map(|option| OptionState { level: option.level, name: option.name, value: option.value })
        .collect()
}

/// Options for the kernel.
pub(crate) fn from_state(options: &[OptionState]) -> Vec<SocketOption> {
    options
        .iter()
        .map(|option| SocketOption { level: option.level, name: option.name, value: option.value.clone() })
        .collect()
}

/// The kind of socket that a description is, if it is one.
pub(crate) fn kind(view: &DescriptionView) -> Option<Kind> {
    if view.link.starts_with(b"socket:[") { raw::kind(&view.descriptor).ok() } else { None }
}

/// Refuses what a socket has beside its options.
pub(crate) fn refuse_foreign_options(view: &DescriptionView) -> Result<(), CaptureError> {
    match sockopt::foreign(&view.descriptor)? {
        Some(Foreign { reason, remedy }) => Err(view.refuse(reason, remedy).into()),
        None => Ok(()),
    }
}

/// The network namespace that a socket is in, and its device and inode number.
fn namespace_of(view: &DescriptionView) -> Result<(OwnedFd, (u64, u64)), CaptureError> {
    let namespace = raw::namespace(&view.descriptor)?;
    let stat = rustix::fs::fstat(&namespace).map_err(view.error("fstat of a network namespace"))?;
    Ok((namespace, (stat.st_dev, stat.st_ino)))
}

/// What must be held while a tree with sockets is frozen.
#[derive(Debug, Default)]
pub struct Network {
    places: Vec<Locked>,
    connections: HashMap<u64, Result<Snapshot, SnapshotError>>,
    unix: HashMap<u64, UnixSocket>,
    /// See [`Network::running`].
    stuck: HashMap<u64, usize>,
    /// The multicast groups of each network namespace, by its device and inode number.
    groups: HashMap<(u64, u64), Vec<Group>>,
    /// Likewise, the TCP sockets whose segments are signed, by inode number.
    signed: HashMap<(u64, u64), HashSet<u64>>,
    /// Likewise, the flow labels that are leased.
    leased: HashMap<(u64, u64), Leased>,
    /// The PID in the tree of the peers of unix sockets, by the socket's inode number: of those that had to be asked for.
    pub(crate) peers: HashMap<u64, i32>,
    /// What becomes of the connections.
    pub(crate) tcp: TcpConnections,
    /// What becomes of those that wait in listening sockets.
    pub(crate) unaccepted: Unaccepted,
    /// TCP connections that wait now have come since the freeze: they belong to the source.
    pub(crate) came_later: bool,
    /// Whether every descriptor in flight is among the descriptions.
    pub(crate) sees_all_in_flight: bool,
}

/// The tree's connections in one network namespace.
#[derive(Debug)]
struct Locked {
    namespace: OwnedFd,
    lock: PacketLock,
    sockets: Vec<OwnedFd>,
    addresses: Vec<(SocketAddr, SocketAddr)>,
}

impl Network {
    /// Locks the connections among `found` and reads them, unless they are to be closed. `root` names the lock.
    pub(crate) fn look(
        root: i32,
        found: &[DescriptionView],
        options: &Options,
    ) -> Result<Self, CaptureError> {
        let mut network = Self { tcp: options.tcp, unaccepted: options.unaccepted, ..Self::default() };
        if network.tcp == TcpConnections::Close {
            return Ok(network);
        }
        let mut by_namespace: HashMap<(u64, u64), (OwnedFd, Vec<&DescriptionView>)> = HashMap::new();
        for view in found.iter().filter(|view| is_connected(view)) {
            let (namespace, id) = namespace_of(view)?;
            by_namespace.entry(id).or_insert((namespace, Vec::new())).1.push(view);
        }
        for (namespace, views) in by_namespace.into_values() {
            let mut addresses = Vec::with_capacity(views.len());
            let mut sockets = Vec::with_capacity(views.len());
            for view in &views {
                let fd = view.descriptor.as_fd();
                addresses.push((tcp_snapshot::local_address(fd)?, tcp_snapshot::remote_address(fd)?));
                sockets.push(fd.try_clone_to_owned().map_err(|source| CaptureError::Io {
                    what: "duplicating a socket",
                    pid: view.process.pid,
                    source,
                })?);
            }
            let lock = PacketLock::within(
                namespace.as_fd(),
                &format!("checkpoint-{root}"),
                Scope::Connections(&addresses),
            )?;
            let fds: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
            let snapshots = tcp_snapshot::take(&fds)?;
            network.connections.extend(views.iter().map(|view| view.stat.st_ino).zip(snapshots));
            network.places.push(Locked { namespace, lock, sockets, addresses });
        }
        Ok(network)
    }

    /// For a tree that runs: nothing is locked or read. `stuck` counts the connections that wait in its listening sockets
    /// and are not accepted, by inode number.
    pub(crate) fn running(options: &Options, stuck: HashMap<u64, usize>) -> Self {
        Self { tcp: options.tcp, unaccepted: options.unaccepted, stuck, ..Self::default() }
    }

    /// How many connections wait in a listening socket of a running tree and are not accepted.
    pub(crate) fn stuck(&self, inode: u64) -> usize {
        self.stuck.get(&inode).copied().unwrap_or(0)
    }

    /// The snapshot of the connection with that inode number, once.
    pub(crate) fn take(&mut self, inode: u64) -> Option<Result<Snapshot, SnapshotError>> {
        self.connections.remove(&inode)
    }

    /// What the kernel lists of a unix socket. The namespace that it is in is listed once.
    pub(crate) fn unix(&mut self, view: &DescriptionView) -> Result<UnixSocket, CaptureError> {
        let inode = view.stat.st_ino;
        if !self.unix.contains_key(&inode) {
            let listed = Diag::open_for(&view.descriptor)?.unix()?;
            self.unix.extend(listed.into_iter().map(|socket| (socket.inode, socket)));
        }
        self.unix.get(&inode).cloned().ok_or_else(|| {
            let reason = "the kernel does not list it among the unix sockets of its network namespace";
            view.refuse(reason, "load the kernel module unix_diag").into()
        })
    }

    /// The multicast groups of all interfaces of the namespace that a socket is in, listed once.
    pub(crate) fn groups(&mut self, view: &DescriptionView) -> Result<&[Group], CaptureError> {
        match self.groups.entry(namespace_of(view)?.1) {
            Entry::Occupied(listed) => Ok(listed.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(multicast::groups(&view.descriptor)?)),
        }
    }

    /// Refuses an internet socket that has what no restore can give it, or that is in another network namespace than its process.
    pub(crate) fn refuse_foreign(&mut self, view: &DescriptionView) -> Result<(), CaptureError> {
        let (_, namespace) = namespace_of(view)?;
        let home = view.process.proc.ns_id(NsKind::Net)?;
        if namespace != (home.dev, home.ino) {
            let reason = "it was made in another network namespace than its process is in";
            return Err(view.refuse(reason, "close it before the checkpoint").into());
        }
        refuse_foreign_options(view)?;
        self.refuse_leases(view, namespace)?;
        if kind(view).is_some_and(|kind| kind.protocol == libc::IPPROTO_TCP)
            && self.signed(view, namespace)?.contains(&view.stat.st_ino)
        {
            let reason = "it signs its segments (TCP_MD5SIG), with keys that would lie in the checkpoint";
            return Err(view.refuse(reason, "close it before the checkpoint").into());
        }
        Ok(())
    }

    fn refuse_leases(&mut self, view: &DescriptionView, namespace: (u64, u64)) -> Result<(), CaptureError> {
        if kind(view).is_none_or(|kind| kind.domain != libc::AF_INET6) {
            return Ok(());
        }
        let leased = match self.leased.entry(namespace) {
            Entry::Occupied(listed) => listed.into_mut(),
            Entry::Vacant(place) => {
                let leased = flow_labels::leased(&view.descriptor)?;
                for address in &leased.anycast {
                    tracing::warn!(%address, "sockets have joined an anycast address; those of the tree lose it");
                }
                place.insert(leased)
            }
        };
        if leased.labels.iter().any(|label| flow_labels::has_leased(&view.descriptor, *label)) {
            let reason = "it has an IPv6 flow label (IPV6_FLOWLABEL_MGR), which is leased from this machine";
            return Err(view.refuse(reason, "release the label and try again").into());
        }
        Ok(())
    }

    fn signed(
        &mut self,
        view: &DescriptionView,
        namespace: (u64, u64),
    ) -> Result<&HashSet<u64>, CaptureError> {
        match self.signed.entry(namespace) {
            Entry::Occupied(listed) => Ok(listed.into_mut()),
            Entry::Vacant(place) => {
                let mut diag = Diag::open_for(&view.descriptor)?;
                let mut signed = HashSet::new();
                for family in [libc::AF_INET, libc::AF_INET6] {
                    let listed = diag.tcp_with_signatures(family)?.into_iter();
                    signed.extend(listed.filter(|socket| socket.signed).map(|socket| socket.inode));
                }
                Ok(place.insert(signed))
            }
        }
    }

    /// The name of a listed unix socket.
    pub(crate) fn unix_name(&self, inode: u64) -> Option<UnixName> {
        self.unix.get(&inode)?.name.clone()
    }

    /// Whether connections that wait to be accepted are left out.
    pub(crate) fn closes_unaccepted(&self) -> bool {
        self.unaccepted == Unaccepted::Close || self.tcp == TcpConnections::Close
    }

    /// The listening unix socket in which the connection of another waits.
    pub(crate) fn waits_in(&self, inode: u64) -> Option<u64> {
        self.unix.values().find(|socket| socket.pending.contains(&inode)).map(|socket| socket.inode)
    }

    /// Whether a listed unix socket has sent something that is not read.
    pub(crate) fn has_sent(&self, inode: u64) -> bool {
        self.unix.get(&inode).is_none_or(|socket| socket.send_queue > 0)
    }

    /// The tree has ended: its connections vanish without a packet, and stay locked for the restore. Limosa's last
    /// act on them; what fails is reported and changes nothing.
    pub(crate) fn abandon(self, left_behind: &str) {
        for place in self.places {
            for socket in &place.sockets {
                if let Err(error) = tcp_snapshot::abandon(socket.as_fd()) {
                    tracing::warn!(%error, "a connection of the ended tree is closed, not abandoned");
                }
            }
            let leave = || {
                let _inside = InNetns::enter(&place.namespace)?;
                place.lock.leave_behind(left_behind, &place.addresses, LEFT_BEHIND)
            };
            if let Err(error) = leave() {
                tracing::warn!(%error, "the connections are not locked until the restore");
            }
        }
    }
}

/// The refusal of a listening socket whose program does not accept.
pub(crate) fn refuse_unaccepted(view: &DescriptionView, waiting: usize) -> CaptureError {
    let reason = format!("{waiting} connections wait in it, and its program does not accept them");
    let remedy = "let it accept them and try again, or give up these connections with --unaccepted close";
    view.refuse(reason, remedy).into()
}

/// The name of the lock that a checkpoint leaves behind when it ends the tree.
pub(crate) fn left_behind(root: i32) -> String {
    format!("left-{root}")
}

fn is_connected(view: &DescriptionView) -> bool {
    let Some(kind) = kind(view) else { return false };
    matches!(kind.domain, libc::AF_INET | libc::AF_INET6)
        && kind.protocol == libc::IPPROTO_TCP
        && tcp_repair::info(&view.descriptor).is_ok_and(|info| is_connection(info.state))
}

/// Whether a socket in this state has a connection that can be read.
pub(crate) fn is_connection(state: State) -> bool {
    !matches!(state, State::Listen | State::Close | State::TimeWait | State::SynReceived)
}

/// Something to be done with a socket when the tree starts.
pub(crate) type Starter = Box<dyn FnOnce() -> Result<(), RestoreError>>;

/// What has to be done with the sockets of a tree.
#[derive(Default)]
pub(crate) struct Starters {
    /// When it is about to start: what it needs to live without Limosa.
    pub(crate) at_start: Vec<Starter>,
    /// When it is there to stay, and reachable.
    pub(crate) when_reachable: Vec<Starter>,
}

/// What must be held until a restored tree starts. Dropped, after the tree has ended, its connections vanish silently.
#[derive(Default)]
pub(crate) struct Restored {
    lock: Option<PacketLock>,
    left_behind: Option<String>,
    pub(crate) starters: Starters,
}

impl Restored {
    /// Locks `connections` in the namespace of the calling thread, where `left_behind` may be locking them, too.
    pub(crate) fn lock(
        connections: &[(SocketAddr, SocketAddr)],
        left_behind: Option<&str>,
    ) -> Result<Self, RestoreError> {
        if connections.is_empty() {
            return Ok(Self::default());
        }
        let name = format!("restore-{}", std::process::id());
        let lock = PacketLock::new(&name, Scope::Connections(connections))?;
        Ok(Self {
            lock: Some(lock),
            left_behind: left_behind.map(ToOwned::to_owned),
            starters: Starters::default(),
        })
    }

    /// The sockets live, but nothing passes yet. From here on they need Limosa no more: if it dies, the lock falls.
    pub(crate) fn start(&mut self) -> Result<(), RestoreError> {
        std::mem::take(&mut self.starters.at_start).into_iter().try_for_each(|starter| starter())?;
        if let Some(name) = &self.left_behind {
            nft::remove(name)?;
        }
        Ok(())
    }

    /// Packets pass. The tree is there to stay, so nothing can fail any more.
    pub(crate) fn open(self) {
        drop(self.lock);
        for starter in self.starters.when_reachable {
            if let Err(error) = starter() {
                tracing::warn!(%error, "a restored connection goes on only when its timers expire");
            }
        }
    }
}
