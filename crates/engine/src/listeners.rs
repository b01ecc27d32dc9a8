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
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::InNetns;
use limosa_kernel::net::nft::{PacketLock, Scope};
use limosa_kernel::net::sock_diag::{Diag, UnixSocket};
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

impl Listeners {
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
