//! Descriptors of memfds (memfd_create(2)). The memory itself is a shared object of the tree; a description adds an
//! offset and flags.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, SeekFrom};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

const DELETED: &[u8] = b" (deleted)";
/// `f_type` of hugetlbfs in statfs(2).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// An open memfd.
#[derive(Debug, Serialize, Deserialize)]
pub struct Memfd {
    /// Index of the shared object.
    pub object: usize,
    /// Offset in bytes.
    pub position: i64,
}

impl DescriptorKind for Memfd {
    fn recognise(view: &DescriptionView) -> bool {
        view.link.starts_with(b"/memfd:")
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let filesystem = rustix::fs::fstatfs(&view.descriptor).map_err(view.error("fstatfs of a memfd"))?;
        if filesystem.f_type as i64 == HUGETLBFS_MAGIC {
            let remedy = "make it without MFD_HUGETLB and advise transparent huge pages";
            return Err(view.refuse("it is a memfd of hugetlbfs pages", remedy).into());
        }
        // A description of our own: reading through the process's would move its offset.
        let file = rustix::fs::open(itself(&view.descriptor), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(view.error("opening a memfd"))?;
        let name = view.link.strip_suffix(DELETED).unwrap_or(&view.link);
        let object = context.shared_objects.of_descriptor(view.process.pid, file, name)?;
        Ok(Self { object, position: view.info.pos })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let object = context.shared_objects.get(self.object).ok_or_else(|| {
            RestoreError::inconsistent(format!("there is no shared object {}", self.object))
        })?;
        let fail = |step| RestoreError::rebuild("memfd", step);
        let kept = OFlags::ACCMODE | OFlags::APPEND | OFlags::NONBLOCK | OFlags::PATH;
        let flags = (OFlags::from_bits_retain(flags) & kept) | OFlags::CLOEXEC;
        let file = rustix::fs::open(itself(object), flags, Mode::empty()).map_err(fail("open"))?;
        if self.position > 0 && !flags.contains(OFlags::PATH) {
            rustix::fs::seek(&file, SeekFrom::Start(self.position as u64)).map_err(fail("lseek"))?;
        }
        Ok(file)
    }
}

/// A path that opens a descriptor of ours again.
fn itself(descriptor: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}
