//! Signals that are read from a descriptor (signalfd(2)): which.

use std::os::fd::OwnedFd;

use limosa_kernel::proc::FdExtra;
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

/// A signalfd. Whoever reads it gets its own signals, so which process made it does not matter.
#[derive(Debug, Serialize, Deserialize)]
pub struct SignalFd {
    /// Bit N-1 for signal N.
    pub mask: u64,
}

impl DescriptorKind for SignalFd {
    fn recognise(view: &DescriptionView) -> bool {
        view.link == b"anon_inode:[signalfd]"
    }

    fn capture(view: &DescriptionView, _: &mut CaptureContext) -> Result<Self, CaptureError> {
        match view.info.extra {
            FdExtra::SignalFd { mask } => Ok(Self { mask }),
            _ => Err(view.refuse("the kernel does not tell its signals", "close it before the checkpoint").into()),
        }
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _: u32, _: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        Ok(limosa_kernel::signals::signalfd(self.mask)?)
    }
}
