//! TCP sockets (tcp(7)): new, listening, and connected with both queues, over IPv4 and IPv6.
//!
//! Connections are read by [`crate::network`], all at once and with their packets locked, and come back in repair mode: nothing
//! is sent until the tree starts. Which of the half-closed states come back, and how, is told in
//! `limosa_kernel::net::tcp_rebuild`.
//!
//! A connection that waits in a listening socket and was not accepted has no descriptor. The freeze waits until the
//! program has accepted it (see `crate::listeners`); if it does not, the socket is refused, or comes back without
//! the connection.
//!
//! A closed socket that was connected once comes back as a new one (reading it gives `ENOTCONN` instead of the end of
//! the stream). Refused: unread urgent data, kTLS and other upper layers, signed segments, a `SYN` kept for
//! the program, unread data of a closed connection.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use limosa_kernel::net::sockopt::{self, Phase};
use limosa_kernel::net::tcp_rebuild;
use limosa_kernel::net::tcp_repair::{self, Options, State, Window};
use limosa_kernel::net::tcp_snapshot::{self, Snapshot, SnapshotError};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::checkpoint::TcpConnections;
use crate::error::{CaptureError, RestoreError};
use crate::network::{self, Address, OptionState};
use crate::view::DescriptionView;

/// A TCP socket.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tcp {
    /// Whether it is an IPv6 socket.
    pub ipv6: bool,
    /// The options that differ from a new socket's.
    pub options: Vec<OptionState>,
    /// What it does.
    pub role: Role,
}

/// What a TCP socket does.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Nothing yet, or nothing any more.
    Idle {
        /// The address it is bound to, if any.
        local: Option<Address>,
    },
    /// Waiting for connections.
    Listening {
        /// The address.
        local: Address,
        /// The limit of connections not yet accepted.
        backlog: u32,
    },
    /// Connected, or connecting.
    Connected(Box<Connection>),
}

/// A connection; the fields are those of `limosa_kernel::net::tcp_snapshot::Snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The state's number in the kernel.
    pub state: u8,
    /// This side.
    pub local: Address,
    /// The peer.
    pub remote: Address,
    /// The number after the last byte written, our `FIN` included.
    pub send_sequence: u32,
    /// The number after the last byte received, the peer's `FIN` included.
    pub receive_sequence: u32,
    /// Written and not acknowledged.
    #[serde(with = "serde_bytes")]
    pub send_queue: Vec<u8>,
    /// How many bytes at its end were never sent.
    pub unsent: usize,
    /// Our `FIN` is in the queue and was never sent.
    pub fin_unsent: bool,
    /// Received and not read.
    #[serde(with = "serde_bytes")]
    pub receive_queue: Vec<u8>,
    /// The largest segment the peer accepts.
    pub mss: u16,
    /// Shifts of the windows that the peer and this side send.
    pub window_scale: Option<(u8, u8)>,
    /// Selective acknowledgements.
    pub sack: bool,
    /// The clock of this side's timestamps, where both use them.
    pub timestamp: Option<u32>,
    /// `snd_wl1`, `snd_wnd`, `max_window`, `rcv_wnd`, `rcv_wup`.
    pub windows: [u32; 5],
    /// Reading was shut down by this side.
    pub read_shut: bool,
}

impl From<Snapshot> for Connection {
    fn from(snapshot: Snapshot) -> Self {
        let window = snapshot.window;
        Self {
            state: snapshot.state as u8,
            local: snapshot.local.into(),
            remote: snapshot.remote.into(),
            send_sequence: snapshot.send_sequence,
            receive_sequence: snapshot.receive_sequence,
            send_queue: snapshot.send_queue,
            unsent: snapshot.unsent,
            fin_unsent: snapshot.fin_unsent,
            receive_queue: snapshot.receive_queue,
            mss: snapshot.options.mss,
            window_scale: snapshot.options.window_scale,
            sack: snapshot.options.sack,
            timestamp: snapshot.options.timestamps.then_some(snapshot.timestamp),
            windows: [window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup],
            read_shut: snapshot.read_shut,
        }
    }
}

impl Connection {
    /// For the kernel. The state must be one that is carried; the kernel checks the rest.
    fn to_snapshot(&self) -> Result<Snapshot, RestoreError> {
        use State::{Close, Listen, SynReceived, TimeWait};
        let state = State::from_number(self.state)
            .filter(|state| !matches!(state, Close | Listen | SynReceived | TimeWait))
            .ok_or_else(|| RestoreError::inconsistent(format!("a TCP connection in state {}", self.state)))?;
        let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = self.windows;
        Ok(Snapshot {
            state,
            local: self.local.into(),
            remote: self.remote.into(),
            send_sequence: self.send_sequence,
            receive_sequence: self.receive_sequence,
            send_queue: self.send_queue.clone(),
            unsent: self.unsent,
            fin_unsent: self.fin_unsent,
            receive_queue: self.receive_queue.clone(),
            options: Options {
                mss: self.mss,
                window_scale: self.window_scale,
                sack: self.sack,
                timestamps: self.timestamp.is_some(),
            },
            timestamp: self.timestamp.unwrap_or(0),
            window: Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup },
            read_shut: self.read_shut,
        })
    }
}

impl DescriptorKind for Tcp {
    fn recognise(view: &DescriptionView) -> bool {
        network::kind(view).is_some_and(|kind| {
            matches!(kind.domain, libc::AF_INET | libc::AF_INET6) && kind.protocol == libc::IPPROTO_TCP
        })
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let fd = view.descriptor.as_fd();
        let closes = context.network.tcp == TcpConnections::Close && is_connected(view)?;
        if !closes {
            context.network.refuse_foreign(view)?;
        }
        let ipv6 = network::kind(view).is_some_and(|kind| kind.domain == libc::AF_INET6);
        let options = network::to_state(sockopt::capture(fd)?);
        let role = match context.network.take(view.stat.st_ino) {
            Some(Ok(snapshot)) => Role::Connected(Box::new(snapshot.into())),
            Some(Err(error)) => return Err(not_at_rest(view, &error)),
            None if closes => Role::Idle { local: None },
            None => unconnected(view, context)?,
        };
        Ok(Self { ipv6, options, role })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        let fd = view.descriptor.as_fd();
        let closes = context.network.tcp == TcpConnections::Close && is_connected(view)?;
        if !closes {
            context.network.refuse_foreign(view)?;
        }
        let state = tcp_repair::info(fd)?.state;
        if state == State::Listen {
            return match context.network.stuck(view.stat.st_ino) {
                0 => Ok(()),
                waiting => Err(network::refuse_unaccepted(view, waiting)),
            };
        }
        if closes {
            return Ok(());
        }
        if network::is_connection(state) {
            return tcp_snapshot::examine(fd).map_err(|error| not_at_rest(view, &error));
        }
        unconnected(view, context).map(drop)
    }

    fn rebuild(&self, _flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        match &self.role {
            Role::Connected(connection) => self.reconnect(connection, context),
            Role::Listening { local, backlog } => self.place(Some((*local).into()), Some(*backlog)),
            Role::Idle { local } => self.place(local.map(Into::into), None),
        }
    }
}

fn not_at_rest(view: &DescriptionView, error: &SnapshotError) -> CaptureError {
    view.refuse(error.to_string(), "let the connection come to rest and try again").into()
}

/// Whether it has a connection, or once had one.
fn is_connected(view: &DescriptionView) -> Result<bool, CaptureError> {
    Ok(tcp_repair::info(view.descriptor.as_fd())?.state != State::Listen
        && tcp_snapshot::remote_address(view.descriptor.as_fd()).is_ok())
}

/// A socket that has no connection.
fn unconnected(view: &DescriptionView, context: &CaptureContext) -> Result<Role, CaptureError> {
    let fd = view.descriptor.as_fd();
    let info = tcp_repair::info(fd)?;
    let local = tcp_snapshot::local_address(fd)?;
    match info.state {
        State::Listen
            if info.unacked > 0
                && !context.network.closes_unaccepted()
                // Whether one that is only in flight was empty at the freeze, nobody has looked.
                && !(context.network.came_later && view.number().is_some()) =>
        {
            Err(network::refuse_unaccepted(view, info.unacked as usize))
        }
        State::Listen => Ok(Role::Listening { local: local.into(), backlog: info.sacked }),
        State::Close => {
            let unread = rustix::io::ioctl_fionread(fd).unwrap_or(0);
            if unread > 0 {
                let reason = format!("its connection has ended and left {unread} bytes unread");
                return Err(view.refuse(reason, "let the process read or close it, and try again").into());
            }
            Ok(Role::Idle { local: (local.port() != 0).then(|| local.into()) })
        }
        state => {
            let reason = format!("its connection is in state {state:?}");
            Err(view.refuse(reason, "try again when the connection is made or ended").into())
        }
    }
}

impl Tcp {
    fn reconnect(
        &self,
        connection: &Connection,
        context: &mut RebuildContext,
    ) -> Result<OwnedFd, RestoreError> {
        let snapshot = connection.to_snapshot()?;
        if snapshot.local.is_ipv6() != self.ipv6 || snapshot.remote.is_ipv6() != self.ipv6 {
            return Err(RestoreError::inconsistent("a TCP connection between addresses of two families"));
        }
        let options = network::from_state(&self.options);
        let rebuilt =
            tcp_rebuild::rebuild(&snapshot, |fd| sockopt::apply(fd, &options, Phase::BeforeBind))?;
        let clone = || {
            rebuilt.socket.try_clone().map_err(|source| RestoreError::Rebuild {
                object: "TCP connection".into(),
                step: "dup",
                source,
            })
        };
        let (kept, probed) = (clone()?, clone()?);
        let reuse = self.reuse_address();
        context.at_start(move || {
            tcp_rebuild::resume(&kept, &snapshot, reuse)?;
            Ok(sockopt::apply(&kept, &options, Phase::Last)?)
        });
        context.when_reachable(move || Ok(tcp_rebuild::probe(&probed, reuse)?));
        Ok(rebuilt.socket)
    }

    /// A socket without a connection.
    fn place(&self, local: Option<SocketAddr>, backlog: Option<u32>) -> Result<OwnedFd, RestoreError> {
        let describe = || local.map_or_else(|| "TCP socket".into(), |local| format!("TCP socket at {local}"));
        let family = if self.ipv6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(RestoreError::rebuild(describe(), "socket"))?;
        let options = network::from_state(&self.options);
        sockopt::apply(&socket, &options, Phase::BeforeBind)?;
        if let Some(local) = local {
            // Connections of the same port may be back already.
            let reuse = |on| {
                rustix::net::sockopt::set_socket_reuseaddr(&socket, on)
                    .map_err(RestoreError::rebuild(describe(), "setsockopt(SO_REUSEADDR)"))
            };
            reuse(true)?;
            rustix::net::bind(&socket, &local).map_err(RestoreError::rebuild(describe(), "bind"))?;
            if let Some(backlog) = backlog {
                let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
                rustix::net::listen(&socket, backlog).map_err(RestoreError::rebuild(describe(), "listen"))?;
            }
            reuse(self.reuse_address())?;
        }
        sockopt::apply(&socket, &options, Phase::Last)?;
        Ok(socket)
    }

    fn reuse_address(&self) -> bool {
        let is = |option: &&OptionState| (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_REUSEADDR);
        self.options.iter().find(is).is_some_and(|option| option.value.first().is_some_and(|byte| *byte != 0))
    }

    /// The two ends, if it is connected.
    pub(crate) fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        match &self.role {
            Role::Connected(connection) => Some((connection.local.into(), connection.remote.into())),
            _ => None,
        }
    }
}
