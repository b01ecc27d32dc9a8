//! Netlink messages as bytes: building them, and reading them with every length checked.
//!
//! ```text
//! message:   u32 length | u16 type | u16 flags | u32 sequence | u32 port | payload, padded to 4 bytes
//! attribute: u16 length | u16 type | value, padded to 4 bytes
//! ```
//! Source: `netlink(7)`; `include/uapi/linux/netlink.h`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use super::raw;
use crate::{Error, Result};

pub(super) const REQUEST: u16 = 1;
pub(super) const ACK: u16 = 4;
pub(super) const DUMP: u16 = 0x300;
pub(super) const CREATE: u16 = 0x400;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;

/// A netlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    what: &'static str,
}

impl Netlink {
    /// Opens a socket of that protocol; `what` names it in errors.
    pub(super) fn open(protocol: i32, what: &'static str) -> Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, protocol) };
        if fd < 0 {
            return Err(Error::last("socket(AF_NETLINK)", what));
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self { socket: unsafe { OwnedFd::from_raw_fd(fd) }, sequence: 0, what })
    }

    /// The next sequence number.
    pub(super) fn next(&mut self) -> u32 {
        self.sequence += 1;
        self.sequence
    }

    /// Sends finished messages.
    pub(super) fn send(&self, messages: &[u8]) -> Result<()> {
        raw::send(self.socket.as_fd(), messages, 0)
            .map(|_| ())
            .map_err(|source| Error::new("send", self.what, source))
    }

    /// Reads answers until the dump is done, handing each message's type and payload to `each`.
    pub(super) fn dump(&self, mut each: impl FnMut(u16, &[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let datagram = self.receive(&mut buffer, 0)?;
            for message in messages(datagram) {
                let message = message.map_err(|why| Error::malformed("recv", self.what, why))?;
                match message.kind {
                    DONE => return Ok(()),
                    ERROR => return self.answer(&message),
                    kind => each(kind, message.payload)?,
                }
            }
        }
    }

    /// Reads acknowledgements until that of message `last`, or the first refusal.
    pub(super) fn acknowledged(&self, last: u32) -> Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let datagram = self.receive(&mut buffer, 0)?;
            for message in messages(datagram) {
                let message = message.map_err(|why| Error::malformed("recv", self.what, why))?;
                if message.kind == ERROR {
                    self.answer(&message)?;
                    if message.sequence == last {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn receive<'a>(&self, buffer: &'a mut [u8], flags: i32) -> Result<&'a [u8]> {
        let length = raw::receive(self.socket.as_fd(), buffer, flags)
            .map_err(|source| Error::new("recv", self.what, source))?;
        Ok(&buffer[..length])
    }

    fn answer(&self, message: &Message<'_>) -> Result<()> {
        let Some(code) = message.payload.first_chunk::<4>() else {
            return Err(Error::malformed("recv", self.what, "an error message without a code"));
        };
        match i32::from_ne_bytes(*code) {
            0 => Ok(()),
            code => {
                Err(Error::new("request", self.what, io::Error::from_raw_os_error(code.saturating_neg())))
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One message of a datagram.
pub(super) struct Message<'a> {
    pub kind: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// The messages of a datagram; an item that is an error ends it.
pub(super) fn messages(mut rest: &[u8]) -> impl Iterator<Item = std::result::Result<Message<'_>, String>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut rest);
        let Some(header) = bytes.first_chunk::<HEADER>() else {
            return Some(Err(format!("{} bytes are too short for a message", bytes.len())));
        };
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let Some(payload) = bytes.get(HEADER..length) else {
            return Some(Err(format!("a message of {length} bytes among {}", bytes.len())));
        };
        rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            payload,
        }))
    })
}

/// The attributes in `rest` as (type without flags, value); a malformed one ends them.
pub(super) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3FFF;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Builds one message after the other.
#[derive(Default)]
pub(super) struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    /// Adds a message whose payload `fill` writes.
    pub(super) fn message(&mut self, kind: u16, flags: u16, sequence: u32, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        fill(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.pad();
    }

    /// Adds raw bytes.
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Adds an attribute.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.bytes.extend((value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.pad();
    }

    /// Adds an attribute with a big-endian number, as netfilter wants them.
    pub(super) fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// Adds an attribute with a string and its terminating zero.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat());
    }

    /// Adds an attribute made of attributes.
    pub(super) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        const NESTED: u16 = 0x8000;
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        fill(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// The bytes, to be sent.
    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
