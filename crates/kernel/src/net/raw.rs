//! The few raw socket calls that the modules here share: options as bytes, queue lengths, kinds.
//!
//! Everything in this module allocates nothing on success or failure (`io::Error` from an `errno` holds
//! just the number), so that it may be used in the short-lived process of [`crate::guarded`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::{Error, Result};

/// Bytes in the receive queue that a reader would get (`FIONREAD`).
pub(super) const SIOCINQ: libc::Ioctl = 0x541B;
/// Bytes in the send queue that the peer has not acknowledged (`TIOCOUTQ`).
pub(super) const SIOCOUTQ: libc::Ioctl = 0x5411;
/// Bytes in the send queue that have not been sent once. Source: `linux/sockios.h`.
pub(super) const SIOCOUTQNSD: libc::Ioctl = 0x894B;
/// A descriptor of the network namespace of a socket. Source: `linux/sockios.h`.
const SIOCGSKNS: libc::Ioctl = 0x894C;

/// `setsockopt(2)` with bytes.
pub(super) fn set_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes at `value`, which lives through the call.
    let answer = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `setsockopt(2)` with an `int`.
pub(super) fn set_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_bytes(fd, level, name, &value.to_ne_bytes())
}

/// `getsockopt(2)` into `buffer`: how many bytes the kernel wrote.
pub(super) fn get_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes at `buffer`, and the new length at `length`.
    let answer =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length) };
    if answer == 0 { Ok((length as usize).min(buffer.len())) } else { Err(io::Error::last_os_error()) }
}

/// `getsockopt(2)` of an `int`.
pub(super) fn get_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    get_bytes(fd, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// An `ioctl(2)` that writes one `int`.
pub(super) fn ioctl_int(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    // SAFETY: the requests of this module write one int at the pointer.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    if answer == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// `recv(2)` with flags.
pub(super) fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes at `buffer`.
    let answer = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// `send(2)` with flags; a closed peer is an error, never a signal.
pub(super) fn send(fd: BorrowedFd<'_>, data: &[u8], flags: i32) -> io::Result<usize> {
    // SAFETY: the kernel reads `data.len()` bytes at `data`.
    let answer =
        unsafe { libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), flags | libc::MSG_NOSIGNAL) };
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// How a descriptor is named in an error.
pub(super) fn name(fd: impl AsFd) -> String {
    format!("socket descriptor {}", fd.as_fd().as_raw_fd())
}

/// What kind of socket a descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind {
    /// The address family: `AF_INET`, `AF_UNIX`…
    pub domain: i32,
    /// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_SEQPACKET`, `SOCK_RAW`, without flags.
    pub kind: i32,
    /// `IPPROTO_TCP`, or 0 where the family has one protocol only.
    pub protocol: i32,
}

/// The family, type and protocol of a socket; `ENOTSOCK` for any other descriptor (`socket(7)`).
pub fn kind(fd: impl AsFd) -> Result<Kind> {
    let fd = fd.as_fd();
    let get = |name| get_int(fd, libc::SOL_SOCKET, name);
    let read = || -> io::Result<Kind> {
        Ok(Kind {
            domain: get(libc::SO_DOMAIN)?,
            kind: get(libc::SO_TYPE)?,
            protocol: get(libc::SO_PROTOCOL)?,
        })
    };
    read().map_err(|source| Error::new("getsockopt(SO_DOMAIN)", name(fd), source))
}

/// The identity of a socket in its network namespace's listings: the inode number of its descriptor.
pub fn inode(fd: impl AsFd) -> Result<u64> {
    let fd = fd.as_fd();
    let stat = rustix::fs::fstat(fd).map_err(|source| Error::new("fstat", name(fd), source))?;
    Ok(stat.st_ino)
}

/// The network namespace that a socket lives in, whichever process it was taken from
/// (`SIOCGSKNS`; needs `CAP_NET_ADMIN` in the user namespace that owns it).
pub fn namespace(fd: impl AsFd) -> Result<OwnedFd> {
    let fd = fd.as_fd();
    // SAFETY: the request takes no argument and returns a new descriptor.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS, 0) };
    if answer < 0 {
        return Err(Error::last("ioctl(SIOCGSKNS)", name(fd)));
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// The file that a unix socket is bound to, as an `O_PATH` descriptor (`SIOCUNIXFILE`, Linux 4.13); `ENOENT` where it
/// is bound to none. Needs `CAP_NET_ADMIN`. Source: `net/unix/af_unix.c` (`unix_open_file`).
pub fn unix_file(fd: impl AsFd) -> Result<OwnedFd> {
    const SIOCUNIXFILE: libc::Ioctl = 0x89E0;
    let fd = fd.as_fd();
    // SAFETY: the request takes no argument and returns a new descriptor.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE, 0) };
    if answer < 0 {
        return Err(Error::last("ioctl(SIOCUNIXFILE)", name(fd)));
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// The name of an interface of the namespace that a socket lives in (`netdevice(7)`).
pub fn interface_name(socket: impl AsFd, index: u32) -> Result<String> {
    const SIOCGIFNAME: libc::Ioctl = 0x8910;
    let mut request = InterfaceRequest { name: [0; 16], value: [0; 24] };
    request.value[..4].copy_from_slice(&index.to_ne_bytes());
    request.ask(socket.as_fd(), SIOCGIFNAME, "ioctl(SIOCGIFNAME)", &format!("interface {index}"))?;
    let name = request.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// The index of an interface of the namespace that a socket lives in; `ENODEV` where none has that name.
pub fn interface_index(socket: impl AsFd, name: &str) -> Result<u32> {
    const SIOCGIFINDEX: libc::Ioctl = 0x8933;
    let mut request = InterfaceRequest { name: [0; 16], value: [0; 24] };
    if name.len() >= request.name.len() {
        return Err(Error::new("ioctl(SIOCGIFINDEX)", name, io::Error::from_raw_os_error(libc::ENODEV)));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    request.ask(socket.as_fd(), SIOCGIFINDEX, "ioctl(SIOCGIFINDEX)", &format!("interface {name}"))?;
    Ok(u32::from_ne_bytes([request.value[0], request.value[1], request.value[2], request.value[3]]))
}

/// `struct ifreq`
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

impl InterfaceRequest {
    fn ask(
        &mut self,
        fd: BorrowedFd<'_>,
        request: libc::Ioctl,
        operation: &'static str,
        of: &str,
    ) -> Result<()> {
        // SAFETY: both requests read and write one struct ifreq, which this is.
        let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(self)) };
        if answer == 0 { Ok(()) } else { Err(Error::last(operation, of)) }
    }
}
