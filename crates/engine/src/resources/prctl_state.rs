//! Switches of a process that prctl(2), personality(2) and membarrier(2) set: adoption of orphans, huge pages, merged
//! pages, memory errors, execution domain, whether memory may be writable and executable, and what the process has
//! registered for (barriers on all processors fail without), and arch_prctl(2)'s permission to use the tiles of AMX.

use limosa_puppet::{CallId, Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ProcessAttribute;
use super::processor::TILE_DATA;
use crate::error::CaptureError;
use crate::view::ProcessView;

/// Argument of personality(2) that changes nothing.
const ASK: u32 = 0xffff_ffff;
const ARCH_GET_XCOMP_PERM: i32 = 0x1022;
const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_GET_IO_FLUSHER: i32 = 58;
/// `PR_MCE_KILL_SET`, and the policy that everyone has.
const MCE_KILL_SET: u64 = 1;
const MCE_KILL_DEFAULT: u64 = 2;
const MEMBARRIER_GET_REGISTRATIONS: i32 = 1 << 9;
/// Commands of membarrier(2) that register; the last also needs rseq in use.
const MEMBARRIER_REGISTER: [u64; 4] = [1 << 2, 1 << 4, 1 << 6, 1 << 8];
/// What is registered for where the kernel does not tell (before 6.3): to be registered costs next to nothing.
const MEMBARRIER_UNKNOWN: u64 = 1 << 2 | 1 << 4 | 1 << 6;

/// The switches.
#[derive(Debug, Serialize, Deserialize)]
pub struct Switches {
    /// `PR_SET_CHILD_SUBREAPER`
    pub subreaper: bool,
    /// `PR_SET_THP_DISABLE`: bit 0 whether transparent huge pages are off, the others its flags (6.18).
    pub no_huge_pages: u64,
    /// `PER_*` and its flags.
    pub personality: u64,
    /// `PR_SET_MDWE` (6.3).
    pub deny_write_execute: u64,
    /// `PR_SET_MEMORY_MERGE` (6.4): equal pages are merged (KSM).
    #[serde(default)]
    pub merge_pages: bool,
    /// `PR_SET_IO_FLUSHER` (5.6): it serves a block device.
    #[serde(default)]
    pub flushes: bool,
    /// `PR_MCE_KILL`: how it hears of memory that has failed; none for the system's default.
    #[serde(default)]
    pub memory_errors: Option<u64>,
    /// Registrations of membarrier(2), as `MEMBARRIER_CMD_GET_REGISTRATIONS` gives them.
    #[serde(default)]
    pub barriers: u64,
    /// Parts of the registers that it may use, by number, as `ARCH_GET_XCOMP_PERM` gives them.
    #[serde(default)]
    pub permitted: u64,
}

/// Where the answers will be.
pub struct Asked {
    subreaper: Data,
    no_huge_pages: CallId,
    personality: CallId,
    deny_write_execute: CallId,
    merge_pages: CallId,
    flushes: CallId,
    memory_errors: CallId,
    barriers: CallId,
    permissions: Data,
}

impl ProcessAttribute for Switches {
    type Asked = Asked;

    fn ask(_: &ProcessView, program: &mut Program) -> Result<Asked, CaptureError> {
        let subreaper = program.space(8);
        let arguments = [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()];
        program.call("ask whether it adopts orphans", libc::SYS_prctl, arguments);
        // Zero where the kernel or the processor knows none.
        let permissions = program.space(8);
        let arguments = [ARCH_GET_XCOMP_PERM.into(), permissions.into()];
        program.try_call("ask for its parts of the registers", libc::SYS_arch_prctl, arguments);
        let mut ask = |purpose, option: i32| {
            let arguments = [option.into(), 0.into(), 0.into(), 0.into(), 0.into()];
            program.try_call(purpose, libc::SYS_prctl, arguments)
        };
        Ok(Asked {
            subreaper,
            permissions,
            no_huge_pages: ask("ask for its use of huge pages", libc::PR_GET_THP_DISABLE),
            deny_write_execute: ask("ask whether code may be written", PR_GET_MDWE),
            merge_pages: ask("ask whether pages are merged", PR_GET_MEMORY_MERGE),
            flushes: ask("ask whether it serves a block device", PR_GET_IO_FLUSHER),
            memory_errors: ask("ask how it hears of failed memory", libc::PR_MCE_KILL_GET),
            barriers: program.try_call(
                "ask for its registrations of barriers",
                libc::SYS_membarrier,
                [MEMBARRIER_GET_REGISTRATIONS.into(), 0.into(), 0.into()],
            ),
            personality: program.call("ask for its personality", libc::SYS_personality, [ASK.into()]),
        })
    }

    fn capture(_: &ProcessView, asked: &Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        // A kernel that does not know a switch does not have it on.
        let answer = |call| outcome.result(call).unwrap_or(0);
        Ok(Self {
            subreaper: outcome.word(asked.subreaper, 0) & 0xffff_ffff != 0,
            no_huge_pages: answer(asked.no_huge_pages),
            personality: answer(asked.personality),
            deny_write_execute: answer(asked.deny_write_execute),
            merge_pages: answer(asked.merge_pages) == 1,
            flushes: answer(asked.flushes) == 1,
            memory_errors: outcome.result(asked.memory_errors).ok().filter(|kill| *kill < MCE_KILL_DEFAULT),
            barriers: outcome.result(asked.barriers).unwrap_or(MEMBARRIER_UNKNOWN),
            permitted: outcome.word(asked.permissions, 0),
        })
    }

    fn rebuild(&self, program: &mut Program) {
        // The others every process may use.
        if self.permitted & 1 << TILE_DATA != 0 {
            let arguments = [ARCH_REQ_XCOMP_PERM.into(), TILE_DATA.into()];
            program.call("ask for the tiles of AMX", libc::SYS_arch_prctl, arguments);
        }
        if self.subreaper {
            let arguments = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()];
            program.call("adopt orphans", libc::SYS_prctl, arguments);
        }
        let (off, flags) = (self.no_huge_pages & 1, self.no_huge_pages & !1);
        let arguments = [libc::PR_SET_THP_DISABLE.into(), off.into(), flags.into(), 0.into(), 0.into()];
        program.call("set the use of huge pages", libc::SYS_prctl, arguments);
        program.call("set the personality", libc::SYS_personality, [self.personality.into()]);
        let mut switch = |purpose, arguments: [u64; 3]| {
            let [option, first, second] = arguments.map(Into::into);
            program.call(purpose, libc::SYS_prctl, [option, first, second, 0.into(), 0.into()]);
        };
        if self.merge_pages {
            switch("merge equal pages", [PR_SET_MEMORY_MERGE as u64, 1, 0]);
        }
        if self.flushes {
            switch("serve a block device (takes CAP_SYS_RESOURCE)", [PR_SET_IO_FLUSHER as u64, 1, 0]);
        }
        if let Some(kill) = self.memory_errors {
            switch("choose how to hear of failed memory", [libc::PR_MCE_KILL as u64, MCE_KILL_SET, kill]);
        }
        for command in MEMBARRIER_REGISTER.into_iter().filter(|command| self.barriers & command != 0) {
            // A kernel that does not have a kind of barrier tells its next caller so.
            let arguments = [command.into(), 0.into(), 0.into()];
            program.try_call("register for barriers", libc::SYS_membarrier, arguments);
        }
        if self.deny_write_execute != 0 {
            let arguments = [
                PR_SET_MDWE.into(),
                self.deny_write_execute.into(),
                0.into(),
                0.into(),
                0.into(),
            ];
            program.call("deny writing to code", libc::SYS_prctl, arguments);
        }
    }
}
