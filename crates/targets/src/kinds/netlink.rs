//! Netlink sockets: monitors of routes, of uevents and of generic netlink, and sockets for questions. With the option
//! `unread`, an answer that is not read; with `netfilter`, a socket of that protocol; with `port` and a number, one with that
//! port ID. The answer to a check says how often
//! monitors were told that they have missed messages.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, getpeername,
    getsockname, recv, recvfrom, sendto, socket_with, sockopt,
};

use super::{Setting, Verify};
use crate::sys;

const SOL_NETLINK: i32 = 270;
const ADD_MEMBERSHIP: i32 = 1;
const PKTINFO: i32 = 3;
const NO_ENOBUFS: i32 = 5;
const LIST_MEMBERSHIPS: i32 = 9;
const EXT_ACK: i32 = 11;
const STRICT: i32 = 12;

const ROUTE: u32 = 0;
const SOCK_DIAG: u32 = 4;
const NETFILTER: u32 = 12;
const UEVENT: u32 = 15;
const GENERIC: u32 = 16;

const NOOP: u16 = 1;
const ERROR: u16 = 2;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;

struct State {
    /// Groups of links, IPv4 addresses, and one beyond the first 32; its port ID is the process's.
    monitor: OwnedFd,
    /// Of its own port ID, without news of overruns.
    quiet: OwnedFd,
    uevents: OwnedFd,
    generic: OwnedFd,
    diag: OwnedFd,
    /// A port ID that the kernel chose, and connected.
    connected: OwnedFd,
    /// Never used.
    unbound: OwnedFd,
}

fn open(protocol: u32) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = std::num::NonZeroU32::new(protocol).map(Protocol::from_raw);
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?)
}

fn bound(protocol: u32, port: u32, groups: &[u32]) -> Result<OwnedFd> {
    let socket = open(protocol)?;
    bind(&socket, &SocketAddrNetlink::new(port, 0)).with_context(|| format!("binding to {port}"))?;
    for group in groups {
        sys::set_option(&socket, SOL_NETLINK, ADD_MEMBERSHIP, &group.to_ne_bytes())?;
    }
    Ok(socket)
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let wanted = |what: &str| setting.options.iter().any(|option| option == what);
    let own = std::process::id();
    if wanted("netfilter") || wanted("unread") {
        let socket = bound(if wanted("netfilter") { NETFILTER } else { ROUTE }, own, &[])?;
        if wanted("unread") {
            ask(&socket, &acknowledged_nothing())?;
        }
        return Ok(Box::new(move || {
            ensure!(getsockname(&socket).is_ok(), "the socket is gone");
            Ok(String::new())
        }));
    }
    if let [what, port] = setting.options.as_slice()
        && what == "port"
    {
        let socket = bound(ROUTE, port.parse()?, &[])?;
        return Ok(Box::new(move || {
            Ok(format!("{:?}", SocketAddrNetlink::try_from(getsockname(&socket)?)?.pid()))
        }));
    }
    let one = 1_i32.to_ne_bytes();
    let state = State {
        monitor: bound(ROUTE, own, &[1, 5, 33])?,
        quiet: bound(ROUTE, 0x7000_0000 + own, &[1])?,
        uevents: bound(UEVENT, own, &[1])?,
        generic: bound(GENERIC, own, &[16])?,
        diag: bound(SOCK_DIAG, own, &[])?,
        connected: bound(ROUTE, 0, &[])?,
        unbound: open(ROUTE)?,
    };
    connect(&state.connected, &SocketAddrNetlink::new(0, 8))?;
    sys::set_option(&state.monitor, SOL_NETLINK, PKTINFO, &one)?;
    sys::set_option(&state.monitor, SOL_NETLINK, STRICT, &one)?;
    sys::set_option(&state.quiet, SOL_NETLINK, NO_ENOBUFS, &one)?;
    sys::set_option(&state.connected, SOL_NETLINK, EXT_ACK, &one)?;
    sockopt::set_socket_recv_buffer_size(&state.monitor, 70_000)?;
    sockopt::set_socket_passcred(&state.uevents, true)?;
    let described = state.describe()?;
    Ok(Box::new(move || {
        let mut lost = 0;
        for monitor in [&state.monitor, &state.quiet, &state.uevents, &state.generic] {
            lost += drain(monitor)?;
        }
        ensure!(drain(&state.quiet)? == 0, "who wants no news of overruns was told");
        sys::compare_lines("netlink sockets", &state.describe()?, &described)?;
        state.check()?;
        Ok(format!("{lost} monitors have missed messages"))
    }))
}

impl State {
    fn describe(&self) -> Result<String> {
        let all = [
            ("monitor", &self.monitor),
            ("quiet", &self.quiet),
            ("uevents", &self.uevents),
            ("generic", &self.generic),
            ("diag", &self.diag),
            ("connected", &self.connected),
            ("unbound", &self.unbound),
        ];
        let describe = |(name, socket): (&str, &OwnedFd)| -> Result<String> {
            let option = |number, length| sys::option(socket.as_fd(), SOL_NETLINK, number, length);
            let options = [PKTINFO, NO_ENOBUFS, EXT_ACK, STRICT].map(|number| option(number, 4));
            Ok(format!(
                "{name}: protocol {:?}, own {:?}, peer {:?}, buffer {}, passcred {}, options {options:?}, groups {:?}\n",
                sockopt::socket_protocol(socket)?,
                SocketAddrNetlink::try_from(getsockname(socket)?)?,
                getpeername(socket)?.map(SocketAddrNetlink::try_from),
                sockopt::socket_recv_buffer_size(socket)?,
                sockopt::socket_passcred(socket)?,
                option(LIST_MEMBERSHIPS, 8),
            ))
        };
        all.into_iter().map(describe).collect()
    }

    /// A change of an address is told to the monitor; questions are answered.
    fn check(&self) -> Result<()> {
        for (kind, flags) in [(NEW_ADDRESS, 0x600), (DELETE_ADDRESS, 0)] {
            // To nobody in particular: it is connected to the kernel, and a group.
            ask(&self.connected, &address_request(kind, flags))?;
            let (answer, code) = receive(&self.connected)?;
            ensure!((answer, code) == (ERROR, 0), "changing an address gives message {answer}, {code}");
            let (told, _) = receive(&self.monitor).context("waiting for news")?;
            ensure!(told == kind, "the monitor was told {told}");
        }
        // A dump of unix sockets; the control family of generic netlink.
        let mut diag = header(20, 0x301, 24);
        diag.extend([1, 0, 0, 0, 255, 255, 255, 255]);
        diag.resize(40, 0);
        ask(&self.diag, &diag)?;
        ensure!(receive(&self.diag)?.0 != ERROR, "sock_diag does not answer");
        while drain_one(&self.diag)?.is_some() {}
        let mut control = header(16, 1, 12);
        control.extend([3, 1, 0, 0, 6, 0, 1, 0, 16, 0, 0, 0]);
        ask(&self.generic, &control)?;
        ensure!(receive(&self.generic)?.0 == 16, "generic netlink does not answer");
        Ok(())
    }
}

/// `struct nlmsghdr` for a payload of that length.
fn header(kind: u16, flags: u16, payload: u32) -> Vec<u8> {
    let mut bytes = (16 + payload).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([7, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// Asks for nothing but an acknowledgement.
fn acknowledged_nothing() -> Vec<u8> {
    header(NOOP, 4, 0)
}

/// 127.77.0.1/32 on the loopback interface, with an acknowledgement.
fn address_request(kind: u16, flags: u16) -> Vec<u8> {
    let mut bytes = header(kind, flags | 5, 8 + 8);
    bytes.extend([libc::AF_INET as u8, 32, 0, 254, 1, 0, 0, 0]);
    bytes.extend([8, 0, 2, 0, 127, 77, 0, 1]);
    bytes
}

fn ask(socket: &OwnedFd, request: &[u8]) -> Result<()> {
    let kernel = SocketAddrNetlink::new(0, 0);
    ensure!(sendto(socket, request, SendFlags::empty(), &kernel)? == request.len(), "a short write");
    Ok(())
}

/// The type of the next message, and the word behind its header, which in an answer is the error.
fn receive(socket: &OwnedFd) -> Result<(u16, i32)> {
    let mut polled = [rustix::event::PollFd::new(socket, rustix::event::PollFlags::IN)];
    let patience = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    ensure!(rustix::event::poll(&mut polled, Some(&patience))? == 1, "no message comes");
    drain_one(socket)?.context("no message")
}

fn drain_one(socket: &OwnedFd) -> Result<Option<(u16, i32)>> {
    let mut bytes = [0; 16 << 10];
    match recv(socket, &mut bytes[..], RecvFlags::DONTWAIT) {
        Ok((_, length)) => {
            ensure!(length >= 16, "{length} bytes are no message");
            let word = bytes[16..20].first_chunk().map_or(0, |word| i32::from_ne_bytes(*word));
            Ok(Some((u16::from_ne_bytes([bytes[4], bytes[5]]), word)))
        }
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading from descriptor {}", socket.as_raw_fd())),
    }
}

/// Reads what there is as a monitor does: how often messages were lost. What is not from the kernel is to be ignored.
fn drain(monitor: &OwnedFd) -> Result<usize> {
    let (mut lost, mut bytes) = (0, [0; 16 << 10]);
    loop {
        match recvfrom(monitor, &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((_, length, from)) => {
                let from =
                    from.map(SocketAddrNetlink::try_from).transpose()?.context("a message from nobody")?;
                let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
                ensure!(from.pid() == 0 || kind == NOOP, "{length} bytes of type {kind} from {}", from.pid());
            }
            Err(Errno::NOBUFS) => lost += 1,
            Err(Errno::AGAIN) => return Ok(lost),
            Err(error) => return Err(error.into()),
        }
    }
}
