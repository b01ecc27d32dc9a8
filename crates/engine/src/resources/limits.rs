//! Limits on resources (getrlimit(2)).
//!
//! Set late, so that they are not in the way of building the process, but before privileges are dropped. To raise a
//! hard limit above Limosa's own takes `CAP_SYS_RESOURCE`.

use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use super::LateAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ProcessView;

/// Soft and hard limit of each resource, by `RLIMIT_*`; `u64::MAX` for none.
#[derive(Debug, Serialize, Deserialize)]
pub struct Limits(pub [(u64, u64); COUNT]);

const COUNT: usize = 16;

/// What is being done, for each resource.
const PURPOSES: [&str; COUNT] = [
    "set the limit on processor time (raise Limosa's own, ulimit -t)",
    "set the limit on file sizes (raise Limosa's own, ulimit -f)",
    "set the limit on data (raise Limosa's own, ulimit -d)",
    "set the limit on the stack (raise Limosa's own, ulimit -s)",
    "set the limit on core files (raise Limosa's own, ulimit -c)",
    "set the limit on resident memory (raise Limosa's own, ulimit -m)",
    "set the limit on processes (raise Limosa's own, ulimit -u)",
    "set the limit on open files (raise Limosa's own, ulimit -n)",
    "set the limit on locked memory (raise Limosa's own, ulimit -l)",
    "set the limit on address space (raise Limosa's own, ulimit -v)",
    "set the limit on file locks (raise Limosa's own, ulimit -x)",
    "set the limit on pending signals (raise Limosa's own, ulimit -i)",
    "set the limit on message queues (raise Limosa's own, ulimit -q)",
    "set the limit on the nice value (raise Limosa's own, ulimit -e)",
    "set the limit on real-time priority (raise Limosa's own, ulimit -r)",
    "set the limit on real-time run time (raise Limosa's own, ulimit -R)",
];

impl LateAttribute for Limits {
    type Asked = ();

    fn ask(_: &ProcessView, _: &mut Program) -> Result<(), CaptureError> {
        Ok(())
    }

    fn capture(process: &ProcessView, (): &(), _: &Outcome) -> Result<Self, CaptureError> {
        Ok(Self(process.proc.limits()?.0.map(|limit| (limit.soft, limit.hard))))
    }

    fn rebuild(&self, program: &mut Program) {
        for (resource, ((soft, hard), purpose)) in self.0.iter().zip(PURPOSES).enumerate() {
            let limit = program.words(&[*soft, *hard]);
            let arguments = [0.into(), resource.into(), limit.into(), 0.into()];
            program.call(purpose, libc::SYS_prlimit64, arguments);
        }
    }

    fn finish(&self, _: i32) -> Result<(), RestoreError> {
        Ok(())
    }
}
