//! Reading everything of a checkpoint and comparing it with its checksums.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::error::{OpenError, ReadError, VerifyError};
use crate::index::CHUNK;
use crate::manifest::{BLOBS, CheckpointId, MANIFEST, PAGES};

/// What was found whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// The checkpoint's identity.
    pub id: CheckpointId,
    /// How many files it has, with the manifest.
    pub files: u64,
    /// How many bytes were read and compared, without the manifest.
    pub bytes: u64,
}

/// Reads all of the checkpoint in the directory `path` and compares it with its checksums and digests.
///
/// Every single changed, missing or added byte is found, and every file that does not belong to it.
pub fn verify(path: &Path) -> Result<VerifyReport, VerifyError> {
    let checkpoint = Checkpoint::open(path)?;
    refuse_unexpected(path, &checkpoint)?;
    for extent in checkpoint.all_extents() {
        checkpoint.verify_extent(extent)?;
    }
    for gap in checkpoint.index().gaps() {
        verify_zero(&checkpoint, gap)?;
    }
    for name in checkpoint.blob_names() {
        let mut blob = checkpoint.blob(name)?;
        std::io::copy(&mut blob, &mut std::io::sink()).map_err(|error| blob_error(name, error))?;
    }
    let files = &checkpoint.manifest().files;
    Ok(VerifyReport {
        id: checkpoint.manifest().meta.id,
        files: files.len() as u64 + 1,
        bytes: files.iter().map(|file| file.length).sum(),
    })
}

/// The error inside of what a [`crate::BlobReader`] gives.
fn blob_error(name: &str, error: std::io::Error) -> ReadError {
    let file = PathBuf::from(format!("{BLOBS}/{name}"));
    error.downcast::<ReadError>().unwrap_or_else(|source| ReadError::Io { file, offset: 0, source })
}

/// Bytes that no checksum covers must be zero.
fn verify_zero(checkpoint: &Checkpoint, gap: Range<u64>) -> Result<(), VerifyError> {
    let mut buffer = vec![0; (gap.end - gap.start).min(CHUNK) as usize];
    let mut at = gap.start;
    while at < gap.end {
        let bytes = &mut buffer[..(gap.end - at).min(CHUNK) as usize];
        checkpoint.pages().read_exact_at(bytes, at).map_err(|source| ReadError::Io {
            file: PAGES.into(),
            offset: at,
            source,
        })?;
        if let Some(position) = bytes.iter().position(|byte| *byte != 0) {
            return Err(VerifyError::NotZero { offset: at + position as u64 });
        }
        at += bytes.len() as u64;
    }
    Ok(())
}

/// Finds files that the manifest does not list.
fn refuse_unexpected(path: &Path, checkpoint: &Checkpoint) -> Result<(), VerifyError> {
    let manifest = checkpoint.manifest();
    let has_blobs = manifest.blobs().next().is_some();
    for name in names(path, "")? {
        let listed = name == Path::new(MANIFEST)
            || name.to_str().is_some_and(|name| manifest.file(name).is_some())
            || (has_blobs && name == Path::new(BLOBS));
        if !listed {
            return Err(VerifyError::Unexpected(name));
        }
    }
    if has_blobs {
        for name in names(path, BLOBS)? {
            let path = Path::new(BLOBS).join(name);
            if path.to_str().is_none_or(|path| manifest.file(path).is_none()) {
                return Err(VerifyError::Unexpected(path));
            }
        }
    }
    Ok(())
}

fn names(path: &Path, below: &str) -> Result<Vec<PathBuf>, OpenError> {
    let error = |source| OpenError::Io { operation: "getdents", file: below.into(), source };
    let entries = path.join(below).read_dir().map_err(error)?;
    entries.map(|entry| Ok(entry.map_err(error)?.file_name().into())).collect()
}
