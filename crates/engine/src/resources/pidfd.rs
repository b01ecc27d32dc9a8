//! Descriptors of processes (pidfd_open(2)): which process.
//!
//! When descriptors are rebuilt all processes of the tree are born, so Limosa can open any of them itself. A pidfd of a
//! process that has ended and been reaped, whichever it was, says just that: so does one of a process that Limosa makes
//! and ends.

use std::os::fd::OwnedFd;

use limosa_kernel::proc::FdExtra;
use limosa_kernel::spawn::Spawn;
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
    /// Whether its process has ended and been reaped.
    #[serde(default)]
    pub ended: bool,
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
        let thread = view.info.flags & THREAD != 0;
        if pidfd.pid == -1 {
            return Ok(Self { pid: 0, thread, ended: true });
        }
        let pid = context.own_pids.get(&pidfd.pid).ok_or_else(|| {
            let reason = match pidfd.pid {
                0 => "its process is in another PID namespace, outside the tree".to_owned(),
                pid if thread => format!("it is of thread {pid}, which is not the first of a process of the tree"),
                pid => format!("process {pid}, which it is of, is not in the tree that is checkpointed"),
            };
            view.refuse(reason, "close it, or checkpoint a tree that has both")
        })?;
        Ok(Self { pid: *pid, thread, ended: false })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let flags = if self.thread { THREAD } else { 0 };
        if self.ended {
            // Dropped, the child is ended and reaped.
            let child = Spawn::default().start()?;
            return Ok(task::pidfd_open_with(child.pid(), flags)?);
        }
        let pid = context.pids.get(&self.pid).ok_or_else(|| {
            RestoreError::inconsistent(format!("a pidfd of process {}, which is not in the tree", self.pid))
        })?;
        Ok(task::pidfd_open_with(*pid, flags)?)
    }
}
