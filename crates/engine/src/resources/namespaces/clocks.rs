//! The time namespace: what its monotonic clocks showed (time_namespaces(7)).
//!
//! A restored tree's clocks go on where they stood: whoever prepares the namespace asks [`Clocks::offsets`] for
//! what to add to this host's. It cannot be changed once a process is in it, so the puppet has nothing to do.

use limosa_kernel::namespace::TimeOffsets;
use limosa_kernel::proc::ProcDir;
use limosa_puppet::Program;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::Namespace;
use crate::error::{CaptureError, RestoreError};
use crate::view::ProcessView;

const NANOSECONDS: i128 = 1_000_000_000;

/// Nanoseconds that the clocks showed when the tree was frozen.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Clocks {
    /// `CLOCK_MONOTONIC`
    pub monotonic: i64,
    /// `CLOCK_BOOTTIME`
    pub boottime: i64,
}

/// Nanoseconds that a clock of this host shows.
fn now(clock: ClockId) -> i128 {
    let time = clock_gettime(clock);
    i128::from(time.tv_sec) * NANOSECONDS + i128::from(time.tv_nsec)
}

impl Clocks {
    /// What must be added to this host's clocks now for the tree's to go on where they stood.
    pub fn offsets(&self) -> TimeOffsets {
        let offset = |showed: i64, clock| {
            let difference = i128::from(showed) - now(clock);
            (difference.div_euclid(NANOSECONDS) as i64, difference.rem_euclid(NANOSECONDS) as u32)
        };
        TimeOffsets {
            monotonic: offset(self.monotonic, ClockId::Monotonic),
            boottime: offset(self.boottime, ClockId::Boottime),
        }
    }
}

impl Namespace for Clocks {
    fn capture(root: &ProcessView) -> Result<Self, CaptureError> {
        let offsets = root.proc.timens_offsets()?;
        let showed = |clock, (seconds, nanoseconds): (i64, i64)| {
            (now(clock) + i128::from(seconds) * NANOSECONDS + i128::from(nanoseconds)) as i64
        };
        Ok(Self {
            monotonic: showed(ClockId::Monotonic, offsets.monotonic),
            boottime: showed(ClockId::Boottime, offsets.boottime),
        })
    }

    fn rebuild(&self, _: &ProcDir, _: &mut Program) -> Result<(), RestoreError> {
        Ok(())
    }
}
