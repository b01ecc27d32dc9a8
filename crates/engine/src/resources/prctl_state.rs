//! Switches of a process that prctl(2) and personality(2) set: adoption of orphans, huge pages, execution domain, and
//! whether memory may be writable and executable.

use limosa_puppet::{CallId, Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ProcessAttribute;
use crate::error::CaptureError;
use crate::view::ProcessView;

/// Argument of personality(2) that changes nothing.
const ASK: u32 = 0xffff_ffff;
const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;

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
}

/// Where the answers will be.
pub struct Asked {
    subreaper: Data,
    no_huge_pages: CallId,
    personality: CallId,
    deny_write_execute: CallId,
}

impl ProcessAttribute for Switches {
    type Asked = Asked;

    fn ask(_: &ProcessView, program: &mut Program) -> Result<Asked, CaptureError> {
        let subreaper = program.space(8);
        let arguments = [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()];
        program.call("ask whether it adopts orphans", libc::SYS_prctl, arguments);
        let mut ask = |purpose, option: i32| {
            let arguments = [option.into(), 0.into(), 0.into(), 0.into(), 0.into()];
            program.try_call(purpose, libc::SYS_prctl, arguments)
        };
        Ok(Asked {
            subreaper,
            no_huge_pages: ask("ask for its use of huge pages", libc::PR_GET_THP_DISABLE),
            deny_write_execute: ask("ask whether code may be written", PR_GET_MDWE),
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
        })
    }

    fn rebuild(&self, program: &mut Program) {
        if self.subreaper {
            let arguments = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()];
            program.call("adopt orphans", libc::SYS_prctl, arguments);
        }
        let (off, flags) = (self.no_huge_pages & 1, self.no_huge_pages & !1);
        let arguments = [libc::PR_SET_THP_DISABLE.into(), off.into(), flags.into(), 0.into(), 0.into()];
        program.call("set the use of huge pages", libc::SYS_prctl, arguments);
        program.call("set the personality", libc::SYS_personality, [self.personality.into()]);
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
