//! A checkpoint that is read: opened and checked, its pages and blobs checked as they are read.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use crate::blob::BlobReader;
use crate::cbor;
use crate::error::{OpenError, ReadError, WriteError};
use crate::index::{CHUNK, Extent, Index, MAX_INDEX, SpaceId};
use crate::manifest::{Digest, FileEntry, INDEX, MANIFEST, MAX_MANIFEST, Manifest, PAGES, STATE};
use crate::sink::{MAX_STATE, Sink};

/// A checkpoint whose manifest, state and index are whole. The pages and blobs are checked as they are read.
#[derive(Debug)]
pub struct Checkpoint {
    manifest: Manifest,
    state: Vec<u8>,
    sections: BTreeMap<String, Range<usize>>,
    index: Index,
    pages: File,
    blobs: Blobs,
    watch: Watch,
}

/// Is told how many bytes of pages or blobs are read next; gives the signal that is to end the reading, if one has come.
pub type ReadWatch = Arc<dyn Fn(u64) -> Option<i32> + Send + Sync>;

/// Who watches the reading.
#[derive(Clone, Default)]
pub(crate) struct Watch(Option<ReadWatch>);

impl Watch {
    pub(crate) fn tell(&self, bytes: u64) -> Result<(), ReadError> {
        match self.0.as_ref().and_then(|watch| watch(bytes)) {
            Some(signal) => Err(ReadError::Interrupted { signal }),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(if self.0.is_some() { "watched" } else { "unwatched" })
    }
}

/// Where the blobs are.
#[derive(Debug)]
pub(crate) enum Blobs {
    /// In `blobs/` below this directory.
    Directory(OwnedFd),
    /// In one file, each at its offset.
    Memory { file: Option<File>, offsets: BTreeMap<String, u64> },
}

impl Checkpoint {
    /// Opens the checkpoint in the directory `path` and checks manifest, state and index.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| OpenError::Missing { path: path.into(), source: error.into() })?;
        let (file, length) = open_file(&directory, MANIFEST).map_err(|error| match error {
            OpenError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                OpenError::NoManifest { path: path.into() }
            }
            error => error,
        })?;
        let bytes = read_whole(&file, MANIFEST, length, MAX_MANIFEST)?;
        let manifest = Manifest::from_bytes(&bytes)?;
        let state = read_listed(&directory, &manifest, STATE, MAX_STATE)?;
        let (pages, pages_length) = open_file(&directory, PAGES)?;
        let expected = manifest.file(PAGES).map_or(0, |entry| entry.length);
        if pages_length != expected {
            return Err(OpenError::Length { file: PAGES.into(), found: pages_length, expected });
        }
        let index = read_listed(&directory, &manifest, INDEX, MAX_INDEX)?;
        let index = Index::from_bytes(&index, pages_length)?;
        Ok(Self::new(manifest, state, index, pages, Blobs::Directory(directory)))
    }

    /// A checkpoint from its parts; the sections' lengths add up to that of `state`.
    pub(crate) fn new(manifest: Manifest, state: Vec<u8>, index: Index, pages: File, blobs: Blobs) -> Self {
        let mut sections = BTreeMap::new();
        let mut begin = 0;
        for section in &manifest.sections {
            let end = begin + section.length as usize;
            sections.insert(section.name.clone(), begin..end);
            begin = end;
        }
        Self { manifest, state, sections, index, pages, blobs, watch: Watch::default() }
    }

    /// Whether pages are compared with checksums when they are read. Those of a [`Staging`](crate::Staging) are not: nobody
    /// but this program could change them.
    pub fn is_checked(&self) -> bool {
        self.index.checked
    }

    /// Has `watch` told of everything that is read from now on.
    #[must_use]
    pub fn watched(self, watch: ReadWatch) -> Self {
        Self { watch: Watch(Some(watch)), ..self }
    }

    /// Bytes of all pages and blobs.
    pub fn content_bytes(&self) -> u64 {
        let blobs = self.manifest.blobs().map(|(_, entry)| entry.length);
        self.manifest.file(PAGES).map_or(0, |entry| entry.length) + blobs.sum::<u64>()
    }

    /// What it is, what it needs, and what files it has.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The names of the sections, in alphabetical order.
    pub fn section_names(&self) -> impl Iterator<Item = &str> {
        self.sections.keys().map(String::as_str)
    }

    /// The CBOR of the section `name`, if there is one.
    pub fn section(&self, name: &str) -> Option<&[u8]> {
        self.state.get(self.sections.get(name)?.clone())
    }

    /// The section `name`, decoded.
    pub fn state<'a, T: Deserialize<'a>>(&'a self, name: &str) -> Result<T, ReadError> {
        let bytes = self.section(name).ok_or_else(|| ReadError::NoSection(name.into()))?;
        let offset = self.sections.get(name).map_or(0, |range| range.start as u64);
        cbor::decode(bytes).map_err(|source| ReadError::Decode { name: name.into(), offset, source })
    }

    /// The address spaces and objects that have pages here, in ascending order.
    pub fn spaces(&self) -> Vec<SpaceId> {
        let mut spaces = self.index.extents.iter().map(|extent| extent.space).collect::<Vec<_>>();
        spaces.dedup();
        spaces
    }

    /// The extents of `space` by ascending start; they do not overlap. Empty for a space without pages.
    pub fn extents(&self, space: SpaceId) -> &[Extent] {
        self.index.of(space)
    }

    /// The extents of all spaces, by ascending space and start.
    pub fn all_extents(&self) -> &[Extent] {
        &self.index.extents
    }

    /// The file of the pages, for reading at [`Extent::offset`] without a check: whoever does that calls
    /// [`Self::verify_extent`] as well, before the data is used or before what was built from it runs.
    pub fn pages_fd(&self) -> BorrowedFd<'_> {
        self.pages.as_fd()
    }

    /// Reads `range` of `extent` (bytes from its beginning) into `buffer`, which has the same length.
    ///
    /// Checksums cover whole chunks of [`CHUNK`] bytes: ranges that begin and end at their borders (or at
    /// the extent's end) are read without a copy.
    pub fn read_pages(&self, extent: &Extent, range: Range<u64>, buffer: &mut [u8]) -> Result<(), ReadError> {
        let Range { start, end } = range;
        if start > end || end > extent.length || buffer.len() as u64 != end - start {
            return Err(ReadError::Range { start, end, length: extent.length });
        }
        let mut scratch = Vec::new();
        let (mut at, mut rest) = (start, buffer);
        while at < end {
            let chunk = at / CHUNK;
            let (first, last) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(extent.length));
            let (now, later) = rest.split_at_mut((last.min(end) - at) as usize);
            if at == first && last <= end {
                self.read_chunk(extent, chunk, now)?;
            } else {
                scratch.resize((last - first) as usize, 0);
                self.read_chunk(extent, chunk, &mut scratch)?;
                now.copy_from_slice(&scratch[(at - first) as usize..][..now.len()]);
            }
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// Reads the whole chunk number `chunk` of `extent` and checks it.
    fn read_chunk(&self, extent: &Extent, chunk: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.watch.tell(buffer.len() as u64)?;
        let at = chunk * CHUNK;
        // Checked for the extents of this index; an extent of another checkpoint may point anywhere.
        let offset = extent.offset.saturating_add(at);
        self.pages.read_exact_at(buffer, offset).map_err(|source| ReadError::Io {
            file: PAGES.into(),
            offset,
            source,
        })?;
        let number = usize::try_from(extent.first_checksum.saturating_add(chunk)).unwrap_or(usize::MAX);
        if self.index.checked && self.index.checksums.get(number) != Some(&crc32c::crc32c(buffer)) {
            return Err(ReadError::Checksum {
                offset,
                length: buffer.len() as u64,
                space: extent.space,
                start: extent.start + at,
            });
        }
        Ok(())
    }

    /// Reads all of `extent` and compares it with its checksums.
    pub fn verify_extent(&self, extent: &Extent) -> Result<(), ReadError> {
        self.each_chunk(extent, |_, _| Ok(()))
    }

    /// Gives every chunk of `extent` to `use_chunk`, with its start, after checking it.
    fn each_chunk<E: From<ReadError>>(
        &self,
        extent: &Extent,
        mut use_chunk: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = vec![0; extent.length.min(CHUNK) as usize];
        for chunk in 0..extent.chunks() {
            let at = chunk * CHUNK;
            let bytes = &mut buffer[..(extent.length - at).min(CHUNK) as usize];
            self.read_chunk(extent, chunk, bytes)?;
            use_chunk(extent.start + at, bytes)?;
        }
        Ok(())
    }

    /// The names of the blobs, in the manifest's order.
    pub fn blob_names(&self) -> impl Iterator<Item = &str> {
        self.manifest.blobs().map(|(name, _)| name)
    }

    /// The content of the blob `name`. See [`BlobReader`] for when it is known to be whole.
    pub fn blob(&self, name: &str) -> Result<BlobReader, ReadError> {
        let none = || ReadError::NoBlob(name.into());
        let (_, entry) = self.manifest.blobs().find(|(found, _)| *found == name).ok_or_else(none)?;
        let path = PathBuf::from(&entry.path);
        let io = |source| ReadError::Io { file: path.clone(), offset: 0, source };
        let (file, position) = match &self.blobs {
            Blobs::Memory { file, offsets } => {
                let (Some(file), Some(offset)) = (file, offsets.get(name)) else { return Err(none()) };
                (file.try_clone().map_err(io)?, *offset)
            }
            Blobs::Directory(directory) => {
                let (file, found) = open_beneath(directory, &entry.path).map_err(io)?;
                if found != entry.length {
                    return Err(ReadError::Length { file: path, found, expected: entry.length });
                }
                (file, 0)
            }
        };
        Ok(BlobReader::new(file, path, position, entry, self.watch.clone()))
    }

    /// Puts all of this checkpoint into `sink`, checked on the way.
    pub fn copy_into(&self, sink: &mut dyn Sink) -> Result<(), WriteError> {
        let copy = |error| WriteError::Copy(Box::new(error));
        for section in &self.manifest.sections {
            sink.state(&section.name, self.section(&section.name).unwrap_or_default())?;
        }
        for extent in &self.index.extents {
            self.each_chunk(extent, |start, bytes| {
                sink.pages(extent.space, start, bytes).map_err(CopyError::Write)
            })
            .map_err(|error| match error {
                CopyError::Read(error) => copy(error),
                CopyError::Write(error) => error,
            })?;
        }
        for name in self.blob_names() {
            sink.blob(name, &mut self.blob(name).map_err(copy)?)?;
        }
        Ok(())
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn pages(&self) -> &File {
        &self.pages
    }
}

/// Which side of a copy failed.
enum CopyError {
    Read(ReadError),
    Write(WriteError),
}

impl From<ReadError> for CopyError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

/// Reads the listed file `path` and compares its length and digest with those of the manifest.
fn read_listed(
    directory: &OwnedFd,
    manifest: &Manifest,
    path: &str,
    limit: u64,
) -> Result<Vec<u8>, OpenError> {
    let (file, found) = open_file(directory, path)?;
    let (expected, digest) = match manifest.file(path) {
        Some(FileEntry { length, digest: Some(digest), .. }) => (*length, *digest),
        _ => unreachable!("a manifest that was read lists {path} with a digest"),
    };
    if found != expected {
        return Err(OpenError::Length { file: path.into(), found, expected });
    }
    let bytes = read_whole(&file, path, found, limit)?;
    if Digest::of(&bytes) != digest {
        return Err(OpenError::Digest { file: path.into(), length: found });
    }
    Ok(bytes)
}

/// Reads `length` bytes of `file`, at most `limit`.
fn read_whole(file: &File, path: &str, length: u64, limit: u64) -> Result<Vec<u8>, OpenError> {
    if length > limit {
        let reason = format!("it is {length} bytes long, the limit is {limit}");
        return Err(OpenError::Malformed { file: path.into(), offset: limit, reason });
    }
    let mut bytes = Vec::with_capacity(length as usize);
    file.take(length).read_to_end(&mut bytes).map_err(|source| OpenError::Io {
        operation: "read",
        file: path.into(),
        source,
    })?;
    if bytes.len() as u64 != length {
        let found = bytes.len() as u64;
        return Err(OpenError::Length { file: path.into(), found, expected: length });
    }
    Ok(bytes)
}

fn open_file(directory: &OwnedFd, path: &str) -> Result<(File, u64), OpenError> {
    open_beneath(directory, path).map_err(|source| OpenError::Io {
        operation: "openat2",
        file: path.into(),
        source,
    })
}

/// Opens the regular file `path` below `directory`, following no link, and returns its length.
fn open_beneath(directory: &OwnedFd, path: &str) -> io::Result<(File, u64)> {
    // NONBLOCK: someone may have put a FIFO there, whose opening would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(rustix::fs::openat2(directory, path, flags, Mode::empty(), resolve)?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a regular file"));
    }
    Ok((file, metadata.len()))
}
