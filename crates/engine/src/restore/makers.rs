//! Who makes the connections of unix sockets.
//!
//! The kernel notes for each end who made the connection (`SO_PEERCRED`, `SO_PEERGROUPS`, `SO_PEERPIDFD`), and takes it from
//! the process that calls socketpair(2), connect(2) or listen(2): its ID, effective user and group, and groups. So these
//! three calls are programs of the puppet that has the ID, which takes on the user for the moment of the call.
//!
//! | the one who made it | who makes it again |
//! | --- | --- |
//! | a process of the tree, or an ended leader whose ghost is there | that puppet |
//! | one that has ended | a further ghost with its ID, which ends with the others |
//! | one whose ID is taken here, or which the tree cannot see | the root, with the user and groups of the other |
//! | not known | Limosa |

use std::collections::{HashMap, HashSet};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use limosa_kernel::proc::ProcDir;
use limosa_puppet::{Arg, Birth, CallId, Outcome, Program, ResidentError};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

use super::{Nursery, births, descriptors};
use crate::error::RestoreError;
use crate::plan::{NodeId, Role};
use crate::resources::unix_socket::Identity;

const KIND: &str = "unix socket";
const CAPABILITY_VERSION_3: u64 = 0x2008_0522;
const UNCHANGED: Arg = Arg::Value(u32::MAX as u64);

/// Where a unix socket connects to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal<'a> {
    /// A name in the abstract table.
    Abstract(&'a [u8]),
    /// The file of a bound socket, whatever its path is and whether or not it still has one.
    File(BorrowedFd<'a>),
}

/// Makes the calls from which the kernel takes the credentials of unix sockets.
pub(crate) struct Makers<'a> {
    nursery: Option<&'a mut Nursery>,
    own: Identity,
    /// IDs of ended processes that others have here.
    taken: HashSet<i32>,
}

impl<'a> Makers<'a> {
    /// The puppets of `nursery`.
    pub(crate) fn new(nursery: &'a mut Nursery) -> Self {
        Self { nursery: Some(nursery), own: own_identity(), taken: HashSet::new() }
    }

    /// Limosa alone.
    #[cfg(test)]
    pub(crate) fn limosa() -> Self {
        Self { nursery: None, own: own_identity(), taken: HashSet::new() }
    }

    /// The PID that Limosa sees of each process, by its PID in the tree.
    pub(crate) fn pids(&self) -> HashMap<i32, i32> {
        let nodes = self.nursery.iter().flat_map(|nursery| nursery.own_pids.iter().zip(&nursery.puppets));
        nodes.map(|(own, puppet)| (*own, puppet.pid())).collect()
    }

    /// socketpair(2)
    pub(crate) fn pair(
        &mut self,
        by: Option<&Identity>,
        kind: SocketType,
    ) -> Result<(OwnedFd, OwnedFd), RestoreError> {
        let Some((by, node)) = self.maker(by)? else {
            return rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
                .map_err(RestoreError::rebuild(KIND, "socketpair"));
        };
        self.act(node, by, &[], |program, socket| {
            // The pair's numbers are written right where the message has its descriptors.
            let control = program.words(&[24, libc::SOL_SOCKET as u64 | (libc::SCM_RIGHTS as u64) << 32, 0]);
            let kind = kind.as_raw() | libc::SOCK_CLOEXEC as u32;
            let arguments = [libc::AF_UNIX.into(), kind.into(), 0.into(), Arg::Within(control, 16)];
            let made = program.try_call("make a pair of sockets", libc::SYS_socketpair, arguments);
            let byte = program.space(8);
            let vector = program.words(&[0, 1]);
            program.point(vector, 0, byte);
            let header = program.words(&[0, 0, 0, 1, 0, 24, 0]);
            program.point(header, 16, vector);
            program.point(header, 32, control);
            let arguments = [socket.into(), header.into(), libc::MSG_NOSIGNAL.into()];
            vec![made, program.try_call("hand the pair over", libc::SYS_sendmsg, arguments)]
        })?;
        self.receive_pair()
    }

    /// listen(2)
    pub(crate) fn listen(
        &mut self,
        by: Option<&Identity>,
        socket: &OwnedFd,
        backlog: u32,
    ) -> Result<(), RestoreError> {
        let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
        let Some((by, node)) = self.maker(by)? else {
            return rustix::net::listen(socket, backlog).map_err(RestoreError::rebuild(KIND, "listen"));
        };
        self.act(node, by, &[socket.as_fd()], |program, _| {
            vec![program.try_call("listen on a unix socket", libc::SYS_listen, [0.into(), backlog.into()])]
        })
    }

    /// connect(2), of a stream or sequenced socket; the listener has room for it.
    pub(crate) fn connect(
        &mut self,
        by: Option<&Identity>,
        socket: &OwnedFd,
        goal: Goal<'_>,
    ) -> Result<(), RestoreError> {
        let Some((by, node)) = self.maker(by)? else {
            return rustix::net::connect(socket, &address(goal)?)
                .map_err(RestoreError::rebuild(KIND, "connect"));
        };
        // A path that leads to the file from wherever the puppet is: our own directory of descriptors.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let ours = rustix::fs::open("/proc/self/fd", flags, Mode::empty())
            .map_err(RestoreError::rebuild(KIND, "opening /proc/self/fd"))?;
        let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        match goal {
            Goal::Abstract(name) => {
                bytes.push(0);
                bytes.extend(name);
            }
            Goal::File(file) => bytes.extend(format!("{}\0", file.as_raw_fd()).as_bytes()),
        }
        self.act(node, by, &[socket.as_fd(), ours.as_fd()], |program, _| {
            let go = program.try_call("go to the socket's file", libc::SYS_fchdir, [1.into()]);
            let address = program.bytes(&bytes);
            let arguments = [0.into(), address.into(), bytes.len().into()];
            vec![go, program.try_call("connect a unix socket", libc::SYS_connect, arguments)]
        })
    }

    /// Which puppet stands for an identity; none if that is Limosa itself.
    fn maker<'i>(
        &mut self,
        by: Option<&'i Identity>,
    ) -> Result<Option<(&'i Identity, NodeId)>, RestoreError> {
        let (Some(by), Some(nursery)) = (by, self.nursery.as_deref_mut()) else { return Ok(None) };
        // To setresuid(2) this number means no change.
        if by.uid == u32::MAX || by.gid == u32::MAX {
            return Err(RestoreError::inconsistent("a unix socket whose peer has no user"));
        }
        let known = nursery.own_pids.iter().position(|pid| *pid == by.pid);
        if known.is_some() || by.pid <= 0 || self.taken.contains(&by.pid) {
            return Ok(Some((by, known.unwrap_or(0))));
        }
        let ghost = stand_in(nursery, by.pid)?;
        if ghost.is_none() {
            self.taken.insert(by.pid);
        }
        Ok(Some((by, ghost.unwrap_or(0))))
    }

    /// Has a puppet do something as `by`: descriptors that are sent have the numbers from 0 on.
    fn act(
        &mut self,
        node: NodeId,
        by: &Identity,
        sent: &[BorrowedFd<'_>],
        what: impl FnOnce(&mut Program, i32) -> Vec<CallId>,
    ) -> Result<(), RestoreError> {
        let nursery = self.nursery.as_deref_mut().ok_or_else(|| RestoreError::inconsistent("no puppet"))?;
        let socket = nursery.socket_number;
        let mut program = Program::new();
        if !sent.is_empty() {
            descriptors::receive(&mut program, socket, sent.len());
        }
        let mut needed = become_another(&mut program, by, &self.own);
        needed.extend(what(&mut program, socket));
        needed.extend(become_another(&mut program, &self.own, by));
        if !same_user(by, &self.own) {
            // Changing users has undone it. Nothing before can end the program.
            births::end_with_the_parent(&mut program, socket);
        }
        let arguments = [0.into(), (socket - 1).into(), 0.into()];
        program.call("close what was sent", libc::SYS_close_range, arguments);
        descriptors::send(&nursery.socket, sent)?;
        let (puppet, arena) = nursery.puppet(node);
        let outcome: Outcome = puppet.run(arena, program)?;
        let pid = puppet.pid();
        needed.into_iter().try_for_each(|call| match outcome.result(call) {
            Ok(_) => Ok(()),
            Err(source) => Err(ResidentError::Program { pid, source }.into()),
        })
    }

    fn receive_pair(&self) -> Result<(OwnedFd, OwnedFd), RestoreError> {
        let socket = self.nursery.as_deref().map(|nursery| &nursery.socket);
        let socket = socket.ok_or_else(|| RestoreError::inconsistent("no puppet"))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0; 8];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)
            .map_err(RestoreError::rebuild(KIND, "recvmsg"))?;
        let mut received = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => rights.collect(),
            _ => Vec::new(),
        });
        match (received.next(), received.next()) {
            (Some(one), Some(two)) => Ok((one, two)),
            _ => Err(RestoreError::inconsistent("a puppet handed over no pair of sockets")),
        }
    }
}

/// The address of a goal for Limosa itself.
fn address(goal: Goal<'_>) -> Result<SocketAddrUnix, RestoreError> {
    match goal {
        Goal::Abstract(name) => SocketAddrUnix::new_abstract_name(name),
        Goal::File(file) => SocketAddrUnix::new(format!("/proc/self/fd/{}", file.as_raw_fd())),
    }
    .map_err(RestoreError::rebuild(KIND, "making an address"))
}

/// Limosa's, which its puppets have until they get their own.
fn own_identity() -> Identity {
    let groups = rustix::process::getgroups().unwrap_or_default();
    Identity {
        pid: 0,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        groups: groups.into_iter().map(rustix::process::Gid::as_raw).collect(),
    }
}

fn same_user(one: &Identity, two: &Identity) -> bool {
    (one.uid, one.gid, &one.groups) == (two.uid, two.gid, &two.groups)
}

/// Adds the calls by which a puppet with the effective user of `from` takes that of `to`, with the capabilities it has.
/// Its real and saved users stay, so that it can go back.
fn become_another(program: &mut Program, to: &Identity, from: &Identity) -> Vec<CallId> {
    if same_user(to, from) {
        return Vec::new();
    }
    let header = program.words(&[CAPABILITY_VERSION_3]);
    let sets = program.space(24);
    let list: Vec<u8> = to.groups.iter().flat_map(|group| group.to_le_bytes()).collect();
    let list = program.bytes(&list);
    let mut call = |purpose, number, arguments: [Arg; 3]| program.try_call(purpose, number, arguments);
    vec![
        call("ask for capabilities", libc::SYS_capget, [header.into(), sets.into(), 0.into()]),
        call("take another's groups", libc::SYS_setgroups, [to.groups.len().into(), list.into(), 0.into()]),
        call("take another's group", libc::SYS_setresgid, [UNCHANGED, to.gid.into(), UNCHANGED]),
        call("take another's user", libc::SYS_setresuid, [UNCHANGED, to.uid.into(), UNCHANGED]),
        call("keep capabilities", libc::SYS_capset, [header.into(), sets.into(), 0.into()]),
    ]
}

/// A ghost for a process that has ended. It is laid to rest with those of the plan. None where its ID is taken.
fn stand_in(nursery: &mut Nursery, pid: i32) -> Result<Option<NodeId>, RestoreError> {
    let mut first = Program::new();
    births::end_with_the_parent(&mut first, nursery.socket_number);
    let birth = Birth::new(&mut nursery.arena, first)?;
    let mut program = Program::new();
    births::add_clone(&mut program, births::Cradle::from(&birth), 0, libc::SIGCHLD, pid);
    let (root, arena) = nursery.puppet(0);
    match root.run(arena, program) {
        Ok(_) => {}
        Err(error @ ResidentError::Program { .. }) => {
            tracing::warn!(pid, %error, "the peer of a unix socket, which has ended, is shown with another process ID");
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    }
    let parent = nursery.puppets[0].pid();
    for child in ProcDir::open(parent)?.children()? {
        if ProcDir::open(child)?.status()?.ns_pid.last() == Some(&pid) {
            let (ghost, running) = birth.born(child);
            ghost.finish(&nursery.arena, running)?;
            nursery.puppets.push(ghost);
            nursery.roles.push((Role::Ghost, Some(0)));
            nursery.own_pids.push(pid);
            return Ok(Some(nursery.puppets.len() - 1));
        }
    }
    Err(RestoreError::inconsistent(format!("stand-in {pid} was not born below the root")))
}
