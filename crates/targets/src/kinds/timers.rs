//! Timers that send signals: the three interval timers, and POSIX timers with their kernel ids, also where ids between
//! them are free.

use std::fs;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys;

static TICKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_tick(_: i32) {
    TICKS.fetch_add(1, Ordering::Relaxed);
}

/// Which clock an interval timer counts, and how long it is set to; far enough away never to expire in a test.
const ITIMERS: &[(i32, i64, i64)] =
    &[(libc::ITIMER_REAL, 3600, 17), (libc::ITIMER_VIRTUAL, 1800, 18), (libc::ITIMER_PROF, 900, 0)];

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let tick = libc::SIGRTMIN() + 3;
    // SAFETY: the handler only counts.
    unsafe { libc::signal(tick, on_tick as *const () as usize) };
    for (which, value, interval) in ITIMERS {
        set_itimer(*which, *value, *interval)?;
    }

    let far = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, libc::SIGUSR2, 11)?;
    let gone = create(libc::CLOCK_REALTIME, libc::SIGEV_SIGNAL, libc::SIGUSR2, 12)?;
    let ticking = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, tick, 13)?;
    let silent = create(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0)?;
    let unarmed = create(libc::CLOCK_BOOTTIME, libc::SIGEV_SIGNAL, libc::SIGUSR2, 14)?;
    // SAFETY: a timer of this process.
    sys::check(unsafe { libc::syscall(libc::SYS_timer_delete, gone) }).context("timer_delete")?;
    arm(far, 0, timespec(7200, 0), timespec(5, 5))?;
    arm(ticking, 0, timespec(0, 5_000_000), timespec(0, 5_000_000))?;
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    arm(silent, libc::TIMER_ABSTIME, timespec(now.tv_sec + 5400, 0), timespec(0, 0))?;

    let listed = fs::read_to_string("/proc/self/timers").context("reading /proc/self/timers")?;
    let started = sys::monotonic();
    Ok(Box::new(move || {
        sys::compare_lines("/proc/self/timers", &fs::read_to_string("/proc/self/timers")?, &listed)?;
        let elapsed = (sys::monotonic() - started) / 1_000_000_000 + 1;
        for (which, value, interval) in ITIMERS {
            check_itimer(*which, *value, *interval, elapsed as i64)?;
        }
        check_remaining("far", far, 7200, elapsed as i64, (5, 5))?;
        check_remaining("silent", silent, 5400, elapsed as i64 + 1, (0, 0))?;
        let idle = remaining(unarmed)?;
        ensure!(idle.it_value.tv_sec == 0 && idle.it_value.tv_nsec == 0, "a disarmed timer was armed");
        let before = TICKS.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(60));
        let ticks = TICKS.load(Ordering::Relaxed) - before;
        ensure!((3..=60).contains(&ticks), "a timer of 5 ms expired {ticks} times in about 60 ms");
        Ok(format!("ticks={ticks}"))
    }))
}

fn timespec(seconds: i64, nanoseconds: i64) -> libc::timespec {
    libc::timespec { tv_sec: seconds, tv_nsec: nanoseconds }
}

fn set_itimer(which: i32, value: i64, interval: i64) -> Result<()> {
    let seconds = |tv_sec| libc::timeval { tv_sec, tv_usec: 0 };
    let new = libc::itimerval { it_interval: seconds(interval), it_value: seconds(value) };
    // SAFETY: the structure is read by the kernel, the old value is not asked for.
    sys::check(unsafe {
        libc::syscall(libc::SYS_setitimer, which, &raw const new, ptr::null::<libc::itimerval>())
    })
    .with_context(|| format!("setitimer {which}"))?;
    Ok(())
}

fn check_itimer(which: i32, value: i64, interval: i64, elapsed: i64) -> Result<()> {
    let mut now = MaybeUninit::<libc::itimerval>::zeroed();
    // SAFETY: the kernel fills the structure.
    let now = unsafe {
        sys::check(libc::syscall(libc::SYS_getitimer, which, now.as_mut_ptr()))?;
        now.assume_init()
    };
    let left = now.it_value.tv_sec;
    ensure!(
        (value - elapsed - 1..=value).contains(&left),
        "interval timer {which} has {left} s left of {value} after {elapsed} s"
    );
    ensure!(now.it_interval.tv_sec == interval, "interval timer {which} has another interval");
    Ok(())
}

/// `timer_create(2)` itself, because the C library hides the kernel's ids.
fn create(clock: i32, notify: i32, signal: i32, value: usize) -> Result<i32> {
    // SAFETY: all zeros is a valid sigevent.
    let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value = libc::sigval { sival_ptr: value as *mut _ };
    let mut id = 0_i32;
    // SAFETY: the kernel reads the event and writes the id.
    sys::check(unsafe { libc::syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut id) })
        .with_context(|| format!("timer_create for clock {clock}"))?;
    Ok(id)
}

fn arm(id: i32, flags: i32, value: libc::timespec, interval: libc::timespec) -> Result<()> {
    let new = libc::itimerspec { it_interval: interval, it_value: value };
    // SAFETY: the kernel reads the structure.
    sys::check(unsafe {
        libc::syscall(libc::SYS_timer_settime, id, flags, &raw const new, ptr::null::<libc::itimerspec>())
    })
    .with_context(|| format!("timer_settime of timer {id}"))?;
    Ok(())
}

fn remaining(id: i32) -> Result<libc::itimerspec> {
    let mut now = MaybeUninit::<libc::itimerspec>::zeroed();
    // SAFETY: the kernel fills the structure.
    unsafe {
        sys::check(libc::syscall(libc::SYS_timer_gettime, id, now.as_mut_ptr()))
            .with_context(|| format!("timer_gettime of timer {id}"))?;
        Ok(now.assume_init())
    }
}

fn check_remaining(name: &str, id: i32, value: i64, elapsed: i64, interval: (i64, i64)) -> Result<()> {
    let now = remaining(id)?;
    let left = now.it_value.tv_sec;
    ensure!(
        (value - elapsed - 1..=value).contains(&left),
        "timer {name} has {left} s left of {value} after {elapsed} s"
    );
    ensure!(
        (now.it_interval.tv_sec, now.it_interval.tv_nsec) == interval,
        "timer {name} has another interval"
    );
    Ok(())
}
