//! Socket options as data: which ones exist for a kind of socket, reading them, setting them again.
//!
//! The list is an allowlist in both directions. [`capture`] reads the options in it and keeps those that
//! differ from what a new socket has; [`apply`] refuses any other (a checkpoint is hostile input: a
//! `SO_ATTACH_BPF` or `TCP_ULP` smuggled into it must not be executed), and checks lengths before the kernel does.
//! Options that have to be set before `bind(2)` or `connect(2)` to have their effect are of the
//! [`Phase::BeforeBind`]; the others are set when the socket is what it should be.
//!
//! Left out on purpose, because they set nothing: what is read only, or an action (`SO_ERROR`, `SO_MEMINFO`, `IP_MTU`,
//! `TCP_INFO`, `TCP_CC_INFO`, `TCP_ZEROCOPY_RECEIVE`, `SO_CNX_ADVICE`…), and `TCP_REPAIR` and its kin; old names of options in
//! the table (`SO_BINDTOIFINDEX`, `SO_RCVTIMEO_NEW`, `TCP_THIN_DUPACK`, which does nothing any more). Because they are
//! momentary, or hints of which only the speed depends: `TCP_QUICKACK`, `TCP_WINDOW_CLAMP` (the kernel's own estimate unless
//! set), `SO_INCOMING_CPU`, `SO_INCOMING_NAPI_ID`, `SO_BUSY_POLL_BUDGET`, `SO_RESERVE_MEM`, `SO_TXREHASH`,
//! `TCP_FASTOPEN_KEY` (peers whose cookie it has made connect as without one). Because they are identities:
//! `SO_COOKIE`, `SO_NETNS_COOKIE`. Because others carry them: `SO_PEEK_OFF` (the rooms), `TCP_ULP`, `UDP_ENCAP` and what else
//! is refused ([`foreign`], which also lists what cannot be seen), memberships of groups ([`super::multicast`]). Sources: `socket(7)`, `ip(7)`, `ipv6(7)`, `tcp(7)`, `udp(7)`; `net/core/sock.c`.

use std::os::fd::AsFd;

mod filter;
mod foreign;
mod table;
mod value;

pub use foreign::{Foreign, foreign};

use super::raw;
use crate::{Error, Result};
use table::{SO_BUF_LOCK, SOCKET, TABLE, TCP};

/// One option with its value, as `getsockopt(2)` gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOption {
    /// `SOL_SOCKET`, `IPPROTO_TCP`…
    pub level: i32,
    /// The option's number at that level.
    pub name: i32,
    /// The value in the machine's byte order.
    pub value: Vec<u8>,
}

/// When an option has to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Before the socket gets its address and its peer.
    BeforeBind,
    /// When the socket has its address and its queues.
    Last,
}

/// The options of a socket that differ from a new socket's, in the order in which [`apply`] sets them.
///
/// The sizes of its buffers and the name of its congestion control are always among them.
pub fn capture(fd: impl AsFd) -> Result<Vec<SocketOption>> {
    crate::fault::point();
    let fd = fd.as_fd();
    let kind = raw::kind(fd)?;
    let mut options = Vec::new();
    for known in TABLE.iter().filter(|known| known.applies(kind)) {
        if let Some(value) = known.read(fd)? {
            options.push(SocketOption { level: known.level, name: known.name, value });
        }
    }
    // Without the lock bits the kernel would take the sizes set at restore for the user's own wish.
    if !options.iter().any(|option| (option.level, option.name) == (SOCKET, SO_BUF_LOCK)) {
        options.push(SocketOption { level: SOCKET, name: SO_BUF_LOCK, value: vec![0; 4] });
    }
    Ok(options)
}

/// Sets those of `options` that belong to `phase`, in the order of the table, whatever their own.
///
/// Errors: an option that is not in the allowlist or not one of this kind of socket, a value of the wrong
/// length, or what `setsockopt(2)` says.
pub fn apply(fd: impl AsFd, options: &[SocketOption], phase: Phase) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    let kind = raw::kind(fd)?;
    for option in options {
        let known = TABLE
            .iter()
            .any(|known| (known.level, known.name) == (option.level, option.name) && known.applies(kind));
        if !known {
            let what = format!("option {} of level {}", option.name, option.level);
            return Err(Error::malformed("setsockopt", what, "not an option that may be restored"));
        }
    }
    for known in TABLE.iter().filter(|known| known.phase == phase) {
        let wanted = options.iter().find(|option| (option.level, option.name) == (known.level, known.name));
        match wanted {
            Some(option) => known.write(fd, &option.value)?,
            None if known.applies(kind) => known.write_default(fd)?,
            None => {}
        }
    }
    Ok(())
}

/// The name of an option of the table: `SO_KEEPALIVE`.
pub fn label(option: &SocketOption) -> Option<&'static str> {
    let known = TABLE.iter().find(|known| (known.level, known.name) == (option.level, option.name))?;
    Some(known.label)
}

/// The upper layer protocol of a TCP socket (`tls`, `mptcp`), if it has one: such a socket cannot be repaired.
pub fn upper_layer(fd: impl AsFd) -> Option<String> {
    let mut buffer = [0; 16];
    let length = raw::get_bytes(fd.as_fd(), TCP, libc::TCP_ULP, &mut buffer).ok()?;
    let name = buffer[..length].split(|byte| *byte == 0).next()?;
    (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
}

/// The reading offset of `MSG_PEEK` (`SO_PEEK_OFF`), -1 where it is not used.
pub fn peek_offset(fd: impl AsFd) -> Result<i32> {
    let fd = fd.as_fd();
    raw::get_int(fd, SOCKET, libc::SO_PEEK_OFF)
        .map_err(|source| Error::new("getsockopt(SO_PEEK_OFF)", raw::name(fd), source))
}

/// Sets the reading offset of `MSG_PEEK`; -1 turns it off.
pub fn set_peek_offset(fd: impl AsFd, offset: i32) -> Result<()> {
    crate::fault::point();
    let fd = fd.as_fd();
    raw::set_int(fd, SOCKET, libc::SO_PEEK_OFF, offset)
        .map_err(|source| Error::new("setsockopt(SO_PEEK_OFF)", raw::name(fd), source))
}
