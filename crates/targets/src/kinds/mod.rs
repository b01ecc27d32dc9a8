//! One module for each kind of state that a target can hold.

mod ballast;
mod creds;
mod eventfds;
mod events;
mod files;
mod heartbeat;
mod in_flight;
mod keyrings;
mod locks;
mod memory;
mod memory_advice;
mod memory_file;
mod memory_forked;
mod memory_guarded;
mod memory_huge;
mod memory_segments;
mod memory_shared;
mod message_queues;
mod misc;
mod multicast;
mod netlink;
mod odd_files;
mod pipes;
mod protection_keys;
mod refused;
mod registers;
mod seccomp;
mod server;
mod signals;
mod sleeps;
mod socket_options;
mod sockets_inet;
mod sockets_peers;
mod sockets_unix;
mod terminal;
mod threads;
mod timers;
mod tree;
mod udp_queues;
mod vdso;
mod watchers;
mod writers;

use anyhow::Result;

use crate::protocol::Protocol;

/// Checks the whole state, leaves it as it was, and gives a detail for the answer (often empty).
pub type Verify = dyn FnMut() -> Result<String>;

/// Builds a kind's state and gives back what checks it.
pub type SetUp = fn(&Setting) -> Result<Box<Verify>>;

/// What a kind is given.
pub struct Setting {
    /// Where requests come from; gives paths for files of the kind's own.
    pub protocol: Protocol,
    /// The rest of the command line.
    pub options: Vec<String>,
}

const KINDS: &[(&str, SetUp)] = &[
    ("ballast", ballast::set_up),
    ("creds", creds::set_up),
    ("eventfds", eventfds::set_up),
    ("events", events::set_up),
    ("files", files::set_up),
    ("heartbeat", heartbeat::set_up),
    ("in-flight", in_flight::set_up),
    ("keyrings", keyrings::set_up),
    ("locks", locks::set_up),
    ("memory", memory::set_up),
    ("memory-advice", memory_advice::set_up),
    ("memory-file", memory_file::set_up),
    ("memory-forked", memory_forked::set_up),
    ("memory-guarded", memory_guarded::set_up),
    ("memory-huge", memory_huge::set_up),
    ("memory-segments", memory_segments::set_up),
    ("memory-shared", memory_shared::set_up),
    ("message-queues", message_queues::set_up),
    ("misc", misc::set_up),
    ("multicast", multicast::set_up),
    ("netlink", netlink::set_up),
    ("odd-files", odd_files::set_up),
    ("pipes", pipes::set_up),
    ("protection-keys", protection_keys::set_up),
    ("refused", refused::set_up),
    ("registers", registers::set_up),
    ("seccomp", seccomp::set_up),
    ("server", server::set_up),
    ("signals", signals::set_up),
    ("sleeps", sleeps::set_up),
    ("socket-options", socket_options::set_up),
    ("sockets-inet", sockets_inet::set_up),
    ("sockets-peers", sockets_peers::set_up),
    ("sockets-unix", sockets_unix::set_up),
    ("terminal", terminal::set_up),
    ("threads", threads::set_up),
    ("timers", timers::set_up),
    ("tree", tree::set_up),
    ("udp-queues", udp_queues::set_up),
    ("vdso", vdso::set_up),
    ("watchers", watchers::set_up),
    ("writers", writers::set_up),
];

/// The kind called `name`.
pub fn find(name: &str) -> Option<SetUp> {
    KINDS.iter().find(|(kind, _)| *kind == name).map(|(_, set_up)| *set_up)
}

/// All names, in order.
pub fn names() -> Vec<&'static str> {
    KINDS.iter().map(|(name, _)| *name).collect()
}
