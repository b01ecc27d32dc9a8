//! Sockets and network configuration beyond what the socket API gives.
//!
//! Everything that takes a socket's descriptor works on any descriptor of it, so also on a duplicate that
//! `pidfd_getfd(2)` took from another process, in whatever network namespace that process lives.

pub mod announce;
mod namespace;
pub mod rtnetlink;

pub mod inject;
pub mod multicast;
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

pub use namespace::InNetns;
