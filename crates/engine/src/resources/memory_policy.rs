//! What the kernel does with a process's memory in an emergency: when it runs out of memory
//! (`/proc/PID/oom_score_adj`), and in a core dump (`/proc/PID/coredump_filter`).

use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use super::LateAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ProcessView;

/// Both policies.
#[derive(Debug, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// From -1000, never killed, to 1000, killed first.
    pub oom_score_adjustment: i32,
    /// Kinds of mappings that a core dump contains (core(5)).
    pub core_dump: Option<u32>,
}

impl LateAttribute for MemoryPolicy {
    type Asked = ();

    fn ask(_: &ProcessView, _: &mut Program) -> Result<(), CaptureError> {
        Ok(())
    }

    fn capture(process: &ProcessView, (): &(), _: &Outcome) -> Result<Self, CaptureError> {
        Ok(Self {
            oom_score_adjustment: process.proc.oom_score_adj()?,
            core_dump: process.proc.coredump_filter()?,
        })
    }

    fn rebuild(&self, _: &mut Program) {}

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
