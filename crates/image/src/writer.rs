//! A checkpoint that is written into a directory and becomes visible by one rename.
//!
//! Until then everything lies in a hidden sibling, `.NAME.partial-RANDOM`, that is locked (flock(2)) as
//! long as its writer lives. A writer that is dropped removes it; what a killed one left is removed by
//! the next that writes to the same NAME.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use limosa_kernel::fault;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RawDir};

use crate::blob;
use crate::durable::{Unsynced, sync, sync_all};
use crate::error::{WriteError, random_bytes};
use crate::index::SpaceId;
use crate::manifest::{
    BLOBS, CheckpointId, Digest, FileEntry, INDEX, MANIFEST, Manifest, Meta, PAGES, STATE,
};
use crate::pages::{PageStore, write_at};
use crate::sink::{Sections, Sink, claim_name};

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);

/// A checkpoint directory that is being written.
pub struct CheckpointWriter {
    /// Where the checkpoint will be.
    path: PathBuf,
    name: OsString,
    parent: OwnedFd,
    partial: Option<Partial>,
    sections: Sections,
    pages: Option<PageStore>,
    blobs: BTreeMap<String, FileEntry>,
    blob_names: BTreeSet<String>,
    blob_directory: Option<OwnedFd>,
}

/// The hidden directory, removed with all that is in it unless it got its name.
struct Partial {
    path: PathBuf,
    name: OsString,
    directory: OwnedFd,
    renamed: bool,
}

impl Partial {
    /// Removes it where nothing is in it but files and empty directories.
    fn remove_without_descriptors(&self) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut entries = RawDir::new(&self.directory, &mut space);
        let mut names = Vec::new();
        while let Some(entry) = entries.next() {
            names.push(entry?.file_name().to_owned());
        }
        for name in names.iter().filter(|name| ![c".", c".."].contains(&name.as_c_str())) {
            rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())
                .or_else(|_| rustix::fs::unlinkat(&self.directory, name, AtFlags::REMOVEDIR))?;
        }
        std::fs::remove_dir(&self.path)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.renamed {
            return;
        }
        // The first way takes descriptors, of which there may be none left: perhaps that is why it is unfinished.
        if let Err(error) = std::fs::remove_dir_all(&self.path).or_else(|_| self.remove_without_descriptors())
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished checkpoint could not be removed");
        }
    }
}

/// A checkpoint that has its name and survives a crash of the machine.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Committed {
    /// Its identity.
    pub id: CheckpointId,
    /// Where it is.
    pub path: PathBuf,
    /// How many files it has, with the manifest.
    pub files: u64,
    /// How many bytes they have together.
    pub bytes: u64,
    /// How long it took to write what was not written yet: buffers, state, index, manifest.
    pub write: Duration,
    /// How long the synchronization with the disk took, before and after the rename.
    pub sync: Duration,
}

impl CheckpointWriter {
    /// Prepares to write a checkpoint to `path`: a name that does not exist yet, or an empty directory,
    /// in a directory that exists.
    pub fn create(path: &Path) -> Result<Self, WriteError> {
        let name = path.file_name().ok_or_else(|| WriteError::NoName(path.into()))?.to_owned();
        let above = match path.parent() {
            Some(above) if !above.as_os_str().is_empty() => above,
            _ => Path::new("."),
        };
        let parent = rustix::fs::open(above, DIRECTORY, Mode::empty())
            .map_err(|error| WriteError::io("open", above, 0, error))?;
        refuse_existing(path)?;
        remove_abandoned(above, &parent, &name);
        let partial = Partial::create(above, &parent, &name)?;
        let pages = create_file(&partial.directory, PAGES, &path.join(PAGES))?;
        Ok(Self {
            path: path.into(),
            name,
            parent,
            partial: Some(partial),
            sections: Sections::default(),
            pages: Some(PageStore::new(pages, path.join(PAGES))),
            blobs: BTreeMap::new(),
            blob_names: BTreeSet::new(),
            blob_directory: None,
        })
    }

    /// Writes the rest, synchronizes every file and directory, and gives the checkpoint its name.
    ///
    /// If this fails nothing is left, except when the very last step fails, the synchronization of the
    /// directory that holds the checkpoint: then it is there and whole, but may be gone after a crash.
    pub fn commit(mut self, meta: Meta) -> Result<Committed, WriteError> {
        let begin = Instant::now();
        let (Some(mut partial), Some(pages)) = (self.partial.take(), self.pages.take()) else {
            unreachable!("only commit takes them, and it consumes the writer");
        };
        let (pages, index) = pages.finish()?;
        let (state, id) = (std::mem::take(&mut self.sections), meta.id);
        let mut files = vec![FileEntry { path: PAGES.into(), length: index.pages_length, digest: None }];
        let mut written = vec![(self.path.join(PAGES), pages)];
        let mut write = |name: &str, bytes: &[u8]| {
            let path = self.path.join(name);
            let file = create_file(&partial.directory, name, &path)?;
            write_at(&file, &path, 0, bytes)?;
            written.push((path, file));
            let digest = Some(Digest::of(bytes));
            Ok::<_, WriteError>(FileEntry { path: name.into(), length: bytes.len() as u64, digest })
        };
        files.push(write(STATE, &state.bytes)?);
        files.push(write(INDEX, &index.to_bytes())?);
        files.extend(std::mem::take(&mut self.blobs).into_values());
        let manifest = Manifest { meta, files, sections: state.table };
        let manifest_bytes =
            manifest.to_bytes().map_err(|source| WriteError::Encode { name: MANIFEST.into(), source })?;
        crate::manifest::check_length(manifest_bytes.len() as u64)?;
        write(MANIFEST, &manifest_bytes)?;
        let wrote = Instant::now();

        self.sync_content(&partial, &written, &manifest)?;
        partial.rename(&self.parent, &self.name, &self.path)?;
        sync(&self.parent, self.path.parent().unwrap_or(Path::new(".")))?;
        Ok(Committed {
            id,
            files: manifest.files.len() as u64 + 1,
            bytes: manifest.files.iter().map(|file| file.length).sum::<u64>() + manifest_bytes.len() as u64,
            path: std::mem::take(&mut self.path),
            write: wrote - begin,
            sync: wrote.elapsed(),
        })
    }

    /// Synchronizes everything in the hidden directory, and the directory itself.
    fn sync_content(
        &self,
        partial: &Partial,
        written: &[(PathBuf, File)],
        manifest: &Manifest,
    ) -> Result<(), WriteError> {
        let mut files =
            written.iter().map(|(path, file)| Unsynced::Open(file.as_fd(), path.clone())).collect::<Vec<_>>();
        files.push(Unsynced::Open(partial.directory.as_fd(), self.path.clone()));
        if let Some(directory) = &self.blob_directory {
            files.push(Unsynced::Open(directory.as_fd(), self.path.join(BLOBS)));
            let blobs = manifest.blobs();
            files.extend(
                blobs.map(|(name, entry)| {
                    Unsynced::Below(directory.as_fd(), name, self.path.join(&entry.path))
                }),
            );
        }
        sync_all(&files)
    }

    /// The directory of the blobs, made when it is first needed.
    fn blob_directory(&mut self) -> Result<&OwnedFd, WriteError> {
        if self.blob_directory.is_none() {
            let Some(partial) = &self.partial else { unreachable!("only commit takes it") };
            let path = self.path.join(BLOBS);
            fault::point();
            rustix::fs::mkdirat(&partial.directory, BLOBS, Mode::RWXU)
                .map_err(|error| WriteError::io("mkdirat", &path, 0, error))?;
            let directory = rustix::fs::openat(&partial.directory, BLOBS, DIRECTORY, Mode::empty())
                .map_err(|error| WriteError::io("openat", &path, 0, error))?;
            self.blob_directory = Some(directory);
        }
        let Some(directory) = &self.blob_directory else { unreachable!("it was made above") };
        Ok(directory)
    }
}

impl Sink for CheckpointWriter {
    fn state(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        self.sections.add(name, cbor)
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        let Some(pages) = &mut self.pages else { unreachable!("only commit takes it") };
        pages.add(space, start, data)
    }

    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        let Some(pages) = &mut self.pages else { unreachable!("only commit takes it") };
        pages.forget(space, start, length)
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        claim_name(&mut self.blob_names, "blob", name)?;
        let path = self.path.join(BLOBS).join(name);
        let file = create_file(self.blob_directory()?, name, &path)?;
        let (length, digest) = blob::copy_in(name, content, &file, &path, 0)?;
        let entry = FileEntry { path: format!("{BLOBS}/{name}"), length, digest: Some(digest) };
        self.blobs.insert(name.into(), entry);
        Ok(length)
    }
}

impl Partial {
    fn create(above: &Path, parent: &OwnedFd, name: &OsStr) -> Result<Self, WriteError> {
        let random = u64::from_ne_bytes(random_bytes());
        let mut hidden = prefix(name);
        hidden.extend_from_slice(format!("{random:016x}").as_bytes());
        let name = OsString::from_vec(hidden);
        let path = above.join(&name);
        fault::point();
        rustix::fs::mkdirat(parent, &name, Mode::RWXU)
            .map_err(|error| WriteError::io("mkdirat", &path, 0, error))?;
        let directory = rustix::fs::openat(parent, &name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
            .and_then(|directory| {
                rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
                Ok(directory)
            });
        match directory {
            Ok(directory) => Ok(Self { path, name, directory, renamed: false }),
            Err(error) => {
                let _ = std::fs::remove_dir(&path);
                Err(WriteError::io("open and flock", path, 0, error))
            }
        }
    }

    /// Gives the directory its name; from now on it stays.
    fn rename(&mut self, parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), WriteError> {
        fault::point();
        rustix::fs::renameat(parent, &self.name, parent, name).map_err(|error| match error {
            rustix::io::Errno::NOTEMPTY | rustix::io::Errno::EXIST | rustix::io::Errno::NOTDIR => {
                WriteError::Exists(path.into())
            }
            error => WriteError::io("rename", path, 0, error),
        })?;
        self.renamed = true;
        Ok(())
    }
}

/// Refuses whatever the final rename could not replace, before any work is done.
fn refuse_existing(path: &Path) -> Result<(), WriteError> {
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(WriteError::io("lstat", path, 0, error)),
    };
    let empty = metadata.is_dir()
        && path.read_dir().map_err(|error| WriteError::io("open", path, 0, error))?.next().is_none();
    if empty { Ok(()) } else { Err(WriteError::Exists(path.into())) }
}

/// Removes what killed writers of the same name left: hidden directories that nobody holds locked.
fn remove_abandoned(above: &Path, parent: &OwnedFd, name: &OsStr) {
    let prefix = prefix(name);
    let Ok(entries) = above.read_dir() else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().as_bytes().starts_with(&prefix)) {
        let name = entry.file_name();
        let flags = DIRECTORY | OFlags::NOFOLLOW;
        let Ok(directory) = rustix::fs::openat(parent, &name, flags, Mode::empty()) else { continue };
        if rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let path = above.join(&name);
            match std::fs::remove_dir_all(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed an abandoned checkpoint"),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove an abandoned checkpoint");
                }
            }
        }
    }
}

fn prefix(name: &OsStr) -> Vec<u8> {
    [b".", name.as_bytes(), b".partial-"].concat()
}

/// Creates a file that only its owner may read and write.
fn create_file(directory: &OwnedFd, name: &str, path: &Path) -> Result<File, WriteError> {
    fault::point();
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(|error| WriteError::io("openat", path, 0, error))
}
