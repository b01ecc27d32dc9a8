//! Timers that are read from a descriptor (timerfd_create(2)).
//!
//! A timer goes on with what was left of it, except an absolute one on the wall clock: its deadline stays where it
//! was, and if it has passed meanwhile the timer expires at once.

use std::os::fd::OwnedFd;

use limosa_kernel::proc::FdExtra;
use limosa_kernel::timer;
use rustix::time::{ClockId, TimerfdClockId, TimerfdFlags, clock_gettime, timerfd_create, timerfd_gettime};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

const ABSOLUTE: u32 = 1;
const CANCEL_ON_SET: u32 = 2;
/// So many times a periodic timer is asked that has expired again before its state was read.
const MANY: u32 = 50;
const NANOSECONDS: i128 = 1_000_000_000;

/// A timerfd.
#[derive(Debug, Serialize, Deserialize)]
pub struct TimerFd {
    /// `CLOCK_*`
    pub clock: i32,
    /// `TFD_TIMER_*` of its last setting.
    pub flags: u32,
    /// When it expires, if it is armed: the deadline, if it is absolute and on the wall clock, otherwise what is
    /// left; seconds and nanoseconds.
    pub expires: Option<(i64, i64)>,
    /// Interval.
    pub interval: (i64, i64),
    /// Expirations that nobody has read.
    pub ticks: u64,
}

impl DescriptorKind for TimerFd {
    fn recognise(view: &DescriptionView) -> bool {
        view.link == b"anon_inode:[timerfd]"
    }

    fn capture(view: &DescriptionView, _: &mut CaptureContext) -> Result<Self, CaptureError> {
        // The kernel brings a periodic timer up to date when it is asked: until then one that has expired looks as
        // if it were not armed. So ask before reading its state; it may expire again in between.
        let mut tries = 0;
        let (timer, asked) = loop {
            let asked =
                timerfd_gettime(&view.descriptor).map_err(view.error("asking a timerfd for its time"))?;
            let FdExtra::TimerFd(timer) = view.info_again()?.extra else {
                let reason = "the kernel does not tell its state";
                return Err(view.refuse(reason, "close it before the checkpoint").into());
            };
            tries += 1;
            if timer.value != (0, 0) || timer.interval == (0, 0) || tries == MANY {
                break (timer, asked.it_value);
            }
        };
        let pair = |(seconds, nanoseconds): (u64, u64)| (seconds as i64, nanoseconds as i64);
        let left = match pair(timer.value) {
            // One that expires faster than it can be looked at, or is not armed.
            (0, 0) if timer.interval != (0, 0) => (asked.tv_sec, asked.tv_nsec),
            left => left,
        };
        let expires = match (left, timer.settime_flags & ABSOLUTE != 0 && is_wall_clock(timer.clock)) {
            ((0, 0), _) => None,
            (left, false) => Some(left),
            (left, true) => Some(sum(now(timer.clock), left)),
        };
        Ok(Self {
            clock: timer.clock,
            flags: timer.settime_flags & (ABSOLUTE | CANCEL_ON_SET),
            expires,
            interval: pair(timer.interval),
            ticks: timer.ticks,
        })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _: u32, _: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let fail = |step| RestoreError::rebuild("timerfd", step);
        let clock = [
            TimerfdClockId::Realtime,
            TimerfdClockId::Monotonic,
            TimerfdClockId::Boottime,
            TimerfdClockId::RealtimeAlarm,
            TimerfdClockId::BoottimeAlarm,
        ]
        .into_iter()
        .find(|known| *known as i32 == self.clock)
        .ok_or_else(|| RestoreError::inconsistent(format!("a timerfd on clock {}", self.clock)))?;
        let descriptor =
            timerfd_create(clock, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK).map_err(fail("timerfd_create"))?;
        if let Some(expires) = self.expires {
            let absolute = self.flags & ABSOLUTE != 0;
            let value =
                if absolute && !is_wall_clock(self.clock) { sum(now(self.clock), expires) } else { expires };
            timer::arm(&descriptor, self.flags, value, self.interval)?;
        }
        if self.ticks > 0 {
            timer::set_ticks(&descriptor, self.ticks)?;
        }
        Ok(descriptor)
    }
}

fn is_wall_clock(clock: i32) -> bool {
    clock == libc::CLOCK_REALTIME || clock == libc::CLOCK_REALTIME_ALARM
}

/// The time of the clock that a timer's clock follows.
pub(crate) fn now(clock: i32) -> (i64, i64) {
    let clock = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => ClockId::Realtime,
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => ClockId::Boottime,
        _ => ClockId::Monotonic,
    };
    let time = clock_gettime(clock);
    (time.tv_sec, time.tv_nsec)
}

/// The sum of two times; the latest there is, where it is too large.
pub(crate) fn sum(a: (i64, i64), b: (i64, i64)) -> (i64, i64) {
    let total = i128::from(a.0) * NANOSECONDS
        + i128::from(a.1)
        + i128::from(b.0) * NANOSECONDS
        + i128::from(b.1);
    let seconds = i64::try_from(total.div_euclid(NANOSECONDS)).unwrap_or(i64::MAX);
    (seconds, total.rem_euclid(NANOSECONDS) as i64)
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn sums_carry_and_stay_in_range() {
        assert_eq!(sum((1, 700_000_000), (2, 600_000_000)), (4, 300_000_000));
        assert_eq!(sum((i64::MAX, 0), (1, 0)).0, i64::MAX);
    }
}
