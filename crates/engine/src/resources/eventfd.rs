//! Event counters (eventfd(2)): the count, and whether it is a semaphore.

use std::os::fd::OwnedFd;

use limosa_kernel::proc::FdExtra;
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// An eventfd.
#[derive(Debug, Serialize, Deserialize)]
pub struct EventFd {
    /// The counter.
    pub count: u64,
    /// Whether a read takes one instead of all (`EFD_SEMAPHORE`).
    pub semaphore: bool,
}

impl DescriptorKind for EventFd {
    fn recognise(view: &DescriptionView) -> bool {
        view.link == b"anon_inode:[eventfd]"
    }

    fn capture(view: &DescriptionView, _: &mut CaptureContext) -> Result<Self, CaptureError> {
        let FdExtra::EventFd(eventfd) = &view.info.extra else {
            let reason = "the kernel does not tell its count";
            return Err(view.refuse(reason, "close it before the checkpoint").into());
        };
        if eventfd.semaphore.is_none() {
            // Linux before 6.5 keeps it to itself; semaphores are rare.
            let (pid, number) = (view.process.pid, view.number);
            tracing::warn!(pid, number, "this kernel does not tell whether an eventfd is a semaphore: taken as a counter");
        }
        Ok(Self { count: eventfd.count, semaphore: eventfd.semaphore.unwrap_or(false) })
    }

    fn rebuild(&self, _: u32, _: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let kind = if self.semaphore { EventfdFlags::SEMAPHORE } else { EventfdFlags::empty() };
        let fail = |step| RestoreError::rebuild("eventfd", step);
        // Not blocking, so that a count that does not fit is an error and not a restore that hangs.
        let flags = kind | EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let descriptor = eventfd(0, flags).map_err(fail("eventfd2"))?;
        if self.count > 0 {
            rustix::io::write(&descriptor, &self.count.to_ne_bytes()).map_err(fail("write"))?;
        }
        Ok(descriptor)
    }
}
