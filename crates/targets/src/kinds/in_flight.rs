//! Descriptors that are only in messages: files with locks, pipes and connections with both ends in flight, sockets within
//! sockets and through themselves. With an option, one that needs a process: `watching` or `signals`; `behind` puts a
//! message with another descriptor before it.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, PipeReader, PipeWriter, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FlockOperation, MemfdFlags, flock, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::{Setting, Verify};
use crate::sys;

/// Most descriptors in one message here.
const MOST: usize = 4;

struct State {
    carrier: (UnixStream, UnixStream),
    path: PathBuf,
    listener: SocketAddr,
    /// Its connection waits in a listening socket that is in flight.
    waiting: Option<UnixStream>,
    /// Its peer is in flight.
    peer: Option<UnixStream>,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let wanted = |what: &str| setting.options.iter().any(|option| option == what);
    let name = format!("limosa-in-flight-{}", std::process::id());
    let mut state = State {
        carrier: UnixStream::pair()?,
        path: setting.protocol.beside("in-flight"),
        listener: SocketAddr::from_abstract_name(name)?,
        waiting: None,
        peer: None,
    };
    if wanted("watching") || wanted("signals") {
        if wanted("behind") {
            send(&state.carrier.0, b"before", &[std::io::pipe()?.0.as_fd()])?;
        }
        let needy = if wanted("watching") { watching()? } else { signalling()? };
        send(&state.carrier.0, b"needy", &[needy.as_fd()])?;
        return Ok(Box::new(move || {
            // It stays where it is.
            let _carrier = &state.carrier;
            Ok(String::new())
        }));
    }
    state.fill()?;
    Ok(Box::new(move || {
        state.check()?;
        state.fill()?;
        Ok(String::new())
    }))
}

/// An epoll that watches something.
fn watching() -> Result<OwnedFd> {
    use rustix::event::epoll::{CreateFlags, EventData, EventFlags, add, create};
    let epoll = create(CreateFlags::CLOEXEC)?;
    let (reader, _writer) = std::io::pipe()?;
    add(&epoll, &reader, EventData::new_u64(1), EventFlags::IN).context("epoll_ctl")?;
    // What it watches must stay open for it to be watched.
    std::mem::forget(reader);
    Ok(epoll)
}

/// A pipe that sends its owner a signal.
fn signalling() -> Result<OwnedFd> {
    let (reader, writer) = std::io::pipe()?;
    std::mem::forget(writer);
    // SAFETY: takes numbers only.
    sys::check(i64::from(unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETOWN, libc::getpid()) }))?;
    Ok(reader.into())
}

impl State {
    /// Puts everything on its way, and closes it.
    fn fill(&mut self) -> Result<()> {
        let to = &self.carrier.0;
        // A file whose description has locks and a position; once more further on.
        let mut file =
            OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&self.path)?;
        file.write_all(b"content of a file")?;
        file.seek(SeekFrom::Start(11))?;
        flock(&file, FlockOperation::LockExclusive)?;
        lock_byte(&file, libc::F_WRLCK)?;
        send(to, b"file", &[file.as_fd()])?;
        // Both ends of a pipe.
        let (reader, mut writer) = std::io::pipe()?;
        writer.write_all(b"from a pipe")?;
        send(to, b"pipe", &[reader.as_fd(), writer.as_fd(), file.as_fd()])?;
        // A listening socket, and both ends of a connection.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (mut server, _) = listener.accept()?;
        client.write_all(b"to the server")?;
        server.write_all(b"to the client")?;
        send(to, b"tcp", &[listener.as_fd(), client.as_fd(), server.as_fd()])?;
        // What has a state of its own.
        let counter = eventfd(3, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC)?;
        let memory = memfd_create("in flight", MemfdFlags::CLOEXEC)?;
        rustix::io::write(&memory, b"in memory")?;
        send(to, b"objects", &[counter.as_fd(), memory.as_fd()])?;
        // A pipe within a socket within a socket. The other ends are closed.
        let (reader, mut writer) = std::io::pipe()?;
        writer.write_all(b"deep inside")?;
        let (inner, outer) = (UnixDatagram::pair()?, UnixStream::pair()?);
        send(&inner.0, b"innermost", &[reader.as_fd()])?;
        send(&inner.0, b"again", &[])?;
        drop(inner.0);
        send(&outer.0, b"inner", &[inner.1.as_fd()])?;
        drop(outer.0);
        send(to, b"outer", &[outer.1.as_fd()])?;
        // A connection with both ends in flight, one of them through itself.
        let circle = UnixStream::pair()?;
        send(&circle.0, b"itself", &[circle.1.as_fd()])?;
        send(to, b"circle", &[circle.0.as_fd(), circle.1.as_fd()])?;
        // A peer, and a listening socket in which a connection waits.
        let (kept, sent) = UnixStream::pair()?;
        (&kept).write_all(b"to a peer")?;
        let listener = UnixListener::bind_addr(&self.listener)?;
        self.waiting = Some(UnixStream::connect_addr(&self.listener)?);
        self.peer = Some(kept);
        send(to, b"peers", &[sent.as_fd(), listener.as_fd()])
    }

    fn check(&mut self) -> Result<()> {
        let from = &self.carrier.1;
        let [file] = receive(from, b"file")?;
        let [reader, writer, again] = receive(from, b"pipe")?;
        self.check_file(file, again)?;
        let (mut reader, mut writer) = (PipeReader::from(reader), PipeWriter::from(writer));
        expect(&mut reader, b"from a pipe")?;
        writer.write_all(b"x")?;
        drop(writer);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest)?;
        ensure!(rest == b"x", "the pipe held {rest:?}");

        let [listener, client, server] = receive(from, b"tcp")?;
        let (mut client, mut server) = (TcpStream::from(client), TcpStream::from(server));
        expect(&mut server, b"to the server")?;
        expect(&mut client, b"to the client")?;
        client.write_all(b"more")?;
        expect(&mut server, b"more")?;
        let listener = TcpListener::from(listener);
        let _connected = TcpStream::connect(listener.local_addr()?)?;
        listener.accept()?;

        let [counter, memory] = receive(from, b"objects")?;
        let mut count = [0; 8];
        for _ in 0..3 {
            rustix::io::read(&counter, &mut count)?;
            ensure!(u64::from_ne_bytes(count) == 1, "the eventfd is no semaphore");
        }
        let mut memory = File::from(memory);
        ensure!(memory.stream_position()? == 9, "the memory's position is {}", memory.stream_position()?);
        memory.rewind()?;
        expect(&mut memory, b"in memory")?;

        let [outer] = receive(from, b"outer")?;
        let outer = UnixStream::from(outer);
        let [inner] = receive(&outer, b"inner")?;
        let inner = UnixDatagram::from(inner);
        let [innermost] = receive(&inner, b"innermost")?;
        let [] = receive(&inner, b"again")?;
        expect(&mut PipeReader::from(innermost), b"deep inside")?;
        ensure!((&outer).read(&mut [0])? == 0, "the outer socket is not at its end");

        let [one, two] = receive(from, b"circle")?;
        let (mut one, two) = (UnixStream::from(one), UnixStream::from(two));
        let [itself] = receive(&two, b"itself")?;
        UnixStream::from(itself).write_all(b"round")?;
        expect(&mut one, b"round")?;

        let [peer, listener] = receive(from, b"peers")?;
        let mut peer = UnixStream::from(peer);
        expect(&mut peer, b"to a peer")?;
        peer.write_all(b"back")?;
        expect(self.peer.as_mut().context("no peer")?, b"back")?;
        let (mut accepted, _) = UnixListener::from(listener).accept()?;
        accepted.write_all(b"accepted")?;
        expect(self.waiting.as_mut().context("nobody waits")?, b"accepted")
    }

    /// Both are one description, with its locks.
    fn check_file(&self, file: OwnedFd, again: OwnedFd) -> Result<()> {
        let other = OpenOptions::new().read(true).write(true).open(&self.path)?;
        let taken = flock(&other, FlockOperation::NonBlockingLockShared);
        ensure!(taken == Err(rustix::io::Errno::WOULDBLOCK), "the file is not locked: {taken:?}");
        ensure!(lock_byte(&other, libc::F_RDLCK).is_err(), "the file's byte is not locked");
        let (mut file, mut again) = (File::from(file), File::from(again));
        expect(&mut file, b"a ")?;
        expect(&mut again, b"file")?;
        drop(file);
        let taken = flock(&other, FlockOperation::NonBlockingLockShared);
        ensure!(taken == Err(rustix::io::Errno::WOULDBLOCK), "the lock went with one of two descriptors");
        drop(again);
        flock(&other, FlockOperation::NonBlockingLockShared).context("the lock stays behind")
    }
}

/// Locks the first byte for the description.
fn lock_byte(file: &File, kind: i32) -> Result<()> {
    let lock =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 1, l_pid: 0 };
    // SAFETY: the kernel reads the structure.
    sys::check(i64::from(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }))?;
    Ok(())
}

fn expect(from: &mut impl Read, expected: &[u8]) -> Result<()> {
    let mut bytes = vec![0; expected.len()];
    from.read_exact(&mut bytes)
        .with_context(|| format!("reading {:?}", String::from_utf8_lossy(expected)))?;
    sys::compare("what was in flight", &bytes, expected)
}

fn send(to: impl AsFd, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ensure!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    sendmsg(to, &[IoSlice::new(text)], &mut control, SendFlags::empty()).context("sendmsg")?;
    Ok(())
}

/// Receives the message `text` and the descriptors in it.
fn receive<const COUNT: usize>(from: impl AsFd, text: &[u8]) -> Result<[OwnedFd; COUNT]> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; text.len()];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let said = || String::from_utf8_lossy(text).into_owned();
    recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).with_context(said)?;
    sys::compare("a message", &bytes, text)?;
    let mut received = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            received.extend(descriptors);
        }
    }
    let count = received.len();
    received.try_into().map_err(|_| anyhow::anyhow!("{count} descriptors came with {:?}", said()))
}
