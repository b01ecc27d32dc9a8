//! The three interval timers of a process (setitimer(2)).

use limosa_puppet::{Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::LateAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ProcessView;

/// `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF`
const TIMERS: i32 = 3;

/// What is left of each timer.
#[derive(Debug, Serialize, Deserialize)]
pub struct IntervalTimers(pub Vec<IntervalTimer>);

/// An armed timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    /// `ITIMER_*`
    pub which: i32,
    /// `struct itimerval`: interval in seconds and microseconds, what is left in seconds and microseconds.
    pub value: [u64; 4],
}

impl LateAttribute for IntervalTimers {
    type Asked = Vec<(i32, Data)>;

    fn ask(_: &ProcessView, program: &mut Program) -> Result<Self::Asked, CaptureError> {
        Ok((0..TIMERS)
            .map(|which| {
                let answer = program.space(32);
                program.call("ask for an interval timer", libc::SYS_getitimer, [which.into(), answer.into()]);
                (which, answer)
            })
            .collect())
    }

    fn capture(_: &ProcessView, asked: &Self::Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let timer = |(which, data): &(i32, Data)| IntervalTimer {
            which: *which,
            value: [0, 1, 2, 3].map(|index| outcome.word(*data, index)),
        };
        Ok(Self(asked.iter().map(timer).filter(|timer| timer.value[2..] != [0, 0]).collect()))
    }

    fn rebuild(&self, program: &mut Program) {
        for timer in &self.0 {
            let value = program.words(&timer.value);
            let arguments = [timer.which.into(), value.into(), 0.into()];
            program.call("set an interval timer", libc::SYS_setitimer, arguments);
        }
    }

    fn finish(&self, _: i32) -> Result<(), RestoreError> {
        Ok(())
    }
}
