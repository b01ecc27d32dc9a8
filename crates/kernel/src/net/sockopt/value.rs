//! Reading and setting one option.

use std::os::fd::BorrowedFd;

use super::table::Family::{Any, Credentials, Inet, Inet6, Netlink, Tcp, Udp, Udp6, Unix};
use super::table::Known;
use super::table::Shape::{
    Algorithm, Blob, Buffer, Bytes, Filter, Int, Interface, Ones, SegmentSize, Text, Tuned,
};
use super::{filter, raw};
use crate::net::raw::Kind;
use crate::{Error, Result};

/// `TCP_MSS_DEFAULT`, what the kernel tells where nobody has set one.
const DEFAULT_SEGMENT_SIZE: i32 = 536;

/// Whether a TCP socket has and had no connection: it is closed or listens, and knows no path's MTU.
/// `struct tcp_info` begins with the state and has the MTU at 60.
fn never_connected(fd: BorrowedFd<'_>) -> bool {
    const CLOSE: u8 = 7;
    const LISTEN: u8 = 10;
    let mut info = [0; 64];
    raw::get_bytes(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).is_ok_and(|length| length == info.len())
        && matches!(info[0], CLOSE | LISTEN)
        && info[60..] == [0; 4]
}

impl Known {
    pub(super) fn applies(&self, kind: Kind) -> bool {
        let inet = matches!(kind.domain, libc::AF_INET | libc::AF_INET6);
        match self.family {
            Any => true,
            Inet => inet,
            Inet6 => kind.domain == libc::AF_INET6,
            Tcp => inet && kind.protocol == libc::IPPROTO_TCP,
            Udp => inet && kind.protocol == libc::IPPROTO_UDP,
            Udp6 => kind.domain == libc::AF_INET6 && kind.protocol == libc::IPPROTO_UDP,
            Unix => kind.domain == libc::AF_UNIX,
            Netlink => kind.domain == libc::AF_NETLINK,
            Credentials => matches!(kind.domain, libc::AF_UNIX | libc::AF_NETLINK),
        }
    }

    /// Reads the option; `None` where it has a new socket's value or this kernel or socket lacks it.
    pub(super) fn read(&self, fd: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
        let room = match self.shape {
            Filter => return filter::read(fd).map_err(|source| self.error("getsockopt", fd, source)),
            SegmentSize if !never_connected(fd) => return Ok(None),
            Int(_) | Tuned(_) | Buffer { .. } | Interface { .. } | SegmentSize => 4,
            Bytes(length) | Ones(length) | Blob(length) => length,
            // IFNAMSIZ is what the kernel insists on; names of algorithms are as long.
            Text(_) | Algorithm => 16,
        };
        let mut buffer = vec![0; room];
        match raw::get_bytes(fd, self.level, self.name, &mut buffer) {
            Ok(length) => buffer.truncate(length),
            Err(source)
                if matches!(
                    source.raw_os_error(),
                    Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTCONN)
                ) =>
            {
                return Ok(None);
            }
            Err(source) => return Err(self.error("getsockopt", fd, source)),
        }
        let usual = match self.shape {
            Int(default) | Tuned(default) => buffer == default.to_ne_bytes(),
            SegmentSize => buffer == DEFAULT_SEGMENT_SIZE.to_ne_bytes(),
            Bytes(_) | Text(_) | Blob(_) | Interface { .. } => buffer.iter().all(|byte| *byte == 0),
            Ones(_) => buffer.iter().all(|byte| *byte == 0xFF),
            Algorithm | Buffer { .. } | Filter => false,
        };
        if usual {
            return Ok(None);
        }
        match self.shape {
            Text(_) | Algorithm => {
                let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
                buffer.truncate(end);
            }
            Interface { big_endian } => {
                let bytes = <[u8; 4]>::try_from(&buffer[..]).map_err(|_| self.length(buffer.len()))?;
                let index = if big_endian { u32::from_be_bytes(bytes) } else { u32::from_ne_bytes(bytes) };
                buffer = raw::interface_name(fd, index)?.into_bytes();
            }
            _ => {}
        }
        Ok(Some(buffer))
    }

    pub(super) fn write(&self, fd: BorrowedFd<'_>, value: &[u8]) -> Result<()> {
        let set = |name, value: &[u8]| {
            raw::set_bytes(fd, self.level, name, value).map_err(|source| self.error("setsockopt", fd, source))
        };
        match self.shape {
            Buffer { force } => {
                let Ok(bytes) = <[u8; 4]>::try_from(value) else { return Err(self.length(value.len())) };
                self.write_buffer(fd, force, i32::from_ne_bytes(bytes))
            }
            Int(_) | Tuned(_) | SegmentSize if value.len() != 4 => Err(self.length(value.len())),
            Bytes(length) | Ones(length) if value.len() != length => Err(self.length(value.len())),
            Text(most) | Blob(most) if value.len() > most => Err(self.length(value.len())),
            Algorithm | Interface { .. } if value.len() > 15 => Err(self.length(value.len())),
            // A new socket has the namespace's algorithm, which need not be among those an
            // unprivileged user may choose: leave it when it is the same.
            Algorithm if self.read(fd)?.as_deref() == Some(value) => Ok(()),
            Filter => filter::write(fd, value).map_err(|source| self.error("setsockopt", fd, source)),
            Interface { big_endian } => {
                let index = raw::interface_index(fd, &String::from_utf8_lossy(value))?;
                let bytes = if big_endian { index.to_be_bytes() } else { index.to_ne_bytes() };
                set(self.name, &bytes)
            }
            _ => set(self.name, value),
        }
    }

    /// Gives a socket whose namespace has other settings than a new one the value that it would have without them.
    pub(super) fn write_default(&self, fd: BorrowedFd<'_>) -> Result<()> {
        match self.shape {
            Tuned(default) if self.read(fd)?.is_some() => self.write(fd, &default.to_ne_bytes()),
            _ => Ok(()),
        }
    }

    /// The kernel doubles what it is given; `SO_SNDBUFFORCE` is not bound by `wmem_max`.
    fn write_buffer(&self, fd: BorrowedFd<'_>, force: i32, doubled: i32) -> Result<()> {
        if raw::get_int(fd, self.level, self.name).ok() == Some(doubled) {
            return Ok(());
        }
        if doubled < 0 {
            return Err(Error::malformed("setsockopt", self.label, format!("negative size {doubled}")));
        }
        raw::set_int(fd, self.level, force, doubled / 2)
            .or_else(|_| raw::set_int(fd, self.level, self.name, doubled / 2))
            .map_err(|source| self.error("setsockopt", fd, source))
    }

    fn error(&self, operation: &'static str, fd: BorrowedFd<'_>, source: std::io::Error) -> Error {
        Error::new(operation, format!("{} of {}", self.label, raw::name(fd)), source)
    }

    fn length(&self, length: usize) -> Error {
        Error::malformed("setsockopt", self.label, format!("a value of {length} bytes is not of its length"))
    }
}
