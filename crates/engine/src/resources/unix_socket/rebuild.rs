//! Making all unix sockets of a tree again.
//!
//! ```text
//! sockets, names, listeners ─► connections ─► queues, by the senders ─► shutdowns ─► options
//! ```

use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_kernel::net::sockopt::{self, Phase};
use limosa_kernel::net::raw;
use rustix::fs::{Gid, Uid};
use rustix::process::Pid;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, UCred,
};

use super::names::{address, address_below, bind};
use super::{Identity, Kind, Message, Name, Role, UnixSocket};
use crate::error::RestoreError;
use crate::network;
use crate::restore::{Goal, Makers};

const KIND: &str = "unix socket";
/// `SCM_MAX_FD`.
const MOST_RIGHTS: usize = 253;

pub(super) fn fail(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> RestoreError {
    RestoreError::rebuild(KIND, step)
}

/// Makes `sockets` (with the index of their description) and returns them by that index. `descriptions` are the
/// tree's others, for rights in flight; paths are resolved below `root`.
pub(crate) fn assemble(
    sockets: &[(usize, &UnixSocket)],
    descriptions: &[OwnedFd],
    root: BorrowedFd<'_>,
    pids: &HashMap<i32, i32>,
    makers: &mut Makers<'_>,
) -> Result<HashMap<usize, OwnedFd>, RestoreError> {
    let mut assembly = Assembly { sockets, made: HashMap::new(), root, pids, makers };
    for (_, socket) in sockets {
        let placed = match socket.role {
            Role::Orphaned => false,
            Role::Connected { .. } | Role::Waiting { .. } => socket.kind == Kind::Datagram,
            _ => true,
        };
        if placed {
            assembly.place(socket)?;
        }
    }
    for (_, socket) in sockets {
        assembly.connect(socket)?;
    }
    for (_, socket) in sockets {
        assembly.queue_up(socket)?;
    }
    // The sockets have their final descriptors: those in flight may be such sockets themselves.
    for at in carriers_first(sockets) {
        assembly.fill(sockets[at].1, descriptions)?;
    }
    for (_, socket) in sockets {
        assembly.finish(socket)?;
    }
    let mut made = assembly.made;
    let take = |(index, socket): &(usize, &UnixSocket)| made.remove(&socket.inode).map(|fd| (*index, fd));
    Ok(sockets.iter().filter_map(take).collect())
}

/// The order in which queues are filled: a socket is sent before anything is in its own queue, because kernels before 6.10
/// allow only a few sockets within each other. Where they go round in circles, any is the first.
fn carriers_first(sockets: &[(usize, &UnixSocket)]) -> Vec<usize> {
    let places: HashMap<usize, usize> = sockets.iter().enumerate().map(|(at, (index, _))| (*index, at)).collect();
    let carried = |at: usize| {
        let rights = sockets[at].1.queue.iter().flat_map(|message| &message.rights);
        rights.filter_map(|index| places.get(index).copied())
    };
    let mut carriers = vec![0_usize; sockets.len()];
    (0..sockets.len()).flat_map(carried).for_each(|at| carriers[at] += 1);
    let mut ready: Vec<usize> = (0..sockets.len()).filter(|at| carriers[*at] == 0).collect();
    let (mut order, mut done) = (Vec::with_capacity(sockets.len()), vec![false; sockets.len()]);
    for next in 0..=sockets.len() {
        while let Some(at) = ready.pop() {
            if !std::mem::replace(&mut done[at], true) {
                order.push(at);
                for at in carried(at) {
                    carriers[at] = carriers[at].saturating_sub(1);
                    if carriers[at] == 0 {
                        ready.push(at);
                    }
                }
            }
        }
        ready.extend((next < sockets.len()).then_some(next));
    }
    order
}

struct Assembly<'a, 'm> {
    sockets: &'a [(usize, &'a UnixSocket)],
    made: HashMap<u64, OwnedFd>,
    root: BorrowedFd<'a>,
    /// The PID that Limosa sees of each process, by its PID in the tree.
    pids: &'a HashMap<i32, i32>,
    makers: &'a mut Makers<'m>,
}

impl<'a> Assembly<'a, '_> {
    fn by_inode(&self, inode: u64) -> Option<&'a UnixSocket> {
        self.sockets.iter().find(|(_, socket)| socket.inode == inode).map(|(_, socket)| *socket)
    }

    fn get(&self, inode: u64) -> Result<&OwnedFd, RestoreError> {
        self.made
            .get(&inode)
            .ok_or_else(|| RestoreError::inconsistent(format!("there is no unix socket {inode}")))
    }

    /// A socket with its name. Datagram pairs without names are made by [`Self::connect`].
    fn place(&mut self, socket: &UnixSocket) -> Result<(), RestoreError> {
        let unnamed_pair = socket.name.is_none()
            && matches!(socket.role, Role::Connected { peer } if self.by_inode(peer).is_some_and(|peer| peer.name.is_none()));
        if unnamed_pair {
            return Ok(());
        }
        let made = new(socket.kind)?;
        before_bind(&made, socket)?;
        if let Some(name) = &socket.name {
            bind(&made, name, socket.file.as_ref(), self.root)?;
        }
        if let Role::Listening { backlog, .. } = socket.role {
            self.makers.listen(socket.peer.as_ref(), &made, backlog)?;
        }
        self.made.insert(socket.inode, made);
        Ok(())
    }

    fn connect(&mut self, socket: &UnixSocket) -> Result<(), RestoreError> {
        match &socket.role {
            Role::Idle | Role::Listening { .. } | Role::Waiting { .. } => Ok(()),
            Role::ToName { name } => {
                // Whoever has the name may be gone; then the application learns it at its next send.
                let address = address_below(name, self.root)?;
                if let Err(error) = rustix::net::connect(self.get(socket.inode)?, &address.0) {
                    tracing::warn!(?name, %error, "a datagram socket is not connected to its name again");
                }
                Ok(())
            }
            Role::Orphaned => {
                let (kept, other) = self.makers.pair(socket.peer.as_ref(), kind(socket.kind))?;
                before_bind(&kept, socket)?;
                enlarge(&other, &socket.queue)?;
                // Rights come later in order, but this end is closed then: it is kept until the queue is filled.
                self.made.insert(socket.inode, kept);
                self.made.insert(orphan(socket.inode), other);
                Ok(())
            }
            Role::Connected { peer } if socket.kind == Kind::Datagram && self.made.contains_key(&socket.inode) => {
                let target = self.by_inode(*peer).and_then(|peer| peer.name.as_ref());
                let Some(name) = target else {
                    if socket.name.is_none() && self.made.contains_key(peer) {
                        // Made as a pair with it.
                        return Ok(());
                    }
                    return Err(RestoreError::inconsistent("a datagram socket connected to one without a name"));
                };
                let address = address(name, self.get(*peer)?)?;
                rustix::net::connect(self.get(socket.inode)?, &address.0).map_err(fail("connect"))
            }
            Role::Connected { .. } if self.made.contains_key(&socket.inode) => Ok(()),
            Role::Connected { peer } => {
                let other = self.by_inode(*peer).ok_or_else(|| {
                    RestoreError::inconsistent(format!("unix socket {} has no peer", socket.inode))
                })?;
                let (inode, other_inode) = (socket.inode, other.inode);
                let (one, two) = self.connection(socket, other)?;
                self.made.insert(inode, one);
                self.made.insert(other_inode, two);
                Ok(())
            }
        }
    }

    /// The two ends of a connection, with their names.
    fn connection(&mut self, one: &UnixSocket, two: &UnixSocket) -> Result<(OwnedFd, OwnedFd), RestoreError> {
        if one.name.is_none() && two.name.is_none() {
            let made = self.makers.pair(one.peer.as_ref(), kind(one.kind))?;
            before_bind(&made.0, one)?;
            before_bind(&made.1, two)?;
            return Ok(made);
        }
        // The accepted end has the name of the listener; where both have names, one that listens is its sign.
        let one_accepted =
            self.listener_of(one).is_some() || (two.name.is_none() && self.listener_of(two).is_none());
        let (client, server) = if one_accepted { (two, one) } else { (one, two) };
        let made = self.client(client)?;
        let Some(name) = &server.name else {
            return Err(RestoreError::inconsistent("an accepted unix socket without a name"));
        };
        let accepted = match self.listener_of(server) {
            Some(listener) => {
                self.connect_to(listener, &made, client, server.peer.as_ref())?;
                accept(self.get(listener.inode)?)?
            }
            None => {
                // Its listener is gone; another of that name accepts once.
                let listener = new(server.kind)?;
                bind(&listener, name, None, self.root)?;
                self.makers.listen(client.peer.as_ref(), &listener, 1)?;
                reach(self.makers, &made, server.peer.as_ref(), server.name.as_ref(), &listener)?;
                accept(&listener)?
            }
        };
        before_bind(&accepted, server)?;
        Ok(if one_accepted { (accepted, made) } else { (made, accepted) })
    }

    /// The listening socket by which an end was accepted, or could have been.
    fn listener_of(&self, end: &UnixSocket) -> Option<&'a UnixSocket> {
        let is = |(_, other): &&(usize, &UnixSocket)| {
            end.name.is_some() && other.name == end.name && matches!(other.role, Role::Listening { .. })
        };
        self.sockets.iter().find(is).map(|(_, listener)| *listener)
    }

    /// Connects by a listener of the tree. Those that connect see who listens at that moment, and that may have been
    /// another then.
    fn connect_to(
        &mut self,
        listener: &UnixSocket,
        made: &OwnedFd,
        client: &UnixSocket,
        by: Option<&Identity>,
    ) -> Result<(), RestoreError> {
        let socket = self
            .made
            .get(&listener.inode)
            .ok_or_else(|| RestoreError::inconsistent("a listening unix socket is missing"))?;
        let Role::Listening { backlog, .. } = listener.role else {
            return Err(RestoreError::inconsistent("a unix socket that does not listen has accepted"));
        };
        let another = client.peer.as_ref().filter(|peer| Some(*peer) != listener.peer.as_ref());
        if another.is_some() {
            self.makers.listen(another, socket, backlog)?;
        }
        reach(self.makers, made, by, listener.name.as_ref(), socket)?;
        if another.is_some() {
            self.makers.listen(listener.peer.as_ref(), socket, backlog)?;
        }
        Ok(())
    }

    /// A socket that is going to connect: it does not wait where there is no room.
    fn client(&self, client: &UnixSocket) -> Result<OwnedFd, RestoreError> {
        let made = new(client.kind)?;
        rustix::io::ioctl_fionbio(&made, true).map_err(fail("ioctl(FIONBIO)"))?;
        before_bind(&made, client)?;
        if let Some(name) = &client.name {
            bind(&made, name, client.file.as_ref(), self.root)?;
        }
        Ok(made)
    }

    /// Makes the connections that wait in a listening socket.
    fn queue_up(&mut self, listener: &UnixSocket) -> Result<(), RestoreError> {
        let Role::Listening { pending, .. } = &listener.role else { return Ok(()) };
        for inode in pending {
            let waiting = self.by_inode(*inode).filter(|socket| socket.kind == listener.kind);
            let Some((client, Role::Waiting { by })) = waiting.map(|socket| (socket, &socket.role)) else {
                return Err(RestoreError::inconsistent(format!("unix socket {inode} does not wait")));
            };
            let made = self.client(client)?;
            self.connect_to(listener, &made, client, by.as_ref())?;
            self.made.insert(*inode, made);
        }
        Ok(())
    }

    /// Sends a socket what it has not read.
    fn fill(&mut self, socket: &UnixSocket, descriptions: &[OwnedFd]) -> Result<(), RestoreError> {
        if let Role::Orphaned = socket.role {
            let other = self.made.remove(&orphan(socket.inode)).ok_or_else(|| RestoreError::inconsistent("an end"))?;
            for message in &socket.queue {
                self.send(&other, None, message, descriptions)?;
            }
            return Ok(());
        }
        for message in &socket.queue {
            if socket.kind != Kind::Datagram {
                let Role::Connected { peer } = socket.role else {
                    return Err(RestoreError::inconsistent("a unix socket without a peer that has a queue"));
                };
                let sender = self.get(peer)?;
                enlarge(sender, &socket.queue)?;
                self.send(sender, None, message, descriptions)?;
                continue;
            }
            // From the socket of the sender's name; without a name from the peer, or from a new socket.
            let named = self.sockets.iter().find(|(_, other)| message.from.is_some() && other.name == message.from);
            let peer = match socket.role {
                Role::Connected { peer } if named.is_none() => self.by_inode(peer),
                _ => None,
            };
            let temporary;
            let sender = match named.map(|(_, sender)| *sender).or(peer) {
                Some(sender) => self.get(sender.inode)?,
                None => {
                    temporary = new(Kind::Datagram)?;
                    &temporary
                }
            };
            enlarge(sender, &socket.queue)?;
            let address = match &socket.name {
                Some(name) => Some(address(name, self.get(socket.inode)?)?),
                None => None,
            };
            self.send(sender, address.as_ref(), message, descriptions)?;
        }
        Ok(())
    }

    fn send(
        &self,
        sender: &OwnedFd,
        to: Option<&(SocketAddrUnix, Option<OwnedFd>)>,
        message: &Message,
        descriptions: &[OwnedFd],
    ) -> Result<(), RestoreError> {
        if message.rights.len() > MOST_RIGHTS {
            return Err(RestoreError::inconsistent("more descriptors in flight than a message can carry"));
        }
        let mut rights = Vec::with_capacity(message.rights.len());
        for index in &message.rights {
            let socket = self.sockets.iter().find(|(own, _)| own == index);
            rights.push(match socket {
                Some((_, socket)) => self.get(socket.inode)?.as_fd(),
                None => descriptions
                    .get(*index)
                    .ok_or_else(|| RestoreError::inconsistent(format!("there is no description {index}")))?
                    .as_fd(),
            });
        }
        let mut space =
            vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_RIGHTS), ScmCredentials(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !rights.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&rights));
        }
        if let Some((pid, uid, gid)) = message.credentials {
            // The kernel wants a process that exists: Limosa stands for one that has ended, and ends soon, too.
            let sender = self.pids.get(&pid).and_then(|pid| Pid::from_raw(*pid));
            let pid = sender.unwrap_or_else(rustix::process::getpid);
            let credentials = UCred { pid, uid: Uid::from_raw(uid), gid: Gid::from_raw(gid) };
            ancillary.push(SendAncillaryMessage::ScmCredentials(credentials));
        }
        let bytes = [IoSlice::new(&message.data)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = match to {
            Some((address, _)) => rustix::net::sendmsg_addr(sender, address, &bytes, &mut ancillary, flags),
            None => rustix::net::sendmsg(sender, &bytes, &mut ancillary, flags),
        };
        match sent.map_err(fail("sendmsg"))? {
            sent if sent == message.data.len() => Ok(()),
            _ => Err(RestoreError::inconsistent("the queue of a unix socket does not fit into it")),
        }
    }

    fn finish(&self, socket: &UnixSocket) -> Result<(), RestoreError> {
        use rustix::net::{Shutdown, shutdown};
        let fd = self.get(socket.inode)?;
        let is_shut_already = match socket.role {
            Role::Orphaned => socket.kind != Kind::Datagram,
            Role::Listening { .. } => true,
            _ => false,
        };
        if !is_shut_already {
            for (wanted, how) in [(socket.read_shut, Shutdown::Read), (socket.write_shut, Shutdown::Write)] {
                match if wanted { shutdown(fd, how) } else { Ok(()) } {
                    Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
                    Err(error) => return Err(fail("shutdown")(error)),
                }
            }
        }
        sockopt::apply(fd, &network::from_state(&socket.options), Phase::Last)?;
        if socket.peek_offset >= 0 {
            sockopt::set_peek_offset(fd, socket.peek_offset)?;
        }
        Ok(())
    }
}

/// Where the closed end of an orphan is kept meanwhile: no inode number has this bit.
fn orphan(inode: u64) -> u64 {
    inode | 1 << 63
}

fn kind(kind: Kind) -> SocketType {
    match kind {
        Kind::Stream => SocketType::STREAM,
        Kind::Datagram => SocketType::DGRAM,
        Kind::Packets => SocketType::SEQPACKET,
    }
}

fn new(of: Kind) -> Result<OwnedFd, RestoreError> {
    rustix::net::socket_with(AddressFamily::UNIX, kind(of), SocketFlags::CLOEXEC, None).map_err(fail("socket"))
}

fn before_bind(fd: &OwnedFd, socket: &UnixSocket) -> Result<(), RestoreError> {
    Ok(sockopt::apply(fd, &network::from_state(&socket.options), Phase::BeforeBind)?)
}

/// Room for a queue in the buffer of its sender, which the kernel charges; the captured size is set last.
fn enlarge(sender: &OwnedFd, queue: &[Message]) -> Result<(), RestoreError> {
    let bytes: usize = queue.iter().map(|message| message.data.len() * 2 + 2_048).sum();
    if bytes < 100_000 {
        return Ok(());
    }
    rustix::net::sockopt::set_socket_send_buffer_size_force(sender, bytes.min(1 << 30))
        .map_err(fail("setsockopt(SO_SNDBUFFORCE)"))
}

/// Connects to a listener of that name.
fn reach(
    makers: &mut Makers<'_>,
    client: &OwnedFd,
    by: Option<&Identity>,
    name: Option<&Name>,
    listener: &OwnedFd,
) -> Result<(), RestoreError> {
    match name {
        Some(Name::Abstract(name)) => makers.connect(by, client, Goal::Abstract(name)),
        _ => makers.connect(by, client, Goal::File(raw::unix_file(listener)?.as_fd())),
    }
}

fn accept(listener: &OwnedFd) -> Result<OwnedFd, RestoreError> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC).map_err(fail("accept"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use limosa_kernel::net::peek;

    use super::super::SocketFile;
    use super::*;

    fn socket(inode: u64, kind: Kind, role: Role) -> UnixSocket {
        UnixSocket {
            inode,
            kind,
            name: None,
            file: None,
            role,
            read_shut: false,
            write_shut: false,
            queue: Vec::new(),
            options: Vec::new(),
            peek_offset: -1,
            peer: None,
        }
    }

    fn message(data: &[u8], from: Option<Name>, rights: &[usize]) -> Message {
        Message { data: data.to_vec().into(), from, rights: rights.to_vec(), credentials: None }
    }

    fn made(sockets: &[UnixSocket]) -> HashMap<usize, OwnedFd> {
        let numbered: Vec<_> = sockets.iter().enumerate().collect();
        let others: Vec<OwnedFd> =
            sockets.iter().map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        let root = std::fs::File::open("/").unwrap();
        assemble(&numbered, &others, root.as_fd(), &HashMap::new(), &mut Makers::limosa()).unwrap()
    }

    #[test]
    fn pairs_come_back_with_what_is_queued() {
        for kind in [Kind::Stream, Kind::Packets, Kind::Datagram] {
            let mut sockets =
                [socket(1, kind, Role::Connected { peer: 2 }), socket(2, kind, Role::Connected { peer: 1 })];
            sockets[0].queue = vec![message(b"one", None, &[]), message(&[7; 90_000], None, &[1])];
            sockets[1].queue = vec![message(b"back", None, &[0, 0])];
            let made = made(&sockets);
            for (index, socket) in sockets.iter().enumerate() {
                let seen = peek::receive_queue(&made[&index]).unwrap();
                let counts = |messages: Vec<(usize, usize)>| match kind {
                    // Boundaries do not matter on a stream, where the kernel cuts at 32 KiB.
                    Kind::Stream => vec![messages.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))],
                    _ => messages,
                };
                let got = seen.iter().map(|message| (message.data.len(), message.descriptors.len()));
                let wanted = socket.queue.iter().map(|message| (message.data.len(), message.rights.len()));
                assert_eq!(counts(got.collect()), counts(wanted.collect()), "{kind:?}");
                let got: Vec<u8> = seen.into_iter().flat_map(|message| message.data).collect();
                let wanted: Vec<u8> = socket.queue.iter().flat_map(|message| message.data.to_vec()).collect();
                assert!(got == wanted);
            }
        }
    }

    #[test]
    fn the_last_words_of_a_closed_peer_come_back() {
        let mut sockets = [socket(1, Kind::Stream, Role::Orphaned), socket(2, Kind::Datagram, Role::Orphaned)];
        for socket in &mut sockets {
            socket.queue = vec![message(b"last words", None, &[])];
        }
        let mut made = made(&sockets);
        let mut text = String::new();
        UnixStream::from(made.remove(&0).unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        let datagrams = UnixDatagram::from(made.remove(&1).unwrap());
        assert_eq!(datagrams.recv(&mut [0; 20]).unwrap(), 10);
        assert!(datagrams.send(b"to nobody").is_err());
    }

    #[test]
    fn sockets_within_sockets_are_sent_empty() {
        let mut sockets: Vec<UnixSocket> =
            (0..8).map(|at| socket(at, Kind::Datagram, Role::Connected { peer: at ^ 1 })).collect();
        // 7 carries 5, which carries 3 twice, which carries 1; 0 carries itself.
        for (carrier, rights) in [(7, vec![5]), (5, vec![3, 3]), (3, vec![1]), (0, vec![0])] {
            sockets[carrier].queue = vec![message(b"x", None, &rights)];
        }
        let numbered: Vec<_> = sockets.iter().enumerate().collect();
        let order = carriers_first(&numbered);
        let place = |socket| order.iter().position(|at| *at == socket).unwrap();
        assert_eq!(order.len(), 8);
        assert!(place(7) < place(5) && place(5) < place(3) && place(3) < place(1));
        assert_eq!(made(&sockets).len(), 8);
    }

    #[test]
    fn names_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("listener");
        let name = Name::Path(path.to_str().unwrap().as_bytes().to_vec().into());
        drop(UnixListener::bind(&path).unwrap());
        let file = SocketFile {
            path: path.to_str().unwrap().as_bytes().to_vec().into(),
            mode: 0o640,
            uid: 12,
            gid: 34,
        };
        let abstract_name = Name::Abstract(format!("limosa-test-{}", std::process::id()).into_bytes().into());
        let mut sockets = [
            socket(1, Kind::Stream, Role::Connected { peer: 2 }),
            socket(2, Kind::Stream, Role::Connected { peer: 1 }),
            socket(3, Kind::Stream, Role::Listening { backlog: 5, pending: vec![6, 7] }),
            socket(4, Kind::Datagram, Role::Idle),
            socket(5, Kind::Datagram, Role::Connected { peer: 4 }),
            socket(6, Kind::Stream, Role::Waiting { by: None }),
            socket(7, Kind::Stream, Role::Waiting { by: None }),
        ];
        sockets[1].name = Some(name.clone());
        sockets[2].name = Some(name);
        sockets[2].file = Some(file);
        sockets[3].name = Some(abstract_name.clone());
        sockets[3].queue = vec![message(b"datagram", None, &[]), message(b"", None, &[])];
        let mut made = made(&sockets);
        let client = UnixStream::from(made.remove(&0).unwrap());
        assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(path.as_path()));
        let listener = UnixListener::from(made.remove(&2).unwrap());
        let _another = UnixStream::connect(&path).unwrap();
        for waiting in [5, 6] {
            let mut waiting = UnixStream::from(made.remove(&waiting).unwrap());
            waiting.write_all(&[waiting.as_raw_fd() as u8]).unwrap();
            let mut byte = [0];
            listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [waiting.as_raw_fd() as u8]);
        }
        listener.accept().unwrap();
        let stat = rustix::fs::lstat(&path).unwrap();
        assert_eq!((stat.st_mode & 0o7777, stat.st_uid, stat.st_gid), (0o640, 12, 34));
        let datagrams = UnixDatagram::from(made.remove(&3).unwrap());
        let sender = UnixDatagram::from(made.remove(&4).unwrap());
        sender.send(b"more").unwrap();
        let mut buffer = [0; 20];
        for length in [8, 0, 4] {
            assert_eq!(datagrams.recv(&mut buffer).unwrap(), length);
        }
        let again: Vec<_> = sockets.iter().enumerate().filter(|(_, socket)| socket.inode == 4).collect();
        drop(datagrams);
        assert_eq!(again[0].1.name, Some(abstract_name));
    }
}
