//! Listening sockets before and at the freeze: connections that nobody has accepted yet.
//!
//! Such a connection has no descriptor. Taking it out of the listening socket to look at it could not be undone if Limosa
//! were killed, so it is left to the program, which runs until it has accepted what there is:
//!
//! ```text
//! running ─► SYNs to the listening ports are dropped ─► wait until all is accepted ─► freeze ─► look again
//!            (who connects tries again, a second later)       ▲                                   │ one has come
//!                                                             └──────────── let go ───────────────┘ meanwhile
//! ```
//!
//! The lock on `SYN`s falls with the end of the checkpoint: a connection that begins while the tree is frozen is made by
//! whoever listens then. Where the source runs on, that is the source, and the lock is there only if it has no moment
//! without such connections, and only until the freeze: those that come later are the source's own. What a program
//! does not accept in time is refused, or with [`Unaccepted::Close`] left out of the checkpoint.
//!
//! Unix sockets have no packets to be dropped. Connections without data that wait in them are carried (see
//! `resources::unix_socket`), so that only those with data are waited for.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::InNetns;
use limosa_kernel::net::nft::{PacketLock, Scope};
use limosa_kernel::net::sock_diag::{Diag, InetSocket, UnixSocket};
use limosa_kernel::net::tcp_repair::State;
use limosa_kernel::proc::ProcDir;

use crate::checkpoint::{Options, TcpConnections, Unaccepted};
use crate::error::CaptureError;
use crate::freeze::Frozen;
use crate::preflight;
use crate::report::Report;

/// How long a program may take to accept what waits. One that is busy does it in milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a source that is to run on may take until it has accepted all at one moment, while others connect.
const LULL: Duration = Duration::from_millis(30);
const PERIOD: Duration = Duration::from_micros(500);
/// How often the tree is let go because a connection has come at the last moment; after a quarter of it, they are held
/// back.
const TRIES: usize = 20;

/// The listening sockets of a tree, which take no new TCP connections as long as this exists.
#[derive(Debug)]
pub(crate) struct Listeners {
    namespace: OwnedFd,
    /// Inode numbers of all sockets of the tree.
    sockets: HashSet<u64>,
    ports: Vec<u16>,
    lock: Option<PacketLock>,
    /// Nothing waited when the tree was frozen: what waits now has come later.
    pub(crate) were_empty: bool,
}

/// Freezes the tree rooted at `root` when none of its listening sockets has a connection that would be lost, if there
/// is such a moment.
pub(crate) fn freeze(
    root: i32,
    options: &Options,
    report: &mut Report,
) -> Result<(Frozen, Option<Listeners>), CaptureError> {
    let listeners = report.phase("listeners", |_| Listeners::find(root))?;
    let wait = options.unaccepted == Unaccepted::Refuse && options.tcp == TcpConnections::Established;
    let Some(mut listeners) = listeners else {
        return Ok((report.phase("freeze", |_| Frozen::stop(root))?, None));
    };
    if !options.leaves_running {
        listeners.lock(root);
    }
    let started = Instant::now();
    for tried in 0..TRIES {
        if tried == TRIES / 4 {
            listeners.lock(root);
        }
        while wait && started.elapsed() < PATIENCE && listeners.has_waiting()? {
            if started.elapsed() > LULL {
                // More come all the time.
                listeners.lock(root);
            }
            std::thread::sleep(PERIOD);
        }
        let frozen = report.phase("freeze", |_| Frozen::stop(root))?;
        listeners.were_empty = wait && !listeners.has_waiting()?;
        if !wait || listeners.were_empty || started.elapsed() > PATIENCE {
            if options.leaves_running {
                listeners.lock = None;
            }
            return Ok((frozen, Some(listeners)));
        }
        drop(frozen);
        report.rename_last("frozen in vain");
    }
    Ok((report.phase("freeze", |_| Frozen::stop(root))?, Some(listeners)))
}

/// A connection that waits in a listening socket of a tree: its listening socket, and what tells it from others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Waiting {
    Tcp(u64, SocketAddr, SocketAddr),
    Unix(u64, u64),
}

/// How many connections wait in each listening socket of the tree rooted at `root`, which runs, and are not accepted within
/// a second, by inode number. Returns as soon as none is left of those that waited at first.
pub(crate) fn stuck(root: i32, options: &Options) -> Result<HashMap<u64, usize>, CaptureError> {
    let mut counts = HashMap::new();
    if options.unaccepted == Unaccepted::Close || options.tcp == TcpConnections::Close {
        return Ok(counts);
    }
    let Some(listeners) = Listeners::find(root)? else { return Ok(counts) };
    let started = Instant::now();
    let mut stuck = listeners.waiting()?;
    while !stuck.is_empty() && started.elapsed() < PATIENCE {
        std::thread::sleep(PERIOD * 10);
        let still = listeners.waiting()?;
        stuck.retain(|one| still.contains(one));
    }
    for Waiting::Tcp(listener, ..) | Waiting::Unix(listener, _) in stuck {
        *counts.entry(listener).or_default() += 1;
    }
    Ok(counts)
}

impl Listeners {
    /// The connections that wait and that a checkpoint could not carry.
    fn waiting(&self) -> Result<HashSet<Waiting>, CaptureError> {
        let _inside = InNetns::enter(&self.namespace)?;
        let mut diag = Diag::open()?;
        let mut found = HashSet::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let all = diag.inet(family, libc::IPPROTO_TCP).unwrap_or_default();
            let listening: Vec<_> = all
                .iter()
                .filter(|socket| State::from_number(socket.state) == Some(State::Listen))
                .filter(|socket| socket.receive_queue > 0 && self.sockets.contains(&socket.inode))
                .collect();
            for socket in all.iter().filter(|socket| is_unaccepted(socket)) {
                let listener = listening.iter().find(|listener| {
                    let (local, ip) = (listener.local, listener.local.ip());
                    local.port() == socket.local.port() && (ip.is_unspecified() || ip == socket.local.ip())
                });
                found.extend(listener.map(|one| Waiting::Tcp(one.inode, socket.local, socket.remote)));
            }
        }
        let unix = diag.unix().unwrap_or_default();
        let silent: HashSet<u64> =
            unix.iter().filter(|socket| socket.send_queue == 0).map(|socket| socket.inode).collect();
        let is_carried = |client: &u64| silent.contains(client) && self.sockets.contains(client);
        for socket in unix.iter().filter(|one| is_listening(one) && self.sockets.contains(&one.inode)) {
            let clients = socket.pending.iter().filter(|client| !is_carried(client));
            found.extend(clients.map(|client| Waiting::Unix(socket.inode, *client)));
        }
        Ok(found)
    }

    /// Finds those of the tree, which runs. None where there are none.
    fn find(root: i32) -> Result<Option<Self>, CaptureError> {
        let namespace = namespace::of_process(root, Kind::Network)?;
        let (tcp, unix) = {
            let _inside = InNetns::enter(&namespace)?;
            let mut diag = Diag::open()?;
            // A kernel without the modules that list sockets: the checkpoint will say what it lacks.
            let mut tcp = diag.tcp_listeners(libc::AF_INET).unwrap_or_default();
            tcp.extend(diag.tcp_listeners(libc::AF_INET6).unwrap_or_default());
            (tcp, diag.unix().unwrap_or_default())
        };
        let mut listening: HashMap<u64, Option<u16>> = HashMap::new();
        listening.extend(tcp.iter().map(|socket| (socket.inode, Some(socket.local.port()))));
        listening
            .extend(unix.iter().filter(|socket| is_listening(socket)).map(|socket| (socket.inode, None)));
        if listening.is_empty() {
            return Ok(None);
        }
        let sockets = sockets(root)?;
        listening.retain(|inode, _| sockets.contains(inode));
        if listening.is_empty() {
            return Ok(None);
        }
        let ports: HashSet<u16> = listening.into_values().flatten().collect();
        let ports = ports.into_iter().collect();
        Ok(Some(Self { namespace, sockets, ports, lock: None, were_empty: false }))
    }

    /// Has those who connect try again later.
    fn lock(&mut self, root: i32) {
        if self.lock.is_some() || self.ports.is_empty() {
            return;
        }
        let scope = Scope::NewConnections(&self.ports);
        match PacketLock::within(self.namespace.as_fd(), &format!("listen-{root}"), scope) {
            Ok(lock) => self.lock = Some(lock),
            // What comes at the wrong moment is found by the checkpoint, or reset by its end.
            Err(error) => {
                self.ports.clear();
                tracing::warn!(%error, "connections that begin during the checkpoint are not held back");
            }
        }
    }

    /// Whether connections wait in one of them that a checkpoint could not carry.
    fn has_waiting(&self) -> Result<bool, CaptureError> {
        let _inside = InNetns::enter(&self.namespace)?;
        let mut diag = Diag::open()?;
        for family in [libc::AF_INET, libc::AF_INET6] {
            let listening = diag.tcp_listeners(family).unwrap_or_default();
            if listening.iter().any(|socket| socket.receive_queue > 0 && self.sockets.contains(&socket.inode))
            {
                return Ok(true);
            }
        }
        let unix = diag.unix().unwrap_or_default();
        let ours = unix.iter().filter(|socket| is_listening(socket) && self.sockets.contains(&socket.inode));
        let sent: HashMap<u64, u32> = unix.iter().map(|socket| (socket.inode, socket.send_queue)).collect();
        let clients: Vec<u64> = ours.flat_map(|socket| socket.pending.iter().copied()).collect();
        Ok(clients.iter().any(|client| sent.get(client) != Some(&0)))
    }
}

/// Whether a TCP socket is the end of a connection that waits to be accepted. Closed by its program, and not yet gone, it
/// would have no inode number either, but another state.
fn is_unaccepted(socket: &InetSocket) -> bool {
    socket.inode == 0
        && matches!(State::from_number(socket.state), Some(State::Established | State::CloseWait))
}

fn is_listening(socket: &UnixSocket) -> bool {
    const LISTEN: u8 = 10;
    socket.state == LISTEN
}

/// The inode numbers of all sockets of a running tree. What is gone meanwhile has none.
fn sockets(root: i32) -> Result<HashSet<u64>, CaptureError> {
    let mut found = HashSet::new();
    for process in preflight::members(root)? {
        add_sockets(&process.proc, &mut found);
    }
    Ok(found)
}

fn add_sockets(proc: &ProcDir, found: &mut HashSet<u64>) {
    for number in proc.fds().unwrap_or_default() {
        let link = proc.fd_link(number).unwrap_or_default();
        let inode = link.strip_prefix(b"socket:[").and_then(|rest| rest.strip_suffix(b"]"));
        found.extend(inode.and_then(|inode| std::str::from_utf8(inode).ok()?.parse::<u64>().ok()));
    }
}
