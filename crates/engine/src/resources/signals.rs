//! Signals of a thread: blocked, pending (with those of the whole process, in its leader), alternate stack.

use limosa_kernel::ptrace::{self, RawSiginfo};
use limosa_puppet::{Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ThreadView;

const SS_ONSTACK: u64 = 1;

/// A thread's signals.
#[derive(Debug, Serialize, Deserialize)]
pub struct Signals {
    /// IDs of the process and the thread, as they send to themselves.
    ids: (i32, i32),
    /// Blocked signals.
    pub blocked: u64,
    /// `siginfo_t` of each signal pending for the thread.
    pub pending: Vec<serde_bytes::ByteBuf>,
    /// `siginfo_t` of each signal pending for the process; only in its leader.
    pub shared_pending: Vec<serde_bytes::ByteBuf>,
    /// `stack_t`: address, flags, size.
    pub alternate_stack: (u64, u64, u64),
}

impl Signals {
    /// Whether the signal is pending for the process.
    pub(crate) fn has_pending(&self, signal: i32) -> bool {
        self.shared_pending.iter().any(|info| signal_of(info) == signal)
    }
}

fn raw(pending: Vec<RawSiginfo>) -> Vec<serde_bytes::ByteBuf> {
    pending.into_iter().map(|info| serde_bytes::ByteBuf::from(info.to_vec())).collect()
}

impl ThreadAttribute for Signals {
    type Asked = Data;

    fn ask(_: &ThreadView, program: &mut Program) -> Result<Data, CaptureError> {
        let stack = program.space(24);
        program.call("ask for the alternate stack", libc::SYS_sigaltstack, [0.into(), stack.into()]);
        Ok(stack)
    }

    fn capture(thread: &ThreadView, asked: &Data, outcome: &Outcome) -> Result<Self, CaptureError> {
        let leads = thread.tid == thread.process.pid;
        let flags = outcome.word(*asked, 1) & 0xffff_ffff & !SS_ONSTACK;
        Ok(Self {
            ids: (thread.process.own_pid, thread.own_tid),
            blocked: ptrace::signal_mask(thread.tid)?,
            pending: raw(ptrace::pending_signals(thread.tid, false)?),
            shared_pending: if leads { raw(ptrace::pending_signals(thread.tid, true)?) } else { Vec::new() },
            alternate_stack: (outcome.word(*asked, 0), flags, outcome.word(*asked, 2)),
        })
    }

    fn rebuild(&self, program: &mut Program) {
        let (address, flags, size) = self.alternate_stack;
        let stack = program.words(&[address, flags, size]);
        program.call("set the alternate stack", libc::SYS_sigaltstack, [stack.into(), 0.into()]);
        let (pid, tid) = self.ids;
        for info in &self.pending {
            let (signal, data) = (signal_of(info), program.bytes(info));
            let arguments = [pid.into(), tid.into(), signal.into(), data.into()];
            program.call("queue a pending signal", libc::SYS_rt_tgsigqueueinfo, arguments);
        }
        for info in &self.shared_pending {
            let (signal, data) = (signal_of(info), program.bytes(info));
            let arguments = [pid.into(), signal.into(), data.into()];
            program.call("queue a signal pending for the process", libc::SYS_rt_sigqueueinfo, arguments);
        }
    }

    fn finish(&self, tid: i32) -> Result<(), RestoreError> {
        ptrace::set_signal_mask(tid, self.blocked)?;
        Ok(())
    }
}

/// `si_signo`; 0, which the kernel refuses, for anything too short.
fn signal_of(info: &[u8]) -> i32 {
    info.first_chunk().map_or(0, |bytes| i32::from_le_bytes(*bytes))
}
