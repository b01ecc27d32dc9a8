//! Reading a unix socket from outside: the kernel's listing, its name and file, and its queue.

use std::os::fd::AsRawFd;

use limosa_kernel::net::sock_diag::{self, UnixName};
use limosa_kernel::net::peer::{self, Peer};
use limosa_kernel::net::{raw, sockopt};

use super::{Identity, Kind, Message, Name, Role, SocketFile, UnixSocket, shut};
use crate::error::CaptureError;
use crate::flight::Queued;
use crate::network;
use crate::resources::CaptureContext;
use crate::view::DescriptionView;

const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

pub(super) fn capture(
    view: &DescriptionView,
    context: &mut CaptureContext,
) -> Result<UnixSocket, CaptureError> {
    let inode = view.stat.st_ino;
    let listed = context.network.unix(view)?;
    let kind = kind(&listed);
    network::refuse_foreign_options(view)?;
    let role = role(view, &listed, kind, context)?;
    let (read_shut, write_shut) = shut(listed.shutdown);
    let queue = match role {
        Role::Listening { .. } => Vec::new(),
        _ => queue(view, context),
    };
    let file = if matches!(listed.name, Some(UnixName::Path(_))) { file(view)? } else { None };
    Ok(UnixSocket {
        inode,
        kind,
        name: listed.name.map(Name::from),
        file,
        role,
        read_shut,
        write_shut,
        queue,
        options: network::to_state(sockopt::capture(&view.descriptor)?),
        peer: peer(view, context)?,
        peek_offset: sockopt::peek_offset(&view.descriptor)?,
    })
}

/// What of that would be refused; the queue is left alone.
pub(super) fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
    network::refuse_foreign_options(view)?;
    let listed = context.network.unix(view)?;
    if listed.state == LISTEN {
        // A client that is only in flight is carried, too, and was not known to those who counted.
        let is_carried = |inode: &&u64| {
            context.descriptions.iter().any(|other| other.number().is_none() && other.stat.st_ino == **inode)
                && !context.network.has_sent(**inode)
        };
        let in_flight = listed.pending.iter().filter(is_carried).count();
        return match context.network.stuck(view.stat.st_ino).saturating_sub(in_flight) {
            0 => Ok(()),
            waiting => Err(network::refuse_unaccepted(view, waiting)),
        };
    }
    let kind = kind(&listed);
    match role(view, &listed, kind, context) {
        // Its peer may be in a message that was not looked at.
        Err(CaptureError::Refused(_)) if !context.network.sees_all_in_flight => Ok(()),
        role => role.map(drop),
    }
}

fn kind(listed: &sock_diag::UnixSocket) -> Kind {
    match i32::from(listed.kind) {
        libc::SOCK_STREAM => Kind::Stream,
        libc::SOCK_DGRAM => Kind::Datagram,
        _ => Kind::Packets,
    }
}

fn role(
    view: &DescriptionView,
    listed: &sock_diag::UnixSocket,
    kind: Kind,
    context: &mut CaptureContext,
) -> Result<Role, CaptureError> {
    if listed.state == LISTEN {
        let pending = pending(view, listed, context)?;
        return Ok(Role::Listening { backlog: listed.send_queue, pending });
    }
    let in_tree =
        |inode| context.descriptions.iter().any(|other| other.stat.st_ino == inode && network::kind(other).is_some());
    let outside = |what: String| {
        view.refuse(what, "checkpoint both processes together, or close the connection").into()
    };
    let Some(peer) = listed.peer else {
        match context.network.waits_in(view.stat.st_ino) {
            Some(_) if context.network.closes_unaccepted() => return Ok(Role::Orphaned),
            Some(listener) if in_tree(listener) => return Ok(Role::Waiting { by: Some(holder(view)) }),
            Some(listener) => {
                return Err(outside(format!("a process outside the tree is to accept its connection (socket {listener})")));
            }
            None => {}
        }
        // A datagram socket with a name can be sent to whatever became of its peer; one without was in a pair.
        let connected = listed.state == ESTABLISHED && (kind != Kind::Datagram || listed.name.is_none());
        return Ok(if connected { Role::Orphaned } else { Role::Idle });
    };
    if in_tree(peer) {
        return Ok(Role::Connected { peer });
    }
    match (kind, context.network.unix_name(peer)) {
        (Kind::Datagram, Some(name)) => Ok(Role::ToName { name: name.into() }),
        _ => Err(outside(format!("it is connected to a process outside the tree (socket {peer})"))),
    }
}

/// The sockets whose connections wait in a listening one. What they have sent lies in sockets that have no descriptor
/// yet: only those that have sent nothing can be carried.
fn pending(
    view: &DescriptionView,
    listed: &sock_diag::UnixSocket,
    context: &CaptureContext,
) -> Result<Vec<u64>, CaptureError> {
    if context.network.closes_unaccepted() {
        return Ok(Vec::new());
    }
    let is_carried = |inode: &u64| {
        context.descriptions.iter().any(|other| other.stat.st_ino == *inode && network::kind(other).is_some())
            && !context.network.has_sent(*inode)
    };
    let lost = listed.pending.iter().filter(|inode| !is_carried(inode)).count();
    if lost > 0 { Err(network::refuse_unaccepted(view, lost)) } else { Ok(listed.pending.clone()) }
}

/// Who has the socket: as a rule, who connected it.
fn holder(view: &DescriptionView) -> Identity {
    let status = &view.process.status;
    Identity {
        pid: view.process.own_pid,
        uid: status.uid.effective,
        gid: status.gid.effective,
        groups: status.groups.clone(),
    }
}

/// Who the kernel says made the connection.
fn peer(view: &DescriptionView, context: &CaptureContext) -> Result<Option<Identity>, CaptureError> {
    let peer = peer::peer(&view.descriptor)?;
    Ok(peer.map(|Peer { pid, uid, gid, groups }| Identity {
        pid: context.network.peers.get(&view.stat.st_ino).copied().unwrap_or_else(|| own_pid(view, pid, context)),
        uid,
        gid,
        groups,
    }))
}

/// The PID in the tree of a process that Limosa sees, or saw; 0 where the tree cannot see it, or nothing tells.
fn own_pid(view: &DescriptionView, pid: i32, context: &CaptureContext) -> i32 {
    let one_namespace = view.process.pid == view.process.own_pid;
    context.own_pids.get(&pid).copied().unwrap_or(if one_namespace { pid } else { 0 })
}

/// What `crate::flight` has read.
fn queue(view: &DescriptionView, context: &mut CaptureContext) -> Vec<Message> {
    let index = context.descriptions.iter().position(|other| std::ptr::eq(other, view));
    let messages = index.and_then(|index| context.queues.remove(&index)).unwrap_or_default();
    let mut queue = Vec::with_capacity(messages.len());
    for Queued { message, rights } in messages {
        let from = message.sender.get(2..).and_then(UnixName::from_sun_path).map(Name::from);
        // A message from before the socket asked for credentials has none: the kernel shows process 0.
        let credentials = message.credentials.filter(|(pid, ..)| *pid != 0);
        let credentials = credentials.map(|(pid, uid, gid)| (own_pid(view, pid, context), uid, gid));
        queue.push(Message { data: message.data.into(), from, rights, credentials });
    }
    queue
}

/// The file of a socket bound to a path; none if it has been removed.
fn file(view: &DescriptionView) -> Result<Option<SocketFile>, CaptureError> {
    let Ok(file) = raw::unix_file(&view.descriptor) else { return Ok(None) };
    let stat = rustix::fs::fstat(&file).map_err(view.error("fstat of a socket's file"))?;
    if stat.st_nlink == 0 {
        return Ok(None);
    }
    let path = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())
        .map_err(view.error("reading a socket's path"))?;
    Ok(Some(SocketFile {
        path: path.into_bytes().into(),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
    }))
}
