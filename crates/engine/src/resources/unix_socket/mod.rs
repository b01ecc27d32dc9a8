//! Unix sockets (unix(7)) of the three types: pairs, listening, connected, bound to a path or an abstract name, with
//! what is queued in them, message by message, and descriptors in flight.
//!
//! Sockets refer to each other, by names and by being connected, so they are rebuilt together, when every other description
//! exists: until then a placeholder stands for each (see [`rebuild::assemble`]).
//!
//! A connection that waits to be accepted comes back in its place in the listening socket, unless something was sent over
//! it: that lies in a socket without a descriptor, where it cannot be read. The freeze waits for it to be accepted
//! (see `crate::listeners`). Whoever accepts it sees as its peer the process that holds the connected socket.
//!
//! Refused: a connection to a process outside the tree (but a datagram socket connected to a name is connected to
//! it again, as to `/dev/log`); connections not accepted that have data.
//!
//! Peer credentials (`SO_PEERCRED`) come back as `crate::restore::Makers` tells. Credentials of queued messages
//! (`SCM_CREDENTIALS`) come back where the socket asks for them (`SO_PASSCRED`); of a sender that has ended, without its
//! process ID.

use std::os::fd::OwnedFd;

use limosa_kernel::net::sock_diag::{Shutdown, UnixName};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::network::{self, OptionState};
use crate::view::DescriptionView;

mod capture;
mod names;
pub(crate) mod rebuild;

/// A unix socket.
#[derive(Debug, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Its inode number, which tells sockets of one checkpoint apart.
    pub inode: u64,
    /// Stream, datagram or sequenced packets.
    pub kind: Kind,
    /// The name it is bound to. An accepted socket has that of its listener.
    pub name: Option<Name>,
    /// The file of that name.
    pub file: Option<SocketFile>,
    /// What it does.
    pub role: Role,
    /// Reading is shut down.
    pub read_shut: bool,
    /// Writing is shut down.
    pub write_shut: bool,
    /// What is not read, oldest first.
    pub queue: Vec<Message>,
    /// The options that differ from a new socket's.
    pub options: Vec<OptionState>,
    /// `SO_PEEK_OFF`; -1 where it is not used.
    pub peek_offset: i32,
    /// Who made the connection as this end sees it; of a listening socket, what those that connect see.
    #[serde(default)]
    pub peer: Option<Identity>,
}

/// The process that made a connection, as the kernel noted it then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its ID in the tree's PID namespace; 0 where it cannot be seen from there.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// The type of a unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `SOCK_STREAM`
    Stream,
    /// `SOCK_DGRAM`
    Datagram,
    /// `SOCK_SEQPACKET`
    Packets,
}

/// The name of a unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Name {
    /// A path as it was given to bind(2).
    Path(serde_bytes::ByteBuf),
    /// An abstract name, without its leading zero.
    Abstract(serde_bytes::ByteBuf),
}

impl From<UnixName> for Name {
    fn from(name: UnixName) -> Self {
        match name {
            UnixName::Path(path) => Self::Path(path.into()),
            UnixName::Abstract(name) => Self::Abstract(name.into()),
        }
    }
}

/// The file that a socket is bound to.
#[derive(Debug, Serialize, Deserialize)]
pub struct SocketFile {
    /// Its absolute path; it tells where a relative name is meant.
    pub path: serde_bytes::ByteBuf,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What a unix socket does.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Not connected.
    Idle,
    /// Waiting for connections.
    Listening {
        /// The limit of connections not yet accepted.
        backlog: u32,
        /// The inode numbers of the [`Role::Waiting`] sockets whose connections are not accepted yet, oldest first.
        #[serde(default)]
        pending: Vec<u64>,
    },
    /// Connected to a listening socket, and not accepted yet.
    Waiting {
        /// Who connected it, as far as is known.
        by: Option<Identity>,
    },
    /// Connected to another socket of the tree. A datagram socket's peer need not be connected to it.
    Connected {
        /// The inode number of the other.
        peer: u64,
    },
    /// Was connected; the other end is closed.
    Orphaned,
    /// A datagram socket that is connected to a name outside the tree.
    ToName {
        /// The name.
        name: Name,
    },
}

/// Something queued: a message; on a stream, a stretch of bytes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Message {
    /// The bytes.
    pub data: serde_bytes::ByteBuf,
    /// The name of the sender (datagrams only).
    pub from: Option<Name>,
    /// Descriptors sent with the first byte, by index of the description.
    pub rights: Vec<usize>,
    /// The sender's process (0 where the tree cannot see it), user and group, where the socket asks for them.
    #[serde(default)]
    pub credentials: Option<(i32, u32, u32)>,
}

impl DescriptorKind for UnixSocket {
    fn recognise(view: &DescriptionView) -> bool {
        network::kind(view).is_some_and(|kind| kind.domain == libc::AF_UNIX)
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        capture::capture(view, context)
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        capture::examine(view, context)
    }

    fn rebuild(&self, _flags: u32, _context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
            .map_err(RestoreError::rebuild("unix socket", "eventfd (a placeholder)"))
    }
}

/// Both directions as the kernel lists them.
fn shut(shutdown: Shutdown) -> (bool, bool) {
    (shutdown.read, shutdown.write)
}
