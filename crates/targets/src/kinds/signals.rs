//! Signals: dispositions, masks of threads, alternate stacks, and signals that are pending with what they carry.

use std::fmt::Write as _;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

/// Blocked in every thread; real-time signals queue, and keep their order and values.
fn queued() -> [i32; 3] {
    [libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2, libc::SIGRTMIN() + 5]
}

/// Where the handler last ran: an address on its stack.
static HANDLER_STACK: AtomicUsize = AtomicUsize::new(0);
static HANDLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let local = 0_u8;
    HANDLER_STACK.store(ptr::from_ref(&local) as usize, Ordering::Relaxed);
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    install(
        libc::SIGUSR2,
        on_signal as *const () as usize,
        libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART,
        &[],
    )?;
    install(
        libc::SIGWINCH,
        on_signal as *const () as usize,
        libc::SA_SIGINFO | libc::SA_NODEFER,
        &[libc::SIGHUP, libc::SIGIO],
    )?;
    install(libc::SIGHUP, libc::SIG_IGN, 0, &[])?;
    install(libc::SIGCHLD, libc::SIG_DFL, libc::SA_NOCLDWAIT | libc::SA_NOCLDSTOP, &[])?;

    let mut blocked = queued().to_vec();
    blocked.extend([libc::SIGTERM, libc::SIGUSR1]);
    block(&blocked)?;
    let stack = Region::anonymous(64 << 10)?;
    set_alternate_stack(stack)?;
    let second = Second::start()?;

    send_pending()?;
    let dispositions = dispositions()?;
    let mask = mask()?;
    Ok(Box::new(move || {
        sys::compare_lines("dispositions", &self::dispositions()?, &dispositions)?;
        ensure!(self::mask()? == mask, "the signal mask is {:?} instead of {mask:?}", self::mask()?);
        check_alternate_stack(stack)?;
        second.check()?;
        take_pending()?;
        send_pending()?;
        Ok(String::new())
    }))
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset makes the set whole, sigaddset only adds.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

fn members(set: &libc::sigset_t) -> Vec<i32> {
    // SAFETY: the set is whole.
    (1..=64).filter(|signal| unsafe { libc::sigismember(set, *signal) } == 1).collect()
}

fn install(signal: i32, handler: usize, flags: i32, masked: &[i32]) -> Result<()> {
    let action = libc::sigaction {
        sa_sigaction: handler,
        sa_mask: set_of(masked),
        sa_flags: flags,
        sa_restorer: None,
    };
    // SAFETY: the handler only stores into atomics.
    sys::check(i64::from(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) }))
        .with_context(|| format!("sigaction for {signal}"))?;
    Ok(())
}

/// One line for each signal: handler, flags, mask and restorer.
fn dispositions() -> Result<String> {
    let mut text = String::new();
    for signal in (1..=64).filter(|signal| ![32, 33].contains(signal)) {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: the kernel fills the structure.
        let action = unsafe {
            sys::check(i64::from(libc::sigaction(signal, ptr::null(), action.as_mut_ptr())))?;
            action.assume_init()
        };
        let restorer = action.sa_restorer.map_or(0, |f| f as usize);
        let _ = writeln!(
            text,
            "{signal}: {:#x} {:#x} {:?} {restorer:#x}",
            action.sa_sigaction,
            action.sa_flags,
            members(&action.sa_mask)
        );
    }
    Ok(text)
}

fn block(signals: &[i32]) -> Result<()> {
    let set = set_of(signals);
    // SAFETY: the set is whole.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    ensure!(error == 0, "pthread_sigmask: error {error}");
    Ok(())
}

fn mask() -> Result<Vec<i32>> {
    let mut set = set_of(&[]);
    // SAFETY: the kernel fills the set.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut set) };
    ensure!(error == 0, "pthread_sigmask: error {error}");
    Ok(members(&set))
}

fn set_alternate_stack(stack: Region) -> Result<()> {
    let new = libc::stack_t { ss_sp: stack.address() as *mut _, ss_flags: 0, ss_size: stack.bytes().len() };
    // SAFETY: the region stays mapped, and serves one thread's handlers.
    sys::check(i64::from(unsafe { libc::sigaltstack(&raw const new, ptr::null_mut()) }))
        .context("sigaltstack")?;
    Ok(())
}

/// The alternate stack is the one that was set, and handlers do run on it.
fn check_alternate_stack(stack: Region) -> Result<()> {
    let mut now = MaybeUninit::<libc::stack_t>::zeroed();
    // SAFETY: the kernel fills the structure.
    let now = unsafe {
        sys::check(i64::from(libc::sigaltstack(ptr::null(), now.as_mut_ptr())))?;
        now.assume_init()
    };
    ensure!(
        (now.ss_sp as usize, now.ss_size, now.ss_flags) == (stack.address(), stack.bytes().len(), 0),
        "the alternate stack is {:?}, {} bytes, flags {}",
        now.ss_sp,
        now.ss_size,
        now.ss_flags
    );
    let before = HANDLED.load(Ordering::Relaxed);
    // SAFETY: a signal to this thread, with a handler.
    unsafe { libc::raise(libc::SIGUSR2) };
    ensure!(HANDLED.load(Ordering::Relaxed) == before + 1, "the handler of SIGUSR2 did not run");
    let ran_at = HANDLER_STACK.load(Ordering::Relaxed);
    let range = stack.address()..stack.address() + stack.bytes().len();
    ensure!(range.contains(&ran_at), "the handler ran at {ran_at:#x}, not on the alternate stack");
    Ok(())
}

/// Three real-time signals to the process, with values, in this order; one to this thread; one standard signal.
fn send_pending() -> Result<()> {
    let [first, second, third] = queued();
    for (signal, value) in [(second, 20), (first, 10), (first, 11)] {
        let value = libc::sigval { sival_ptr: value as *mut _ };
        // SAFETY: a signal to this process, blocked in all of its threads.
        sys::check(i64::from(unsafe { libc::sigqueue(libc::getpid(), signal, value) }))
            .context("sigqueue")?;
    }
    // SAFETY: as above, to this thread.
    unsafe {
        let value = libc::sigval { sival_ptr: 30 as *mut _ };
        let error = libc::pthread_sigqueue(libc::pthread_self(), third, value);
        ensure!(error == 0, "pthread_sigqueue: error {error}");
        sys::check(i64::from(libc::kill(libc::getpid(), libc::SIGTERM)))?;
    }
    Ok(())
}

/// Takes what [`send_pending`] sent: lowest signal first, those of one number in the order they came.
fn take_pending() -> Result<()> {
    let [first, second, third] = queued();
    let set = set_of(&[first, second, third, libc::SIGTERM]);
    let expected = [
        (libc::SIGTERM, libc::SI_USER, 0),
        (first, libc::SI_QUEUE, 10),
        (first, libc::SI_QUEUE, 11),
        (second, libc::SI_QUEUE, 20),
        (third, libc::SI_QUEUE, 30),
    ];
    let mut found = Vec::new();
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: the kernel fills the structure; its value is read only where the code says that there is one.
        let (signal, info) = unsafe {
            (libc::sigtimedwait(&raw const set, info.as_mut_ptr(), &raw const none), info.assume_init())
        };
        if signal == -1 {
            break;
        }
        // SAFETY: both codes carry a sender's process id; SI_QUEUE also a value.
        let (value, pid) = unsafe {
            let queued = info.si_code == libc::SI_QUEUE;
            (if queued { info.si_value().sival_ptr as usize } else { 0 }, info.si_pid())
        };
        ensure!(pid == std::process::id() as i32, "signal {signal} came from process {pid}");
        found.push((signal, info.si_code, value));
    }
    // Thread-directed signals come before the process's, whatever their number: compare as sets of one order each.
    found.sort_by_key(|(signal, _, _)| *signal);
    ensure!(found == expected, "pending signals (number, code, value) are {found:?} instead of {expected:?}");
    Ok(())
}

/// A second thread with a mask of its own, no alternate stack but the runtime's, and a pending signal of its own.
struct Second {
    ask: Sender<()>,
    answer: Receiver<Result<()>>,
}

impl Second {
    fn start() -> Result<Self> {
        let (ask, asked) = channel();
        let (answers, answer) = channel();
        thread::Builder::new().name("second".into()).spawn(move || {
            let set_up = block(&[libc::SIGALRM, libc::SIGRTMIN() + 9]).and_then(|()| raise_pending());
            let expected = set_up.and_then(|()| mask());
            while asked.recv().is_ok() {
                let check = match &expected {
                    Ok(expected) => check_second(expected),
                    Err(error) => Err(anyhow::anyhow!("setting up: {error:#}")),
                };
                if answers.send(check).is_err() {
                    return;
                }
            }
        })?;
        let second = Self { ask, answer };
        second.check()?;
        Ok(second)
    }

    fn check(&self) -> Result<()> {
        self.ask.send(()).context("the second thread is gone")?;
        self.answer.recv_timeout(Duration::from_secs(5)).context("the second thread does not answer")?
    }
}

fn raise_pending() -> Result<()> {
    // SAFETY: a signal to this thread, which blocks it.
    let error = unsafe { libc::raise(libc::SIGALRM) };
    ensure!(error == 0, "raise: error {error}");
    Ok(())
}

fn check_second(expected: &[i32]) -> Result<()> {
    let mask = mask()?;
    ensure!(mask == expected, "the second thread's mask is {mask:?} instead of {expected:?}");
    let set = set_of(&[libc::SIGALRM]);
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: nothing is written through a null siginfo.
    let signal = unsafe { libc::sigtimedwait(&raw const set, ptr::null_mut(), &raw const none) };
    ensure!(signal == libc::SIGALRM, "the second thread's pending SIGALRM is lost");
    raise_pending()
}
