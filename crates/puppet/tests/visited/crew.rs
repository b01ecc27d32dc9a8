//! A target of seven threads, each in another situation over and over, each counting its rounds and what went
//! wrong: registers held, checksums, sleeps that must last, polls and pipe reads, two that play futex ping-pong.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::situations::{ready, spin};
use super::{Shared, Target, gettid, until};

/// The roles, in the order of their counters; the first thread is the last.
pub const ROLES: [&str; 7] = ["spin", "checksum", "sleep", "pipe", "ping", "pong", "first"];

/// One role's counters.
#[derive(Default)]
pub struct Counter {
    rounds: AtomicU64,
    /// How often something was wrong, and what it was the first time.
    wrong: AtomicU64,
    what: AtomicU64,
    /// Longest time from one round to the next, in microseconds.
    gap: AtomicU64,
}

/// What the crew and the test share.
#[derive(Default)]
pub struct Log {
    counters: [Counter; 7],
    futex: AtomicU32,
}

/// Counts the rounds of one role.
struct Rounds {
    counter: &'static Counter,
    last: Instant,
}

impl Rounds {
    fn of(log: &'static Log, role: usize) -> Self {
        Self { counter: &log.counters[role], last: Instant::now() }
    }

    fn done(&mut self, right: bool, what: impl FnOnce() -> u64) {
        if !right && self.counter.wrong.fetch_add(1, Ordering::SeqCst) == 0 {
            self.counter.what.store(what(), Ordering::SeqCst);
        }
        let now = Instant::now();
        self.counter.gap.fetch_max((now - self.last).as_micros() as u64, Ordering::SeqCst);
        self.last = now;
        self.counter.rounds.fetch_add(1, Ordering::SeqCst);
    }
}

/// The crew, and what it looked like before anybody visited it.
pub struct Crew {
    pub target: Target,
    log: &'static Log,
    mappings: String,
    threads: Vec<(i32, u64)>,
}

impl Crew {
    pub fn start() -> Self {
        // SAFETY: a new shared anonymous mapping, zeroed, never unmapped; all-zero bytes are a valid Log.
        let log: &'static Log = unsafe {
            let page = libc::mmap(
                std::ptr::null_mut(),
                size_of::<Log>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(page, libc::MAP_FAILED);
            &*page.cast::<Log>()
        };
        let target = Target::fork(|shared| work(shared, log));
        let mut crew = Self { target, log, mappings: String::new(), threads: Vec::new() };
        // Three rounds of each: whatever is allocated is allocated by then.
        crew.all_advance(3);
        crew.mappings = crew.target.mappings();
        crew.threads = crew.tids().into_iter().map(|tid| (tid, crew.target.status(tid, "SigBlk:"))).collect();
        assert_eq!(crew.threads.len(), ROLES.len());
        crew
    }

    pub fn tids(&self) -> Vec<i32> {
        tids(self.target.pid)
    }

    /// Longest time between two rounds of a role since the last call, in microseconds.
    pub fn longest_gap(&self) -> u64 {
        self.log.counters.iter().map(|counter| counter.gap.swap(0, Ordering::SeqCst)).max().unwrap_or(0)
    }

    /// Every thread works on and found nothing wrong; nobody traces it; its mask and the process's mappings are
    /// what they were.
    pub fn is_whole(&self) {
        self.all_advance(2);
        for (role, counter) in ROLES.iter().zip(&self.log.counters) {
            let (wrong, what) = (counter.wrong.load(Ordering::SeqCst), counter.what.load(Ordering::SeqCst));
            assert_eq!(wrong, 0, "'{role}' went wrong {wrong} times, at first with {what:#x}");
        }
        until("the mappings are as before", || self.mappings == self.target.mappings());
        let threads: Vec<_> =
            self.tids().into_iter().map(|tid| (tid, self.target.status(tid, "SigBlk:"))).collect();
        assert_eq!(threads, self.threads, "threads and their signal masks");
        for (tid, _) in threads {
            assert_eq!(self.target.status(tid, "TracerPid:"), 0, "who traces {tid}");
        }
    }

    fn all_advance(&self, rounds: u64) {
        let before = self.log.counters.each_ref().map(|counter| counter.rounds.load(Ordering::SeqCst));
        for ((role, counter), before) in ROLES.iter().zip(&self.log.counters).zip(before) {
            until(role, || counter.rounds.load(Ordering::SeqCst) >= before + rounds);
        }
    }
}

/// The threads of a process.
pub fn tids(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// What the target runs.
fn work(shared: &'static Shared, log: &'static Log) -> bool {
    let mut ends = [0; 2];
    // SAFETY: the array is live.
    unsafe { libc::pipe(ends.as_mut_ptr()) };
    std::thread::spawn(move || hold_registers(shared, Rounds::of(log, 0)));
    std::thread::spawn(move || checksum(Rounds::of(log, 1)));
    std::thread::spawn(move || sleep(Rounds::of(log, 2)));
    std::thread::spawn(move || read_pipe(ends[0], Rounds::of(log, 3)));
    std::thread::spawn(move || ping(&log.futex, 0, Rounds::of(log, 4)));
    std::thread::spawn(move || ping(&log.futex, 1, Rounds::of(log, 5)));
    ready(shared);
    let (mut rounds, mut number) = (Rounds::of(log, 6), 0_u64);
    let own = gettid();
    while shared.go.load(Ordering::SeqCst) == 0 {
        nap(1);
        number += 1;
        // SAFETY: the bytes are live; word 0 is only read by the spinning assembly.
        let written = unsafe {
            shared.spin.as_ptr().cast_mut().write_volatile(1);
            libc::write(ends[1], (&raw const number).cast(), 8)
        };
        rounds.done(written == 8 && gettid() == own, || written as u64);
    }
    true
}

/// Sleeps some milliseconds; whether it was that long and not interrupted.
fn nap(milliseconds: u64) -> bool {
    let started = Instant::now();
    let time = libc::timespec { tv_sec: 0, tv_nsec: milliseconds as i64 * 1_000_000 };
    // SAFETY: the time is live.
    let result = unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
    result == 0 && started.elapsed() >= Duration::from_millis(milliseconds)
}

fn hold_registers(shared: &'static Shared, mut rounds: Rounds) {
    // All flags clear; carry, parity, adjust and overflow; zero, sign, direction.
    for flags in [0, 0x815, 0x4c0].into_iter().cycle() {
        // SAFETY: only this thread spins on the word.
        unsafe { shared.spin.as_ptr().cast_mut().write_volatile(0) };
        let right = spin(shared, flags, None);
        rounds.done(right, || shared.found.load(Ordering::SeqCst) as u64);
    }
}

fn checksum(mut rounds: Rounds) {
    let bytes: Vec<u8> = (0..16 << 10).map(|at: u32| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let sum = || {
        std::hint::black_box(&bytes).iter().fold((7_u64, 1.0_f64), |(hash, product), byte| {
            let hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            (hash, product * (1.0 + f64::from(*byte) / 1e6) / 1.000_1)
        })
    };
    let expected = sum();
    loop {
        let found = sum();
        rounds.done(found.0 == expected.0 && found.1.to_bits() == expected.1.to_bits(), || found.0);
        nap(1);
    }
}

fn sleep(mut rounds: Rounds) {
    loop {
        let right = nap(3);
        rounds.done(right, || u64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0) as u32));
    }
}

/// Polls for a time that must pass, polls for what comes, and reads numbers that must follow on each other.
fn read_pipe(end: i32, mut rounds: Rounds) {
    let mut last = 0;
    loop {
        let mut number = 0_u64;
        let mut wanted = libc::pollfd { fd: end, events: libc::POLLIN, revents: 0 };
        let started = Instant::now();
        // SAFETY: the structures are live.
        let results = unsafe {
            [
                libc::poll(std::ptr::null_mut(), 0, 1) as isize,
                libc::poll(&raw mut wanted, 1, -1) as isize,
                libc::read(end, (&raw mut number).cast(), 8),
                // With nothing left to read the second of two reads waits in the kernel.
                {
                    number += u64::from(number != last + 1) << 32;
                    libc::read(end, (&raw mut last).cast(), 8)
                },
            ]
        };
        let right = results == [0, 1, 8, 8] && started.elapsed() >= Duration::from_millis(1);
        rounds.done(right && last == number + 1, || (results[2] as u64) << 32 | last);
    }
}

/// Waits until the word's last bit is `side`, and increments it.
fn ping(word: &'static AtomicU32, side: u32, mut rounds: Rounds) {
    loop {
        let mut right = true;
        loop {
            let seen = word.load(Ordering::SeqCst);
            if seen % 2 == side {
                break;
            }
            // SAFETY: the word lives.
            let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, 0) };
            let error = std::io::Error::last_os_error().raw_os_error();
            right &= result == 0 || error == Some(libc::EAGAIN);
        }
        word.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the word lives.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
        rounds.done(right, || 1);
        nap(1);
    }
}
