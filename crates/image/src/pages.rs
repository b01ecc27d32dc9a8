//! Writing `memory.pages`: buffered, checksummed on the way, each page at most once in the file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use limosa_kernel::fault;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::error::WriteError;
use crate::index::{CHUNK, Extent, Index, MAX_INDEX, SpaceId};
use crate::sink::check_pages;

/// How much is collected before it is written: large enough that system calls do not count, small enough
/// to stay in the cache.
const BUFFER: usize = 512 << 10;
/// From here on data is written where it lies.
const DIRECT: usize = 256 << 10;

/// An extent that is still growing.
struct Piece {
    length: u64,
    offset: u64,
    checksums: Vec<u32>,
}

/// The file `memory.pages` and its index, while they are made.
pub(crate) struct PageStore {
    file: File,
    path: PathBuf,
    /// The length of the file once the buffer is written.
    length: u64,
    buffer: Vec<u8>,
    /// By space and start.
    pieces: BTreeMap<(SpaceId, u64), Piece>,
    /// Chunks (by their piece and number) that were overwritten, so that their checksums are wrong.
    stale: BTreeSet<(SpaceId, u64, u64)>,
    /// Whether there are checksums at all.
    checked: bool,
}

impl PageStore {
    /// An empty store in `file`, which is readable, and is called `path` in errors.
    pub(crate) fn new(file: File, path: PathBuf) -> Self {
        Self {
            file,
            path,
            length: 0,
            buffer: Vec::new(),
            pieces: BTreeMap::new(),
            stale: BTreeSet::new(),
            checked: true,
        }
    }

    /// The same without checksums, for a file that nobody else can change. To compute them anew for a few pages that were
    /// overwritten takes reading the MiB that each is in.
    pub(crate) fn unchecked(file: File, path: PathBuf) -> Self {
        Self { checked: false, ..Self::new(file, path) }
    }

    /// Adds whole pages; those that are there already are overwritten in place.
    pub(crate) fn add(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        check_pages(space, start, data.len())?;
        let (mut start, mut data) = (start, data);
        while !data.is_empty() {
            let before = self.pieces.range(..=(space, start)).next_back();
            let before =
                before.filter(|((owner, _), _)| *owner == space).map(|((_, at), piece)| (*at, piece));
            let count = match before {
                Some((at, piece)) if at + piece.length > start => {
                    let count = data.len().min((at + piece.length - start) as usize);
                    let offset = piece.offset + (start - at);
                    self.overwrite((space, at), start - at, offset, &data[..count])?;
                    count
                }
                _ => {
                    let before = before.map(|(at, _)| at);
                    let next = self.pieces.range((space, start)..).next();
                    let free = match next {
                        Some(((owner, at), _)) if *owner == space => (at - start) as usize,
                        _ => usize::MAX,
                    };
                    let count = data.len().min(free);
                    self.append(space, before, start, &data[..count])?;
                    count
                }
            };
            start += count as u64;
            data = &data[count..];
        }
        Ok(())
    }

    /// Adds pages at the end of the file, to the piece that begins at `before` if they continue it.
    fn append(
        &mut self,
        space: SpaceId,
        before: Option<u64>,
        start: u64,
        data: &[u8],
    ) -> Result<(), WriteError> {
        let continued = before.filter(|at| {
            self.pieces
                .get(&(space, *at))
                .is_some_and(|piece| at + piece.length == start && piece.offset + piece.length == self.length)
        });
        self.write(data)?;
        let offset = self.length;
        self.length += data.len() as u64;
        self.pieces
            .entry((space, continued.unwrap_or(start)))
            .or_insert_with(|| Piece { length: 0, offset, checksums: Vec::new() })
            .grow(data, self.checked);
        Ok(())
    }

    /// Replaces the bytes from `at` on of the piece `key`, which are at `offset` in the file.
    fn overwrite(
        &mut self,
        key: (SpaceId, u64),
        at: u64,
        offset: u64,
        data: &[u8],
    ) -> Result<(), WriteError> {
        self.flush()?;
        write_at(&self.file, &self.path, offset, data)?;
        let last = (at + data.len() as u64 - 1) / CHUNK;
        if !self.checked {
            return Ok(());
        }
        self.stale.extend((at / CHUNK..=last).map(|chunk| (key.0, key.1, chunk)));
        Ok(())
    }

    /// Takes pages out again; those that are not there need not be.
    pub(crate) fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        check_pages(space, start, usize::try_from(length).unwrap_or(usize::MAX))?;
        let end = start + length;
        let before = self.pieces.range(..(space, start)).next_back();
        let before = before.filter(|((owner, at), piece)| *owner == space && at + piece.length > start);
        let first = before.map_or(start, |((_, at), _)| *at);
        let hit: Vec<u64> = self.pieces.range((space, first)..(space, end)).map(|((_, at), _)| *at).collect();
        for at in hit {
            let Some(piece) = self.pieces.remove(&(space, at)) else { continue };
            let (from, to) = (start.max(at) - at, (end - at).min(piece.length));
            let (next, rest) = (piece.offset + from, to - from);
            self.keep(space, at, &piece, 0, from);
            // What begins within a chunk has no checksum of its own; the chunks behind it keep theirs.
            let whole = to.next_multiple_of(CHUNK).min(piece.length);
            self.keep(space, at, &piece, to, whole);
            self.keep(space, at, &piece, whole, piece.length);
            self.flush()?;
            clear(&self.file, &self.path, next, rest)?;
        }
        Ok(())
    }

    /// Puts the bytes from `from` to `to` of a piece that began at `start` back, as a piece of their own. It begins with a
    /// chunk of the old one, or lies within one.
    fn keep(&mut self, space: SpaceId, start: u64, old: &Piece, from: u64, to: u64) {
        if from >= to {
            return;
        }
        let (key, length) = ((space, start + from), to - from);
        if !self.checked {
            self.pieces.insert(key, Piece { length, offset: old.offset + from, checksums: Vec::new() });
            return;
        }
        let first = from / CHUNK;
        let count = length.div_ceil(CHUNK);
        let checksums = old.checksums[first as usize..][..count as usize].to_vec();
        let was_stale: Vec<u64> = self
            .stale
            .range((space, start, first)..(space, start, first + count))
            .map(|stale| stale.2)
            .collect();
        for chunk in was_stale {
            self.stale.insert((key.0, key.1, chunk - first));
        }
        // A chunk that lost a part of it, at either end.
        if !from.is_multiple_of(CHUNK) || !to.is_multiple_of(CHUNK) && to < old.length {
            self.stale.insert((key.0, key.1, count - 1));
        }
        self.pieces.insert(key, Piece { length, offset: old.offset + from, checksums });
    }

    fn write(&mut self, data: &[u8]) -> Result<(), WriteError> {
        if data.len() >= DIRECT {
            self.flush()?;
            return write_at(&self.file, &self.path, self.length, data);
        }
        if self.buffer.len() + data.len() > BUFFER {
            self.flush()?;
        }
        self.buffer.extend_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        if !self.buffer.is_empty() {
            let offset = self.length - self.buffer.len() as u64;
            write_at(&self.file, &self.path, offset, &self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Computes anew the checksums of what was overwritten.
    fn refresh(&mut self) -> Result<(), WriteError> {
        let mut buffer = vec![0; if self.stale.is_empty() { 0 } else { CHUNK as usize }];
        for (space, start, chunk) in std::mem::take(&mut self.stale) {
            let Some(piece) = self.pieces.get_mut(&(space, start)) else { continue };
            let at = chunk * CHUNK;
            let bytes = &mut buffer[..piece.length.saturating_sub(at).min(CHUNK) as usize];
            let offset = piece.offset + at;
            self.file
                .read_exact_at(bytes, offset)
                .map_err(|error| WriteError::io("pread", &self.path, offset, error))?;
            // Of a piece that was shortened, or has made room for another one, nothing is left of some chunks.
            if let Some(checksum) = piece.checksums.get_mut(chunk as usize) {
                *checksum = crc32c::crc32c(bytes);
            }
        }
        Ok(())
    }

    /// Writes what is still buffered; returns the file and its index.
    pub(crate) fn finish(mut self) -> Result<(File, Index), WriteError> {
        self.flush()?;
        self.refresh()?;
        let mut index = Index { pages_length: self.length, checked: self.checked, ..Index::default() };
        index.extents.reserve_exact(self.pieces.len());
        for ((space, start), piece) in self.pieces {
            let first_checksum = index.checksums.len() as u64;
            let (length, offset) = (piece.length, piece.offset);
            index.extents.push(Extent { space, start, length, offset, first_checksum });
            index.checksums.extend_from_slice(&piece.checksums);
        }
        if index.size() > MAX_INDEX {
            let (what, length) = ("the index of the memory", index.size());
            return Err(WriteError::TooLarge { what, length, limit: MAX_INDEX });
        }
        Ok((self.file, index))
    }
}

impl Piece {
    /// Takes `data` into the length, and, if it is to be `checked`, into the checksums.
    fn grow(&mut self, mut data: &[u8], checked: bool) {
        if !checked {
            self.length += data.len() as u64;
            return;
        }
        while !data.is_empty() {
            let filled = self.length % CHUNK;
            let (now, later) = data.split_at(data.len().min((CHUNK - filled) as usize));
            match self.checksums.last_mut() {
                Some(last) if filled > 0 => *last = crc32c::crc32c_append(*last, now),
                _ => self.checksums.push(crc32c::crc32c(now)),
            }
            self.length += now.len() as u64;
            data = later;
        }
    }
}

/// Makes `length` bytes at `offset` zeros, by a hole where the filesystem has them.
fn clear(file: &File, path: &Path, offset: u64, length: u64) -> Result<(), WriteError> {
    fault::point();
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, how, offset, length) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(error) => return Err(WriteError::io("fallocate", path, offset, error)),
    }
    let zeros = vec![0; length.min(CHUNK) as usize];
    let mut at = 0;
    while at < length {
        let part = (length - at).min(CHUNK);
        write_at(file, path, offset + at, &zeros[..part as usize])?;
        at += part;
    }
    Ok(())
}

/// Writes all of `data` at `offset`; a full filesystem is told with what was written before.
pub(crate) fn write_at(file: &File, path: &Path, offset: u64, data: &[u8]) -> Result<(), WriteError> {
    let mut done = 0;
    while done < data.len() {
        fault::point();
        match file.write_at(&data[done..], offset + done as u64) {
            Ok(0) => {
                let error = io::Error::from(io::ErrorKind::WriteZero);
                return Err(WriteError::io("pwrite", path, offset + done as u64, error));
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(WriteError::io("pwrite", path, offset + done as u64, error)),
        }
    }
    Ok(())
}
