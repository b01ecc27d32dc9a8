//! POSIX timers of a process (timer_create(2)), under the IDs that the kernel gave them.
//!
//! A timer goes on with what was left of it; the kernel does not tell whether it was set to an absolute time. Since
//! Linux 6.15 a process can ask for an ID (`PR_TIMER_CREATE_RESTORE_IDS`). Before, IDs rise from 0 in a new process:
//! timers are made and deleted until the ID fits.

use limosa_kernel::proc::{PosixTimer, TimerNotify};
use limosa_kernel::task;
use limosa_puppet::{Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::LateAttribute;
use crate::error::{CaptureError, Refusal, RestoreError};
use crate::view::ProcessView;

const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const SIGEV_THREAD_ID: u64 = 4;
/// Clocks of the process and thread that made the timer, as the kernel keeps them (`PROCESS_CLOCK`, `THREAD_CLOCK`).
const OWN_PROCESS_CLOCK: i32 = -6;
const OWN_THREAD_CLOCK: i32 = -2;
/// Largest ID that is reached by making and deleting timers.
const ID_MAX: i32 = 10_000;

/// The timers, by ID.
#[derive(Debug, Serialize, Deserialize)]
pub struct PosixTimers(pub Vec<Timer>);

/// A timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timer {
    /// The kernel's ID.
    pub id: i32,
    /// `CLOCK_*`
    pub clock: i32,
    /// The first words of `struct sigevent`: value; signal and `SIGEV_*`; thread.
    pub event: [u64; 3],
    /// `struct itimerspec`: interval in seconds and nanoseconds, what is left in seconds and nanoseconds.
    pub value: [u64; 4],
}

impl LateAttribute for PosixTimers {
    type Asked = Vec<(PosixTimer, Data)>;

    fn ask(process: &ProcessView, program: &mut Program) -> Result<Self::Asked, CaptureError> {
        let timers = process.proc.timers()?;
        Ok(timers
            .into_iter()
            .map(|timer| {
                let answer = program.space(32);
                program.call("ask for a timer", libc::SYS_timer_gettime, [timer.id.into(), answer.into()]);
                (timer, answer)
            })
            .collect())
    }

    fn capture(process: &ProcessView, asked: &Self::Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let mut timers = Vec::with_capacity(asked.len());
        for (timer, data) in asked {
            timers.push(Timer {
                id: timer.id,
                clock: checked_clock(process, timer)?,
                event: event(process, timer)?,
                value: [0, 1, 2, 3].map(|index| outcome.word(*data, index)),
            });
        }
        timers.sort_by_key(|timer| timer.id);
        Ok(Self(timers))
    }

    fn rebuild(&self, program: &mut Program) {
        if self.0.is_empty() {
            return;
        }
        let choose = task::timer_ids_can_be_chosen();
        let switch = |program: &mut Program, on: i32| {
            if choose {
                let arguments = [PR_TIMER_CREATE_RESTORE_IDS.into(), on.into(), 0.into(), 0.into(), 0.into()];
                program.call("choose the IDs of timers", libc::SYS_prctl, arguments);
            }
        };
        switch(program, 1);
        let mut next = 0;
        for timer in &self.0 {
            if !choose {
                for id in next..timer.id.min(ID_MAX) {
                    skip(id, program);
                }
                next = timer.id.saturating_add(1);
            }
            timer.rebuild(program);
        }
        switch(program, 0);
    }

    fn finish(&self, _: i32) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl Timer {
    fn rebuild(&self, program: &mut Program) {
        let mut words = self.event.to_vec();
        words.resize(8, 0);
        let event = program.words(&words);
        let id = program.words(&[u64::from(self.id as u32)]);
        let arguments = [self.clock.into(), event.into(), id.into()];
        program.call("make a timer", libc::SYS_timer_create, arguments);
        if self.value[2..] != [0, 0] {
            let value = program.words(&self.value);
            // By the ID that it must have: where the kernel gave another, this fails.
            let arguments = [self.id.into(), 0.into(), value.into(), 0.into()];
            program.call("set a timer", libc::SYS_timer_settime, arguments);
        }
    }
}

/// Makes and deletes a timer, so that the next one gets the next ID.
fn skip(id: i32, program: &mut Program) {
    let mut words = [0; 8];
    words[1] = (libc::SIGEV_NONE as u64) << 32;
    let event = program.words(&words);
    let place = program.words(&[0]);
    let arguments = [libc::CLOCK_MONOTONIC.into(), event.into(), place.into()];
    program.call("skip the ID of a timer", libc::SYS_timer_create, arguments);
    program.call("skip the ID of a timer", libc::SYS_timer_delete, [id.into()]);
}

/// The clock, if a restored process can have a timer on it.
fn checked_clock(process: &ProcessView, timer: &PosixTimer) -> Result<i32, CaptureError> {
    let known = match timer.clock {
        OWN_PROCESS_CLOCK => true,
        // Of the thread that made it, which nobody tells: certain only if there is but one.
        OWN_THREAD_CLOCK => process.status.threads == 1,
        clock => clock >= 0,
    };
    if known {
        return Ok(timer.clock);
    }
    let reason = format!("its timer {} counts the processor time of some thread or process", timer.id);
    Err(Refusal::process(process.pid, reason, "delete that timer, or use one on CLOCK_MONOTONIC").into())
}

fn event(process: &ProcessView, timer: &PosixTimer) -> Result<[u64; 3], CaptureError> {
    let notify = match timer.notify {
        TimerNotify::Signal => libc::SIGEV_SIGNAL,
        TimerNotify::None => libc::SIGEV_NONE,
        TimerNotify::Thread => libc::SIGEV_THREAD,
    } as u64;
    let (flag, thread) = if timer.to_thread {
        let status = process.proc.task(timer.target).and_then(|task| task.status());
        let own = status.ok().and_then(|status| status.ns_pid.last().copied()).ok_or_else(|| {
            let reason = format!("its timer {} signals a thread that has ended", timer.id);
            Refusal::process(process.pid, reason, "delete that timer")
        })?;
        (SIGEV_THREAD_ID, own as u64)
    } else {
        (0, 0)
    };
    Ok([timer.value, timer.signal as u64 | (notify | flag) << 32, thread])
}
