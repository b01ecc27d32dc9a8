//! What can go wrong when a checkpoint is written, opened, read and verified: one enum for each.

use std::io;
use std::path::PathBuf;

use crate::cbor::{DecodeError, EncodeError};
use crate::index::SpaceId;

/// A checkpoint that could not be written. Nothing of it remains once the writer is dropped.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Whoever writes was told to stop.
    #[error("interrupted by signal {signal}")]
    Interrupted {
        /// Its number.
        signal: i32,
    },
    /// The filesystem is full, or a quota is used up (`ENOSPC`, `EDQUOT`).
    #[error(
        "no space left for {} after {written} bytes of it: free space on that filesystem, or write the \
         checkpoint to another one", file.display()
    )]
    NoSpace {
        /// The file that did not fit.
        file: PathBuf,
        /// How many bytes of it were written before.
        written: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Any other answer of the kernel.
    #[error("{operation} on {} failed: {source}", file.display())]
    Io {
        /// The operation, as its manual page names it.
        operation: &'static str,
        /// The file or directory it was done to.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is something at the checkpoint's place already.
    #[error("{} exists and is not an empty directory: choose another place or remove it", .0.display())]
    Exists(PathBuf),
    /// The checkpoint's path ends in no name (`/`, `..`).
    #[error("{} does not end in a name that the checkpoint could get", .0.display())]
    NoName(PathBuf),
    /// A name outside of `[a-z0-9._-]{1,128}` or one that begins with a dot.
    #[error("{0:?} cannot name a section or blob: use 1 to 128 of a-z 0-9 . _ -, not beginning with a dot")]
    Name(String),
    /// The section or blob has been written before.
    #[error("the {kind} {name} has been written before")]
    Twice {
        /// `section` or `blob`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// Pages that are not whole, or lie beyond the end of the address space.
    #[error("space {space}: {length} bytes at {start:#x} are not whole pages")]
    NotPages {
        /// The address space or object.
        space: SpaceId,
        /// The address or offset.
        start: u64,
        /// The length in bytes.
        length: u64,
    },
    /// A value that cannot be encoded.
    #[error("section {name}: {source}")]
    Encode {
        /// The section.
        name: String,
        /// Why not.
        #[source]
        source: EncodeError,
    },
    /// More state than a checkpoint may hold.
    #[error("{what} would be {length} bytes long, the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its length in bytes.
        length: u64,
        /// The most it may be.
        limit: u64,
    },
    /// The content of a blob could not be read from where it comes from.
    #[error("the content of blob {name} could not be read: {source}")]
    Content {
        /// The blob.
        name: String,
        /// What its source said.
        #[source]
        source: io::Error,
    },
    /// The checkpoint that was being copied is damaged.
    #[error("the checkpoint that is being copied cannot be read: {0}")]
    Copy(#[source] Box<ReadError>),
    /// A sink that is not a file refused: a peer that closed the connection, for instance.
    #[error("sending {what} to the peer failed: {source}")]
    Peer {
        /// What was being sent.
        what: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl WriteError {
    /// The error of `operation` on `file`, of which `written` bytes were there already.
    pub(crate) fn io(
        operation: &'static str,
        file: impl Into<PathBuf>,
        written: u64,
        source: impl Into<io::Error>,
    ) -> Self {
        let (file, source) = (file.into(), source.into());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { file, written, source }
            }
            _ => Self::Io { operation, file, source },
        }
    }
}

/// A directory that is not a checkpoint this program can use.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path, or no directory.
    #[error("there is no checkpoint {}: {source}", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The directory is no checkpoint, or one that was never finished.
    #[error("{} is not a checkpoint: it has no manifest, which is written last", path.display())]
    NoManifest {
        /// The directory.
        path: PathBuf,
    },
    /// A file that cannot be opened or read.
    #[error("{operation} on {} failed: {source}", file.display())]
    Io {
        /// The operation, as its manual page names it.
        operation: &'static str,
        /// The file or directory.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A format that this program does not know.
    #[error(
        "{} has format version {found}, this program reads up to {supported}: use a Limosa that knows \
         version {found}", file.display()
    )]
    Version {
        /// The file that says so.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version this program knows.
        supported: u32,
    },
    /// A file whose content is wrong.
    #[error("{}, byte {offset}: {reason}", file.display())]
    Malformed {
        /// The file, below the checkpoint's directory.
        file: PathBuf,
        /// Where in the file the fault was found, in bytes.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A file whose length is not the one that the manifest gives.
    #[error("{} is {found} bytes long and should be {expected}: it is damaged or incomplete", file.display())]
    Length {
        /// The file, below the checkpoint's directory.
        file: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length that the manifest gives.
        expected: u64,
    },
    /// A file whose content is not the one that the manifest gives a digest of.
    #[error("{}: its {length} bytes do not match their digest in the manifest: it is damaged", file.display())]
    Digest {
        /// The file, below the checkpoint's directory.
        file: PathBuf,
        /// Its length in bytes; the fault is somewhere in it.
        length: u64,
    },
}

/// A part of an opened checkpoint that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Whoever reads was told to stop.
    #[error("interrupted by signal {signal}")]
    Interrupted {
        /// Its number.
        signal: i32,
    },
    /// There is no such section.
    #[error("the checkpoint has no section {0}")]
    NoSection(String),
    /// There is no such blob.
    #[error("the checkpoint has no blob {0}")]
    NoBlob(String),
    /// A section that does not decode as the expected type.
    #[error("state, section {name} at byte {offset}: {source}")]
    Decode {
        /// The section.
        name: String,
        /// Where in the `state` file the section begins.
        offset: u64,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// A range that is not inside of its extent, or a buffer of another length.
    #[error(
        "bytes {start} to {end} are not a range of an extent of {length} bytes, or not the buffer's length"
    )]
    Range {
        /// The range's first byte, from the extent's beginning.
        start: u64,
        /// The byte after its last.
        end: u64,
        /// The extent's length.
        length: u64,
    },
    /// Page data that does not match its checksum.
    #[error(
        "memory.pages, byte {offset}: {length} bytes (space {space}, {start:#x}) do not match their \
         checksum: they are damaged"
    )]
    Checksum {
        /// Where in `memory.pages` the damaged chunk begins.
        offset: u64,
        /// The chunk's length in bytes; the fault is somewhere in it.
        length: u64,
        /// Whose memory it is.
        space: SpaceId,
        /// Its address or object offset.
        start: u64,
    },
    /// A blob that does not match its digest.
    #[error("{}: its {length} bytes do not match their digest in the manifest: it is damaged", file.display())]
    Digest {
        /// The file, below the checkpoint's directory.
        file: PathBuf,
        /// Its length in bytes; the fault is somewhere in it.
        length: u64,
    },
    /// A file whose length is not the one that the manifest gives.
    #[error("{} is {found} bytes long and should be {expected}: it is damaged or incomplete", file.display())]
    Length {
        /// The file, below the checkpoint's directory.
        file: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length that the manifest gives.
        expected: u64,
    },
    /// The kernel refused to read.
    #[error("reading {} at byte {offset} failed: {source}", file.display())]
    Io {
        /// The file, below the checkpoint's directory.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A checkpoint that is not whole.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Some of it cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file that no checkpoint has, or that the manifest does not list.
    #[error("{} is not a file of this checkpoint: remove it", .0.display())]
    Unexpected(PathBuf),
    /// Bytes of `memory.pages` that belong to no extent are not zero.
    #[error("memory.pages, byte {offset}: it belongs to no extent and should be zero: it is damaged")]
    NotZero {
        /// Where in `memory.pages`.
        offset: u64,
    },
}

/// Random bytes from the kernel.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            // getrandom(2) has no other error with a valid buffer and no flags; without it, no identity.
            Err(error) => panic!("getrandom: {error}"),
        }
    }
    bytes
}
