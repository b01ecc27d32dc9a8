//! Unix sockets: pairs of the three types with data queued, listening ones, descriptors in flight, names, options. With the
//! option `waiting`, a connection that has data and waits to be accepted; with `silent`, two that have none; with `in-flight`, a descriptor that nobody else has.

use std::fs;
use std::io::{IoSlice, IoSliceMut, PipeReader, PipeWriter, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer};
use rustix::net::{SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg};
use rustix::net::{Shutdown, shutdown, socketpair, sockopt};

use super::{Setting, Verify};
use crate::sys;

struct State {
    stream: (UnixStream, UnixStream),
    datagrams: (UnixDatagram, UnixDatagram),
    packets: (OwnedFd, OwnedFd),
    half_closed: (UnixStream, UnixStream),
    listener: UnixListener,
    listener_path: PathBuf,
    waiting: Option<UnixStream>,
    silent: Vec<UnixStream>,
    abstract_listener: UnixListener,
    abstract_name: SocketAddr,
    bound: UnixDatagram,
    sender: UnixDatagram,
    sender_path: PathBuf,
    carrier: (UnixStream, UnixStream),
    pipe: PipeReader,
    /// The writing end that is in flight, unless nobody is to have it.
    also: Option<PipeWriter>,
    only_in_flight: bool,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let path = |name: &str| {
        let path = setting.protocol.beside(name);
        let _ = fs::remove_file(&path);
        path
    };
    let stream = UnixStream::pair()?;
    sockopt::set_socket_recv_buffer_size(&stream.1, 100_000)?;
    sockopt::set_socket_passcred(&stream.1, true)?;
    let packets = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    let half_closed = UnixStream::pair()?;
    (&half_closed.0).write_all(b"last words")?;
    shutdown(&half_closed.0, Shutdown::Write)?;

    let listener_path = path("listener");
    let listener = UnixListener::bind(&listener_path)?;
    let abstract_name = SocketAddr::from_abstract_name(format!("limosa-target-{}", std::process::id()))?;
    let abstract_listener = UnixListener::bind_addr(&abstract_name)?;
    let (bound_path, sender_path) = (path("bound"), path("sender"));
    let bound = UnixDatagram::bind(&bound_path)?;
    let sender = UnixDatagram::bind(&sender_path)?;
    sender.connect(&bound_path)?;
    let (pipe, _) = std::io::pipe()?;
    let wanted = |what: &str| setting.options.iter().any(|option| option == what);
    let mut state = State {
        stream,
        datagrams: UnixDatagram::pair()?,
        packets,
        half_closed,
        waiting: if wanted("waiting") { Some(connect_and_write(&listener_path)?) } else { None },
        listener,
        listener_path,
        abstract_listener,
        abstract_name,
        bound,
        sender,
        sender_path,
        carrier: UnixStream::pair()?,
        pipe,
        also: None,
        only_in_flight: wanted("in-flight"),
        silent: Vec::new(),
    };
    if wanted("silent") {
        state.silent =
            vec![UnixStream::connect(&state.listener_path)?, UnixStream::connect(&state.listener_path)?];
    }
    state.fill()?;
    let options = state.options()?;
    Ok(Box::new(move || {
        sys::compare_lines("options", &state.options()?, &options)?;
        state.check_pairs()?;
        state.check_names()?;
        state.check_listeners()?;
        state.check_in_flight()?;
        state.fill()?;
        Ok(String::new())
    }))
}

fn connect_and_write(path: &PathBuf) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(path).context("connecting to the listening socket")?;
    stream.write_all(b"before accept")?;
    Ok(stream)
}

const DATAGRAMS: [usize; 4] = [10, 0, 3000, 1];

impl State {
    /// Queues data everywhere, as it is while nothing happens.
    fn fill(&mut self) -> Result<()> {
        (&self.stream.0).write_all(&sys::pattern(20_000, 1))?;
        (&self.stream.1).write_all(&sys::pattern(300, 2))?;
        for (seed, size) in DATAGRAMS.into_iter().enumerate() {
            ensure!(self.datagrams.0.send(&sys::pattern(size, seed as u64))? == size);
        }
        send(&self.packets.0, &sys::pattern(700, 3), SendFlags::empty())?;
        send(&self.packets.0, &sys::pattern(5, 4), SendFlags::empty())?;
        self.sender.send(b"with an address")?;
        // A pipe whose writing end is inside of a message.
        let (read, mut write) = std::io::pipe()?;
        write.write_all(b"from flight")?;
        let mut space = [MaybeUninit::uninit(); 64];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [write.as_fd()];
        ensure!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&self.carrier.0, &[IoSlice::new(b"descriptor")], &mut control, SendFlags::empty())?;
        self.pipe = read;
        self.also = (!self.only_in_flight).then_some(write);
        Ok(())
    }

    fn check_pairs(&mut self) -> Result<()> {
        let mut bytes = vec![0; 20_000];
        (&self.stream.1).read_exact(&mut bytes)?;
        sys::compare("a stream's queue", &bytes, &sys::pattern(20_000, 1))?;
        let mut bytes = vec![0; 300];
        (&self.stream.0).read_exact(&mut bytes)?;
        sys::compare("a stream's other queue", &bytes, &sys::pattern(300, 2))?;
        let mut bytes = vec![0; 8000];
        for (seed, size) in DATAGRAMS.into_iter().enumerate() {
            let read = self.datagrams.1.recv(&mut bytes)?;
            sys::compare("a datagram", &bytes[..read], &sys::pattern(size, seed as u64))?;
        }
        for (size, seed) in [(700, 3), (5, 4)] {
            let (_, read) = recv(&self.packets.1, &mut bytes[..], RecvFlags::empty())?;
            sys::compare("a packet", &bytes[..read], &sys::pattern(size, seed))?;
        }
        let more = recv(&self.packets.1, &mut bytes[..], RecvFlags::empty()).map(|(_, read)| read);
        ensure!(more == Err(rustix::io::Errno::AGAIN), "more packets than were sent: {more:?}");

        // Its writer has shut down, so that it cannot be filled again: look without taking.
        let (_, read) = recv(&self.half_closed.1, &mut bytes[..], RecvFlags::PEEK)?;
        ensure!(&bytes[..read] == b"last words", "the half-closed stream holds {read} bytes");
        let refused = (&self.half_closed.0).write(b"x");
        ensure!(refused.is_err(), "the half-closed stream takes data");
        (&self.half_closed.1).write_all(b"back")?;
        (&self.half_closed.0).read_exact(&mut bytes[..4])?;
        Ok(())
    }

    fn check_names(&self) -> Result<()> {
        let mut bytes = [0; 100];
        let (read, from) = self.bound.recv_from(&mut bytes)?;
        ensure!(&bytes[..read] == b"with an address", "{read} bytes came to a bound socket");
        ensure!(from.as_pathname() == Some(&self.sender_path), "they came from {from:?}");
        let name = self.listener.local_addr()?;
        ensure!(name.as_pathname() == Some(&self.listener_path), "the listener is called {name:?}");
        Ok(())
    }

    fn check_listeners(&mut self) -> Result<()> {
        let mut bytes = [0; 13];
        if let Some(mut waiting) = self.waiting.take() {
            let (mut accepted, _) = self.listener.accept()?;
            accepted.read_exact(&mut bytes)?;
            ensure!(&bytes == b"before accept", "what was sent before accept is lost");
            accepted.write_all(b"after")?;
            waiting.read_exact(&mut bytes[..5])?;
            self.waiting = Some(connect_and_write(&self.listener_path)?);
        }
        for (silent, byte) in self.silent.iter_mut().zip([*b"1", *b"2"]) {
            // Each in its place: the next is accepted when this one has spoken.
            silent.write_all(&byte)?;
            let mut accepted = self.listener.accept()?.0;
            accepted.set_read_timeout(Some(Duration::from_secs(5)))?;
            accepted.read_exact(&mut bytes[..1]).context("reading from a connection that waited")?;
            ensure!(bytes[..1] == byte, "connections were accepted out of order");
            let peer = sockopt::socket_peercred(&accepted)?.pid;
            ensure!(peer == rustix::process::getpid(), "a connection that waited is from process {peer}");
            *silent = UnixStream::connect(&self.listener_path)?;
        }
        let mut client = UnixStream::connect_addr(&self.abstract_name).context("the abstract name")?;
        client.write_all(b"x")?;
        self.abstract_listener.accept()?.0.read_exact(&mut bytes[..1])?;
        Ok(())
    }

    fn check_in_flight(&mut self) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); 64];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 10];
        recvmsg(&self.carrier.1, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut received = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                received.extend(descriptors);
            }
        }
        ensure!(&bytes == b"descriptor" && received.len() == 1, "{} descriptors came", received.len());
        rustix::io::write(&received[0], b" and more")?;
        drop(received);
        self.also = None;
        let mut text = String::new();
        self.pipe.read_to_string(&mut text)?;
        ensure!(text == "from flight and more", "the pipe in flight held {text:?}");
        Ok(())
    }

    fn options(&self) -> Result<String> {
        Ok(format!(
            "receive buffer {}\npasscred {}\npeer {:?}\nlistens {}\n",
            sockopt::socket_recv_buffer_size(&self.stream.1)?,
            sockopt::socket_passcred(&self.stream.1)?,
            sockopt::socket_peercred(&self.stream.0)?,
            sockopt::socket_acceptconn(&self.listener)?,
        ))
    }
}
