//! Where a checkpoint goes while it is captured: a directory, memory, or a peer.

use std::collections::BTreeSet;
use std::io::Read;

use serde::Serialize;

use crate::cbor;
use crate::error::WriteError;
use crate::index::{PAGE, SpaceId};
use crate::manifest::SectionEntry;
use crate::name;

/// All sections together are no larger: 1 GiB.
pub(crate) const MAX_STATE: u64 = 1 << 30;

/// Where a source is that is being captured: told to a [`Sink`] for whoever watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It runs, and its memory is being stored.
    Round {
        /// How many times now, from 1.
        number: u32,
        /// Bytes that were written again since the round before; unknown in the first.
        left: Option<u64>,
    },
    /// It stands still.
    Frozen,
}

/// Where the engine puts a checkpoint while it captures it.
pub trait Sink {
    /// Adds the section `name`, a single CBOR value. [`put`] encodes it.
    fn state(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError>;

    /// Adds whole pages of `space`, from the address or object offset `start` on.
    ///
    /// Calls that continue the one before become one extent. Pages given again replace the former ones.
    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError>;

    /// Takes pages that were given before out again, and need not have been: they are not in the checkpoint, unless they are
    /// given once more.
    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError>;

    /// Takes note of where the source is. Nothing of it is in the checkpoint.
    fn stage(&mut self, _: Stage) {}

    /// Adds the blob `name` with everything that `content` yields; returns its length in bytes.
    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError>;
}

/// Encodes `value` as CBOR and adds it as the section `name`.
pub fn put<T: Serialize + ?Sized>(sink: &mut dyn Sink, name: &str, value: &T) -> Result<(), WriteError> {
    let cbor = cbor::encode(value).map_err(|source| WriteError::Encode { name: name.into(), source })?;
    sink.state(name, &cbor)
}

/// The sections collected so far, as the `state` file will hold them.
#[derive(Default)]
pub(crate) struct Sections {
    pub(crate) table: Vec<SectionEntry>,
    pub(crate) bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Sections {
    pub(crate) fn add(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        let length = (self.bytes.len() + cbor.len()) as u64;
        if length > MAX_STATE {
            return Err(WriteError::TooLarge { what: "the state", length, limit: MAX_STATE });
        }
        claim_name(&mut self.names, "section", name)?;
        self.bytes.extend_from_slice(cbor);
        self.table.push(SectionEntry { name: name.into(), length: cbor.len() as u64 });
        Ok(())
    }
}

/// Checks that `name` is one, and takes it.
pub(crate) fn claim_name(
    names: &mut BTreeSet<String>,
    kind: &'static str,
    name: &str,
) -> Result<(), WriteError> {
    if !name::is_valid(name) {
        return Err(WriteError::Name(name.chars().take(2 * name::MAX_NAME).collect()));
    }
    if !names.insert(name.into()) {
        return Err(WriteError::Twice { kind, name: name.into() });
    }
    Ok(())
}

/// Checks that `length` bytes at `start` are whole pages of an address space.
pub(crate) fn check_pages(space: SpaceId, start: u64, length: usize) -> Result<(), WriteError> {
    let length = length as u64;
    if !start.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) || start.checked_add(length).is_none() {
        return Err(WriteError::NotPages { space, start, length });
    }
    Ok(())
}
