//! Visits of real processes: a thread in every situation is asked, let go, and must not have noticed.
//! Each situation is visited in each way: to the end, abandoned at two places (detached while in the stub,
//! as when the controller dies), and all this with both ways of reporting.
#![allow(unsafe_code, missing_docs)]

#[allow(dead_code)] // Each test program uses its part of it.
mod visited;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use limosa_kernel::memory::ForeignMemory;
use limosa_kernel::ptrace::{self, WaitStatus};
use limosa_puppet::{Program, Vdso, Visit, VisitError, step_out_of_stub};
use visited::situations as at;
use visited::{Shared, Target, stop, until, words};

const ROOM: usize = 32 * 1024;
/// Passed as the signals that the process catches, it leaves only system-call stops to report with.
const ALL: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Whole,
    AbandonedAfterBegin,
    AbandonedAfterRun,
}

const WAYS: [(Way, Option<u64>); 6] = [
    (Way::Whole, None),
    (Way::Whole, Some(ALL)),
    (Way::AbandonedAfterBegin, None),
    (Way::AbandonedAfterBegin, Some(ALL)),
    (Way::AbandonedAfterRun, None),
    (Way::AbandonedAfterRun, Some(ALL)),
];

/// Asks what a checkpoint asks, in two programs, and compares with what /proc says.
fn ask(visit: &mut Visit<'_>, target: &Target, tid: i32) {
    let own = own_pid(target.pid);
    let mut program = Program::new();
    let pid = program.call("ask for the process id", libc::SYS_getpid, []);
    let stack = program.space(24);
    program.call("ask for the alternate stack", libc::SYS_sigaltstack, [0.into(), stack.into()]);
    let brk = program.call("ask for the break", libc::SYS_brk, [0.into()]);
    let bad = program.try_call("close nothing", libc::SYS_close, [9999.into()]);
    let outcome = visit.run(program).unwrap();
    outcome.check().unwrap();
    assert_eq!(outcome.result(pid).unwrap(), own as u64);
    assert!(outcome.result(brk).unwrap() > 0);
    assert!(outcome.result(bad).is_err());

    let mut program = Program::new();
    let actions: Vec<_> = (1..=64_i32)
        .map(|signal| {
            let action = program.space(32);
            let arguments = [signal.into(), 0.into(), action.into(), 8.into()];
            program.call("ask for a signal's action", libc::SYS_rt_sigaction, arguments);
            action
        })
        .collect();
    let outcome = visit.run(program).unwrap();
    outcome.check().unwrap();
    let caught = target.status(tid, "SigCgt:");
    for (index, action) in actions.iter().enumerate() {
        let has_handler = outcome.word(*action, 0) > 1;
        assert_eq!(has_handler, caught & (1 << index) != 0, "signal {}", index + 1);
    }
}

/// The process's number in its own PID namespace.
fn own_pid(pid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
    line.split_whitespace().last().unwrap().parse().unwrap()
}

/// Visits one thread in one way and lets it go; everything must be as before.
fn visit(target: &Target, tid: i32, way: Way, caught: Option<u64>) {
    let mappings = target.mappings();
    stop(tid);
    let memory = ForeignMemory::open(target.pid).unwrap();
    let vdso = target.vdso(&memory);
    step_out_of_stub(tid, &vdso).unwrap();
    let caught = caught.unwrap_or_else(|| target.status(tid, "SigCgt:"));
    let before = (
        words(&ptrace::registers(tid).unwrap()),
        ptrace::signal_mask(tid).unwrap(),
        ptrace::xstate(tid).unwrap(),
        ptrace::pending_signals(tid, false).unwrap(),
        ptrace::pending_signals(tid, true).unwrap(),
    );
    let mut visit = Visit::begin(target.pid, tid, vdso, &memory, caught, ROOM).unwrap();
    if way != Way::AbandonedAfterBegin {
        ask(&mut visit, target, tid);
    }
    if way == Way::Whole {
        let registers = visit.end().unwrap();
        let after = (
            words(&ptrace::registers(tid).unwrap()),
            ptrace::signal_mask(tid).unwrap(),
            ptrace::xstate(tid).unwrap(),
            ptrace::pending_signals(tid, false).unwrap(),
            ptrace::pending_signals(tid, true).unwrap(),
        );
        assert_eq!(before, after);
        assert_eq!(words(&registers), before.0);
        assert_eq!(mappings, target.mappings());
        let mut padding = vec![1; (vdso.end - vdso.padding) as usize];
        memory.read(vdso.padding, &mut padding).unwrap();
        assert!(padding.iter().all(|byte| *byte == 0), "the padding is wiped");
    }
    // Otherwise the visit is abandoned where it is.
    ptrace::detach(tid, 0).unwrap();
    until("the scratch is gone", || mappings == target.mappings());
}

/// Visits fresh targets in `situation`, in each way.
fn each_way(sleeps: bool, situation: fn(&'static Shared) -> bool, end: fn(&Target)) {
    for (way, caught) in WAYS {
        println!("{way:?}, caught {caught:x?}");
        let mut target = Target::fork(situation);
        let tid = target.shared.tid.load(Ordering::SeqCst) as i32;
        if sleeps {
            target = target.asleep(tid);
        }
        visit(&target, tid, way, caught);
        end(&target);
        target.succeeds();
    }
}

fn end_spin(target: &Target) {
    // SAFETY: the word is only read by the spinning assembly.
    unsafe { target.shared.spin.as_ptr().cast_mut().write_volatile(1) };
}

fn nothing(_: &Target) {}

#[test]
fn spinning_with_flags_clear() {
    each_way(false, |shared| at::spin(shared, 0, None), end_spin);
}

#[test]
fn spinning_with_carry_overflow_and_direction() {
    each_way(false, |shared| at::spin(shared, 0xc01, None), end_spin);
}

#[test]
fn spinning_with_all_status_flags() {
    each_way(false, |shared| at::spin(shared, 0x8d5, None), end_spin);
    each_way(false, |shared| at::spin(shared, 0x0d4, None), end_spin);
}

#[test]
fn spinning_without_a_stack() {
    each_way(false, |shared| at::spin(shared, 0x44, Some(0x1000)), end_spin);
}

#[test]
fn sleeping() {
    each_way(true, at::nanosleep, nothing);
}

#[test]
fn polling() {
    each_way(true, at::poll, nothing);
}

#[test]
fn waiting_for_a_futex() {
    each_way(true, at::futex, |target| {
        let word = target.shared.word.as_ptr();
        // Until one was woken: right after the visit it may not yet be waiting again.
        until("the target wakes", || {
            // SAFETY: the futex word lives.
            let woken = unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, 1) };
            woken == 1
        });
    });
}

#[test]
fn reading_a_pipe() {
    each_way(true, at::pipe_read, nothing);
}

#[test]
fn in_epoll_wait() {
    each_way(true, at::epoll, nothing);
}

fn send_usr1_to_sleeper(target: &Target) {
    until("it sleeps again", || target.state(target.pid) == 'S');
    std::thread::sleep(Duration::from_millis(5));
    target.send(libc::SIGUSR1);
}

#[test]
fn pausing() {
    each_way(true, at::pause, send_usr1_to_sleeper);
}

#[test]
fn suspended_for_a_signal() {
    each_way(true, at::sigsuspend, send_usr1_to_sleeper);
}

#[test]
fn in_a_handler_on_an_alternate_stack() {
    each_way(false, at::handler_on_altstack, end_spin);
}

#[test]
fn with_pending_signals() {
    each_way(false, at::pending, end_spin);
}

#[test]
fn a_thread_that_is_not_the_first() {
    each_way(false, at::second_thread, end_spin);
}

#[test]
fn in_a_pid_namespace() {
    for (way, caught) in WAYS {
        let target = Target::fork_with(libc::CLONE_NEWPID, |shared| at::spin(shared, 0, None));
        visit(&target, target.pid, way, caught);
        end_spin(&target);
        target.succeeds();
    }
}

#[test]
fn in_a_group_stop() {
    for (_, caught) in &WAYS[..2] {
        let target = Target::fork(|shared| at::spin(shared, 0, None));
        target.send(libc::SIGSTOP);
        until("it stops", || target.state(target.pid) == 'T');
        visit(&target, target.pid, Way::Whole, *caught);
        until("it is stopped again", || target.state(target.pid) == 'T');
        target.send(libc::SIGCONT);
        end_spin(&target);
        target.succeeds();
    }
}

/// A target that spins, stopped, with a visit of it begun.
fn with_visit(caught: u64, act: impl FnOnce(&Target, Visit<'_>)) -> Target {
    let target = Target::fork(|shared| at::spin(shared, 0xc01, None));
    stop(target.pid);
    let memory = ForeignMemory::open(target.pid).unwrap();
    let vdso = target.vdso(&memory);
    act(&target, Visit::begin(target.pid, target.pid, vdso, &memory, caught, ROOM).unwrap());
    target
}

#[test]
fn signals_that_arrive_during_a_visit() {
    for caught in [0, ALL] {
        for signal in [libc::SIGURG, libc::SIGSTOP, libc::SIGUSR1, libc::SIGWINCH] {
            println!("signal {signal}, caught {caught:x}");
            let target = with_visit(caught, |target, mut visit| {
                target.send(signal);
                limosa_kernel::task::signal_thread(target.pid, target.pid, signal).unwrap();
                ask(&mut visit, target, target.pid);
                target.send(signal);
                visit.end().unwrap();
            });
            ptrace::detach(target.pid, 0).unwrap();
            match signal {
                libc::SIGSTOP => {
                    until("the stop is not lost", || target.state(target.pid) == 'T');
                    target.send(libc::SIGCONT);
                }
                libc::SIGUSR1 => {
                    let status = ptrace::wait_within(target.pid, Duration::from_secs(5)).unwrap();
                    assert_eq!(status, WaitStatus::Killed(signal), "the signal is not lost");
                    continue;
                }
                _ => {}
            }
            end_spin(&target);
            target.succeeds();
        }
    }
}

#[test]
fn a_target_that_is_killed_ends_the_visit() {
    for caught in [0, ALL] {
        let started = Instant::now();
        with_visit(caught, |target, mut visit| {
            target.send(libc::SIGKILL);
            let mut program = Program::new();
            program.call("ask for the process id", libc::SYS_getpid, []);
            let error = visit.run(program).unwrap_err();
            assert!(error.is_gone(), "{error}");
        });
        // Killed while we wait for it, with a second thread whose end only its tracer can wait for.
        let target = Target::fork(at::second_thread);
        let tid = target.shared.tid.load(Ordering::SeqCst) as i32;
        stop(target.pid);
        stop(tid);
        let memory = ForeignMemory::open(target.pid).unwrap();
        let vdso = target.vdso(&memory);
        let mut visit = Visit::begin(target.pid, target.pid, vdso, &memory, caught, ROOM).unwrap();
        let mut program = Program::new();
        let time = program.words(&[30, 0]);
        program.call("sleep", libc::SYS_nanosleep, [time.into(), 0.into()]);
        let pid = target.pid;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            limosa_kernel::task::signal_process(pid, libc::SIGKILL).unwrap();
        });
        let error = visit.run(program).unwrap_err();
        assert!(error.is_gone(), "{error}");
        killer.join().unwrap();
        ptrace::wait_within(tid, Duration::from_secs(5)).unwrap();
        assert!(started.elapsed() < Duration::from_secs(5), "it does not wait in vain");
    }
}

#[test]
fn without_address_space() {
    for caught in [0, ALL] {
        let target = Target::fork(|shared| {
            let limit = libc::rlimit { rlim_cur: 4096, rlim_max: libc::RLIM_INFINITY };
            // SAFETY: the limit is live.
            unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
            at::spin(shared, 0, None)
        });
        stop(target.pid);
        let before = words(&ptrace::registers(target.pid).unwrap());
        let memory = ForeignMemory::open(target.pid).unwrap();
        let vdso = target.vdso(&memory);
        let error = Visit::begin(target.pid, target.pid, vdso, &memory, caught, ROOM).unwrap_err();
        assert!(
            matches!(&error, VisitError::Scratch { source, .. } if source.raw_os_error() == Some(libc::ENOMEM)),
            "{error}"
        );
        assert_eq!(before, words(&ptrace::registers(target.pid).unwrap()));
        ptrace::detach(target.pid, 0).unwrap();
        end_spin(&target);
        target.succeeds();
    }
}

#[test]
fn what_has_no_room_is_refused() {
    let target = Target::fork(|shared| at::spin(shared, 0, None));
    let memory = ForeignMemory::open(target.pid).unwrap();
    let vdso = target.vdso(&memory);
    let short = Vdso::locate(target.pid, &memory, vdso.start, vdso.padding);
    assert!(matches!(short, Err(VisitError::NoRoom { .. })), "{short:?}");
    let not_one = Vdso::locate(target.pid, &memory, vdso.start + 64, vdso.end);
    assert!(matches!(not_one, Err(VisitError::NoRoom { .. })), "{not_one:?}");
    stop(target.pid);
    let mut visit = Visit::begin(target.pid, target.pid, vdso, &memory, 0, ROOM).unwrap();
    let mut program = Program::new();
    program.space(1 << 20);
    assert!(matches!(visit.run(program), Err(VisitError::TooLarge { .. })));
    visit.end().unwrap();
    ptrace::detach(target.pid, 0).unwrap();
    end_spin(&target);
    target.succeeds();
}
