//! A real target process for the tests of visits: a forked child that shares one page with the test.

pub mod crew;
pub mod situations;

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use limosa_kernel::memory::ForeignMemory;
use limosa_kernel::ptrace::{self, WaitStatus};
use limosa_puppet::Vdso;

/// What the test and its target share.
#[repr(C)]
pub struct Shared {
    /// For the assembly in `spin`: left at 0 while it is to spin, registers wanted and found.
    pub spin: [u64; 128],
    /// Set by the target once it is about to be in its situation.
    pub ready: AtomicU32,
    /// Set by the test: the situation is to end.
    pub go: AtomicU32,
    /// TID of the thread to visit.
    pub tid: AtomicU32,
    /// A futex word, a byte of a pipe, …
    pub word: AtomicU32,
    /// What the target found.
    pub found: AtomicI64,
}

/// A forked child. Killed and reaped when dropped.
pub struct Target {
    pub pid: i32,
    pub shared: &'static Shared,
    reaped: bool,
}

impl Target {
    /// Forks; the child runs `body` and exits with 0 if it returns true. It is ready when `ready` is set.
    pub fn fork(body: impl FnOnce(&'static Shared) -> bool) -> Self {
        Self::fork_with(0, body)
    }

    /// Like `fork`, with more `CLONE_*` flags.
    pub fn fork_with(flags: i32, body: impl FnOnce(&'static Shared) -> bool) -> Self {
        // SAFETY: a new shared anonymous mapping, zeroed, never unmapped; all-zero bytes are a valid Shared.
        let shared: &'static Shared = unsafe {
            let page = libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(page, libc::MAP_FAILED);
            &*page.cast::<Shared>()
        };
        // SAFETY: fork by its system call; the child only runs `body`, and leaves by _exit.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) } as i32;
        assert!(pid >= 0, "clone: {}", std::io::Error::last_os_error());
        if pid == 0 {
            shared.tid.store(gettid() as u32, Ordering::SeqCst);
            // SAFETY: prctl and _exit take no pointers here.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(shared)));
                libc::_exit(i32::from(!matches!(good, Ok(true))));
            }
        }
        let target = Self { pid, shared, reaped: false };
        until("the target is ready", || target.shared.ready.load(Ordering::SeqCst) != 0);
        target
    }

    /// Waits until the thread sleeps in the kernel.
    pub fn asleep(self, tid: i32) -> Self {
        until("the target sleeps", || self.state(tid) == 'S');
        // A thread may sleep for a moment on its way to the situation.
        std::thread::sleep(Duration::from_millis(3));
        until("the target sleeps", || self.state(tid) == 'S');
        self
    }

    /// The thread's state as /proc shows it.
    pub fn state(&self, tid: i32) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/task/{tid}/stat", self.pid)).unwrap();
        stat.rsplit(") ").next().unwrap().chars().next().unwrap()
    }

    pub fn send(&self, signal: i32) {
        limosa_kernel::task::signal_process(self.pid, signal).unwrap();
    }

    /// A field of /proc/PID/task/TID/status as a hexadecimal number.
    pub fn status(&self, tid: i32, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/task/{tid}/status", self.pid)).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    }

    /// The mappings' addresses, protections and names.
    pub fn mappings(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap()
    }

    pub fn vdso(&self, memory: &ForeignMemory) -> Vdso {
        let (start, end) = vdso_range(&self.mappings());
        Vdso::locate(self.pid, memory, start, end).unwrap()
    }

    /// Lets the situation end and demands that the target found everything right.
    pub fn succeeds(mut self) {
        self.shared.go.store(1, Ordering::SeqCst);
        self.reaped = true;
        match ptrace::wait_within(self.pid, Duration::from_secs(10)) {
            Ok(WaitStatus::Exited(0)) => {}
            other => {
                let found = self.shared.found.load(Ordering::SeqCst);
                self.reaped = false;
                panic!("the target ended with {other:?} and found {found:#x}");
            }
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = limosa_kernel::task::signal_process(self.pid, libc::SIGKILL);
            while matches!(
                ptrace::wait_within(self.pid, Duration::from_secs(2)),
                Ok(WaitStatus::Stopped { .. })
            ) {}
        }
    }
}

/// First address of the vDSO and first behind it.
pub fn vdso_range(maps: &str) -> (u64, u64) {
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
    let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
    (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap())
}

/// Seizes a thread and stops it.
pub fn stop(tid: i32) {
    ptrace::seize(tid, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(tid).unwrap();
    match ptrace::wait_within(tid, Duration::from_secs(5)).unwrap() {
        WaitStatus::Stopped { event: ptrace::EVENT_STOP, .. } => {}
        other => panic!("an interrupt's stop, not {other:?}"),
    }
}

pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

pub fn gettid() -> i32 {
    // SAFETY: takes nothing.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

/// Registers in a form that can be compared.
pub fn words(registers: &ptrace::Registers) -> [u64; 27] {
    // SAFETY: user_regs_struct is 27 unsigned 64-bit integers.
    unsafe { std::mem::transmute_copy(registers) }
}
