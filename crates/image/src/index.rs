//! `memory.index`: which memory is where in `memory.pages`, and its checksums.
//!
//! ```text
//! header, 48 bytes                    extent, 40 bytes each, in the order of (space, start)
//!  0  8  magic "LIMOSAIX"              0  4  space
//!  8  4  version, 1                    4  4  flags, 0
//! 12  4  reserved, 0                   8  8  start: address, or offset in the object
//! 16  8  number of extents            16  8  length
//! 24  8  number of checksums          24  8  offset in memory.pages
//! 32  8  length of memory.pages       32  8  number of its first checksum
//! 40  8  reserved, 0
//!                                     then the checksums: CRC32C, 4 bytes each
//! ```
//!
//! All numbers are little-endian; starts, lengths and offsets are multiples of 4096. An extent of
//! n bytes has ⌈n / 1 MiB⌉ checksums, one for each MiB from its beginning. Extents overlap neither in
//! their space nor in `memory.pages`; what no extent covers in `memory.pages` is zero.
//! The index has the version of the manifest that lists its digest.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::OpenError;
use crate::manifest::{FORMAT_VERSION, INDEX};

/// The page size of the format, in bytes.
pub const PAGE: u64 = 4096;
/// How many bytes of an extent one checksum covers.
pub const CHUNK: u64 = 1 << 20;

/// No index is larger: 1 GiB, which is 24 million extents.
pub(crate) const MAX_INDEX: u64 = 1 << 30;

const MAGIC: [u8; 8] = *b"LIMOSAIX";

/// The number of an address space or shared-memory object within one checkpoint. What it stands for is
/// told by the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SpaceId(pub u32);

impl fmt::Display for SpaceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    extents: U64,
    checksums: U64,
    pages_length: U64,
    reserved2: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Record {
    space: U32,
    flags: U32,
    start: U64,
    length: U64,
    offset: U64,
    first_checksum: U64,
}

/// A run of pages that is contiguous in its space and in `memory.pages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Whose memory it is.
    pub space: SpaceId,
    /// The address of its first byte, or its offset in the shared-memory object; page-aligned.
    pub start: u64,
    /// Its length in bytes; a positive number of pages.
    pub length: u64,
    /// Where it begins in `memory.pages`; page-aligned.
    pub offset: u64,
    pub(crate) first_checksum: u64,
}

impl Extent {
    /// The byte after its last.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// How many checksums it has.
    pub(crate) fn chunks(&self) -> u64 {
        self.length.div_ceil(CHUNK)
    }
}

/// A checked index.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// In the order of (space, start).
    pub(crate) extents: Vec<Extent>,
    pub(crate) checksums: Vec<u32>,
    pub(crate) pages_length: u64,
    /// Whether the pages are compared with the checksums, which there are only then.
    pub(crate) checked: bool,
}

impl Index {
    /// The length of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        (size_of::<Header>() + self.extents.len() * size_of::<Record>() + self.checksums.len() * 4) as u64
    }

    /// The file's bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let header = Header {
            magic: MAGIC,
            version: U32::new(FORMAT_VERSION),
            reserved: U32::new(0),
            extents: U64::new(self.extents.len() as u64),
            checksums: U64::new(self.checksums.len() as u64),
            pages_length: U64::new(self.pages_length),
            reserved2: U64::new(0),
        };
        let mut bytes = Vec::with_capacity(self.size() as usize);
        bytes.extend_from_slice(header.as_bytes());
        for extent in &self.extents {
            let record = Record {
                space: U32::new(extent.space.0),
                flags: U32::new(0),
                start: U64::new(extent.start),
                length: U64::new(extent.length),
                offset: U64::new(extent.offset),
                first_checksum: U64::new(extent.first_checksum),
            };
            bytes.extend_from_slice(record.as_bytes());
        }
        self.checksums.iter().for_each(|checksum| bytes.extend_from_slice(&checksum.to_le_bytes()));
        bytes
    }

    /// Reads the file's bytes, for a `memory.pages` of `pages_length` bytes.
    pub(crate) fn from_bytes(bytes: &[u8], pages_length: u64) -> Result<Self, OpenError> {
        let short = || malformed(bytes.len(), format!("it ends after {} bytes", bytes.len()));
        let (header, rest) = Header::read_from_prefix(bytes).map_err(|_| short())?;
        check_header(&header, rest.len(), pages_length)?;
        // check_header has shown that the counts fit the length exactly, so they fit usize too.
        let (records, checksums) = rest.split_at(header.extents.get() as usize * size_of::<Record>());
        let records = <[Record]>::ref_from_bytes(records).map_err(|_| short())?;
        let checksums = checksums
            .chunks_exact(4)
            .map(|bytes| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
            .collect::<Vec<_>>();
        let mut extents = Vec::with_capacity(records.len());
        for (number, record) in records.iter().enumerate() {
            let offset = size_of::<Header>() + number * size_of::<Record>();
            let extent = check_record(record, pages_length, checksums.len() as u64)
                .map_err(|reason| malformed(offset, reason))?;
            let in_order = extents.last().is_none_or(|last: &Extent| {
                last.space < extent.space || (last.space == extent.space && last.end() <= extent.start)
            });
            if !in_order {
                return Err(malformed(
                    offset,
                    "the extent overlaps the one before it or is out of order".into(),
                ));
            }
            extents.push(extent);
        }
        let index = Self { extents, checksums, pages_length, checked: true };
        index.check_disjoint()?;
        Ok(index)
    }

    /// No byte of `memory.pages`, and no checksum, belongs to two extents.
    fn check_disjoint(&self) -> Result<(), OpenError> {
        let overlap = |file, (one, other): (&Extent, &Extent)| {
            let reason = format!(
                "the extents at {:#x} of space {} and at {:#x} of space {} overlap in {file}",
                one.start, one.space, other.start, other.space
            );
            malformed(0, reason)
        };
        let order = self.by_offset();
        for pair in order.windows(2) {
            if pair[0].offset + pair[0].length > pair[1].offset {
                return Err(overlap("memory.pages", (pair[0], pair[1])));
            }
        }
        let mut order = order;
        order.sort_unstable_by_key(|extent| extent.first_checksum);
        for pair in order.windows(2) {
            if pair[0].first_checksum + pair[0].chunks() > pair[1].first_checksum {
                return Err(overlap("the checksums", (pair[0], pair[1])));
            }
        }
        Ok(())
    }

    fn by_offset(&self) -> Vec<&Extent> {
        let mut order = self.extents.iter().collect::<Vec<_>>();
        order.sort_unstable_by_key(|extent| extent.offset);
        order
    }

    /// The ranges of `memory.pages` that belong to no extent.
    pub(crate) fn gaps(&self) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut end = 0;
        for extent in self.by_offset() {
            if extent.offset > end {
                gaps.push(end..extent.offset);
            }
            end = extent.offset + extent.length;
        }
        if end < self.pages_length {
            gaps.push(end..self.pages_length);
        }
        gaps
    }

    /// The extents of `space`.
    pub(crate) fn of(&self, space: SpaceId) -> &[Extent] {
        let begin = self.extents.partition_point(|extent| extent.space < space);
        let end = self.extents.partition_point(|extent| extent.space <= space);
        &self.extents[begin..end]
    }
}

fn malformed(offset: usize, reason: String) -> OpenError {
    OpenError::Malformed { file: INDEX.into(), offset: offset as u64, reason }
}

fn check_header(header: &Header, rest: usize, pages_length: u64) -> Result<(), OpenError> {
    if header.magic != MAGIC {
        return Err(malformed(0, "it does not begin as a memory index does".into()));
    }
    if header.version.get() != FORMAT_VERSION {
        let found = header.version.get();
        return Err(OpenError::Version { file: INDEX.into(), found, supported: FORMAT_VERSION });
    }
    let (extents, checksums) = (header.extents.get(), header.checksums.get());
    let expected = extents
        .checked_mul(size_of::<Record>() as u64)
        .and_then(|size| checksums.checked_mul(4)?.checked_add(size));
    if expected != Some(rest as u64) {
        let reason = format!("{extents} extents and {checksums} checksums do not make {rest} bytes");
        return Err(malformed(16, reason));
    }
    if header.pages_length.get() != pages_length {
        let reason =
            format!("it is for {} bytes of pages, the manifest has {pages_length}", header.pages_length);
        return Err(malformed(32, reason));
    }
    Ok(())
}

fn check_record(record: &Record, pages_length: u64, checksums: u64) -> Result<Extent, String> {
    let extent = Extent {
        space: SpaceId(record.space.get()),
        start: record.start.get(),
        length: record.length.get(),
        offset: record.offset.get(),
        first_checksum: record.first_checksum.get(),
    };
    let Extent { start, length, offset, first_checksum, .. } = extent;
    if record.flags.get() != 0 {
        return Err(format!("the extent has the unknown flags {:#x}", record.flags));
    }
    if length == 0 || [start, length, offset].iter().any(|number| !number.is_multiple_of(PAGE)) {
        return Err(format!("{length} bytes at {start:#x}, stored at {offset:#x}, are not whole pages"));
    }
    if start.checked_add(length).is_none() {
        return Err(format!("{length} bytes at {start:#x} end beyond any address"));
    }
    if offset.checked_add(length).is_none_or(|end| end > pages_length) {
        return Err(format!(
            "{length} bytes at {offset} are not inside of the {pages_length} of memory.pages"
        ));
    }
    if first_checksum.checked_add(extent.chunks()).is_none_or(|end| end > checksums) {
        return Err(format!("its checksums from {first_checksum} on are not among the {checksums}"));
    }
    Ok(extent)
}

#[cfg(test)]
mod tests;
