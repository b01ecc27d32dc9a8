//! System calls that sleep: whatever interrupts them unseen, they end when they would have, with their own result.
//!
//! One thread for each call repeats it for 300 ms at a time. It may take longer, by as long as the process was frozen;
//! it may not end early, and it may not fail with `EINTR`. Options name the calls to use; without any, all that
//! the kernel itself restarts. `epoll_wait`, `sigtimedwait` and `recv-timeout` end with `EINTR` when a process is
//! stopped and continued, unless the one who stops it takes care.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::net::UnixDatagram;
use std::ptr;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Setting, Verify};
use crate::sys;

const NAP_MS: i64 = 300;
const RESTARTED: &[&str] =
    &["nanosleep", "clock_nanosleep", "poll", "ppoll", "select", "futex", "futex-absolute", "pipe"];
const ALL: &[&str] = &["epoll_wait", "sigtimedwait", "recv-timeout"];

#[derive(Default)]
struct Record {
    naps: u64,
    failure: Option<String>,
}

type Records = Arc<Mutex<BTreeMap<String, Record>>>;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let calls: Vec<String> = if setting.options.is_empty() {
        RESTARTED.iter().map(ToString::to_string).collect()
    } else {
        setting.options.clone()
    };
    let records = Records::default();
    for call in calls {
        ensure!(RESTARTED.contains(&&*call) || ALL.contains(&&*call), "no sleeping call is called {call}");
        let records = Arc::clone(&records);
        let name: String = call.chars().take(15).collect();
        records.lock().unwrap_or_else(PoisonError::into_inner).insert(call.clone(), Record::default());
        thread::Builder::new().name(name).spawn(move || nap_for_ever(&call, &records))?;
    }
    Ok(Box::new(move || {
        let naps = || -> Vec<u64> {
            let records = records.lock().unwrap_or_else(PoisonError::into_inner);
            records.values().map(|record| record.naps).collect()
        };
        let before = naps();
        thread::sleep(Duration::from_millis(2 * NAP_MS as u64 + 100));
        let after = naps();
        let records = records.lock().unwrap_or_else(PoisonError::into_inner);
        for ((call, record), (before, after)) in records.iter().zip(before.iter().zip(&after)) {
            if let Some(failure) = &record.failure {
                anyhow::bail!("{call}: {failure}");
            }
            ensure!(after > before, "{call} does not wake up");
        }
        Ok(String::new())
    }))
}

fn nap_for_ever(call: &str, records: &Records) {
    let mut nap = nap_of(call);
    loop {
        let start = sys::monotonic();
        let outcome = nap();
        let took = (sys::monotonic() - start) / 1_000_000;
        let failure = match outcome {
            Err(error) => Some(format!("{error}, after {took} ms of {NAP_MS}")),
            Ok(()) if (took as i64) < NAP_MS - 1 => Some(format!("ended after {took} ms of {NAP_MS}")),
            Ok(()) => None,
        };
        let mut records = records.lock().unwrap_or_else(PoisonError::into_inner);
        let record = records.entry(call.to_owned()).or_default();
        record.naps += 1;
        record.failure = record.failure.take().or(failure);
    }
}

/// The end of a nap: `returned` is what the call gave, `wanted` what it gives on a timeout (−1 with `error`, or 0).
fn ended(returned: i64, error: Option<i32>) -> io::Result<()> {
    match (sys::check(returned), error) {
        (Ok(0), None) => Ok(()),
        (Ok(other), _) => Err(io::Error::other(format!("returned {other}"))),
        (Err(found), Some(code)) if found.raw_os_error() == Some(code) => Ok(()),
        (Err(found), _) => Err(found),
    }
}

fn nap_of(call: &str) -> Box<dyn FnMut() -> io::Result<()>> {
    let nap = libc::timespec { tv_sec: 0, tv_nsec: NAP_MS * 1_000_000 };
    match call {
        "nanosleep" => Box::new(move || {
            // SAFETY: the kernel reads the time.
            ended(unsafe { libc::syscall(libc::SYS_nanosleep, &raw const nap, ptr::null::<u8>()) }, None)
        }),
        "clock_nanosleep" => Box::new(move || {
            let (end, none) = (in_a_nap(), ptr::null::<u8>());
            let (clock, absolute) = (libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME);
            // SAFETY: the kernel reads the time.
            let returned =
                unsafe { libc::syscall(libc::SYS_clock_nanosleep, clock, absolute, &raw const end, none) };
            ended(returned, None)
        }),
        // SAFETY: no descriptors are given, so none are read or written.
        "poll" => Box::new(|| ended(unsafe { libc::poll(ptr::null_mut(), 0, NAP_MS as i32) }.into(), None)),
        "ppoll" => Box::new(move || {
            let mut left = nap;
            let none = ptr::null::<u8>();
            // SAFETY: as above; the kernel may write what is left of the time, to a copy.
            let returned = unsafe { libc::syscall(libc::SYS_ppoll, none, 0, &raw mut left, none, 8) };
            ended(returned, None)
        }),
        "select" => Box::new(|| {
            let mut left = libc::timeval { tv_sec: 0, tv_usec: NAP_MS * 1000 };
            // SAFETY: no sets are given; the time is a copy.
            let returned =
                unsafe { libc::select(0, ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), &raw mut left) };
            ended(returned.into(), None)
        }),
        "futex" => futex(libc::FUTEX_WAIT),
        "futex-absolute" => futex(libc::FUTEX_WAIT_BITSET),
        "pipe" => pipe(),
        "epoll_wait" => Box::new({
            // SAFETY: no pointers.
            let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
            move || {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                // SAFETY: there is room for one event.
                ended(unsafe { libc::epoll_wait(epoll, &raw mut event, 1, NAP_MS as i32) }.into(), None)
            }
        }),
        "sigtimedwait" => Box::new(move || {
            let set = 1_u64 << (libc::SIGRTMAX() - 1);
            // SAFETY: the kernel reads a set of 8 bytes and the time.
            let returned = unsafe {
                libc::syscall(libc::SYS_rt_sigtimedwait, &raw const set, ptr::null::<u8>(), &raw const nap, 8)
            };
            ended(returned, Some(libc::EAGAIN))
        }),
        _ => recv_timeout(),
    }
}

fn in_a_nap() -> libc::timespec {
    let end = sys::monotonic() as i64 + NAP_MS * 1_000_000;
    libc::timespec { tv_sec: end / 1_000_000_000, tv_nsec: end % 1_000_000_000 }
}

/// `FUTEX_WAIT` takes a time span, `FUTEX_WAIT_BITSET` a time on `CLOCK_MONOTONIC`.
fn futex(operation: i32) -> Box<dyn FnMut() -> io::Result<()>> {
    let word = 0_u32;
    Box::new(move || {
        let span = libc::timespec { tv_sec: 0, tv_nsec: NAP_MS * 1_000_000 };
        let time = if operation == libc::FUTEX_WAIT { span } else { in_a_nap() };
        // SAFETY: the kernel compares the word and reads the time.
        let returned = unsafe {
            libc::syscall(
                libc::SYS_futex,
                &raw const word,
                operation | libc::FUTEX_PRIVATE_FLAG,
                0,
                &raw const time,
                ptr::null::<u8>(),
                u32::MAX,
            )
        };
        ended(returned, Some(libc::ETIMEDOUT))
    })
}

/// A read that waits for a byte which another thread writes.
fn pipe() -> Box<dyn FnMut() -> io::Result<()>> {
    let Ok((read, write)) = io::pipe() else {
        return Box::new(|| Err(io::Error::other("no pipe could be made")));
    };
    let read = read.into_raw_fd();
    let (mut go, going) = io::pipe().map_or((None, None), |(r, w)| (Some(w), Some(r)));
    thread::spawn(move || {
        let (mut write, Some(mut going)) = (write, going) else { return };
        let mut byte = [0];
        while io::Read::read_exact(&mut going, &mut byte).is_ok() {
            thread::sleep(Duration::from_millis(NAP_MS as u64));
            if io::Write::write_all(&mut write, &byte).is_err() {
                return;
            }
        }
    });
    Box::new(move || {
        let Some(go) = &mut go else { return Err(io::Error::other("no pipe could be made")) };
        io::Write::write_all(go, b"x")?;
        let mut byte = 0_u8;
        // SAFETY: there is room for one byte. The raw call, because the library repeats one that gave EINTR.
        let returned = unsafe { libc::read(read, ptr::from_mut(&mut byte).cast(), 1) };
        ended(returned as i64 - 1, None)
    })
}

fn recv_timeout() -> Box<dyn FnMut() -> io::Result<()>> {
    let socket = UnixDatagram::unbound().and_then(|socket| {
        socket.set_read_timeout(Some(Duration::from_millis(NAP_MS as u64))).map(|()| socket)
    });
    Box::new(move || {
        let socket = socket.as_ref().map_err(|error| io::Error::other(error.to_string()))?;
        let mut byte = 0_u8;
        // SAFETY: there is room for one byte.
        let returned = unsafe { libc::recv(socket.as_raw_fd(), ptr::from_mut(&mut byte).cast(), 1, 0) };
        ended(returned as i64, Some(libc::EAGAIN))
    })
}
