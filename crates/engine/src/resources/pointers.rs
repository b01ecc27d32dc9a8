//! Addresses that the kernel keeps for a thread: the word it clears and wakes at the thread's end
//! (set_tid_address(2)), the list of robust futexes (set_robust_list(2)), restartable sequences (rseq(2)).

use limosa_kernel::ptrace::RseqConfiguration;
use limosa_kernel::{memory, ptrace, task};
use limosa_puppet::{Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ThreadView;

/// Offset of `rseq_cs` in `struct rseq`.
const RSEQ_CS: u64 = 8;

/// The addresses; 0 where there is none.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pointers {
    /// `clear_child_tid`
    pub clear_tid: u64,
    /// Head of the robust list and its size.
    pub robust_list: (u64, u64),
    /// Restartable sequences: address, size, signature.
    pub rseq: Option<Rseq>,
}

/// A registration of restartable sequences.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of `struct rseq`.
    pub address: u64,
    /// Registered size.
    pub size: u32,
    /// What stands before abort handlers.
    pub signature: u32,
    /// The critical section that the thread is in: the kernel clears it when the puppet registers, outside of
    /// it, so it is written back last; the kernel then aborts the sequence as after any preemption.
    pub section: u64,
}

impl ThreadAttribute for Pointers {
    type Asked = Data;

    fn ask(_: &ThreadView, program: &mut Program) -> Result<Data, CaptureError> {
        let address = program.space(8);
        // Fails where the kernel lacks CONFIG_CHECKPOINT_RESTORE; then nothing is to be cleared.
        program.try_call(
            "ask for the word cleared at the thread's end",
            libc::SYS_prctl,
            [libc::PR_GET_TID_ADDRESS.into(), address.into()],
        );
        Ok(address)
    }

    fn capture(thread: &ThreadView, asked: &Data, outcome: &Outcome) -> Result<Self, CaptureError> {
        let RseqConfiguration { address, size, signature, .. } =
            ptrace::rseq_configuration(thread.tid).unwrap_or_default();
        let rseq = if address == 0 {
            None
        } else {
            let mut section = [0; 8];
            memory::read(thread.tid, address + RSEQ_CS, &mut section)?;
            Some(Rseq { address, size, signature, section: u64::from_le_bytes(section) })
        };
        Ok(Self { clear_tid: outcome.word(*asked, 0), robust_list: task::robust_list(thread.tid)?, rseq })
    }

    fn rebuild(&self, program: &mut Program) {
        program.call("set the word cleared at the thread's end", libc::SYS_set_tid_address, [self.clear_tid.into()]);
        let (head, length) = self.robust_list;
        if head != 0 {
            program.call("set the robust list", libc::SYS_set_robust_list, [head.into(), length.into()]);
        }
        if let Some(rseq) = self.rseq {
            let arguments = [rseq.address.into(), rseq.size.into(), 0.into(), rseq.signature.into()];
            program.call("register restartable sequences", libc::SYS_rseq, arguments);
        }
    }

    fn finish(&self, tid: i32) -> Result<(), RestoreError> {
        if let Some(rseq) = self.rseq.filter(|rseq| rseq.section != 0) {
            memory::write(tid, rseq.address + RSEQ_CS, &rseq.section.to_le_bytes())?;
        }
        Ok(())
    }
}
