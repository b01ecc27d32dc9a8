//! A checkpoint as data: its files, integrity and versions. This crate knows no process.
//!
//! ```text
//! NAME/              0700; every file 0600
//!   manifest         identity, needs, the table of sections, length and digest of every other file
//!   state            the sections, one CBOR value after the other
//!   memory.index     extents: which memory is where in memory.pages; CRC32C of every MiB
//!   memory.pages     page data
//!   blobs/NAME       byte streams (a deleted file's content, a writable layer), only if there are any
//! ```
//!
//! The layout of each file heads its module, and `docs/format.md` has all of it.
//!
//! - [`Sink`] is where a checkpoint goes while it is captured: [`CheckpointWriter`] (a directory that
//!   appears by one rename when it is complete and durable), [`Staging`] (memory), or a peer.
//! - [`Checkpoint`] is one that is read. [`Checkpoint::open`] checks manifest, state and index; pages and
//!   blobs are checked as they are read; [`verify`] checks all.
//!
//! Reading a checkpoint is reading hostile input: every length, count, name and number is checked before
//! it is used, no link is followed, and nothing is allocated that the files are not large enough for.

mod blob;
pub mod cbor;
mod checkpoint;
mod describe;
mod durable;
mod error;
mod index;
mod manifest;
mod name;
mod pages;
mod sink;
mod staging;
mod verify;
mod writer;

pub use blob::BlobReader;
pub use checkpoint::{Checkpoint, ReadWatch};
pub use describe::{BlobSize, Description, SectionSize, SpaceSize};
pub use error::{OpenError, ReadError, VerifyError, WriteError};
pub use index::{CHUNK, Extent, PAGE, SpaceId};
pub use manifest::{
    CheckpointId, Digest, FORMAT_VERSION, FileEntry, Manifest, Meta, ParseHexError, SectionEntry,
};
pub use name::{MAX_NAME, is_valid as is_valid_name};
pub use sink::{Sink, Stage, put};
pub use staging::Staging;
pub use verify::{VerifyReport, verify};
/// The checks of a `memory.index`, alone, for fuzzing. Returns the number of extents.
#[doc(hidden)]
pub fn check_index(bytes: &[u8], pages_length: u64) -> Result<usize, OpenError> {
    index::Index::from_bytes(bytes, pages_length).map(|index| index.extents.len())
}

pub use writer::{CheckpointWriter, Committed};
