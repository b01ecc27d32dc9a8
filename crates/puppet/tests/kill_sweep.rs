//! The controller is killed in the midst of visits, at each of its operations on the kernel and at random
//! instants; the visited process must not notice.
//!
//! ```text
//! test ── forks ──► crew: seven threads at work (visited/crew.rs)
//!  └──── runs itself again ──► controller: freezes the crew, visits each thread, lets it go; is killed
//! ```
//!
//! `LIMOSA_SWEEP=full` kills at every single operation (at every fourth otherwise), `LIMOSA_SWEEP_SECONDS` says
//! how long the random kills go on (5 otherwise).
#![allow(unsafe_code, missing_docs)]

#[allow(dead_code)] // Each test program uses its part of it.
mod visited;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use limosa_kernel::memory::ForeignMemory;
use limosa_kernel::ptrace::{self, WaitStatus};
use limosa_puppet::{Program, Vdso, Visit, step_out_of_stub};
use visited::crew::{Crew, tids};
use visited::{until, vdso_range};

/// The process that a controller is to visit.
const CREW: &str = "LIMOSA_SWEEP_CREW";
/// Printed by a controller right before its first operation.
const BEGINS: &str = "the controller begins";

/// Runs this test program again, as the controller of the crew; killed at operation `kill_at`, if given.
fn controller(test: &str, crew: &Crew, kill_at: Option<u64>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CREW, crew.target.pid.to_string())
        .env_remove("LIMOSA_KILL_AT")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(number) = kill_at {
        command.env("LIMOSA_KILL_AT", number.to_string());
    }
    command.spawn().unwrap()
}

/// Whether the controller got to its end; otherwise it was killed. Whatever else is a failure.
fn completed(mut child: Child) -> bool {
    let status = child.wait().unwrap();
    if status.signal() == Some(libc::SIGKILL) {
        return false;
    }
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(status.success(), "the controller failed ({status}):\n{out}\n{err}");
    true
}

/// If this process is to be the controller, it is.
fn is_controller() -> bool {
    let Ok(pid) = std::env::var(CREW) else { return false };
    println!("{BEGINS}");
    freeze_and_visit(pid.parse().unwrap());
    true
}

/// As a checkpoint does it: all threads stopped, each visited, all let go.
fn freeze_and_visit(pid: i32) {
    let mut stopped = Vec::new();
    loop {
        let fresh: Vec<i32> = tids(pid).into_iter().filter(|tid| !stopped.contains(tid)).collect();
        if fresh.is_empty() {
            break;
        }
        for tid in &fresh {
            ptrace::seize(*tid, ptrace::Options::TRACE_SYSGOOD).unwrap();
            ptrace::interrupt(*tid).unwrap();
        }
        for tid in fresh {
            settle(tid);
            stopped.push(tid);
        }
    }
    let memory = ForeignMemory::open(pid).unwrap();
    let (start, end) = vdso_range(&std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap());
    let vdso = Vdso::locate(pid, &memory, start, end).unwrap();
    for tid in &stopped {
        step_out_of_stub(*tid, &vdso).unwrap();
    }
    for (index, tid) in stopped.iter().enumerate() {
        // Every other thread as if its process caught all signals: it reports by system-call stops.
        let caught = if index % 2 == 0 { 0 } else { u64::MAX };
        let mut visit = Visit::begin(pid, *tid, vdso, &memory, caught, 16 * 1024).unwrap();
        ask_eighty(&mut visit, pid);
        visit.end().unwrap();
    }
    for tid in stopped {
        ptrace::detach(tid, 0).unwrap();
    }
}

fn settle(tid: i32) {
    loop {
        match ptrace::wait_within(tid, Duration::from_secs(10)).unwrap() {
            WaitStatus::Stopped { event: ptrace::EVENT_STOP, .. } => return,
            WaitStatus::Stopped { signal, .. } => ptrace::resume(tid, signal).unwrap(),
            ended => panic!("thread {tid}: {ended:?}"),
        }
    }
}

/// Two programs, together of 80 system calls.
fn ask_eighty(visit: &mut Visit<'_>, pid: i32) {
    let mut program = Program::new();
    for signal in 1..=64_i32 {
        let action = program.space(32);
        let arguments = [signal.into(), 0.into(), action.into(), 8.into()];
        program.call("ask for a signal's action", libc::SYS_rt_sigaction, arguments);
    }
    visit.run(program).unwrap().check().unwrap();
    let mut program = Program::new();
    let calls: Vec<_> = (0..16).map(|_| program.call("ask for the pid", libc::SYS_getpid, [])).collect();
    let outcome = visit.run(program).unwrap();
    outcome.check().unwrap();
    assert!(calls.into_iter().all(|call| outcome.result(call).unwrap() == pid as u64));
}

#[test]
fn machine_killed_at_every_operation() {
    if is_controller() {
        return;
    }
    let crew = Crew::start();
    let full = std::env::var("LIMOSA_SWEEP").is_ok_and(|value| value == "full");
    let stride = if full { 1 } else { 4 };
    // A sweep with gaps begins somewhere else each time.
    let (mut kills, mut number) = (0, 1 + Random::seeded().below(stride));
    while !completed(controller("machine_killed_at_every_operation", &crew, Some(number))) {
        kills += 1;
        crew.is_whole();
        number += stride;
    }
    crew.is_whole();
    println!("killed {kills} times, up to operation {number}; longest gap {} us", crew.longest_gap());
    assert!(number > 1000, "only {number} operations: is limosa-kernel built with its feature 'fault'?");
    crew.target.succeeds();
}

#[test]
fn machine_killed_at_random_instants() {
    if is_controller() {
        return;
    }
    let test = "machine_killed_at_random_instants";
    let crew = Crew::start();
    let seconds = std::env::var("LIMOSA_SWEEP_SECONDS").map_or(5, |text| text.parse().unwrap());
    let (started, limit) = (Instant::now(), Duration::from_secs(seconds));
    let mut random = Random::seeded();
    let (mut kills, mut ends) = (0, 0);
    // The longest run so far, in microseconds; a run gets at most a bit more.
    let mut span = 1000;
    while started.elapsed() < limit {
        let mut child = controller(test, &crew, None);
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let begun = began(&mut lines);
        std::thread::sleep(Duration::from_micros(random.below(span)));
        child.kill().unwrap();
        child.stdout = Some(lines.into_inner());
        if completed(child) {
            ends += 1;
            span = span.max(begun.elapsed().as_micros() as u64 * 5 / 4);
        } else {
            kills += 1;
            // Too early throughout: runs take longer than was thought.
            span += span / 50;
        }
        span = span.min(100_000);
        crew.is_whole();
    }
    println!("killed {kills} times, {ends} runs ended before; longest gap {} us", crew.longest_gap());
    assert!(kills > 10, "only {kills} kills");
    crew.target.succeeds();
}

/// Waits until the controller says that it begins.
fn began(lines: &mut impl BufRead) -> Instant {
    let mut line = String::new();
    until("the controller begins", || {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "the controller ended");
        line.contains(BEGINS)
    });
    Instant::now()
}

/// xorshift64, seeded by the clock.
struct Random(u64);

impl Random {
    fn seeded() -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = now.as_nanos() as u64 | 1;
        println!("seed {seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}
