//! Byte streams of a checkpoint: copied in with a digest, read back with a check at the end.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::checkpoint::Watch;
use crate::error::{ReadError, WriteError};
use crate::manifest::{Digest, FileEntry};
use crate::pages::write_at;

/// How much of a blob is read and written at a time.
const BUFFER: usize = 256 << 10;

/// Copies all of `content` to `file` from `offset` on. Returns its length and digest.
pub(crate) fn copy_in(
    name: &str,
    content: &mut dyn Read,
    file: &File,
    path: &Path,
    offset: u64,
) -> Result<(u64, Digest), WriteError> {
    let mut buffer = vec![0; BUFFER];
    let mut hasher = blake3::Hasher::new();
    let mut length = 0;
    loop {
        let count =
            fill(content, &mut buffer).map_err(|source| WriteError::Content { name: name.into(), source })?;
        if count == 0 {
            return Ok((length, Digest(*hasher.finalize().as_bytes())));
        }
        hasher.update(&buffer[..count]);
        write_at(file, path, offset + length, &buffer[..count])?;
        length += count as u64;
    }
}

/// Reads until `buffer` is full or `content` ends, so that short reads do not become short writes.
fn fill(content: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match content.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The content of a blob.
///
/// Its digest is checked when the last byte has been read: the read that would return 0 fails with
/// [`io::ErrorKind::InvalidData`] around a [`ReadError::Digest`] if the content is not what was written.
/// So nothing that was read may be relied on before the end has been reached.
#[derive(Debug)]
pub struct BlobReader {
    file: File,
    path: PathBuf,
    position: u64,
    left: u64,
    length: u64,
    digest: Option<Digest>,
    hasher: blake3::Hasher,
    watch: Watch,
}

impl BlobReader {
    /// A reader of what `entry` says of the bytes of `file` from `position` on. A missing digest matches nothing.
    pub(crate) fn new(file: File, path: PathBuf, position: u64, entry: &FileEntry, watch: Watch) -> Self {
        let (length, digest) = (entry.length, entry.digest);
        Self { file, path, position, left: length, length, digest, hasher: blake3::Hasher::new(), watch }
    }

    /// The length of the whole blob in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = if count == 0 { 0 } else { self.file.read_at(&mut buffer[..count], self.position)? };
        if count == 0 {
            if self.left == 0 && Some(Digest(*self.hasher.finalize().as_bytes())) == self.digest {
                return Ok(0);
            }
            let damage = ReadError::Digest { file: self.path.clone(), length: self.length };
            return Err(io::Error::new(io::ErrorKind::InvalidData, damage));
        }
        self.watch.tell(count as u64).map_err(io::Error::other)?;
        self.hasher.update(&buffer[..count]);
        self.position += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}
