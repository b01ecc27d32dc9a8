//! Mounts through the descriptor-based calls: fsopen(2), fsconfig(2), fsmount(2), `move_mount(2)`.
//!
//! A filesystem is configured and mounted *detached*: it is nowhere until [`Detached::attach`], and gone
//! if the descriptor is closed before.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

pub use rustix::mount::MountAttrFlags as Attributes;

use crate::fault;
use crate::{Error, Result};

/// A filesystem that is being configured.
#[derive(Debug)]
pub struct Filesystem {
    context: OwnedFd,
    kind: String,
}

impl Filesystem {
    /// Starts configuring a filesystem of type `kind`, as `/proc/filesystems` names it.
    pub fn new(kind: &str) -> Result<Self> {
        fault::point();
        let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|errno| Error::new("fsopen", kind, errno))?;
        // What mountinfo shows as the source; by custom the type, where there is no device.
        Self { context, kind: kind.to_owned() }.set("source", kind)
    }

    /// Sets a parameter. The kernel takes values of at most 255 bytes.
    pub fn set(self, key: &str, value: impl AsRef<OsStr>) -> Result<Self> {
        fault::point();
        rustix::mount::fsconfig_set_string(self.context.as_fd(), key, value.as_ref()).map_err(|errno| {
            let assignment = format!("{key}={}", value.as_ref().display());
            self.error("fsconfig", &assignment, errno)
        })?;
        Ok(self)
    }

    /// Sets a parameter that has no value, such as `ro`.
    pub fn flag(self, key: &str) -> Result<Self> {
        fault::point();
        rustix::mount::fsconfig_set_flag(self.context.as_fd(), key)
            .map_err(|errno| self.error("fsconfig", key, errno))?;
        Ok(self)
    }

    /// Creates the filesystem and mounts it, attached to nothing yet.
    pub fn mount(self, attributes: Attributes) -> Result<Detached> {
        fault::point();
        rustix::mount::fsconfig_create(self.context.as_fd())
            .map_err(|errno| self.error("fsconfig(CREATE)", "", errno))?;
        let mount = rustix::mount::fsmount(self.context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.error("fsmount", "", errno))?;
        Ok(Detached { mount, kind: self.kind })
    }

    /// An error with what the kernel has put into the context's message queue, usually the only place
    /// where it says which parameter it disliked and why.
    fn error(&self, operation: &'static str, detail: &str, errno: rustix::io::Errno) -> Error {
        let mut object = self.kind.clone();
        if !detail.is_empty() {
            let _ = write!(object, " ({detail})");
        }
        let mut message = [0_u8; 1024];
        while let Ok(length @ 1..) = rustix::io::read(&self.context, &mut message) {
            let text = String::from_utf8_lossy(message.get(..length).unwrap_or_default()).into_owned();
            let _ = write!(object, ": {}", text.trim_end());
        }
        Error::new(operation, object, errno)
    }
}

/// A mount that is not attached anywhere.
#[derive(Debug)]
pub struct Detached {
    mount: OwnedFd,
    kind: String,
}

impl Detached {
    /// Attaches the mount at `path` of the calling thread's mount namespace.
    pub fn attach(&self, path: &Path) -> Result<()> {
        fault::point();
        rustix::mount::move_mount(&self.mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|errno| {
                Error::new("move_mount", format_args!("{} onto {}", self.kind, path.display()), errno)
            })
    }
}

impl AsFd for Detached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// A detached copy of the mount at `path` (a bind mount to be), with everything mounted below it if
/// `recursive`.
pub fn clone_tree(path: &Path, recursive: bool) -> Result<Detached> {
    fault::point();
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let mount = rustix::mount::open_tree(CWD, path, flags)
        .map_err(|errno| Error::new("open_tree", path.display(), errno))?;
    Ok(Detached { mount, kind: format!("a copy of {}", path.display()) })
}

/// Makes every mount of the calling thread's mount namespace private: nothing that is mounted here shows
/// elsewhere, nor the other way round.
pub fn make_all_private() -> Result<()> {
    fault::point();
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|errno| Error::new("mount(MS_REC|MS_PRIVATE)", "/", errno))
}

/// Makes the mount at `new_root` the root of the calling thread's mount namespace, detaches the old root
/// with everything below it, and makes the new root the thread's working directory.
pub fn change_root(new_root: &Path) -> Result<()> {
    fault::point();
    rustix::process::chdir(new_root).map_err(|errno| Error::new("chdir", new_root.display(), errno))?;
    // With both arguments "." the old root ends up mounted over the new one, and is taken away again
    // (pivot_root(2), Notes): no directory for it is needed.
    rustix::process::pivot_root(".", ".").map_err(|errno| {
        let hint = if errno == rustix::io::Errno::INVAL {
            " (not possible where the host's root is its initial RAM filesystem: switch_root(8) first)"
        } else {
            ""
        };
        Error::new("pivot_root", format_args!("{}{hint}", new_root.display()), errno)
    })?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .map_err(|errno| Error::new("umount2", "the old root", errno))?;
    rustix::process::chdir("/").map_err(|errno| Error::new("chdir", "/", errno))
}
