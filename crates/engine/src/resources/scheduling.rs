//! How a thread is scheduled: policy and priority (sched_setattr(2)), processors, I/O priority, timer slack.
//!
//! Utilization clamps are not carried. A thread that could run on every processor can so after a restore, however
//! many there are.

use limosa_kernel::task::{self, SchedulingAttributes};
use limosa_puppet::{CallId, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ThreadView;

/// First published size of `struct sched_attr`: without utilization clamps.
const ATTRIBUTES_SIZE: u64 = 48;
const IOPRIO_WHO_PROCESS: i32 = 1;
/// Words of the mask of all processors, as many as the kernel can have (8192).
const ALL: usize = 128;

/// A thread's scheduling.
#[derive(Debug, Serialize, Deserialize)]
pub struct Scheduling {
    /// `SCHED_*`
    pub policy: u32,
    /// `SCHED_FLAG_*`
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// Run time, deadline and period in nanoseconds; for fair policies the slice, if it was chosen (6.12).
    pub times: [u64; 3],
    /// Processors, 64 in each word; none for all.
    pub processors: Option<Vec<u64>>,
    /// As ioprio_get(2) encodes it.
    pub io_priority: u32,
    /// Nanoseconds by which the kernel may delay a timer.
    pub timer_slack: u64,
}

impl ThreadAttribute for Scheduling {
    type Asked = CallId;

    fn ask(_: &ThreadView, program: &mut Program) -> Result<CallId, CaptureError> {
        Ok(program.call("ask for the timer slack", libc::SYS_prctl, [libc::PR_GET_TIMERSLACK.into()]))
    }

    fn capture(thread: &ThreadView, asked: &CallId, outcome: &Outcome) -> Result<Self, CaptureError> {
        let question = |source| CaptureError::Question { pid: thread.process.pid, source };
        let SchedulingAttributes { policy, flags, nice, priority, mut runtime, deadline, period, .. } =
            task::scheduling(thread.tid)?;
        // The slice that everyone has was not chosen, and is another one on another machine.
        if is_fair(policy) && is_default_slice(runtime) {
            runtime = 0;
        }
        let processors = task::affinity(thread.tid)?;
        let all = covers(&processors, &online_processors());
        Ok(Self {
            policy,
            flags,
            nice,
            priority,
            times: [runtime, deadline, period],
            processors: (!all).then_some(processors),
            io_priority: task::io_priority(thread.tid)?,
            timer_slack: outcome.result(*asked).map_err(question)?,
        })
    }

    fn rebuild(&self, program: &mut Program) {
        self.choose_processors(program);
        let low = |word: u32| u64::from(word);
        let attributes = program.words(&[
            ATTRIBUTES_SIZE | low(self.policy) << 32,
            self.flags,
            low(self.nice as u32) | low(self.priority) << 32,
            self.times[0],
            self.times[1],
            self.times[2],
        ]);
        let arguments = [0.into(), attributes.into(), 0.into()];
        program.call("set the scheduling policy", libc::SYS_sched_setattr, arguments);
        if self.io_priority != 0 {
            let arguments = [IOPRIO_WHO_PROCESS.into(), 0.into(), self.io_priority.into()];
            program.call("set the I/O priority", libc::SYS_ioprio_set, arguments);
        }
        let arguments = [libc::PR_SET_TIMERSLACK.into(), self.timer_slack.into()];
        program.call("set the timer slack", libc::SYS_prctl, arguments);
    }

    fn finish(&self, _: i32) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl Scheduling {
    /// The processors that there are here too; the kernel leaves out those that there are not.
    fn choose_processors(&self, program: &mut Program) {
        let wanted = self.processors.clone().unwrap_or_else(|| vec![u64::MAX; ALL]);
        let online = online_processors();
        if !online.is_empty() && wanted.iter().zip(&online).all(|(wanted, online)| wanted & online == 0) {
            tracing::warn!("none of the processors that a thread was bound to is here: it may run on all");
            return;
        }
        let mask = program.words(&wanted);
        let arguments = [0.into(), (wanted.len() * 8).into(), mask.into()];
        program.call("bind to processors", libc::SYS_sched_setaffinity, arguments);
    }
}

fn is_fair(policy: u32) -> bool {
    [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE].contains(&(policy as i32))
}

/// Whether the slice is the one that Limosa has itself.
fn is_default_slice(runtime: u64) -> bool {
    const SELF: i32 = 0;
    task::scheduling(SELF).is_ok_and(|own| own.runtime == runtime)
}

/// Whether `mask` has all bits of `all`.
fn covers(mask: &[u64], all: &[u64]) -> bool {
    !all.is_empty()
        && all.iter().enumerate().all(|(index, word)| word & !mask.get(index).copied().unwrap_or(0) == 0)
}

/// The processors that are running, 64 in each word; empty if nobody tells.
fn online_processors() -> Vec<u64> {
    std::fs::read_to_string("/sys/devices/system/cpu/online").map_or_else(|_| Vec::new(), |text| parse_list(&text))
}

/// A list such as `0-3,8`.
fn parse_list(text: &str) -> Vec<u64> {
    let mut mask = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else { continue };
        for number in first..=last.min(ALL * 64 - 1) {
            if mask.len() <= number / 64 {
                mask.resize(number / 64 + 1, 0);
            }
            mask[number / 64] |= 1 << (number % 64);
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_masks() {
        assert_eq!(parse_list("0-3,8\n"), [0b1_0000_1111]);
        assert_eq!(parse_list("0,64"), [1, 1]);
        assert!(covers(&[0b111], &[0b101]) && !covers(&[0b101], &[0b111]) && !covers(&[1], &[1, 1]));
    }
}
