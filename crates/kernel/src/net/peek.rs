//! What waits in the receive queue of a datagram or unix socket, read without taking it out.
//!
//! `MSG_PEEK` alone shows the first message only; with `SO_PEEK_OFF` each peek goes on after the last. That offset
//! belongs to the socket, and an application that peeks itself would be led astray by a forgotten one:
//! so it is set, used and put back by the helper of `guarded`, which a `kill -9` of this process does not interrupt.
//!
//! Descriptors in flight (`SCM_RIGHTS`) come as duplicates; those in the queue stay there.
//! On a stream, the kernel hands out at most one message's descriptors at a time but puts bytes written before
//! in front of them: where their message begins is found by a peek that is made to fail in it.
//!
//! Not seen: datagrams of length zero that were peeked before (a second look skips them), and on
//! `SOCK_SEQPACKET` everything from a message of length zero on, which looks like the end.
//! Sources: `socket(7)`, `unix(7)`; `net/core/datagram.c`, `net/unix/af_unix.c`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{raw, sockopt};
use crate::guarded;
use crate::{Error, Result};

/// A message in a queue. On a stream: a stretch of bytes.
#[derive(Debug)]
pub struct Message {
    /// The bytes.
    pub data: Vec<u8>,
    /// The sender's address as the kernel gave it (`struct sockaddr_*`), empty where it has none.
    pub sender: Vec<u8>,
    /// Duplicates of the descriptors sent with the first byte.
    pub descriptors: Vec<OwnedFd>,
    /// The sender's process, user and group as seen from here, where the socket asks for them (`SO_PASSCRED`).
    pub credentials: Option<(i32, u32, u32)>,
    /// The bytes are those of several UDP datagrams, each of this length but the last (`UDP_GRO`).
    pub segment: Option<usize>,
}

/// More than any queue of a real program; a limit against endless growth.
const MOST_BYTES: usize = 1 << 30;
/// `SCM_MAX_FD`.
const MOST_DESCRIPTORS: usize = 253;
/// Descriptors (two headers), credentials, and what else a socket may ask for.
const CONTROL: usize = 2_048;

/// One message as the helper finds it, with room for everything.
#[derive(Clone)]
struct Slot {
    start: usize,
    length: usize,
    sender: [u8; 128],
    sender_length: usize,
    descriptors: [i32; MOST_DESCRIPTORS],
    count: usize,
    credentials: Option<(i32, u32, u32)>,
    segment: Option<usize>,
}

impl Slot {
    const EMPTY: Self = Self {
        start: 0,
        length: 0,
        sender: [0; 128],
        sender_length: 0,
        descriptors: [-1; MOST_DESCRIPTORS],
        count: 0,
        credentials: None,
        segment: None,
    };
}

/// How the helper's work ended.
enum End {
    Empty,
    /// The buffer or the slots were too small.
    Full,
    Failed(io::Error),
}

/// All messages in the receive queue of `socket`.
pub fn receive_queue(socket: impl AsFd) -> Result<Vec<Message>> {
    crate::fault::point();
    let fd = socket.as_fd();
    let kind = raw::kind(fd)?;
    let before = sockopt::peek_offset(fd)?;
    let (mut bytes, mut messages) = (256 << 10, 32);
    loop {
        let mut data = vec![0; bytes];
        let mut slots = vec![Slot::EMPTY; messages];
        let mut used = 0;
        let mut end = End::Empty;
        let finished = guarded::run(|_| end = look(fd, kind, before, &mut data, &mut slots, &mut used))
            .map_err(|source| Error::new("clone(CLONE_VM)", "the helper that peeks at queues", source))?;
        if !finished {
            let _ = raw::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before);
        }
        let found: Vec<Message> = slots[..used].iter().map(|slot| own(slot, &data)).collect();
        match end {
            _ if !finished => {
                return Err(Error::malformed("recvmsg(MSG_PEEK)", raw::name(fd), "the helper was killed"));
            }
            End::Empty => return Ok(found),
            End::Full if bytes < MOST_BYTES => (bytes, messages) = (bytes * 4, messages * 4),
            End::Full => {
                return Err(Error::malformed("recvmsg(MSG_PEEK)", raw::name(fd), "its queue is over 1 GiB"));
            }
            End::Failed(source) => return Err(Error::new("recvmsg(MSG_PEEK)", raw::name(fd), source)),
        }
    }
}

/// Duplicates of the descriptors in the first message that has any, as far as they can be seen without touching the
/// socket; none of a socket that is peeked at with an offset, which would move.
pub fn first_descriptors(socket: impl AsFd) -> Result<Vec<OwnedFd>> {
    crate::fault::point();
    let fd = socket.as_fd();
    if sockopt::peek_offset(fd)? >= 0 {
        return Ok(Vec::new());
    }
    let mut data = vec![0; 256 << 10];
    let mut slot = Slot::EMPTY;
    match peek(fd, &mut data, &mut slot) {
        Ok(_) => Ok(own(&slot, &data).descriptors),
        Err(error) => match ended(error) {
            End::Failed(source) => Err(Error::new("recvmsg(MSG_PEEK)", raw::name(fd), source)),
            _ => Ok(Vec::new()),
        },
    }
}

/// Takes ownership of a slot's descriptors.
fn own(slot: &Slot, data: &[u8]) -> Message {
    Message {
        data: data[slot.start..slot.start + slot.length].to_vec(),
        sender: slot.sender[..slot.sender_length].to_vec(),
        // SAFETY: the helper, which shares our descriptor table, received these numbers and left them open;
        // nobody else knows them.
        descriptors: slot.descriptors[..slot.count]
            .iter()
            .map(|number| unsafe { OwnedFd::from_raw_fd(*number) })
            .collect(),
        credentials: slot.credentials,
        segment: slot.segment,
    }
}

/// In the helper: all messages, then the offset as it was. Allocates nothing.
fn look(
    fd: BorrowedFd<'_>,
    kind: raw::Kind,
    before: i32,
    data: &mut [u8],
    slots: &mut [Slot],
    used: &mut usize,
) -> End {
    if let Err(error) = raw::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0) {
        return End::Failed(error);
    }
    let end = if kind.kind == libc::SOCK_STREAM {
        look_at_stream(fd, data, slots, used)
    } else {
        look_at_messages(fd, kind, data, slots, used)
    };
    match raw::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before) {
        Ok(()) => end,
        Err(error) => End::Failed(error),
    }
}

fn look_at_messages(
    fd: BorrowedFd<'_>,
    kind: raw::Kind,
    data: &mut [u8],
    slots: &mut [Slot],
    used: &mut usize,
) -> End {
    let mut filled = 0;
    while let Some(slot) = slots.get_mut(*used) {
        slot.start = filled;
        match peek(fd, &mut data[filled..], slot) {
            Ok(truncated) => {
                let at_end = slot.length == 0
                    && (kind.kind == libc::SOCK_SEQPACKET
                        || (kind.domain != libc::AF_UNIX && slot.sender_length == 0));
                if at_end {
                    return End::Empty;
                }
                *used += 1;
                if truncated {
                    return End::Full;
                }
                filled += slot.length;
            }
            Err(error) => return ended(error),
        }
    }
    End::Full
}

fn look_at_stream(fd: BorrowedFd<'_>, data: &mut [u8], slots: &mut [Slot], used: &mut usize) -> End {
    let mut filled = 0;
    while *used + 1 < slots.len() && filled < data.len() {
        let slot = &mut slots[*used];
        slot.start = filled;
        match peek(fd, &mut data[filled..], slot) {
            Ok(_) if slot.length == 0 => return End::Empty,
            Ok(_) => {}
            Err(error) => return ended(error),
        }
        let (length, whole) = (slot.length, slot.count);
        *used += 1;
        if whole > 0 {
            match before_descriptors(fd, &mut data[filled..filled + length], filled) {
                Ok(0) => {}
                Ok(plain) => {
                    // The bytes before belong to earlier messages without descriptors.
                    let (left, right) = slots.split_at_mut(*used);
                    let (first, second) = (&mut left[*used - 1], &mut right[0]);
                    second.clone_from(first);
                    second.start += plain;
                    second.length -= plain;
                    first.length = plain;
                    first.count = 0;
                    *used += 1;
                }
                Err(error) => return End::Failed(error),
            }
        }
        filled += length;
        // The search has moved the offset.
        if let Err(error) = raw::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, filled as i32) {
            return End::Failed(error);
        }
    }
    End::Full
}

/// How many bytes of `stretch`, which begins at `offset` and ends with a message that has descriptors, come
/// before that message.
///
/// A peek whose last byte has nowhere to go fails in that message, and reports what it copied of those before.
fn before_descriptors(fd: BorrowedFd<'_>, stretch: &mut [u8], offset: usize) -> io::Result<usize> {
    raw::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset as i32)?;
    let mut vectors = [
        libc::iovec { iov_base: stretch.as_mut_ptr().cast(), iov_len: stretch.len() - 1 },
        // Never mapped (vm.mmap_min_addr); the kernel answers with EFAULT.
        libc::iovec { iov_base: std::ptr::without_provenance_mut(1), iov_len: 1 },
    ];
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = vectors.as_mut_ptr();
    header.msg_iovlen = vectors.len();
    // SAFETY: the first vector is within `stretch`; the second is unmapped, which the kernel checks.
    let answer =
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    match usize::try_from(answer) {
        Ok(plain) => Ok(plain.min(stretch.len() - 1)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
            error => Err(error),
        },
    }
}

fn ended(error: io::Error) -> End {
    match error.raw_os_error() {
        // A stream or sequenced socket that is not connected has nothing, nor has one whose peer reset it.
        Some(libc::EAGAIN | libc::ENOTCONN | libc::EINVAL | libc::ECONNRESET) => End::Empty,
        _ => End::Failed(error),
    }
}

/// One `recvmsg(MSG_PEEK)`; whether the message was longer than the room for it.
fn peek(fd: BorrowedFd<'_>, room: &mut [u8], slot: &mut Slot) -> io::Result<bool> {
    #[repr(align(8))]
    struct Control([u8; CONTROL]);
    let mut control = Control([0; CONTROL]);
    let mut vector = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = slot.sender.as_mut_ptr().cast();
    header.msg_namelen = slot.sender.len() as libc::socklen_t;
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every pointer in `header` is to a live buffer of the length given with it.
    let answer = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) };
    slot.length = usize::try_from(answer).map_err(|_| io::Error::last_os_error())?.min(room.len());
    slot.sender_length = (header.msg_namelen as usize).min(slot.sender.len());
    slot.count = 0;
    slot.credentials = None;
    slot.segment = None;
    // SAFETY: the kernel filled `control` with whole headers within msg_controllen; CMSG_NXTHDR stops there.
    let mut part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !part.is_null() {
        // SAFETY: `part` points to a header inside `control`.
        let (level, kind, length) = unsafe { ((*part).cmsg_level, (*part).cmsg_type, (*part).cmsg_len) };
        // SAFETY: the data of a header follows it.
        let data = unsafe { libc::CMSG_DATA(part) };
        let length = length.saturating_sub(data as usize - part as usize);
        match (level, kind) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                let count = (length / 4).min(MOST_DESCRIPTORS - slot.count);
                for index in 0..count {
                    // SAFETY: within the data of this header.
                    let bytes = unsafe { data.add(index * 4).cast::<[u8; 4]>().read() };
                    slot.descriptors[slot.count + index] = i32::from_ne_bytes(bytes);
                }
                slot.count += count;
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= 12 => {
                // SAFETY: the data of this header is a struct ucred of 12 bytes.
                let sender = unsafe { data.cast::<libc::ucred>().read_unaligned() };
                slot.credentials = Some((sender.pid, sender.uid, sender.gid));
            }
            (libc::SOL_UDP, libc::UDP_GRO) if length >= 2 => {
                // SAFETY: the data of this header is an int, whose first two bytes on x86 are the length (at most 65535).
                let segment = unsafe { data.cast::<u16>().read_unaligned() };
                slot.segment = (segment != 0).then_some(segment.into());
            }
            // A pidfd of the sender (SO_PASSPIDFD): ours to close.
            (libc::SOL_SOCKET, 4) if length >= 4 => {
                // SAFETY: a descriptor that we have just received; nobody else knows it.
                unsafe { libc::close(i32::from_ne_bytes(data.cast::<[u8; 4]>().read())) };
            }
            _ => {}
        }
        // SAFETY: as above.
        part = unsafe { libc::CMSG_NXTHDR(&raw const header, part) };
    }
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        // No number was free, or somebody does not allow it: what is missing would be lost.
        for number in &slot.descriptors[..std::mem::take(&mut slot.count)] {
            // SAFETY: a descriptor that we have just received; nobody else knows it.
            unsafe { libc::close(*number) };
        }
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(header.msg_flags & libc::MSG_TRUNC != 0)
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::mem::MaybeUninit;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;

    fn send(socket: &impl AsFd, data: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        rustix::net::sendmsg(socket, &[IoSlice::new(data)], &mut ancillary, SendFlags::empty()).unwrap();
    }

    #[test]
    fn messages_keep_their_boundaries_and_stay() {
        let (a, b) = UnixDatagram::pair().unwrap();
        let long = vec![7; 100_000];
        for message in [&b"one"[..], b"", &long] {
            a.send(message).unwrap();
        }
        let seen = receive_queue(&b).unwrap();
        let lengths: Vec<usize> = seen.iter().map(|message| message.data.len()).collect();
        assert_eq!(lengths, [3, 0, 100_000]);
        assert_eq!(sockopt::peek_offset(&b).unwrap(), -1);
        let mut buffer = [0; 8];
        assert_eq!(b.recv(&mut buffer).unwrap(), 3);
    }

    #[test]
    fn descriptors_in_a_stream_are_found_at_their_byte() {
        let (a, mut b) = UnixStream::pair().unwrap();
        send(&a, b"plain ", &[]);
        let other = std::fs::File::open("/dev/null").unwrap();
        send(&a, b"with one ", &[other.as_fd()]);
        send(&a, b"with two", &[other.as_fd(), other.as_fd()]);
        send(&a, b" end", &[]);
        let seen = receive_queue(&b).unwrap();
        let text: Vec<(&[u8], usize)> =
            seen.iter().map(|message| (&message.data[..], message.descriptors.len())).collect();
        assert_eq!(text, [(&b"plain "[..], 0), (b"with one ", 1), (b"with two", 2), (b" end", 0)]);
        drop(a);
        let mut all = String::new();
        b.read_to_string(&mut all).unwrap();
        assert_eq!(all, "plain with one with two end");
        assert_eq!(receive_queue(&b).unwrap().len(), 0);
    }

    #[test]
    fn the_first_descriptors_are_found_without_a_trace() {
        let (a, mut b) = UnixStream::pair().unwrap();
        assert_eq!(first_descriptors(&b).unwrap().len(), 0);
        let other = std::fs::File::open("/dev/null").unwrap();
        send(&a, b"plain ", &[]);
        send(&a, b"two ", &[other.as_fd(), other.as_fd()]);
        send(&a, b"one", &[other.as_fd()]);
        for _ in 0..2 {
            assert_eq!(first_descriptors(&b).unwrap().len(), 2);
        }
        sockopt::set_peek_offset(&b, 1).unwrap();
        assert_eq!(first_descriptors(&b).unwrap().len(), 0);
        assert_eq!(sockopt::peek_offset(&b).unwrap(), 1);
        drop(a);
        let mut all = String::new();
        b.read_to_string(&mut all).unwrap();
        assert_eq!(all, "plain two one");
    }

    #[test]
    fn a_long_stream_needs_a_second_try() {
        let (mut a, b) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size_force(&a, 4 << 20).unwrap();
        let data: Vec<u8> = (0..1_000_000_u32).map(|at| (at * 7 / 3) as u8).collect();
        a.write_all(&data).unwrap();
        let seen: Vec<u8> = receive_queue(&b).unwrap().into_iter().flat_map(|message| message.data).collect();
        assert!(seen == data);
    }
}
