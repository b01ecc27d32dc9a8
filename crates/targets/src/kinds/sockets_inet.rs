//! TCP and UDP sockets within one tree, over IPv4 and IPv6: listening, established with both queues filled, half closed;
//! options; UDP sockets bound and connected. With an option, `tcp` or `udp`, only those; with `waiting`, TCP connections
//! that have data and wait to be accepted.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt;

use super::{Setting, Verify};
use crate::sys;

const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
const PATIENCE: Duration = Duration::from_secs(10);

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let wanted =
        |kind: &str| setting.options.is_empty() || setting.options.iter().any(|option| option == kind);
    let waiting = setting.options.iter().any(|option| option == "waiting");
    let mut tcp = Vec::new();
    let mut udp = Vec::new();
    for address in LOOPBACK {
        if wanted("tcp") {
            tcp.push(Tcp::start(address, waiting).with_context(|| format!("TCP on {address}"))?);
        }
        if wanted("udp") {
            udp.push(Udp::start(address).with_context(|| format!("UDP on {address}"))?);
        }
    }
    Ok(Box::new(move || {
        for tcp in &mut tcp {
            tcp.check().with_context(|| format!("TCP on {}", tcp.address))?;
        }
        for udp in &udp {
            udp.check().with_context(|| format!("UDP on {}", udp.address))?;
        }
        Ok(String::new())
    }))
}

struct Tcp {
    address: SocketAddr,
    listener: TcpListener,
    established: (TcpStream, TcpStream),
    half_closed: (TcpStream, TcpStream),
    waiting: Option<TcpStream>,
    described: String,
}

impl Tcp {
    fn start(address: IpAddr, waiting: bool) -> Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let address = listener.local_addr()?;
        let established = pair(&listener)?;
        established.0.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&established.0, true)?;
        sockopt::set_tcp_keepidle(&established.0, Duration::from_secs(77))?;
        sockopt::set_socket_recv_buffer_size(&established.1, 200_000)?;
        let half_closed = pair(&listener)?;
        half_closed.0.shutdown(Shutdown::Write)?;
        let waiting = if waiting { Some(connect_and_write(address)?) } else { None };
        let mut tcp = Self { address, listener, established, half_closed, waiting, described: String::new() };
        tcp.fill()?;
        tcp.described = tcp.describe()?;
        Ok(tcp)
    }

    /// Data in both directions that nobody has read.
    fn fill(&mut self) -> Result<()> {
        self.established.0.write_all(&sys::pattern(50_000, 1))?;
        self.established.1.write_all(&sys::pattern(3000, 2))?;
        self.half_closed.1.write_all(&sys::pattern(100, 3))?;
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        sys::compare_lines("addresses and options", &self.describe()?, &self.described)?;
        let read = |from: &mut TcpStream, length, seed| -> Result<()> {
            let mut bytes = vec![0; length];
            from.read_exact(&mut bytes).context("reading what was queued")?;
            sys::compare("a queue", &bytes, &sys::pattern(length, seed))
        };
        read(&mut self.established.1, 50_000, 1)?;
        read(&mut self.established.0, 3000, 2)?;
        read(&mut self.half_closed.0, 100, 3)?;
        let ended = self.half_closed.1.read(&mut [0; 1])?;
        ensure!(ended == 0, "the half-closed connection gives data");
        let refused = self.half_closed.0.write(b"x").map_err(|error| error.kind());
        ensure!(refused == Err(ErrorKind::BrokenPipe), "the half-closed connection takes data: {refused:?}");

        if let Some(waiting) = self.waiting.take() {
            self.accept(&waiting)?;
            self.waiting = Some(connect_and_write(self.address)?);
        }
        self.fill()
    }

    fn accept(&self, waiting: &TcpStream) -> Result<()> {
        let (mut accepted, from) = self.listener.accept()?;
        ensure!(from == waiting.local_addr()?, "the waiting connection came from {from}");
        let mut bytes = [0; 13];
        accepted.set_read_timeout(Some(PATIENCE))?;
        accepted.read_exact(&mut bytes)?;
        ensure!(&bytes == b"before accept", "what was sent before accept is lost");
        Ok(())
    }

    fn describe(&self) -> Result<String> {
        let one = &self.established.0;
        Ok(format!(
            "listens on {}\nfrom {} to {}\nnodelay {}\nkeepalive {} {:?}\nreceive buffer {}\n",
            self.listener.local_addr()?,
            one.local_addr()?,
            one.peer_addr()?,
            one.nodelay()?,
            sockopt::socket_keepalive(one)?,
            sockopt::tcp_keepidle(one)?,
            sockopt::socket_recv_buffer_size(&self.established.1)?,
        ))
    }
}

/// A connection through the listener: the side that connected, and the side that was accepted.
fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let connected = TcpStream::connect(listener.local_addr()?)?;
    let (accepted, _) = listener.accept()?;
    for stream in [&connected, &accepted] {
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    Ok((connected, accepted))
}

fn connect_and_write(address: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address).context("connecting to the listening socket")?;
    stream.write_all(b"before accept")?;
    Ok(stream)
}

struct Udp {
    address: SocketAddr,
    bound: UdpSocket,
    connected: UdpSocket,
    described: String,
}

impl Udp {
    fn start(address: IpAddr) -> Result<Self> {
        let bound = UdpSocket::bind((address, 0))?;
        let connected = UdpSocket::bind((address, 0))?;
        let address = bound.local_addr()?;
        connected.connect(address)?;
        bound.set_read_timeout(Some(PATIENCE))?;
        bound.set_ttl(33)?;
        bound.set_broadcast(true)?;
        let mut udp = Self { address, bound, connected, described: String::new() };
        udp.described = udp.describe()?;
        Ok(udp)
    }

    fn check(&self) -> Result<()> {
        sys::compare_lines("addresses and options", &self.describe()?, &self.described)?;
        let mut bytes = vec![0; 2000];
        self.connected.send(&sys::pattern(1234, 5))?;
        let (read, from) = self.bound.recv_from(&mut bytes)?;
        sys::compare("a datagram", &bytes[..read], &sys::pattern(1234, 5))?;
        ensure!(from == self.connected.local_addr()?, "a datagram came from {from}");
        Ok(())
    }

    fn describe(&self) -> Result<String> {
        Ok(format!(
            "bound to {}\nfrom {} to {}\nttl {}\nbroadcast {}\ntimeout {:?}\n",
            self.bound.local_addr()?,
            self.connected.local_addr()?,
            self.connected.peer_addr()?,
            self.bound.ttl()?,
            self.bound.broadcast()?,
            self.bound.read_timeout()?,
        ))
    }
}
