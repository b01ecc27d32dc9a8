//! UDP sockets with datagrams that are not read, of which each must come back to its own: sockets that share a port
//! (`SO_REUSEPORT`, `SO_REUSEADDR`), an address within another's, a socket that was connected later, one bound to a device, and
//! one bound to the address of a group.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recvfrom, socket_with, sockopt};

use super::{Setting, Verify};
use crate::sys;

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 77, 2, 1);
const SO_PEEK_OFF: i32 = 42;

type Datagrams = Vec<(SocketAddr, Vec<u8>)>;

struct Receiver {
    what: String,
    socket: UdpSocket,
    queue: Datagrams,
}

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let mut receivers = fill()?;
    Ok(Box::new(move || {
        for Receiver { what, socket, queue } in &receivers {
            let came = read(socket)?;
            let short =
                |queue: &Datagrams| queue.iter().map(|(from, data)| (*from, data.len())).collect::<Vec<_>>();
            ensure!(came == *queue, "{what}: {:?} instead of {:?}", short(&came), short(queue));
        }
        // Their ports are free only when all are closed.
        receivers.clear();
        receivers = fill()?;
        Ok(String::new())
    }))
}

/// All receivers, with what the kernel gave to each.
fn fill() -> Result<Vec<Receiver>> {
    let mut made = Vec::new();
    for loopback in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let senders: Vec<UdpSocket> =
            (0..24).map(|_| UdpSocket::bind((loopback, 0))).collect::<Result<_, _>>()?;
        shared_by_hash(loopback, &senders, &mut made)?;
        shared_with_the_last(loopback, &senders, &mut made)?;
        within_another(loopback, &senders, &mut made)?;
        connected_later(loopback, &senders, &mut made)?;
    }
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let device = open(IpAddr::V4(Ipv4Addr::LOCALHOST), |_| Ok(()))?;
    sys::set_option(&device, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo")?;
    send(&sender, device.local_addr()?, 1)?;
    made.push(("bound to a device".to_owned(), device));
    let group = UdpSocket::bind((GROUP, 0))?;
    group.join_multicast_v4(&GROUP, &Ipv4Addr::LOCALHOST)?;
    sys::set_option(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &Ipv4Addr::LOCALHOST.octets())?;
    send(&sender, group.local_addr()?, 2)?;
    made.push(("bound to a group".to_owned(), group));
    let received = made.into_iter().map(|(what, socket)| {
        let queue = peek(&socket)?;
        // The kernel may well choose the same one for all senders.
        ensure!(!queue.is_empty() || what.ends_with("at a shared port"), "{what}: nothing came");
        Ok(Receiver { what, socket, queue })
    });
    received.collect()
}

/// A socket at a free port of the address, or what `set` says.
fn open(address: IpAddr, set: impl FnOnce(&OwnedFd) -> Result<()>) -> Result<UdpSocket> {
    at(SocketAddr::new(address, 0), set)
}

fn at(address: SocketAddr, set: impl FnOnce(&OwnedFd) -> Result<()>) -> Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    set(&socket)?;
    rustix::net::bind(&socket, &address).with_context(|| format!("binding to {address}"))?;
    Ok(socket.into())
}

fn send(from: &UdpSocket, to: SocketAddr, seed: u64) -> Result<()> {
    let data = sys::pattern(10 + seed as usize * 7 % 900, seed);
    ensure!(from.send_to(&data, to)? == data.len(), "a short datagram");
    Ok(())
}

/// `SO_REUSEPORT`: the kernel chooses by the addresses. Many senders reach all.
fn shared_by_hash(
    loopback: IpAddr,
    senders: &[UdpSocket],
    made: &mut Vec<(String, UdpSocket)>,
) -> Result<()> {
    let reuse = |socket: &OwnedFd| Ok(sockopt::set_socket_reuseport(socket, true)?);
    let first = open(loopback, reuse)?;
    let address = first.local_addr()?;
    let mut all = vec![first];
    for _ in 1..3 {
        all.push(at(address, reuse)?);
    }
    for (sender, seed) in senders.iter().zip(0..) {
        send(sender, address, seed)?;
        send(sender, address, seed + 100)?;
    }
    made.extend(
        all.into_iter().enumerate().map(|(index, socket)| (format!("{index} at a shared port"), socket)),
    );
    Ok(())
}

/// `SO_REUSEADDR`: the last one that is bound gets all.
fn shared_with_the_last(
    loopback: IpAddr,
    senders: &[UdpSocket],
    made: &mut Vec<(String, UdpSocket)>,
) -> Result<()> {
    let reuse = |socket: &OwnedFd| Ok(sockopt::set_socket_reuseaddr(socket, true)?);
    let mut address = SocketAddr::new(loopback, 0);
    for (index, sender) in senders.iter().take(3).enumerate() {
        let socket = at(address, reuse)?;
        address = socket.local_addr()?;
        send(sender, address, 200 + index as u64)?;
        made.push((format!("{index} at a shared address"), socket));
    }
    Ok(())
}

/// A socket at all addresses, and then one of the same port at one.
fn within_another(
    loopback: IpAddr,
    senders: &[UdpSocket],
    made: &mut Vec<(String, UdpSocket)>,
) -> Result<()> {
    let reuse = |socket: &OwnedFd| Ok(sockopt::set_socket_reuseaddr(socket, true)?);
    let any =
        if loopback.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let outer = open(any, reuse)?;
    let address = SocketAddr::new(loopback, outer.local_addr()?.port());
    send(&senders[0], address, 300)?;
    let inner = at(address, reuse)?;
    send(&senders[0], address, 301)?;
    made.push(("at all addresses".into(), outer));
    made.push(("at one of them".into(), inner));
    Ok(())
}

/// What came before it was connected stays, whoever it is from.
fn connected_later(
    loopback: IpAddr,
    senders: &[UdpSocket],
    made: &mut Vec<(String, UdpSocket)>,
) -> Result<()> {
    let socket = open(loopback, |_| Ok(()))?;
    for (sender, seed) in senders.iter().take(2).zip(400..) {
        send(sender, socket.local_addr()?, seed)?;
    }
    socket.connect(senders[0].local_addr()?)?;
    send(&senders[0], socket.local_addr()?, 402)?;
    made.push(("connected later".into(), socket));
    Ok(())
}

/// The queue, which stays.
fn peek(socket: &UdpSocket) -> Result<Datagrams> {
    sys::set_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF, &0_i32.to_ne_bytes())?;
    let seen = receive(socket, RecvFlags::PEEK);
    sys::set_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF, &(-1_i32).to_ne_bytes())?;
    seen
}

fn read(socket: &UdpSocket) -> Result<Datagrams> {
    receive(socket, RecvFlags::empty())
}

fn receive(socket: &UdpSocket, flags: RecvFlags) -> Result<Datagrams> {
    let (mut datagrams, mut buffer) = (Vec::new(), [0; 2000]);
    loop {
        match recvfrom(socket.as_fd(), &mut buffer[..], flags | RecvFlags::DONTWAIT) {
            Ok((_, length, from)) => {
                let from = SocketAddr::try_from(from.context("a datagram from nobody")?)?;
                datagrams.push((from, buffer[..length].to_vec()));
            }
            Err(Errno::AGAIN) => return Ok(datagrams),
            Err(error) => return Err(error).context("receiving"),
        }
    }
}
