//! What the kernel does with a process's memory in an emergency: when it runs out of memory
//! (`/proc/PID/oom_score_adj`), and in a core dump (`/proc/PID/coredump_filter`). And whether it locks what will be
//! mapped (mlockall(2)), which shows in a mapping that is made for that.

use std::io;

use limosa_puppet::{CallId, Data, Outcome, Program, ProgramError};
use serde::{Deserialize, Serialize};

use super::LateAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ProcessView;

const PAGE: u64 = 4096;

/// The policies.
#[derive(Debug, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// From -1000, never killed, to 1000, killed first.
    pub oom_score_adjustment: i32,
    /// Kinds of mappings that a core dump contains (core(5)).
    pub core_dump: Option<u32>,
    /// `MCL_FUTURE`, perhaps with `MCL_ONFAULT`, if mappings to come are locked.
    #[serde(default)]
    pub locks_future: Option<i32>,
}

/// What is done with a mapping that is made for the question.
pub struct Asked {
    invalidated: CallId,
    is_resident: CallId,
    resident: Data,
}

impl LateAttribute for MemoryPolicy {
    type Asked = Asked;

    /// A shared one: it merges with none of the process's own.
    fn ask(_: &ProcessView, program: &mut Program) -> Result<Asked, CaptureError> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let arguments = [0.into(), PAGE.into(), access.into(), kind.into(), (-1).into(), 0.into()];
        // Where it fails, so do the others.
        let page = program.try_call("map a page, which may be locked", libc::SYS_mmap, arguments);
        let arguments = [page.into(), PAGE.into(), libc::MS_INVALIDATE.into()];
        let invalidated = program.try_call("ask whether it is locked", libc::SYS_msync, arguments);
        let resident = program.space(8);
        let arguments = [page.into(), PAGE.into(), resident.into()];
        let is_resident = program.try_call("ask whether it is there", libc::SYS_mincore, arguments);
        program.try_call("unmap the page", libc::SYS_munmap, [page.into(), PAGE.into()]);
        Ok(Asked { invalidated, is_resident, resident })
    }

    fn capture(process: &ProcessView, asked: &Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let locked = matches!(
            outcome.result(asked.invalidated),
            Err(ProgramError::Call { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy
        );
        let resident = outcome.result(asked.is_resident).is_ok() && outcome.word(asked.resident, 0) & 1 != 0;
        let flags = if resident { libc::MCL_FUTURE } else { libc::MCL_FUTURE | libc::MCL_ONFAULT };
        Ok(Self {
            oom_score_adjustment: process.proc.oom_score_adj()?,
            core_dump: process.proc.coredump_filter()?,
            locks_future: locked.then_some(flags),
        })
    }

    fn rebuild(&self, program: &mut Program) {
        if let Some(flags) = self.locks_future {
            program.call("lock what will be mapped", libc::SYS_mlockall, [flags.into()]);
        }
    }

    fn finish(&self, pid: i32) -> Result<(), RestoreError> {
        // What it has already may be more than we were allowed to give.
        let proc = limosa_kernel::proc::ProcDir::open(pid)?;
        if proc.oom_score_adj()? != self.oom_score_adjustment {
            let step = "writing oom_score_adj (a lower one takes CAP_SYS_RESOURCE)";
            write(pid, "oom_score_adj", &self.oom_score_adjustment.to_string(), step)?;
        }
        if let Some(filter) = self.core_dump
            && proc.coredump_filter()? != self.core_dump
        {
            write(pid, "coredump_filter", &format!("{filter:#x}"), "writing coredump_filter")?;
        }
        Ok(())
    }
}

fn write(pid: i32, file: &str, content: &str, step: &'static str) -> Result<(), RestoreError> {
    std::fs::write(format!("/proc/{pid}/{file}"), content).map_err(|source| RestoreError::Rebuild {
        object: format!("process {pid}"),
        step,
        source,
    })
}
