//! What a socket can have beside its options that no restore can give it, as far as the kernel tells.
//!
//! It does not tell: programs that choose among sockets of one port (`SO_ATTACH_REUSEPORT_CBPF` and `_EBPF`), IPsec policies
//! (`IP_XFRM_POLICY`), `IP_MULTICAST_IF` set by an index alone, `IPV6_PKTINFO` and `IPV6_MTU` that were set, and which
//! sockets have joined IPv6 anycast addresses. Leased flow labels are listed (see `flow_labels`).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::table::{SOCKET, TCP};
use super::upper_layer;
use crate::Result;
use crate::net::raw;

/// Something that cannot be carried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// What it is.
    pub reason: String,
    /// What can be done about it.
    pub remedy: &'static str,
}

const UDP: i32 = libc::IPPROTO_UDP;
/// Linux 6.7
const TCP_AO_INFO: i32 = 40;

/// What of the socket cannot be carried.
pub fn foreign(fd: impl AsFd) -> Result<Option<Foreign>> {
    crate::fault::point();
    let fd = fd.as_fd();
    let kind = raw::kind(fd)?;
    let found = |reason: &str, remedy| Ok(Some(Foreign { reason: reason.into(), remedy }));
    if raw::get_bytes(fd, SOCKET, libc::SO_GET_FILTER, &mut []).is_err_and(is(libc::EACCES)) {
        return found(
            "an eBPF program filters what it receives (SO_ATTACH_BPF)",
            "detach it (SO_DETACH_FILTER) and try again; classic filters (SO_ATTACH_FILTER) are carried",
        );
    }
    let internet = matches!(kind.domain, libc::AF_INET | libc::AF_INET6);
    match kind.protocol {
        UDP if internet => {
            if raw::get_int(fd, UDP, libc::UDP_ENCAP).is_ok_and(|kind| kind != 0) {
                return found(
                    "it belongs to IPsec or L2TP (UDP_ENCAP), whose tunnels are not carried",
                    "end the tunnel and try again",
                );
            }
            if has_pending_data(fd, kind.domain) {
                return found(
                    "it has begun a datagram (MSG_MORE, UDP_CORK), whose bytes the kernel does not give out",
                    "let the process send it and try again",
                );
            }
        }
        TCP if internet => {
            if let Some(name) = upper_layer(fd) {
                let reason = format!("its upper layer protocol is {name}, whose keys the kernel keeps");
                let remedy = "close the connection and try again, or use --tcp close";
                return Ok(Some(Foreign { reason, remedy }));
            }
            if raw::get_bytes(fd, TCP, TCP_AO_INFO, &mut [0; 64]).is_ok() {
                return found("it signs its segments (TCP-AO)", "close it and try again");
            }
            // Asked for with no room, which leaves it there.
            if raw::get_bytes(fd, TCP, libc::TCP_SAVED_SYN, &mut []).is_err_and(is(libc::EINVAL)) {
                return found(
                    "it has kept the SYN of its connection for the program (TCP_SAVE_SYN)",
                    "let the process read it (TCP_SAVED_SYN) and try again",
                );
            }
        }
        _ => {}
    }
    Ok(None)
}

fn is(errno: i32) -> impl Fn(std::io::Error) -> bool {
    move |error| error.raw_os_error() == Some(errno)
}

/// Whether a datagram has been begun and not sent.
///
/// Nothing tells, but a `sendmsg(2)` to port 0 fails with `EINVAL` unless there is one, to which the address does not matter;
/// with `MSG_PROBE` and no bytes it adds nothing to it. Source: `udp_sendmsg` (`net/ipv4/udp.c`), `ip_append_data`.
fn has_pending_data(fd: BorrowedFd<'_>, domain: i32) -> bool {
    /// Known to the kernel only (`linux/socket.h`).
    const MSG_PROBE: i32 = 0x10;
    let mut address = [0_u8; 28];
    address[..2].copy_from_slice(&(domain as u16).to_ne_bytes());
    let length = match domain {
        libc::AF_INET => {
            address[4..8].copy_from_slice(&[127, 0, 0, 1]);
            16
        }
        _ => {
            address[23] = 1;
            28
        }
    };
    let flags = libc::MSG_MORE | MSG_PROBE | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: no bytes are read at the null pointer, whose length is 0, and `length` bytes at the address.
    let answer =
        unsafe { libc::sendto(fd.as_raw_fd(), std::ptr::null(), 0, flags, address.as_ptr().cast(), length) };
    answer == 0
}
