//! Sockets and network configuration beyond what the socket API gives.

pub mod announce;
mod namespace;
pub mod rtnetlink;

pub use namespace::InNetns;
