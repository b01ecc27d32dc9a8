//! Telling the link that an address is now here: gratuitous ARP (RFC 5944, section 4.6) and unsolicited
//! neighbour advertisements (RFC 4861, section 7.2.6). Switches learn the port from the frames' source,
//! neighbours the hardware address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::fault;
use crate::{Error, Result};

const BROADCAST: [u8; 6] = [0xff; 6];
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

/// Sends one announcement of `address` with the hardware address `mac` out of link `index` of the calling
/// thread's network namespace.
pub fn announce(index: u32, mac: [u8; 6], address: IpAddr) -> Result<()> {
    fault::point();
    let (frame, protocol) = match address {
        IpAddr::V4(address) => (gratuitous_arp(mac, address), ETH_P_ARP),
        IpAddr::V6(address) => (neighbour_advertisement(mac, address), ETH_P_IPV6),
    };
    // SAFETY: takes numbers only; a result that is not negative is a new descriptor that we own.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(Error::last("socket(AF_PACKET)", format_args!("link {index}")));
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: sockaddr_ll is plain numbers, for which zero is valid.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = protocol.to_be();
    to.sll_ifindex = index as i32;
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&frame[..6]);
    // SAFETY: the frame and the address are live and of the given sizes.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 {
        return Err(Error::last(
            "sendto(AF_PACKET)",
            format_args!("announcement of {address} on link {index}"),
        ));
    }
    Ok(())
}

fn ethernet(destination: [u8; 6], source: [u8; 6], protocol: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend(destination);
    frame.extend(source);
    frame.extend(protocol.to_be_bytes());
    frame
}

/// An ARP request by the address for itself, which every ARP implementation takes up.
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ETH_P_ARP);
    // Ethernet and IPv4, with addresses of six and four bytes; operation 1, a request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame.resize(60, 0);
    frame
}

/// A neighbour advertisement to all nodes, with the override flag and the link-layer address.
fn neighbour_advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let sum = icmpv6_checksum(address, all_nodes, &message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);

    let mut frame = ethernet([0x33, 0x33, 0, 0, 0, 1], mac, ETH_P_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((message.len() as u16).to_be_bytes());
    // The hop limit of 255 proves that the message comes from this link.
    frame.extend([ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(all_nodes.octets());
    frame.extend(message);
    frame
}

/// The checksum of an `ICMPv6` message of an even number of bytes, over it and the pseudo-header (RFC 8200,
/// section 8.1).
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u32 {
        bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
    };
    let mut sum = words(&source.octets()) + words(&destination.octets()) + words(message);
    sum += message.len() as u32 + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arp_frame_is_padded_to_the_ethernet_minimum_and_asks_for_its_sender() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 7));
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[28..32], [10, 0, 0, 7]);
        assert_eq!(frame[38..42], [10, 0, 0, 7]);
    }

    #[test]
    fn an_advertisement_sums_to_zero_with_its_checksum() {
        let address: Ipv6Addr = "fd00::7".parse().expect("an address");
        let frame = neighbour_advertisement([2, 0, 0, 0, 0, 1], address);
        let destination: Ipv6Addr = "ff02::1".parse().expect("an address");
        assert_eq!(icmpv6_checksum(address, destination, &frame[54..]), 0);
        assert_eq!(frame.len(), 14 + 40 + 32);
    }
}
