//! Sockets with something that cannot be carried.

use std::fs::File;
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Result, bail};

use super::{HERE, STRUCTURE, raw};
use crate::sys;

/// Makes the socket called `kind`; gives what keeps it.
pub fn make(kind: &str) -> Result<Vec<OwnedFd>> {
    let udp = || UdpSocket::bind("127.0.0.1:0");
    let kept: Vec<OwnedFd> = match kind {
        "bpf-filter" => {
            let socket = udp()?;
            attach_program(&socket)?;
            vec![socket.into()]
        }
        "l2tp" => {
            const UDP_ENCAP: i32 = 100;
            const UDP_ENCAP_L2TPINUDP: i32 = 3;
            let socket = udp()?;
            sys::set_option(&socket, libc::IPPROTO_UDP, UDP_ENCAP, &UDP_ENCAP_L2TPINUDP.to_ne_bytes())?;
            vec![socket.into()]
        }
        "begun" | "begun-six" => {
            let socket = if kind == "begun" { udp()? } else { UdpSocket::bind("[::1]:0")? };
            socket.connect(socket.local_addr()?)?;
            // SAFETY: four bytes are read at the address.
            let sent = unsafe { libc::send(socket.as_raw_fd(), b"half".as_ptr().cast(), 4, libc::MSG_MORE) };
            sys::check(sent as i64)?;
            vec![socket.into()]
        }
        "flow-label" => vec![flow_label()?.into()],
        "unused-label" => {
            let listener = TcpListener::bind("[::1]:0")?;
            lease_label(&listener)?;
            vec![listener.into()]
        }
        "signed" => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            // struct tcp_md5sig: the peer's address, flags, prefix, 2 bytes of length, interface, 80 bytes of key.
            let mut request = [0; 216];
            request[..8].copy_from_slice(&[libc::AF_INET as u8, 0, 0, 0, 127, 0, 0, 9]);
            request[130] = 4;
            request[136..140].copy_from_slice(b"abcd");
            sys::set_option(&listener, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &request)?;
            vec![listener.into()]
        }
        "saved-syn" => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            sys::set_option(&listener, libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, &1_i32.to_ne_bytes())?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            let (server, _) = listener.accept()?;
            vec![listener.into(), client.into(), server.into()]
        }
        "from-elsewhere" => {
            let home = File::open("/proc/self/ns/net")?;
            // SAFETY: takes numbers only; this process has one thread.
            sys::check(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into())?;
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            // SAFETY: as above.
            sys::check(unsafe { libc::setns(home.as_raw_fd(), libc::CLONE_NEWNET) }.into())?;
            vec![socket.into()]
        }
        other => bail!("no object is called {other}"),
    };
    Ok(kept)
}

/// A program that accepts everything: `mov32 r0, -1; exit`.
fn attach_program(socket: &UdpSocket) -> Result<()> {
    const BPF_PROG_LOAD: i64 = 5;
    const BPF_PROG_TYPE_SOCKET_FILTER: u64 = 1;
    let program: [u64; 2] = [0xFFFF_FFFF_0000_00B4, 0x95];
    let address = |text: *const u8| text.expose_provenance() as u64;
    let words = [
        BPF_PROG_TYPE_SOCKET_FILTER | (program.len() as u64) << 32,
        address(program.as_ptr().cast()),
        address(c"GPL".as_ptr().cast()),
    ];
    let loaded = raw(libc::SYS_bpf, &words, [BPF_PROG_LOAD, HERE, (STRUCTURE * 8) as i64, 0, 0])?;
    sys::set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &loaded.as_raw_fd().to_ne_bytes())
}

/// A socket that has leased a flow label and uses it (`linux/in6.h`, struct `in6_flowlabel_req`).
fn flow_label() -> Result<UdpSocket> {
    let socket = UdpSocket::bind("[::1]:0")?;
    lease_label(&socket)?;
    sys::set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_FLOWINFO_SEND, &1_i32.to_ne_bytes())?;
    let port = socket.local_addr()?.port();
    // The standard library gives the kernel the number as it stands in memory.
    socket.connect(SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, LABEL.to_be(), 0))?;
    Ok(socket)
}

const LABEL: u32 = 0x1_2345;

fn lease_label(socket: &impl AsRawFd) -> Result<()> {
    const IPV6_FL_A_GET: u8 = 0;
    const IPV6_FL_S_PROCESS: u8 = 2;
    const IPV6_FL_F_CREATE: u16 = 1;
    let mut request = [0; 32];
    request[..16].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
    request[16..20].copy_from_slice(&LABEL.to_be_bytes());
    request[20..22].copy_from_slice(&[IPV6_FL_A_GET, IPV6_FL_S_PROCESS]);
    request[22..24].copy_from_slice(&IPV6_FL_F_CREATE.to_ne_bytes());
    sys::set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_FLOWLABEL_MGR, &request)?;
    Ok(())
}
