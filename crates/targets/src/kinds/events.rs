//! Descriptors that tell of events: eventfd, timerfd, signalfd, inotify, and epoll over them, nested.

use std::fmt::Write as _;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};
use rustix::time::{timerfd_create, timerfd_gettime, timerfd_settime};

use super::{Setting, Verify};
use crate::sys;

struct State {
    counter: OwnedFd,
    semaphore: OwnedFd,
    far: OwnedFd,
    ticking: OwnedFd,
    expired: OwnedFd,
    signals: OwnedFd,
    watch: OwnedFd,
    watched: PathBuf,
    inner: OwnedFd,
    outer: OwnedFd,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let counter = eventfd(41, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let semaphore = eventfd(3, EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE)?;
    let far = timer(3600, 0, (17, 5))?;
    let ticking = timer(0, 5_000_000, (0, 5_000_000))?;
    let expired = timer(0, 1, (0, 0))?;
    let signals = signals()?;

    let watched = setting.protocol.beside("watched");
    fs::create_dir_all(&watched)?;
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    // The first watch is removed again, so that the second one's number is not the first.
    let first = inotify::add_watch(&watch, &watched, WatchFlags::CREATE)?;
    inotify::remove_watch(&watch, first)?;
    drain(&watch)?;
    inotify::add_watch(&watch, &watched, WatchFlags::CREATE | WatchFlags::DELETE)?;

    let inner = epoll::create(CreateFlags::CLOEXEC)?;
    let add = |to: &OwnedFd, fd: BorrowedFd<'_>, data, flags| {
        epoll::add(to, fd, EventData::new_u64(data), flags)
            .with_context(|| format!("adding {data} to an epoll"))
    };
    add(&inner, counter.as_fd(), 0xc0c0_0000_0000_0001, EventFlags::IN)?;
    add(&inner, ticking.as_fd(), 2, EventFlags::IN | EventFlags::ET)?;
    add(&inner, watch.as_fd(), 3, EventFlags::IN)?;
    let outer = epoll::create(CreateFlags::empty())?;
    add(&outer, inner.as_fd(), 10, EventFlags::IN)?;
    add(&outer, signals.as_fd(), 11, EventFlags::IN | EventFlags::ONESHOT)?;
    add(&outer, semaphore.as_fd(), 12, EventFlags::OUT)?;

    std::thread::sleep(Duration::from_millis(2));
    let state = State { counter, semaphore, far, ticking, expired, signals, watch, watched, inner, outer };
    let described = state.describe()?;
    let started = sys::monotonic();
    Ok(Box::new(move || {
        sys::compare_lines("descriptors", &state.describe()?, &described)?;
        state.check_counters()?;
        state.check_timers(started)?;
        state.check_signals()?;
        state.check_watch()?;
        state.check_epoll()?;
        Ok(String::new())
    }))
}

fn timer(seconds: i64, nanoseconds: i64, interval: (i64, i64)) -> Result<OwnedFd> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let times = Itimerspec {
        it_value: Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
        it_interval: Timespec { tv_sec: interval.0, tv_nsec: interval.1 },
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
    Ok(timer)
}

/// A signalfd for SIGHUP and a real-time signal, which is pending.
fn signals() -> Result<OwnedFd> {
    let mask = signal_bit(libc::SIGHUP) | signal_bit(libc::SIGRTMIN() + 4);
    // SAFETY: the kernel reads a set of 8 bytes; the descriptor is new and owned here.
    let fd = unsafe {
        let set = &raw const mask;
        sys::check(libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, set, 0, 8))?;
        let flags = libc::SFD_NONBLOCK | libc::SFD_CLOEXEC;
        let fd = sys::check(libc::syscall(libc::SYS_signalfd4, -1, set, 8, flags)).context("signalfd")?;
        <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as i32)
    };
    send_signal()?;
    Ok(fd)
}

fn signal_bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn send_signal() -> Result<()> {
    let value = libc::sigval { sival_ptr: 99 as *mut _ };
    // SAFETY: a signal to this process, which blocks it.
    sys::check(i64::from(unsafe { libc::sigqueue(libc::getpid(), libc::SIGRTMIN() + 4, value) }))?;
    Ok(())
}

/// Reads everything that waits.
fn drain(fd: &OwnedFd) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    match rustix::io::read(fd, &mut bytes[..]) {
        Ok(read) => bytes.truncate(read),
        Err(Errno::AGAIN) => bytes.clear(),
        Err(error) => return Err(error.into()),
    }
    Ok(bytes)
}

fn read_number(fd: &OwnedFd) -> Result<u64> {
    let bytes = drain(fd)?;
    Ok(u64::from_le_bytes(bytes.get(..8).context("nothing to read")?.try_into()?))
}

/// The watch descriptor, mask and name of the one inotify event in `bytes`.
fn event(bytes: &[u8]) -> Result<(u32, u32, String)> {
    ensure!(bytes.len() > 16, "no event of inotify");
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let name = bytes[16..].split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((word(0), word(4), String::from_utf8_lossy(name).into_owned()))
}

impl State {
    /// What `/proc/self/fdinfo` says that does not change by itself.
    fn describe(&self) -> Result<String> {
        let mut text = String::new();
        for (name, fd) in [
            ("counter", &self.counter),
            ("semaphore", &self.semaphore),
            ("far", &self.far),
            ("ticking", &self.ticking),
            ("expired", &self.expired),
            ("signals", &self.signals),
            ("watch", &self.watch),
            ("inner", &self.inner),
            ("outer", &self.outer),
        ] {
            let number = fd.as_raw_fd();
            let close = rustix::io::fcntl_getfd(fd)?.contains(rustix::io::FdFlags::CLOEXEC);
            let _ = writeln!(text, "{name}: {number} close-on-exec={close}");
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
            let mut lines: Vec<_> = info.lines().collect();
            // An epoll's entries stand in the order of the kernel's addresses.
            lines.sort_unstable();
            for line in lines {
                let volatile = ["ino:", "mnt_id:", "it_value:", "eventfd-id:", "ticks:"];
                if !volatile.iter().any(|field| line.starts_with(field)) {
                    // An epoll's line ends with the inode of what it watches, which is new after a restore.
                    let _ = writeln!(text, "{name}: {}", line.split(" pos:").next().unwrap_or(line));
                }
            }
        }
        Ok(text)
    }

    fn check_counters(&self) -> Result<()> {
        let count = read_number(&self.counter)?;
        ensure!(count == 41, "the eventfd counts {count} instead of 41");
        rustix::io::write(&self.counter, &41_u64.to_ne_bytes())?;
        for _ in 0..3 {
            ensure!(read_number(&self.semaphore)? == 1, "the semaphore gives more than one at a time");
        }
        ensure!(drain(&self.semaphore)?.is_empty(), "the semaphore counts more than 3");
        rustix::io::write(&self.semaphore, &3_u64.to_ne_bytes())?;
        Ok(())
    }

    fn check_timers(&self, started: u64) -> Result<()> {
        let elapsed = ((sys::monotonic() - started) / 1_000_000_000) as i64 + 1;
        let far = timerfd_gettime(&self.far)?;
        let left = far.it_value.tv_sec;
        ensure!((3600 - elapsed - 1..=3600).contains(&left), "{left} s left of 3600 after {elapsed} s");
        ensure!((far.it_interval.tv_sec, far.it_interval.tv_nsec) == (17, 5), "another interval");
        // It expired once before the first check and was not read: that must still be told.
        ensure!(read_number(&self.expired)? == 1, "an expired timer that nobody read is forgotten");
        let soon = Itimerspec {
            it_value: Timespec { tv_sec: 0, tv_nsec: 1 },
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
        };
        timerfd_settime(&self.expired, TimerfdTimerFlags::empty(), &soon)?;
        drain(&self.ticking)?;
        std::thread::sleep(Duration::from_millis(30));
        let ticks = read_number(&self.ticking)?;
        ensure!((3..=60).contains(&ticks), "a timer of 5 ms expired {ticks} times in about 30 ms");
        Ok(())
    }

    fn check_signals(&self) -> Result<()> {
        let bytes = drain(&self.signals)?;
        ensure!(bytes.len() == 128, "{} bytes from a signalfd with one signal pending", bytes.len());
        let signal = i32::from_le_bytes(bytes[..4].try_into()?);
        ensure!(signal == libc::SIGRTMIN() + 4, "the signalfd gives signal {signal}");
        send_signal()
    }

    fn check_watch(&self) -> Result<()> {
        let file = self.watched.join("new");
        drain(&self.watch)?;
        fs::write(&file, [])?;
        let (descriptor, mask, name) = event(&drain(&self.watch)?).context("after a file was made")?;
        ensure!(
            (descriptor, mask, &*name) == (2, ReadFlags::CREATE.bits(), "new"),
            "inotify tells of watch {descriptor}, mask {mask:#x}, name {name}"
        );
        fs::remove_file(&file)?;
        drain(&self.watch)?;
        Ok(())
    }

    fn check_epoll(&self) -> Result<()> {
        std::thread::sleep(Duration::from_millis(10));
        // A new edge only: the one that was seen is not told again.
        let (mut inner, again) = (ready(&self.inner)?, ready(&self.inner)?);
        inner.sort_unstable();
        ensure!(inner == [2, 0xc0c0_0000_0000_0001], "the inner epoll tells of {inner:x?}");
        ensure!(again.contains(&0xc0c0_0000_0000_0001), "a level-triggered event is told only once");
        let outer = ready(&self.outer)?;
        ensure!(outer.contains(&10), "the outer epoll does not tell of the inner: {outer:?}");
        ensure!(outer.contains(&12), "the outer epoll does not tell of the semaphore: {outer:?}");
        ensure!(outer.contains(&11), "the outer epoll does not tell of the signal: {outer:?}");
        let outer = ready(&self.outer)?;
        ensure!(!outer.contains(&11), "a one-shot event is told twice");
        epoll::modify(
            &self.outer,
            &self.signals,
            EventData::new_u64(11),
            EventFlags::IN | EventFlags::ONESHOT,
        )?;
        Ok(())
    }
}

fn ready(epoll: &OwnedFd) -> Result<Vec<u64>> {
    let mut events = Vec::with_capacity(8);
    let none = Timespec { tv_sec: 0, tv_nsec: 0 };
    epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), Some(&none))?;
    Ok(events.iter().map(|event| event.data.u64()).collect())
}
