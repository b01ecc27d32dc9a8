//! Seccomp of a thread (seccomp(2)): strict mode, or filters in the order in which they were installed.
//!
//! Installed last of all, by ptrace calls into the stopped thread, because filters apply to our stub too; the tracer
//! suspends them until it lets the thread go. Installing takes `no_new_privs` or `CAP_SYS_ADMIN`: a thread that has
//! neither keeps the capability until its filters are in place (see `credentials`).

use limosa_kernel::ptrace::{self, FilterInstruction};
use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, Refusal, RestoreError};
use crate::restore::Inside;
use crate::view::ThreadView;

const SET_MODE_STRICT: u64 = 0;
const SET_MODE_FILTER: u64 = 1;
const FILTER_FLAG_LOG: u64 = 1 << 1;
/// `BPF_RET | BPF_K`, and the action of `SECCOMP_RET_USER_NOTIF`.
const RETURN_CONSTANT: u16 = 6;
const USER_NOTIFICATION: u32 = 0x7fc0_0000;
const ACTION: u32 = 0xffff_0000;
/// `BPF_MAXINSNS`
const INSTRUCTIONS_MAX: usize = 4096;
const INSTRUCTION: usize = size_of::<FilterInstruction>();

/// A thread's seccomp.
#[derive(Debug, Serialize, Deserialize)]
pub struct Seccomp {
    /// Whether it may only read, write and end (`SECCOMP_MODE_STRICT`).
    pub strict: bool,
    /// Filters, the oldest first.
    pub filters: Vec<Filter>,
}

/// A filter.
#[derive(Debug, Serialize, Deserialize)]
pub struct Filter {
    /// Classic BPF, 8 bytes an instruction (`struct sock_filter`).
    pub program: serde_bytes::ByteBuf,
    /// `SECCOMP_FILTER_FLAG_LOG`
    pub logged: bool,
}

impl ThreadAttribute for Seccomp {
    type Asked = ();

    fn ask(_: &ThreadView, _: &mut Program) -> Result<(), CaptureError> {
        Ok(())
    }

    fn capture(thread: &ThreadView, (): &(), _: &Outcome) -> Result<Self, CaptureError> {
        let mode = thread.status.seccomp.unwrap_or(0);
        let mut filters = Vec::new();
        if mode == 2 {
            while let Some(program) = ptrace::seccomp_filter(thread.tid, filters.len())? {
                if program.iter().copied().any(notifies) {
                    let reason = "a supervisor listens to its seccomp filter (SECCOMP_RET_USER_NOTIF)";
                    let pid = thread.process.pid;
                    return Err(Refusal::process(pid, reason, "run it without that supervisor").into());
                }
                let logged = ptrace::seccomp_filter_is_logged(thread.tid, filters.len())?;
                filters.push(Filter { program: program.concat().into(), logged });
            }
        }
        Ok(Self { strict: mode == 1, filters })
    }

    fn rebuild(&self, _: &mut Program) {}

    fn finish(&self, _: i32) -> Result<(), RestoreError> {
        Ok(())
    }
}

fn notifies(instruction: FilterInstruction) -> bool {
    let [a, b, _, _, value @ ..] = instruction;
    u16::from_le_bytes([a, b]) == RETURN_CONSTANT && u32::from_le_bytes(value) & ACTION == USER_NOTIFICATION
}

impl Seccomp {
    /// Whether there is anything to install.
    pub fn is_on(&self) -> bool {
        self.strict || !self.filters.is_empty()
    }

    /// Installs everything in a stopped thread whose tracer has suspended seccomp.
    pub(crate) fn install(&self, thread: &mut Inside) -> Result<(), RestoreError> {
        for filter in &self.filters {
            let length = filter.program.len() / INSTRUCTION;
            if !filter.program.len().is_multiple_of(INSTRUCTION) || length > INSTRUCTIONS_MAX {
                let what = format!("a seccomp filter of {} bytes", filter.program.len());
                return Err(RestoreError::inconsistent(what));
            }
            let code = thread.bytes(&filter.program)?;
            // struct sock_fprog: 16-bit length, pointer.
            let mut program = (length as u64).to_le_bytes().to_vec();
            program.extend(code.to_le_bytes());
            let program = thread.bytes(&program)?;
            let flags = if filter.logged { FILTER_FLAG_LOG } else { 0 };
            let arguments = [SET_MODE_FILTER, flags, program, 0, 0, 0];
            thread.call("installing a seccomp filter", libc::SYS_seccomp, arguments)?;
        }
        if self.strict {
            let arguments = [SET_MODE_STRICT, 0, 0, 0, 0, 0];
            thread.call("entering strict seccomp mode", libc::SYS_seccomp, arguments)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_with_a_supervisor_are_known() {
        assert!(notifies([6, 0, 0, 0, 0, 0, 0xc0, 0x7f]));
        assert!(!notifies([6, 0, 0, 0, 0, 0, 0xff, 0x7f]));
        assert!(!notifies([0x15, 0, 0, 0, 0, 0, 0xc0, 0x7f]));
    }
}
