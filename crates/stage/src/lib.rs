//! Two hosts on one machine, and the real `limosa` program on them.
//!
//! ```text
//!   client            host A                      host B
//!   10.99.0.3         10.99.0.1                   10.99.0.2
//!      │                 │                           │
//!      └─── veth ─── bridge br0 ─────── veth ─── bridge br0
//!                        │                           ┊
//!                    container ── limosa migrate ──▶ container
//!                    10.99.0.7                   10.99.0.7
//! ```
//!
//! A host is a network namespace and a state directory. The namespaces have no names, only descriptors that this
//! process holds: however it ends, the kernel takes them and all interfaces in them away.

mod hosts;
mod migration;
mod program;

pub use hosts::{BRIDGE, CONTAINER, Host, PREFIX, Place, join, join_client};
pub use migration::{receive, receive_with};
pub use program::{Limosa, MARK, Running, TICK};
