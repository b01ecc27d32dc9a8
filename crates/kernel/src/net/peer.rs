//! Who is at the other end of a unix socket, as the kernel noted it when the connection was made.
//!
//! The kernel takes it from the process that calls `socketpair(2)` (for both ends), `connect(2)` (for the accepted end) or
//! `listen(2)` (for those that connect), and never looks again: the process may have ended or changed its user since.
//! Sources: `unix(7)`, `socket(7)`; `net/unix/af_unix.c` (`init_peercred`, `copy_peercred`), `net/core/sock.c`.

use std::os::fd::AsFd;

use super::raw;
use crate::{Error, Result};

const SO_PEERGROUPS: i32 = 59;
/// `NGROUPS_MAX`.
const MOST_GROUPS: usize = 65_536;

/// What `SO_PEERCRED` and `SO_PEERGROUPS` say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Process, in the caller's PID namespace; 0 where it is of none that can be seen from there.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// The peer that the kernel noted for a unix socket; for a listening one, what those that connect will see. `None`
/// where it has noted none.
pub fn peer(fd: impl AsFd) -> Result<Option<Peer>> {
    crate::fault::point();
    let fd = fd.as_fd();
    let mut bytes = [0; 12];
    raw::get_bytes(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes)
        .map_err(|source| Error::new("getsockopt(SO_PEERCRED)", raw::name(fd), source))?;
    let Some((pid, uid, gid)) = parse_credentials(&bytes) else { return Ok(None) };
    let mut groups = vec![0; 4 * 64];
    let length = match raw::get_bytes(fd, libc::SOL_SOCKET, SO_PEERGROUPS, &mut groups) {
        Ok(length) => length,
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => {
            groups.resize(4 * MOST_GROUPS, 0);
            raw::get_bytes(fd, libc::SOL_SOCKET, SO_PEERGROUPS, &mut groups)
                .map_err(|source| Error::new("getsockopt(SO_PEERGROUPS)", raw::name(fd), source))?
        }
        // ENODATA: it has noted none.
        Err(_) => 0,
    };
    let groups =
        groups[..length].chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    Ok(Some(Peer { pid, uid, gid, groups: groups.collect() }))
}

/// `struct ucred` as (process, user, group): `None` from a socket without a peer, which has the user -1.
pub fn parse_credentials(bytes: &[u8]) -> Option<(i32, u32, u32)> {
    let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk::<4>()?));
    let (pid, uid, gid) = (word(0)?, word(4)?, word(8)?);
    (uid != u32::MAX && gid != u32::MAX).then_some((pid as i32, uid, gid))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn a_pair_was_made_by_this_process() {
        let (one, _two) = UnixStream::pair().unwrap();
        let peer = peer(&one).unwrap().unwrap();
        let groups: Vec<u32> =
            rustix::process::getgroups().unwrap().into_iter().map(rustix::process::Gid::as_raw).collect();
        assert_eq!(peer.pid, std::process::id() as i32);
        assert_eq!(
            (peer.uid, peer.gid),
            (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
        );
        assert_eq!(peer.groups, groups);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_credentials_never_panic(bytes: Vec<u8>) {
            let parsed = parse_credentials(&bytes);
            proptest::prop_assert!(parsed.is_none() || bytes.len() >= 12);
        }
    }

    #[test]
    fn an_unconnected_socket_has_no_peer() {
        assert_eq!(peer(UnixDatagram::unbound().unwrap()).unwrap(), None);
        assert_eq!(parse_credentials(&[0; 11]), None);
    }
}
