//! Files with a path: regular files, directories and device nodes that keep no state of their own; and whatever an
//! `O_PATH` descriptor stands for.
//!
//! A file is opened again by its path, below the tree's root, with its flags and offset. Where that name is gone, by
//! another that it has. A file that was deleted while open travels with the checkpoint and comes back deleted; a
//! deleted directory is empty by nature and is made anew.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use limosa_kernel::task;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext, paths};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// Device nodes (major, minor) without state in the open file: null, zero, full, random, urandom.
const STATELESS_DEVICES: [(u32, u32); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];
const DELETED: &[u8] = b" (deleted)";
const TMPFILE: u32 = libc::O_TMPFILE as u32;

/// `f_type` of procfs in statfs(2).
const PROC_MAGIC: i64 = 0x9fa0;
const KIND: &str = "file";

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
    /// The inode of a directory that has been deleted.
    #[serde(default)]
    pub deleted_directory: Option<u64>,
    /// The key of a file outside the tree's root; restore is told where it is.
    pub external: Option<String>,
}

impl DescriptorKind for File {
    fn recognise(view: &DescriptionView) -> bool {
        if !view.link.starts_with(b"/") || is_secret_memory(view) {
            return false;
        }
        match FileType::from_raw_mode(view.stat.st_mode) {
            FileType::RegularFile | FileType::Directory | FileType::Symlink => !view.link.starts_with(b"/memfd:"),
            _ if view.is_path() => true,
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
        refuse_notification(view)?;
        let deleted = view.stat.st_nlink == 0;
        let mut path = view.link.clone();
        if deleted && let Some(last) = path.strip_suffix(DELETED) {
            path = last.to_vec();
        } else if let Some(last) = path.strip_suffix(DELETED)
            && external.is_none()
            && !leads_to(view, &path)
        {
            path = other_name(view, last)?;
        }
        let filesystem = rustix::fs::fstatfs(&view.descriptor).map_err(view.error("fstatfs of a file"))?;
        if filesystem.f_type as i64 == PROC_MAGIC {
            check_process_file(view, &path, context)?;
        }
        let (deleted, deleted_directory) = match FileType::from_raw_mode(view.stat.st_mode) {
            _ if !deleted => (None, None),
            FileType::Directory => (None, Some(view.stat.st_ino)),
            _ => (Some(capture_deleted(view, &path, context)?), None),
        };
        let (position, mode) = (view.info.pos, view.stat.st_mode);
        Ok(Self { path: path.into(), position, mode, deleted, deleted_directory, external })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let flags = reopening_flags(flags);
        let file = match (&self.external, self.deleted, self.deleted_directory) {
            (Some(key), ..) => open_external(key, flags, context)?,
            (None, Some(object), _) => open_deleted(object, flags, context)?,
            (None, None, Some(inode)) => self.open_deleted_directory(inode, flags, context)?,
            (None, None, None) => context.open(&self.path, flags, Mode::empty())?,
        };
        let name = String::from_utf8_lossy(&self.path).into_owned();
        let stat = rustix::fs::fstat(&file).map_err(RestoreError::rebuild(name.as_str(), "fstat"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::from_raw_mode(self.mode) {
            return Err(RestoreError::File { path: name, reason: "it is another kind of file now".into() });
        }
        if self.position > 0 && !flags.contains(OFlags::PATH) {
            let position = rustix::fs::SeekFrom::Start(self.position as u64);
            rustix::fs::seek(&file, position).map_err(RestoreError::rebuild(name, "lseek"))?;
        }
        Ok(file)
    }
}

impl File {
    /// A directory that is deleted as soon as it is open: made in the nearest one above it that is there.
    fn open_deleted_directory(
        &self,
        inode: u64,
        flags: OFlags,
        context: &mut RebuildContext,
    ) -> Result<OwnedFd, RestoreError> {
        let fail = |step| RestoreError::rebuild("a deleted directory", step);
        let above = Path::new(std::ffi::OsStr::from_bytes(&self.path)).ancestors().skip(1);
        let mode = Mode::from_raw_mode(self.mode & 0o7777);
        let directory = context.shared(KIND, inode, |context| {
            let open = |path: &Path| context.open(path.as_os_str().as_bytes(), DIRECTORY, Mode::empty());
            let above = above
                .map(open)
                .find_map(Result::ok)
                .ok_or_else(|| RestoreError::inconsistent("a deleted directory without a path"))?;
            let name = format!(".limosa-deleted-{inode}-{}", std::process::id());
            rustix::fs::mkdirat(&above, &name, mode).map_err(fail("mkdir"))?;
            let made = rustix::fs::openat(&above, &name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
            rustix::fs::unlinkat(&above, &name, AtFlags::REMOVEDIR).map_err(fail("rmdir"))?;
            made.map_err(fail("open"))
        })?;
        reopen(directory, flags).map_err(fail("open"))
    }
}

/// What is watched by a directory's descriptor (`F_NOTIFY` of fcntl(2)) nobody tells. But to watch sets who gets the signals.
fn refuse_notification(view: &DescriptionView) -> Result<(), CaptureError> {
    if FileType::from_raw_mode(view.stat.st_mode) != FileType::Directory || view.is_path() {
        return Ok(());
    }
    let Some((_, owner, _)) = task::descriptor_owner(&view.descriptor) else { return Ok(()) };
    let reason = format!("it sends process {owner} signals: of changes of the directory (dnotify, F_NOTIFY), most likely");
    Err(view.refuse(reason, "close it before the checkpoint, and watch directories by inotify(7)").into())
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Memory of memfd_secret(2), which not even the kernel reads.
fn is_secret_memory(view: &DescriptionView) -> bool {
    view.link == b"/secretmem (deleted)"
}

fn root_of(view: &DescriptionView) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root", view.process.pid))
}

/// Whether a path of the process leads to the file.
fn leads_to(view: &DescriptionView, path: &[u8]) -> bool {
    let relative = std::ffi::OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path));
    rustix::fs::lstat(root_of(view).join(relative))
        .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (view.stat.st_dev, view.stat.st_ino))
}

/// A path of a file whose name, `gone`, has been removed while it has others: beside that name or elsewhere.
fn other_name(view: &DescriptionView, gone: &[u8]) -> Result<Vec<u8>, CaptureError> {
    let root = root_of(view);
    let mounts = view.process.proc.mountinfo()?;
    let point = mounts.iter().find(|mount| Some(mount.id) == view.info.mnt_id).map(|mount| mount.point.as_slice());
    let near = paths::nearest_directory(&root, gone);
    for place in [near.as_slice(), point.unwrap_or(b"/")] {
        let inside = root.join(std::ffi::OsStr::from_bytes(place.strip_prefix(b"/").unwrap_or(place)));
        if let Some(path) = paths::search(&root, &inside, view.stat.st_ino)
            && leads_to(view, &path)
        {
            return Ok(path);
        }
    }
    let reason = "the name that it was opened by has been removed, and none of its other names is found";
    Err(view.refuse(reason, "close it, or give the file its name back (ln)").into())
}

/// A file below `/proc/PID` is there at restore if the process is, and is made with the process: not so files of its
/// threads and descriptors, which come later.
fn check_process_file(
    view: &DescriptionView,
    path: &[u8],
    context: &CaptureContext,
) -> Result<(), CaptureError> {
    let mounts = view.process.proc.mountinfo()?;
    let mount = mounts.iter().find(|mount| Some(mount.id) == view.info.mnt_id);
    let relative = mount.and_then(|mount| path.strip_prefix(mount.point.as_slice()));
    let Some(relative) = relative else { return Ok(()) };
    let mut parts = relative.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
    let number = |part: Option<&[u8]>| part.and_then(|part| std::str::from_utf8(part).ok()?.parse::<i32>().ok());
    let Some(pid) = number(parts.next()) else { return Ok(()) };
    let remedy = "close it before the checkpoint and open it again when it is needed";
    if !context.own_pids.values().any(|own| *own == pid) {
        let reason = format!("it tells of process {pid}, which is not in the tree or has ended");
        return Err(view.refuse(reason, remedy).into());
    }
    let (kind, object) = (parts.next(), parts.next());
    let late = match kind {
        Some(b"task") => number(object).is_some_and(|thread| thread != pid),
        Some(b"fd" | b"fdinfo" | b"map_files") => object.is_some(),
        _ => false,
    };
    if late {
        return Err(view.refuse("it tells of a thread or descriptor, which is not there yet when files are opened", remedy).into());
    }
    Ok(())
}

/// The flags that open(2) is given again: neither those that create nor those of the descriptor.
fn reopening_flags(flags: u32) -> OFlags {
    let once = OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::NOCTTY | OFlags::CLOEXEC;
    // O_TMPFILE includes O_DIRECTORY.
    let flags =
        if flags & TMPFILE == TMPFILE { flags & !TMPFILE } else { flags };
    let flags_of_paths = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    if OFlags::from_bits_retain(flags).contains(OFlags::PATH) {
        return OFlags::from_bits_retain(flags) & flags_of_paths;
    }
    // openat2 takes only what it knows; the kernel shows O_LARGEFILE (0o100000), which 64-bit opens imply.
    (OFlags::from_bits_retain(flags & !0o100_000) - once) | OFlags::NOCTTY
}

/// Opens the file outside the tree's root that restore was told takes the place of `key`.
pub(super) fn open_external(key: &str, flags: OFlags, context: &RebuildContext) -> Result<OwnedFd, RestoreError> {
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
        return Err(view.refuse("it is a deleted device, FIFO or socket", "close it before the checkpoint").into());
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
    reopen(file, flags).map_err(RestoreError::rebuild("a deleted file", "open"))
}

/// A description of its own of the file behind a descriptor of ours.
fn reopen(file: &OwnedFd, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    // What is opened is a link of /proc, which must be followed.
    let flags = flags - OFlags::NOFOLLOW;
    rustix::fs::open(format!("/proc/self/fd/{}", file.as_raw_fd()), flags | OFlags::CLOEXEC, Mode::empty())
}
