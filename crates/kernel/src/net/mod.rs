//! Sockets and network configuration beyond what the socket API gives.
//!
//! Everything that takes a socket's descriptor works on any descriptor of it, so also on a duplicate that
//! `pidfd_getfd(2)` took from another process, in whatever network namespace that process lives.

pub mod announce;
mod namespace;
pub mod rtnetlink;

pub mod flow_labels;
pub mod inject;
pub mod multicast;
pub mod netlink_socket;
pub mod nft;
pub mod peek;
pub mod peer;
pub mod raw;
pub mod sock_diag;
pub mod sockopt;
pub mod tcp_rebuild;
pub mod tcp_repair;
pub mod tcp_snapshot;

mod netlink;

/// Gives bytes to every parser of what the kernel says about networks and sockets, for fuzzing; the results do not matter.
#[doc(hidden)]
pub fn feed(bytes: &[u8]) {
    multicast::feed(&String::from_utf8_lossy(bytes));
    netlink_socket::feed(bytes);
    sock_diag::feed(bytes);
    let _ = rtnetlink::parse_answers(bytes);
    let _ = peer::parse_credentials(bytes);
}

pub use namespace::InNetns;
