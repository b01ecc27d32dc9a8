//! Files with a path: regular files, directories and device nodes that keep no state of their own.
//!
//! A file is opened again by its path, below the tree's root, with its flags and offset. A file that was deleted
//! while open travels with the checkpoint and comes back deleted.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// Device nodes (major, minor) without state in the open file: null, zero, full, random, urandom.
const STATELESS_DEVICES: [(u32, u32); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];
const DELETED: &[u8] = b" (deleted)";

/// An open file.
#[derive(Debug, Serialize, Deserialize)]
pub struct File {
    /// Absolute path as the process's mount namespace sees it.
    pub path: serde_bytes::ByteBuf,
    /// Offset in bytes.
    pub position: i64,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Index of the shared object, if the file has been deleted.
    pub deleted: Option<usize>,
    /// The key of a file outside the tree's root; restore is told where it is.
    pub external: Option<String>,
}

impl DescriptorKind for File {
    fn recognise(view: &DescriptionView) -> bool {
        if !view.link.starts_with(b"/") {
            return false;
        }
        match FileType::from_raw_mode(view.stat.st_mode) {
            FileType::RegularFile | FileType::Directory | FileType::Symlink => !view.link.starts_with(b"/memfd:"),
            FileType::CharacterDevice => {
                let device = (rustix::fs::major(view.stat.st_rdev), rustix::fs::minor(view.stat.st_rdev));
                STATELESS_DEVICES.contains(&device)
            }
            _ => false,
        }
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let external = context.externals.get(&(view.stat.st_dev, view.stat.st_ino)).cloned();
        if external.is_none() && !view.is_reachable()? {
            let remedy = "redirect it to a file of the container, or name it with --external";
            return Err(view.refuse("the file is outside the tree's own mounts", remedy).into());
        }
        let deleted = view.stat.st_nlink == 0;
        let path = if deleted { view.link.strip_suffix(DELETED).unwrap_or(&view.link) } else { &view.link };
        let deleted = if deleted { Some(capture_deleted(view, path, context)?) } else { None };
        Ok(Self { path: path.to_vec().into(), position: view.info.pos, mode: view.stat.st_mode, deleted, external })
    }

    fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let flags = reopening_flags(flags);
        let file = match (&self.external, &self.deleted) {
            (Some(key), _) => open_external(key, flags, context)?,
            (None, Some(object)) => open_deleted(*object, flags, context)?,
            (None, None) => context.open(&self.path, flags, Mode::empty())?,
        };
        let name = String::from_utf8_lossy(&self.path).into_owned();
        if !flags.contains(OFlags::PATH) {
            let stat = rustix::fs::fstat(&file).map_err(RestoreError::rebuild(name.as_str(), "fstat"))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::from_raw_mode(self.mode) {
                return Err(RestoreError::File { path: name, reason: "it is another kind of file now".into() });
            }
            if self.position > 0 {
                let position = rustix::fs::SeekFrom::Start(self.position as u64);
                rustix::fs::seek(&file, position).map_err(RestoreError::rebuild(name, "lseek"))?;
            }
        }
        Ok(file)
    }
}

/// The flags that open(2) is given again: neither those that create nor those of the descriptor.
fn reopening_flags(flags: u32) -> OFlags {
    let once = OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::NOCTTY | OFlags::CLOEXEC;
    let flags_of_paths = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    if OFlags::from_bits_retain(flags).contains(OFlags::PATH) {
        return OFlags::from_bits_retain(flags) & flags_of_paths;
    }
    // openat2 takes only what it knows; the kernel shows O_LARGEFILE (0o100000), which 64-bit opens imply.
    (OFlags::from_bits_retain(flags & !0o100_000) - once) | OFlags::NOCTTY
}

fn open_external(key: &str, flags: OFlags, context: &RebuildContext) -> Result<OwnedFd, RestoreError> {
    let file = |reason: String| RestoreError::File { path: format!("external file {key}"), reason };
    let path = context
        .externals
        .get(key)
        .ok_or_else(|| file(format!("restore was not told where it is; use --external {key}=PATH")))?;
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| file(format!("{}: {}", path.display(), std::io::Error::from(errno))))
}

fn capture_deleted(
    view: &DescriptionView,
    path: &[u8],
    context: &mut CaptureContext,
) -> Result<usize, CaptureError> {
    if FileType::from_raw_mode(view.stat.st_mode) != FileType::RegularFile {
        return Err(view.refuse("it is a deleted directory or device", "close it before the checkpoint").into());
    }
    // A description of our own: reading through the process's would move its offset.
    let itself = format!("/proc/self/fd/{}", view.descriptor.as_raw_fd());
    let file = rustix::fs::open(itself, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(view.error("opening a deleted file"))?;
    context.shared_objects.of_descriptor(view.process.pid, file, path)
}

fn open_deleted(object: usize, flags: OFlags, context: &RebuildContext) -> Result<OwnedFd, RestoreError> {
    let file = context
        .shared_objects
        .get(object)
        .ok_or_else(|| RestoreError::inconsistent(format!("there is no shared object {object}")))?;
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(itself, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(RestoreError::rebuild("a deleted file", "open"))
}
