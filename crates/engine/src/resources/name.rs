//! The name of a thread (`PR_SET_NAME` in prctl(2)).

use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ThreadView;

/// At most 15 bytes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Name(#[serde(with = "serde_bytes")] pub Vec<u8>);

impl ThreadAttribute for Name {
    type Asked = ();

    fn ask(_: &ThreadView, _: &mut Program) -> Result<(), CaptureError> {
        Ok(())
    }

    fn capture(thread: &ThreadView, (): &(), _: &Outcome) -> Result<Self, CaptureError> {
        Ok(Self(thread.proc.comm()?))
    }

    fn rebuild(&self, program: &mut Program) {
        set(&self.0, program);
    }

    fn finish(&self, _: i32) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Adds the call that names the calling thread.
pub fn set(name: &[u8], program: &mut Program) {
    let name = program.string(&name[..name.len().min(15)]);
    program.call("set the thread's name", libc::SYS_prctl, [libc::PR_SET_NAME.into(), name.into()]);
}
