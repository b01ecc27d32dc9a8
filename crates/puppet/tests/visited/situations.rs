//! Situations in which a thread can be visited. Each function is run by the target; it returns whether it
//! found afterwards what it would have found without a visit.

use std::arch::global_asm;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::{Shared, gettid};

// limosa_test_spin(rdi: spin words): all registers get the values of words 16.., the flags that of word 1, rsp
// that of word 2; it spins until word 0 is not 0 (rcx) and stores what it finds from word 32 on, the flags to
// word 3. xmm0 to xmm15 go from words 64.. to words 96... mov and jrcxz leave the flags alone.
global_asm!(
    "limosa_test_spin:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov [rdi + 32], rsp",
    "movdqu xmm0, [rdi + 512]; movdqu xmm1, [rdi + 528]; movdqu xmm7, [rdi + 544]; movdqu xmm15, [rdi + 560]",
    "mov rax, [rdi + 8]; push rax; popfq",
    "mov rsp, [rdi + 16]",
    "mov rax, [rdi + 128]; mov rbx, [rdi + 136]; mov rdx, [rdi + 144]; mov rsi, [rdi + 152]",
    "mov rbp, [rdi + 160]; mov r8, [rdi + 168]; mov r9, [rdi + 176]; mov r10, [rdi + 184]",
    "mov r11, [rdi + 192]; mov r12, [rdi + 200]; mov r13, [rdi + 208]; mov r14, [rdi + 216]",
    "mov r15, [rdi + 224]",
    "mov dword ptr [rdi + 1024], 1",
    "2: mov rcx, [rdi]",
    "jrcxz 2b",
    "mov [rdi + 368], rsp",
    "mov rsp, [rdi + 32]",
    "mov [rdi + 256], rax; mov [rdi + 264], rbx; mov [rdi + 272], rdx; mov [rdi + 280], rsi",
    "mov [rdi + 288], rbp; mov [rdi + 296], r8; mov [rdi + 304], r9; mov [rdi + 312], r10",
    "mov [rdi + 320], r11; mov [rdi + 328], r12; mov [rdi + 336], r13; mov [rdi + 344], r14",
    "mov [rdi + 352], r15",
    "pushfq; pop rax; mov [rdi + 24], rax",
    "movdqu [rdi + 576], xmm0; movdqu [rdi + 592], xmm1; movdqu [rdi + 608], xmm7; movdqu [rdi + 624], xmm15",
    "cld",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
);

unsafe extern "C" {
    fn limosa_test_spin(words: *mut u64);
}

/// Spins with known values in all registers, `flags` and, if given, a stack pointer to nowhere.
pub fn spin(shared: &'static Shared, flags: u64, bogus_stack: Option<u64>) -> bool {
    const SOME: u64 = 0x1234_5678_9abc_def0;
    // Carry, parity, adjust, zero, sign, direction, overflow.
    const STATUS: u64 = 0xcd5;
    let words = shared.spin.as_ptr().cast_mut();
    let pattern = |index: usize| SOME.rotate_left(index as u32 * 5) ^ index as u64;
    let stack_here = 0_u64;
    // SAFETY: the words are in shared memory, which the test changes only through word 0; the assembly keeps
    // to its 128 words, saves what the ABI says, and uses no stack while rsp is changed.
    unsafe {
        words.add(1).write_volatile(flags | 2);
        let stack = bogus_stack.unwrap_or((&raw const stack_here).addr() as u64 - 4096);
        words.add(2).write_volatile(stack);
        for index in (16..29).chain(64..72) {
            words.add(index).write_volatile(pattern(index));
        }
        limosa_test_spin(words);
        for index in 0..13 {
            if words.add(32 + index).read_volatile() != pattern(16 + index) {
                return wrong(shared, index as i64);
            }
        }
        for index in 0..8 {
            if words.add(72 + index).read_volatile() != pattern(64 + index) {
                return wrong(shared, 100 + index as i64);
            }
        }
        if words.add(46).read_volatile() != stack {
            return wrong(shared, 200);
        }
        let found = words.add(3).read_volatile() & STATUS;
        found == flags & STATUS || wrong(shared, found as i64 | 0x1_0000)
    }
}

fn wrong(shared: &Shared, found: i64) -> bool {
    shared.found.store(found, Ordering::SeqCst);
    false
}

pub fn ready(shared: &Shared) {
    shared.ready.store(1, Ordering::SeqCst);
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A sleep that must last.
pub fn nanosleep(shared: &'static Shared) -> bool {
    let started = Instant::now();
    ready(shared);
    let time = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    // SAFETY: the time is live.
    let result = unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
    let good = result == 0 && started.elapsed() >= Duration::from_millis(100);
    let good = good || wrong(shared, i64::from(errno()));
    // On a busy machine the test comes when the time is over. What has ended has no mappings to compare.
    wait_for_go(shared);
    good
}

/// A poll that must time out.
pub fn poll(shared: &'static Shared) -> bool {
    let started = Instant::now();
    ready(shared);
    // SAFETY: no descriptors.
    let result = unsafe { libc::poll(std::ptr::null_mut(), 0, 100) };
    let good = result == 0 && started.elapsed() >= Duration::from_millis(100);
    let good = good || wrong(shared, i64::from(errno()));
    // As above.
    wait_for_go(shared);
    good
}

/// A wait for a futex that the test wakes.
pub fn futex(shared: &'static Shared) -> bool {
    ready(shared);
    // SAFETY: the futex word lives.
    let result = unsafe { libc::syscall(libc::SYS_futex, shared.word.as_ptr(), libc::FUTEX_WAIT, 0, 0) };
    result == 0 || wrong(shared, i64::from(errno()))
}

/// A read from a pipe that gets what a thread of the target writes when the test says so.
pub fn pipe_read(shared: &'static Shared) -> bool {
    let mut ends = [0; 2];
    let mut byte = 0_u8;
    // SAFETY: the array and the byte are live.
    unsafe {
        libc::pipe(ends.as_mut_ptr());
        write_later(shared, ends[1]);
        ready(shared);
        let got = libc::read(ends[0], (&raw mut byte).cast(), 1);
        got == 1 && byte == b'!' || wrong(shared, i64::from(errno()))
    }
}

/// An epoll_wait; the kernel ends it with `EINTR` for any stop.
pub fn epoll(shared: &'static Shared) -> bool {
    let mut ends = [0; 2];
    // SAFETY: all pointers are to live values.
    unsafe {
        libc::pipe(ends.as_mut_ptr());
        write_later(shared, ends[1]);
        let epoll = libc::epoll_create1(0);
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 77 };
        libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, ends[0], &raw mut event);
        event.u64 = 0;
        ready(shared);
        let mut got = libc::epoll_wait(epoll, &raw mut event, 1, -1);
        if got == -1 && errno() == libc::EINTR {
            got = libc::epoll_wait(epoll, &raw mut event, 1, -1);
        }
        got == 1 && event.u64 == 77 || wrong(shared, i64::from(errno()))
    }
}

fn write_later(shared: &'static Shared, end: i32) {
    let runs = Arc::new(AtomicU32::new(0));
    let told = Arc::clone(&runs);
    std::thread::spawn(move || {
        // What the C library gives a thread for its memory is there when this is.
        drop(std::hint::black_box(Box::new(0)));
        told.store(1, Ordering::SeqCst);
        drop(told);
        wait_for_go(shared);
        // SAFETY: one live byte.
        unsafe { libc::write(end, b"!".as_ptr().cast(), 1) };
    });
    // Or the mappings that it brings would seem to be left by a visit.
    while runs.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Sleeps until the test says go.
pub fn wait_for_go(shared: &Shared) {
    while shared.go.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_micros(500));
    }
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// Sets a handler.
pub fn handle(signal: i32, handler: extern "C" fn(i32), flags: i32) {
    // SAFETY: the action is live; the handlers only touch atomics.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = flags;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
    }
}

/// Blocks signals.
pub fn block(signals: &[i32]) {
    // SAFETY: the set is live.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// A pause that SIGUSR1 ends.
pub fn pause(shared: &'static Shared) -> bool {
    handle(libc::SIGUSR1, count, 0);
    ready(shared);
    // SAFETY: takes nothing.
    let result = unsafe { libc::pause() };
    result == -1 && errno() == libc::EINTR && HANDLED.load(Ordering::SeqCst) == 1
        || wrong(shared, i64::from(errno()))
}

/// A sigsuspend that SIGUSR1, blocked outside of it, ends.
pub fn sigsuspend(shared: &'static Shared) -> bool {
    handle(libc::SIGUSR1, count, 0);
    block(&[libc::SIGUSR1]);
    ready(shared);
    // SAFETY: the sets are live.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        let mut after: libc::sigset_t = std::mem::zeroed();
        let result = libc::sigsuspend(&raw const empty);
        libc::sigprocmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut after);
        result == -1
            && HANDLED.load(Ordering::SeqCst) == 1
            && libc::sigismember(&raw const after, libc::SIGUSR1) == 1
            || wrong(shared, i64::from(HANDLED.load(Ordering::SeqCst)))
    }
}

static IN_HANDLER: std::sync::atomic::AtomicPtr<Shared> =
    std::sync::atomic::AtomicPtr::new(std::ptr::null_mut());

extern "C" fn spin_in_handler(_signal: i32) {
    // SAFETY: set to the shared page before the signal is raised.
    let shared: &'static Shared = unsafe { &*IN_HANDLER.load(Ordering::SeqCst) };
    if spin(shared, 0, None) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }
}

/// Inside a signal handler on an alternate stack.
pub fn handler_on_altstack(shared: &'static Shared) -> bool {
    IN_HANDLER.store(std::ptr::from_ref(shared).cast_mut(), Ordering::SeqCst);
    let stack = vec![0_u8; 64 * 1024].leak();
    let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: the stack is leaked.
    unsafe {
        libc::sigaltstack(&raw const alternate, std::ptr::null_mut());
        handle(libc::SIGUSR2, spin_in_handler, libc::SA_ONSTACK);
        libc::raise(libc::SIGUSR2);
    }
    HANDLED.load(Ordering::SeqCst) == 1
}

/// Signals pending while blocked, among them those that a visit could report with; each must be there
/// afterwards, with its value.
pub fn pending(shared: &'static Shared) -> bool {
    let signals = [libc::SIGUSR1, libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD, 40];
    block(&signals);
    for signal in signals {
        // SAFETY: takes numbers only; and the info is live below.
        unsafe {
            libc::sigqueue(libc::getpid(), signal, libc::sigval { sival_ptr: (signal * 3) as *mut _ });
        }
    }
    if !spin(shared, 0x801, None) {
        return false;
    }
    for expected in signals {
        // SAFETY: set, info and time are live.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let at_once: libc::timespec = std::mem::zeroed();
            libc::sigaddset(&raw mut set, expected);
            let got = libc::sigtimedwait(&raw const set, &raw mut info, &raw const at_once);
            if got != expected || info.si_value().sival_ptr.addr() as i32 != expected * 3 {
                return wrong(shared, i64::from(expected));
            }
        }
    }
    true
}

/// A second thread spins while the first sleeps.
pub fn second_thread(shared: &'static Shared) -> bool {
    std::thread::spawn(move || {
        shared.tid.store(gettid() as u32, Ordering::SeqCst);
        spin(shared, 0x4d5, None)
    })
    .join()
    .unwrap()
}
