//! Frames: how messages lie on a byte stream.
//!
//! A connection begins, in each direction, with the eight bytes [`PREAMBLE`]; then follow frames:
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 4 | length of the payload in bytes, little endian |
//! | 4 | 1 | kind of message ([`Kind`]) |
//! | 5 | 3 | reserved, zero |
//! | 8 | 4 | CRC-32C of the eight bytes above and of the payload, little endian |
//! | 12 | length | payload |
//!
//! This layout, the preamble and the message `Hello` are the same in every version of the protocol; everything else
//! may change with the version that the two sides agree on (see [`crate::version`]). Each kind has a greatest
//! length, checked before a buffer is made for the payload.

use std::io::{self, Read};

/// The first bytes in each direction. The line ending tells a stream that something translates from a clean one.
pub const PREAMBLE: [u8; 8] = *b"LIMOSA\r\n";
/// Bytes of a frame before its payload.
pub const HEADER_BYTES: usize = 12;
/// The most content (memory, state, a file) that one frame carries, in bytes.
pub const MAX_DATA: usize = 1 << 20;
/// The longest payload of a control message, in bytes.
pub const MAX_CONTROL: usize = 256 << 10;
/// Bytes of a `Pages` payload before the memory: space (4), reserved (4), start address (8).
pub const PAGES_HEAD: usize = 16;

/// What a frame means. The numbers are the ones on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Both: who I am, which versions I speak.
    Hello = 1,
    /// Source: what I would send.
    Offer = 2,
    /// Destination: send it.
    Accept = 3,
    /// Destination: no, for these reasons.
    Refuse = 4,
    /// Source: a piece of state with this name and length begins.
    State = 5,
    /// Source: content of the state.
    StateData = 6,
    /// Source: memory of one address space.
    Pages = 7,
    /// Source: a blob (the content of a file) with this name begins.
    Blob = 8,
    /// Source: content of the blob.
    BlobData = 9,
    /// Source: the blob is complete.
    BlobEnd = 10,
    /// Source: this was everything, and this is its digest.
    End = 11,
    /// Destination: everything is built; nothing runs.
    Ready = 12,
    /// Destination: I give up; the container stays yours.
    Failed = 13,
    /// Source: from here on it is yours.
    HandOver = 14,
    /// Destination: it runs.
    Started = 15,
    /// Destination: it does not run here and never will.
    NotStarted = 16,
    /// Source: I have recorded the outcome.
    Done = 17,
    /// Source: I give up; forget it.
    Abort = 18,
    /// Both: are you there?
    Beat = 19,
    /// Both: yes; answers one `Beat`.
    Echo = 20,
    /// Source, on a new connection: what became of this migration?
    Ask = 21,
    /// Destination: this.
    Answer = 22,
    /// Source: memory that was sent before is not there any more. Since version 2.
    Gone = 23,
}

impl Kind {
    const ALL: [Self; 23] = [
        Self::Hello,
        Self::Offer,
        Self::Accept,
        Self::Refuse,
        Self::State,
        Self::StateData,
        Self::Pages,
        Self::Blob,
        Self::BlobData,
        Self::BlobEnd,
        Self::End,
        Self::Ready,
        Self::Failed,
        Self::HandOver,
        Self::Started,
        Self::NotStarted,
        Self::Done,
        Self::Abort,
        Self::Beat,
        Self::Echo,
        Self::Ask,
        Self::Answer,
        Self::Gone,
    ];

    /// The kind with this number on the wire.
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number.checked_sub(1)?)).copied()
    }

    /// The longest payload of this kind, in bytes.
    pub fn max_payload(self) -> usize {
        match self {
            Self::StateData | Self::BlobData => MAX_DATA,
            Self::Pages => MAX_DATA + PAGES_HEAD,
            Self::Beat | Self::Echo => 8,
            Self::Gone => PAGES_HEAD + 8,
            _ => MAX_CONTROL,
        }
    }

    /// Whether the frame carries a part of the checkpoint, and so counts in its digest.
    pub fn is_content(self) -> bool {
        matches!(
            self,
            Self::State
                | Self::StateData
                | Self::Pages
                | Self::Gone
                | Self::Blob
                | Self::BlobData
                | Self::BlobEnd
        )
    }
}

/// The header of one frame, as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header(pub [u8; HEADER_BYTES]);

impl Header {
    /// The header for a payload that is given in parts.
    pub fn new(kind: Kind, parts: &[&[u8]]) -> Self {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        debug_assert!(length <= kind.max_payload(), "{kind:?} of {length} bytes");
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
        bytes[4] = kind as u8;
        let start = crc32c::crc32c(&bytes[..8]);
        let sum = parts.iter().fold(start, |sum, part| crc32c::crc32c_append(sum, part));
        bytes[8..].copy_from_slice(&sum.to_le_bytes());
        Self(bytes)
    }

    /// Kind and payload length, checked against the kind's limit.
    pub fn parse(&self) -> Result<(Kind, usize), FrameError> {
        let [l0, l1, l2, l3, number, r0, r1, r2, ..] = self.0;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if [r0, r1, r2] != [0; 3] {
            return Err(FrameError::Reserved { bytes: [r0, r1, r2] });
        }
        let kind = Kind::from_wire(number).ok_or(FrameError::UnknownKind { number })?;
        let limit = kind.max_payload();
        if length > limit {
            return Err(FrameError::TooLong { kind, length, limit });
        }
        Ok((kind, length))
    }

    /// Whether the checksum belongs to this header and payload.
    pub fn matches(&self, payload: &[u8]) -> bool {
        let sum = crc32c::crc32c_append(crc32c::crc32c(&self.0[..8]), payload);
        self.0[8..] == sum.to_le_bytes()
    }
}

/// One frame that was read: its checksum holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it means.
    pub kind: Kind,
    /// The header as it was on the wire.
    pub header: Header,
    /// The payload.
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended between two frames.
    #[error("the connection was closed by the other side")]
    Closed,
    /// The stream ended inside a frame.
    #[error("the connection was cut inside a message")]
    Truncated,
    /// The first bytes are not those of this protocol; `said` is their printable beginning.
    #[error(
        "the other side does not speak Limosa's protocol; it said {said:?}. Is `limosa` installed there, and does a \
         login script print text?"
    )]
    NotLimosa {
        /// The printable part of what was read.
        said: String,
    },
    /// The kind is none that this version knows.
    #[error("a message of unknown kind {number}")]
    UnknownKind {
        /// The number on the wire.
        number: u8,
    },
    /// The reserved bytes are not zero.
    #[error("reserved bytes of a message are {bytes:02x?} instead of zero")]
    Reserved {
        /// The three bytes.
        bytes: [u8; 3],
    },
    /// The payload is longer than its kind allows.
    #[error("a {kind:?} message of {length} bytes; the most allowed is {limit}")]
    TooLong {
        /// The kind.
        kind: Kind,
        /// The length claimed, in bytes.
        length: usize,
        /// The kind's limit, in bytes.
        limit: usize,
    },
    /// The checksum is wrong: the data was damaged on its way.
    #[error("a {kind:?} message of {length} bytes was damaged on its way (its CRC-32C is wrong)")]
    Damaged {
        /// The kind.
        kind: Kind,
        /// The payload's length, in bytes.
        length: usize,
    },
    /// Reading failed.
    #[error("reading from the connection")]
    Io(#[source] io::Error),
}

/// Reads [`PREAMBLE`].
pub fn read_preamble(stream: &mut impl Read) -> Result<(), FrameError> {
    let mut bytes = [0; PREAMBLE.len()];
    let mut have = 0;
    while have < bytes.len() {
        match stream.read(&mut bytes[have..]) {
            Ok(0) if have == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(FrameError::Truncated),
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Io(error)),
        }
        if bytes[..have] != PREAMBLE[..have] {
            return Err(FrameError::NotLimosa { said: excerpt(&bytes[..have], stream) });
        }
    }
    Ok(())
}

/// What a stream that is not ours says, for the error message: `first`, and what follows at once.
fn excerpt(first: &[u8], stream: &mut impl Read) -> String {
    let mut said = first.to_vec();
    let mut more = [0; 200];
    if let Ok(length) = stream.read(&mut more) {
        said.extend_from_slice(&more[..length]);
    }
    crate::message::printable(&String::from_utf8_lossy(&said))
}

/// Reads one frame; `buffer` is reused for the payload.
pub fn read_frame(stream: &mut impl Read, mut buffer: Vec<u8>) -> Result<Frame, FrameError> {
    let mut header = Header([0; HEADER_BYTES]);
    match stream.read(&mut header.0).map_err(FrameError::Io)? {
        0 => return Err(FrameError::Closed),
        have => fill(stream, &mut header.0[have..])?,
    }
    let (kind, length) = header.parse()?;
    // Not cleared first: only what the buffer grows by is zeroed.
    buffer.resize(length, 0);
    fill(stream, &mut buffer)?;
    if !header.matches(&buffer) {
        return Err(FrameError::Damaged { kind, length });
    }
    Ok(Frame { kind, header, payload: buffer })
}

fn fill(stream: &mut impl Read, bytes: &mut [u8]) -> Result<(), FrameError> {
    stream.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => FrameError::Truncated,
        _ => FrameError::Io(error),
    })
}
