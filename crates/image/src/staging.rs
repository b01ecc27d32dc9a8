//! A checkpoint in memory: what a receiver collects before it restores, or a fork that stays on the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use limosa_kernel::fault;
use rustix::fs::MemfdFlags;

use crate::blob;
use crate::checkpoint::{Blobs, Checkpoint};
use crate::error::WriteError;
use crate::index::SpaceId;
use crate::manifest::{BLOBS, Digest, FileEntry, INDEX, Manifest, Meta, PAGES, STATE};
use crate::pages::PageStore;
use crate::sink::{Sections, Sink, claim_name};

/// A checkpoint that is collected in memory: sections on the heap, pages and blobs in a memfd each.
pub struct Staging {
    sections: Sections,
    pages: PageStore,
    blobs: BTreeMap<String, (FileEntry, u64)>,
    blob_names: BTreeSet<String>,
    blob_file: Option<File>,
    blob_length: u64,
}

impl Staging {
    /// An empty one.
    pub fn new() -> Result<Self, WriteError> {
        let pages = PageStore::unchecked(memory_file(PAGES)?, label(PAGES));
        Ok(Self {
            sections: Sections::default(),
            pages,
            blobs: BTreeMap::new(),
            blob_names: BTreeSet::new(),
            blob_file: None,
            blob_length: 0,
        })
    }

    /// The finished checkpoint, which lives as long as the value that is returned.
    pub fn into_checkpoint(self, meta: Meta) -> Result<Checkpoint, WriteError> {
        let (pages, index) = self.pages.finish()?;
        let entry = |path: &str, bytes: &[u8]| FileEntry {
            path: path.into(),
            length: bytes.len() as u64,
            digest: Some(Digest::of(bytes)),
        };
        let mut files = vec![
            FileEntry { path: PAGES.into(), length: index.pages_length, digest: None },
            entry(STATE, &self.sections.bytes),
            entry(INDEX, &index.to_bytes()),
        ];
        let mut offsets = BTreeMap::new();
        for (name, (entry, offset)) in self.blobs {
            files.push(entry);
            offsets.insert(name, offset);
        }
        let manifest = Manifest { meta, files, sections: self.sections.table };
        let blobs = Blobs::Memory { file: self.blob_file, offsets };
        Ok(Checkpoint::new(manifest, self.sections.bytes, index, pages, blobs))
    }
}

impl Sink for Staging {
    fn state(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        self.sections.add(name, cbor)
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        self.pages.add(space, start, data)
    }

    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        self.pages.forget(space, start, length)
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        claim_name(&mut self.blob_names, "blob", name)?;
        let file = match &mut self.blob_file {
            Some(file) => file,
            none => none.insert(memory_file(BLOBS)?),
        };
        let offset = self.blob_length;
        let path = format!("{BLOBS}/{name}");
        let (length, digest) = blob::copy_in(name, content, file, &label(&path), offset)?;
        self.blob_length += length;
        self.blobs.insert(name.into(), (FileEntry { path, length, digest: Some(digest) }, offset));
        Ok(length)
    }
}

/// How a part of a checkpoint in memory is called in errors.
fn label(name: &str) -> PathBuf {
    PathBuf::from("(memory)").join(name)
}

fn memory_file(name: &str) -> Result<File, WriteError> {
    fault::point();
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|error| WriteError::io("memfd_create", label(name), 0, error))
}
