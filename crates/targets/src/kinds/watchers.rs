//! Descriptors that refer to others in unusual ways: epoll entries under numbers that were closed or used again since,
//! pidfds of a child and of one that was reaped, two descriptions of one memfd, an owner of signals, absolute timers.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, SeekFrom};
use rustix::time::{ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys;

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

struct State {
    epoll: OwnedFd,
    child: Child,
    pidfd: OwnedFd,
    reaped: OwnedFd,
    memory: [OwnedFd; 2],
    owned: OwnedFd,
    deadline: OwnedFd,
    _kept: Vec<OwnedFd>,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let child = Child::start(&setting.protocol, "child", |_| Ok(Box::new(|| Ok(String::new()))))?;
    let pidfd = rustix::process::pidfd_open(child.pid, rustix::process::PidfdFlags::empty())?;
    let reaped = reaped()?;
    let (epoll, kept) = watched()?;
    let memory = memfd()?;
    let (owned, _writer) = rustix::pipe::pipe()?;
    // SAFETY: numbers only.
    unsafe {
        let number = owned.as_raw_fd();
        sys::check(i64::from(libc::fcntl(number, libc::F_SETOWN, libc::getpid())))?;
        sys::check(i64::from(libc::fcntl(number, F_SETSIG, libc::SIGURG)))?;
    }
    let deadline = rustix::time::timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC)?;
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let value = Timespec { tv_sec: now.tv_sec + 5000, tv_nsec: 0 };
    let times = Itimerspec { it_value: value, it_interval: Timespec { tv_sec: 0, tv_nsec: 0 } };
    rustix::time::timerfd_settime(&deadline, TimerfdTimerFlags::ABSTIME, &times)?;
    let state = State { epoll, child, pidfd, reaped, memory, owned, deadline, _kept: kept };
    Ok(Box::new(move || {
        state.check_epoll()?;
        state.check_process()?;
        state.check_memory()?;
        let signal = sys::check(i64::from(ask(&state.owned, F_GETSIG)))?;
        let owner = sys::check(i64::from(ask(&state.owned, libc::F_GETOWN)))?;
        ensure!(signal == i64::from(libc::SIGURG), "signal {signal} instead of SIGURG");
        ensure!(owner == i64::from(std::process::id()), "process {owner} owns the descriptor");
        let left = rustix::time::timerfd_gettime(&state.deadline)?.it_value.tv_sec;
        let expected = value.tv_sec - rustix::time::clock_gettime(ClockId::Realtime).tv_sec;
        ensure!(
            (left - expected).abs() <= 1,
            "a deadline on the wall clock moved: {left} s left, not {expected}"
        );
        Ok(String::new())
    }))
}

fn ask(fd: &OwnedFd, command: i32) -> i32 {
    // SAFETY: commands that take no argument.
    unsafe { libc::fcntl(fd.as_raw_fd(), command) }
}

/// A pidfd of a child that has ended and been reaped.
fn reaped() -> Result<OwnedFd> {
    let child = sys::fork(|| 7)?;
    let pidfd = rustix::process::pidfd_open(child, rustix::process::PidfdFlags::empty())?;
    rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty())?;
    Ok(pidfd)
}

/// An epoll with three eventfds: under its own number; under one closed since; under one that another file has now.
fn watched() -> Result<(OwnedFd, Vec<OwnedFd>)> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    let ready = || eventfd(1, EventfdFlags::CLOEXEC);
    let (plain, closed, reused) = (ready()?, ready()?, ready()?);
    let (closed_copy, reused_copy) = (closed.try_clone()?, reused.try_clone()?);
    for (data, fd) in [(1, &plain), (2, &closed), (3, &reused)] {
        epoll::add(&epoll, fd, EventData::new_u64(data), EventFlags::IN)?;
    }
    let number = reused.as_raw_fd();
    drop(reused);
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty())?;
    let null = if null.as_raw_fd() == number {
        null
    } else {
        // SAFETY: the number has just been closed; the new descriptor is owned here.
        unsafe { OwnedFd::from_raw_fd(sys::check(i64::from(libc::dup2(null.as_raw_fd(), number)))? as i32) }
    };
    drop(closed);
    Ok((epoll, vec![plain, closed_copy, reused_copy, null]))
}

/// Two descriptions of one memfd with offsets of their own.
fn memfd() -> Result<[OwnedFd; 2]> {
    let first = rustix::fs::memfd_create("limosa-watchers", MemfdFlags::CLOEXEC)?;
    rustix::io::write(&first, &sys::pattern(10_000, 4))?;
    rustix::fs::seek(&first, SeekFrom::Start(123))?;
    let path = format!("/proc/self/fd/{}", first.as_raw_fd());
    let second = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::seek(&second, SeekFrom::Start(4567))?;
    Ok([first, second])
}

impl State {
    fn check_epoll(&self) -> Result<()> {
        let mut events = Vec::with_capacity(8);
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&none))?;
        let mut seen: Vec<u64> = events.iter().map(|event| event.data.u64()).collect();
        seen.sort_unstable();
        ensure!(seen == [1, 2, 3], "the epoll tells of {seen:?}");
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.epoll.as_raw_fd()))?;
        let numbers = info.lines().filter(|line| line.starts_with("tfd:")).count();
        ensure!(numbers == 3, "the epoll has {numbers} entries");
        Ok(())
    }

    fn check_process(&self) -> Result<()> {
        self.child.verify()?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd()))?;
        let pid =
            info.lines().find_map(|line| line.strip_prefix("Pid:")).context("no pidfd")?.trim().to_owned();
        ensure!(pid == self.child.pid.as_raw_pid().to_string(), "the pidfd is of process {pid}");
        let mut poll = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        let none = Timespec { tv_sec: 0, tv_nsec: Duration::from_millis(1).subsec_nanos().into() };
        ensure!(
            rustix::event::poll(&mut poll, Some(&none))? == 0,
            "the pidfd says that its process has ended"
        );
        let mut poll = [PollFd::from_borrowed_fd(self.reaped.as_fd(), PollFlags::IN)];
        ensure!(
            rustix::event::poll(&mut poll, Some(&none))? == 1,
            "a pidfd forgot that its process has ended"
        );
        let gone = rustix::process::pidfd_send_signal(&self.reaped, rustix::process::Signal::CONT);
        ensure!(
            gone == Err(rustix::io::Errno::SRCH),
            "the pidfd of a reaped process leads to another: {gone:?}"
        );
        Ok(())
    }

    fn check_memory(&self) -> Result<()> {
        for (fd, offset) in self.memory.iter().zip([123, 4567]) {
            let position = rustix::fs::tell(fd)?;
            ensure!(position == offset, "a memfd's offset is {position} instead of {offset}");
        }
        let mut content = vec![0; 10_000];
        rustix::io::pread(&self.memory[1], &mut content[..], 0)?;
        sys::compare("the memfd", &content, &sys::pattern(10_000, 4))
    }
}
