//! What is in a checkpoint, in numbers: for `limosa inspect`.

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::index::{Extent, SpaceId};
use crate::manifest::{FORMAT_VERSION, Meta};

/// The content of a checkpoint, counted. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The version of the format.
    pub format_version: u32,
    /// Identity, parent, time, kernel and CPU features.
    pub meta: Meta,
    /// The sections of the state.
    pub sections: Vec<SectionSize>,
    /// The address spaces and shared-memory objects that have pages.
    pub spaces: Vec<SpaceSize>,
    /// The blobs.
    pub blobs: Vec<BlobSize>,
    /// All files but the manifest.
    pub bytes: u64,
}

/// One section of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionSize {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// The pages of one space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SpaceSize {
    /// Its number.
    pub space: SpaceId,
    /// How many runs of pages it has.
    pub extents: u64,
    /// How much memory they are.
    pub bytes: u64,
    /// The first address or object offset that is stored.
    pub first: u64,
    /// The one after the last.
    pub end: u64,
}

/// One blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlobSize {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

impl Checkpoint {
    /// Counts what is in the checkpoint. Reads nothing.
    pub fn describe(&self) -> Description {
        let manifest = self.manifest();
        let sections = manifest.sections.iter();
        let spaces = self.spaces().into_iter().map(|space| {
            let extents = self.extents(space);
            SpaceSize {
                space,
                extents: extents.len() as u64,
                bytes: extents.iter().map(|extent| extent.length).sum(),
                first: extents.first().map_or(0, |extent| extent.start),
                end: extents.last().map_or(0, Extent::end),
            }
        });
        let blobs = manifest.blobs();
        Description {
            format_version: FORMAT_VERSION,
            meta: manifest.meta.clone(),
            sections: sections
                .map(|section| SectionSize { name: section.name.clone(), bytes: section.length })
                .collect(),
            spaces: spaces.collect(),
            blobs: blobs.map(|(name, entry)| BlobSize { name: name.into(), bytes: entry.length }).collect(),
            bytes: manifest.files.iter().map(|file| file.length).sum(),
        }
    }
}
