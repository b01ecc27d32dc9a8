//! Watches of files and directories (inotify(7)).
//!
//! The kernel tells a watched inode and its handle, not the path that it was found by; so a path is sought at checkpoint,
//! and watched again at restore. Watch descriptors are given out in rising order: where there are gaps, watches are
//! added and removed until the number fits. Events that nobody has read are not carried.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use limosa_kernel::handle;
use limosa_kernel::proc::{FdExtra, InotifyWatch};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext, paths};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// Most numbers that are tried for one inotify; each costs a microsecond or two.
const TRIES_MAX: i32 = 1 << 20;

/// An inotify.
#[derive(Debug, Serialize, Deserialize)]
pub struct Inotify {
    /// What it watches, by number.
    pub watches: Vec<Watch>,
}

/// A watch.
#[derive(Debug, Serialize, Deserialize)]
pub struct Watch {
    /// The watch descriptor.
    pub number: i32,
    /// `IN_*`
    pub mask: u32,
    /// A path of the watched file.
    pub path: serde_bytes::ByteBuf,
}

impl DescriptorKind for Inotify {
    fn recognise(view: &DescriptionView) -> bool {
        view.link == b"anon_inode:inotify"
    }

    fn capture(view: &DescriptionView, _: &mut CaptureContext) -> Result<Self, CaptureError> {
        let pending = rustix::io::ioctl_fionread(&view.descriptor)
            .map_err(view.error("asking an inotify for its unread events"))?;
        if pending > 0 {
            let (pid, descriptor) = (view.process.pid, view.place);
            tracing::warn!(pid, %descriptor, "{pending} bytes of unread inotify events do not travel with the checkpoint");
        }
        let watched: &[InotifyWatch] = match &view.info.extra {
            FdExtra::Inotify(watches) => watches,
            _ => &[],
        };
        let mut watches = Vec::with_capacity(watched.len());
        for watch in watched {
            let path = find(view, watch)?;
            watches.push(Watch { number: watch.wd, mask: watch.mask, path: path.into() });
        }
        watches.sort_by_key(|watch| watch.number);
        Ok(Self { watches })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let fail = |step| RestoreError::rebuild("inotify", step);
        let descriptor =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(fail("inotify_init1"))?;
        if self.watches.iter().any(|watch| watch.number > TRIES_MAX) {
            return Err(RestoreError::Unsupported {
                what: format!("an inotify with watch descriptors above {TRIES_MAX}"),
                why: "reaching such a number would take too long".into(),
            });
        }
        for watch in &self.watches {
            let file = context.open(&watch.path, OFlags::PATH, Mode::empty())?;
            watch.add(&descriptor, &file)?;
        }
        // What was removed on the way has left events.
        let mut events = vec![0; 64 * 1024];
        while rustix::io::read(&descriptor, &mut events[..]).is_ok_and(|read| read > 0) {}
        Ok(descriptor)
    }
}

impl Watch {
    fn add(&self, inotify: &OwnedFd, file: &OwnedFd) -> Result<(), RestoreError> {
        let name = || String::from_utf8_lossy(&self.path).into_owned();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // The unmount and overflow bits that the kernel shows are not ones to ask for.
        let mask = WatchFlags::from_bits_retain(self.mask & ASKABLE);
        loop {
            let number = inotify::add_watch(inotify, &path, mask)
                .map_err(RestoreError::rebuild(name(), "inotify_add_watch"))?;
            if number == self.number {
                return Ok(());
            }
            if number > self.number {
                let what = format!("watch descriptor {} of {}", self.number, name());
                return Err(RestoreError::inconsistent(what));
            }
            inotify::remove_watch(inotify, number)
                .map_err(RestoreError::rebuild(name(), "inotify_rm_watch"))?;
        }
    }
}

/// `IN_ALL_EVENTS`, `IN_EXCL_UNLINK`, `IN_ONESHOT`.
const ASKABLE: u32 = 0xfff | 0x0400_0000 | 0x8000_0000;

/// A path of the inode that is watched: by its handle, or else by searching the filesystem for its number.
fn find(view: &DescriptionView, watch: &InotifyWatch) -> Result<Vec<u8>, CaptureError> {
    let device = (watch.sdev >> 20, watch.sdev & 0xf_ffff);
    let root = PathBuf::from(format!("/proc/{}/root", view.process.pid));
    let mounts = view.process.proc.mountinfo()?;
    for mount in mounts.iter().filter(|mount| mount.dev == device) {
        let inside = mount.point.strip_prefix(b"/").unwrap_or(&mount.point);
        let point = root.join(std::ffi::OsStr::from_bytes(inside));
        if let Some(path) = by_handle(&root, &point, watch) {
            return Ok(path);
        }
        if let Some(path) = paths::search(&root, &point, watch.ino) {
            return Ok(path);
        }
    }
    let reason = format!(
        "it watches inode {} of device {}:{}, of which no path can be found",
        watch.ino, device.0, device.1
    );
    Err(view.refuse(reason, "remove that watch (inotify_rm_watch) before the checkpoint").into())
}

/// The path that the kernel knows for the inode, if it leads to it.
fn by_handle(root: &Path, point: &Path, watch: &InotifyWatch) -> Option<Vec<u8>> {
    let mount =
        rustix::fs::open(point, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let file = handle::open(&mount, watch.handle.as_ref()?).ok()?;
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new()).ok()?.into_bytes();
    // An inode that is in no directory cache, or deleted, has no whole path.
    let inside = root.join(std::ffi::OsStr::from_bytes(path.strip_prefix(b"/")?));
    rustix::fs::lstat(inside).is_ok_and(|stat| stat.st_ino == watch.ino).then_some(path)
}
