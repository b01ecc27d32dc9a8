//! Twenty threads that compute, sleep, poll, wait on futexes and pass bytes through pipes, each of which must go on,
//! with its thread id, its name, and its sums right.

use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Setting, Verify};
use crate::sys;

/// What one thread did so far.
#[derive(Default)]
struct Progress {
    rounds: AtomicU64,
    wrong: AtomicU64,
}

impl Progress {
    fn round(&self, right: bool) {
        if !right {
            self.wrong.fetch_add(1, Ordering::Relaxed);
        }
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// How long a thread may take for a round.
const PATIENCE: Duration = Duration::from_secs(5);

struct Worker {
    name: String,
    progress: Arc<Progress>,
}

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let mut workers = Vec::new();
    for number in 0..8 {
        workers.push(start(format!("compute-{number}"), move |progress| compute(number, progress))?);
    }
    for number in 0..4 {
        workers.push(start(format!("sleep-{number}"), move |progress| {
            loop {
                thread::sleep(Duration::from_millis(5 + number));
                progress.round(true);
            }
        })?);
    }
    for pair in 0..2 {
        let turn = Arc::new((Mutex::new(0_u64), Condvar::new()));
        for side in 0..2 {
            let turn = Arc::clone(&turn);
            workers.push(start(format!("futex-{pair}-{side}"), move |progress| ping(&turn, side, progress))?);
        }
    }
    for pair in 0..2 {
        let (there, back) = (io::pipe()?, io::pipe()?);
        workers.push(start(format!("pipe-{pair}-0"), move |p| pass(there.1, back.0, true, p))?);
        workers.push(start(format!("pipe-{pair}-1"), move |p| pass(back.1, there.0, false, p))?);
    }
    // Then each has its name, too.
    await_progress(&workers, &vec![0; workers.len()])?;
    let tasks = tasks()?;
    Ok(Box::new(move || {
        let before: Vec<_> = workers.iter().map(|w| w.progress.rounds.load(Ordering::Relaxed)).collect();
        thread::sleep(Duration::from_millis(150));
        await_progress(&workers, &before)?;
        for worker in &workers {
            let wrong = worker.progress.wrong.load(Ordering::Relaxed);
            ensure!(wrong == 0, "{} went wrong {wrong} times", worker.name);
        }
        sys::compare_lines("threads", &self::tasks()?, &tasks)?;
        Ok(format!("threads={}", workers.len()))
    }))
}

/// Waits until each has done a round more than `before`: on a busy machine that takes a while.
fn await_progress(workers: &[Worker], before: &[u64]) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    for (worker, before) in workers.iter().zip(before) {
        while worker.progress.rounds.load(Ordering::Relaxed) <= *before {
            ensure!(Instant::now() < deadline, "{} stands still at {before}", worker.name);
            thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

fn start(name: String, work: impl FnOnce(&Progress) + Send + 'static) -> Result<Worker> {
    let progress = Arc::new(Progress::default());
    let shared = Arc::clone(&progress);
    thread::Builder::new().name(name.clone()).spawn(move || work(&shared)).context("starting a thread")?;
    Ok(Worker { name, progress })
}

/// Thread ids with names.
fn tasks() -> Result<String> {
    let mut lines = Vec::new();
    for task in fs::read_dir("/proc/self/task").context("reading /proc/self/task")? {
        let task = task?;
        let name = fs::read_to_string(task.path().join("comm"))?;
        lines.push(format!("{} {}", task.file_name().to_string_lossy(), name.trim_end()));
    }
    lines.sort();
    Ok(lines.join("\n"))
}

/// The same sum over and over, in integers and in floating point.
fn compute(seed: u64, progress: &Progress) {
    let bytes = sys::pattern(64 << 10, seed);
    let sum = || {
        bytes.iter().fold((seed, 1.0_f64), |(hash, product), byte| {
            let hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            (hash, product * (1.0 + f64::from(*byte) / 1e6) / 1.000_1)
        })
    };
    let (hash, product) = sum();
    loop {
        let (again, product_again) = std::hint::black_box(&sum)();
        progress.round(again == hash && product_again.to_bits() == product.to_bits());
        // Twenty threads share what may be a single core with the test itself.
        thread::sleep(Duration::from_millis(2));
    }
}

/// Two sides take turns on a condition variable.
fn ping((turn, changed): &(Mutex<u64>, Condvar), side: u64, progress: &Progress) {
    loop {
        let mut now = turn.lock().unwrap_or_else(PoisonError::into_inner);
        while *now % 2 != side {
            now = changed.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
        *now += 1;
        changed.notify_one();
        drop(now);
        progress.round(true);
        thread::sleep(Duration::from_millis(1));
    }
}

/// Two sides pass a number through pipes; each must get the one after its own.
fn pass(mut to: PipeWriter, mut from: PipeReader, first: bool, progress: &Progress) {
    let mut number = 0_u64;
    let mut bytes = [0; 8];
    if first && to.write_all(&bytes).is_err() {
        return;
    }
    loop {
        let wait = Timespec { tv_sec: 5, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&wait));
        if ready != Ok(1) || from.read_exact(&mut bytes).is_err() {
            progress.round(false);
            continue;
        }
        let got = u64::from_le_bytes(bytes);
        progress.round(number == 0 || got == number + 1);
        number = got + 1;
        thread::sleep(Duration::from_millis(1));
        if to.write_all(&number.to_le_bytes()).is_err() {
            progress.round(false);
        }
    }
}
