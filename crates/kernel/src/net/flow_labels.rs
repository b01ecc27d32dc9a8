//! IPv6 flow labels that are leased (RFC 6437; `ipv6(7)` does not tell of them), and anycast addresses that are joined.
//!
//! `/proc/net/ip6_flowlabel` lists all leases of a network namespace, whosever they are. To renew one is answered with `ESRCH`
//! where the socket has not leased it; where it has, by no longer than the six seconds that every lease has.
//!
//! `/proc/net/anycast6` lists the addresses that sockets have joined (`IPV6_JOIN_ANYCAST`), and nothing tells which sockets.
//! Sources: `net/ipv6/ip6_flowlabel.c` (`ipv6_flowlabel_renew`, `ip6fl_seq_show`), `net/ipv6/anycast.c`.

use std::net::Ipv6Addr;
use std::os::fd::AsFd;

use super::{InNetns, raw};
use crate::{Error, Result};

/// What is listed of a network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leased {
    /// Flow labels.
    pub labels: Vec<u32>,
    /// Anycast addresses that are not those of routers (RFC 4291, 2.6.1), which the kernel joins itself.
    pub anycast: Vec<Ipv6Addr>,
}

/// What is leased in the network namespace that `socket` lives in. The calling thread visits it.
pub fn leased(socket: impl AsFd) -> Result<Leased> {
    let namespace = raw::namespace(socket)?;
    let _inside = InNetns::enter(&namespace)?;
    Ok(Leased {
        labels: parse_labels(&read("/proc/thread-self/net/ip6_flowlabel")?),
        anycast: parse_anycast(&read("/proc/thread-self/net/anycast6")?),
    })
}

fn read(path: &str) -> Result<String> {
    crate::fault::point();
    match std::fs::read(path) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
        // A kernel without IPv6.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(Error::new("read", path, source)),
    }
}

/// A line of headings, and one for each lease, whose first word is the label in hexadecimal digits.
fn parse_labels(text: &str) -> Vec<u32> {
    let first = |line: &str| u32::from_str_radix(line.split_whitespace().next()?, 16).ok();
    text.lines().skip(1).filter_map(first).collect()
}

/// A line for each address: the index and name of the interface, the address in 32 digits, how often it is joined.
fn parse_anycast(text: &str) -> Vec<Ipv6Addr> {
    let address = |line: &str| {
        let word = line.split_whitespace().nth(2).filter(|word| word.len() == 32)?;
        u128::from_str_radix(word, 16).ok()
    };
    let joined = text.lines().filter_map(address).filter(|bits| *bits as u64 != 0);
    joined.map(Ipv6Addr::from_bits).collect()
}

/// Whether the IPv6 socket has leased `label`.
pub fn has_leased(socket: impl AsFd, label: u32) -> bool {
    const IPV6_FL_A_RENEW: u8 = 2;
    const IPV6_FL_S_PROCESS: u8 = 2;
    crate::fault::point();
    // struct in6_flowlabel_req (`linux/in6.h`). With sharing not 0 only the socket's own leases are looked through.
    let mut request = [0; 32];
    request[16..20].copy_from_slice(&label.to_be_bytes());
    request[20..22].copy_from_slice(&[IPV6_FL_A_RENEW, IPV6_FL_S_PROCESS]);
    raw::set_bytes(socket.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_FLOWLABEL_MGR, &request).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_read_from_their_lists() {
        let text = "Label S Owner  Users  Linger Expires  Dst                              Opt\n\
            12345 1 0      1      6      5        00000000000000000000000000000001 0   \n";
        assert_eq!(parse_labels(text), [0x1_2345]);
        let text = "3    veth0           20010db8000000000000000000000000     1\n\
            3    veth0           20010db8000000000000000000000009     1\n";
        assert_eq!(parse_anycast(text), ["2001:db8::9".parse::<Ipv6Addr>().unwrap()]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _ = (parse_labels(&text), parse_anycast(&text));
        }
    }
}
