//! Descriptors of processes (pidfd_open(2)): which process.
//!
//! When descriptors are rebuilt all processes of the tree are born, so Limosa can open any of them itself.

use std::os::fd::OwnedFd;

use limosa_kernel::proc::FdExtra;
use limosa_kernel::task;
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// `PIDFD_THREAD`, which is `O_EXCL`.
const THREAD: u32 = libc::O_EXCL as u32;

/// A pidfd.
#[derive(Debug, Serialize, Deserialize)]
pub struct PidFd {
    /// The process, as the tree's processes see it.
    pub pid: i32,
    /// Whether it is one of the leading thread only (`PIDFD_THREAD`).
    pub thread: bool,
}

impl DescriptorKind for PidFd {
    fn recognise(view: &DescriptionView) -> bool {
        // The second is what Linux 6.9 and newer call it.
        view.link == b"anon_inode:[pidfd]" || view.link.starts_with(b"pidfd:[")
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let FdExtra::PidFd(pidfd) = &view.info.extra else {
            let reason = "the kernel does not tell which process it is of";
            return Err(view.refuse(reason, "close it before the checkpoint").into());
        };
        let pid = context.own_pids.get(&pidfd.pid).ok_or_else(|| {
            let reason = match pidfd.pid {
                -1 => "its process has ended and been reaped".to_owned(),
                pid => format!("process {pid}, which it is of, is not in the tree that is checkpointed"),
            };
            view.refuse(reason, "close it, or checkpoint a tree that has both")
        })?;
        Ok(Self { pid: *pid, thread: view.info.flags & THREAD != 0 })
    }

    fn rebuild(&self, _: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let pid = context.pids.get(&self.pid).ok_or_else(|| {
            RestoreError::inconsistent(format!("a pidfd of process {}, which is not in the tree", self.pid))
        })?;
        Ok(task::pidfd_open_with(*pid, if self.thread { THREAD } else { 0 })?)
    }
}
