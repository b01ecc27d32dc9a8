//! ptrace(2) and waitpid(2) for one thread: seize, stop, look, set, let go.
//!
//! Only `PTRACE_SEIZE` is used: attaching sends no signal, and the kernel lets every tracee go on when
//! the tracer dies, group stops included. All functions name the thread by its TID in the caller's PID
//! namespace and must be called from the thread that seized it.

use std::io;
use std::ptr;
use std::time::{Duration, Instant};

use crate::fault;
use crate::{Error, Result};

/// General-purpose registers of a thread (`struct user_regs_struct`, x86-64).
pub type Registers = libc::user_regs_struct;

/// One signal's `siginfo_t` as the kernel's 128 bytes.
pub type RawSiginfo = [u8; 128];

bitflags::bitflags! {
    /// `PTRACE_O_*` options.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Options: usize {
        /// Stop new children and attach them.
        const TRACE_FORK = 0x2;
        /// Stop new threads and attach them.
        const TRACE_CLONE = 0x8;
        /// Stop a thread that ends before it gives anything back: its memory can still be read.
        const TRACE_EXIT = 0x40;
        /// System-call stops report `SIGTRAP | 0x80`.
        const TRACE_SYSGOOD = 0x1;
        /// The tracee is killed when the tracer dies.
        const EXIT_KILL = 0x10_0000;
        /// Seccomp filters of the tracee are not run while attached (needs `CAP_SYS_ADMIN`).
        const SUSPEND_SECCOMP = 0x20_0000;
    }
}

/// What waitpid(2) reported of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitStatus {
    /// Stopped by `signal`; `event` is one of `PTRACE_EVENT_*` or 0 for a signal-delivery stop.
    Stopped {
        /// The signal shown by the stop (`SIGTRAP | 0x80` for system-call stops).
        signal: i32,
        /// `PTRACE_EVENT_STOP` (128) for interrupts and group stops.
        event: i32,
    },
    /// Ended with this exit status.
    Exited(i32),
    /// Ended by this signal.
    Killed(i32),
}

/// `PTRACE_EVENT_STOP`: the event of interrupts and group stops of seized threads.
pub const EVENT_STOP: i32 = 128;
/// `PTRACE_EVENT_CLONE`: a child was made whose end is not told by SIGCHLD.
pub const EVENT_CLONE: i32 = 3;
/// `PTRACE_EVENT_EXIT`: on its way out, whole still.
pub const EVENT_EXIT: i32 = 6;

fn request(
    operation: &'static str,
    request: libc::c_uint,
    tid: i32,
    addr: usize,
    data: usize,
) -> Result<i64> {
    fault::point();
    // SAFETY: every caller passes as `addr` and `data` either plain numbers or pointers to live memory
    // of the size that this request reads or writes (ptrace(2)).
    let result = unsafe { libc::ptrace(request, tid, addr, data) };
    if result == -1 { Err(Error::last(operation, format_args!("thread {tid}"))) } else { Ok(result) }
}

/// Attaches to `tid` without stopping it.
pub fn seize(tid: i32, options: Options) -> Result<()> {
    request("ptrace(PTRACE_SEIZE)", libc::PTRACE_SEIZE, tid, 0, options.bits()).map(drop)
}

/// Sets the options of an attached, stopped thread.
pub fn set_options(tid: i32, options: Options) -> Result<()> {
    request("ptrace(PTRACE_SETOPTIONS)", libc::PTRACE_SETOPTIONS, tid, 0, options.bits()).map(drop)
}

/// Asks an attached thread to stop; the stop is reported by [`wait`] as [`EVENT_STOP`].
pub fn interrupt(tid: i32) -> Result<()> {
    request("ptrace(PTRACE_INTERRUPT)", libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// What the event of a stopped thread is about: the new child's PID in the caller's PID namespace, or an exit status.
pub fn event_message(tid: i32) -> Result<u64> {
    let mut message: libc::c_ulong = 0;
    let data = ptr::from_mut(&mut message) as usize;
    request("ptrace(PTRACE_GETEVENTMSG)", libc::PTRACE_GETEVENTMSG, tid, 0, data)?;
    Ok(message)
}

/// Lets a stopped thread run, delivering `signal` if it is not 0.
pub fn resume(tid: i32, signal: i32) -> Result<()> {
    request("ptrace(PTRACE_CONT)", libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped thread run until its next system-call entry or exit.
pub fn resume_to_syscall(tid: i32) -> Result<()> {
    request("ptrace(PTRACE_SYSCALL)", libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Like [`resume_to_syscall`], delivering `signal` if it is not 0.
pub fn resume_to_syscall_delivering(tid: i32, signal: i32) -> Result<()> {
    request("ptrace(PTRACE_SYSCALL)", libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

/// Detaches from a stopped thread, delivering `signal` if it is not 0.
pub fn detach(tid: i32, signal: i32) -> Result<()> {
    request("ptrace(PTRACE_DETACH)", libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The general-purpose registers.
pub fn registers(tid: i32) -> Result<Registers> {
    // SAFETY: user_regs_struct is plain integers; all zeros is a value of it.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    let data = ptr::from_mut(&mut registers) as usize;
    request("ptrace(PTRACE_GETREGS)", libc::PTRACE_GETREGS, tid, 0, data)?;
    Ok(registers)
}

/// Sets the general-purpose registers.
pub fn set_registers(tid: i32, registers: &Registers) -> Result<()> {
    let data = ptr::from_ref(registers) as usize;
    request("ptrace(PTRACE_SETREGS)", libc::PTRACE_SETREGS, tid, 0, data).map(drop)
}

const NT_X86_XSTATE: usize = 0x202;

/// The largest XSAVE area read: AMX's 8 KiB of tiles and all else stay below.
pub const XSTATE_MAX: usize = 16 * 1024;

/// FPU, vector and other extended state: an XSAVE area in the standard (not compacted) format.
///
/// Source: Intel SDM volume 1, chapter 13; `arch/x86/kernel/fpu/regset.c`.
pub fn xstate(tid: i32) -> Result<Vec<u8>> {
    let mut area = vec![0_u8; XSTATE_MAX];
    let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    let data = ptr::from_mut(&mut iov) as usize;
    request("ptrace(PTRACE_GETREGSET, NT_X86_XSTATE)", libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, data)?;
    area.truncate(iov.iov_len);
    Ok(area)
}

/// Sets the extended state from an XSAVE area in the standard format.
pub fn set_xstate(tid: i32, area: &[u8]) -> Result<()> {
    let mut iov = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    let data = ptr::from_mut(&mut iov) as usize;
    request("ptrace(PTRACE_SETREGSET, NT_X86_XSTATE)", libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, data)
        .map(drop)
}

/// The blocked signals, bit `n - 1` for signal `n`.
pub fn signal_mask(tid: i32) -> Result<u64> {
    let mut mask = 0_u64;
    let data = ptr::from_mut(&mut mask) as usize;
    request("ptrace(PTRACE_GETSIGMASK)", libc::PTRACE_GETSIGMASK as _, tid, 8, data)?;
    Ok(mask)
}

/// Sets the blocked signals.
pub fn set_signal_mask(tid: i32, mask: u64) -> Result<()> {
    let data = ptr::from_ref(&mask) as usize;
    request("ptrace(PTRACE_SETSIGMASK)", libc::PTRACE_SETSIGMASK as _, tid, 8, data).map(drop)
}

/// The `siginfo_t` of the signal-delivery stop the thread is in.
pub fn siginfo(tid: i32) -> Result<RawSiginfo> {
    let mut info = [0_u8; 128];
    let data = info.as_mut_ptr() as usize;
    request("ptrace(PTRACE_GETSIGINFO)", libc::PTRACE_GETSIGINFO, tid, 0, data)?;
    Ok(info)
}

#[repr(C)]
struct PeekSiginfoArgs {
    offset: u64,
    flags: u32,
    number: i32,
}

/// All signals pending for the thread, or for its whole process if `shared`, in queue order.
pub fn pending_signals(tid: i32, shared: bool) -> Result<Vec<RawSiginfo>> {
    const BATCH: usize = 32;
    let mut pending: Vec<RawSiginfo> = Vec::new();
    loop {
        let arguments =
            PeekSiginfoArgs { offset: pending.len() as u64, flags: u32::from(shared), number: BATCH as i32 };
        let mut batch = [[0_u8; 128]; BATCH];
        let got = request(
            "ptrace(PTRACE_PEEKSIGINFO)",
            libc::PTRACE_PEEKSIGINFO as _,
            tid,
            ptr::from_ref(&arguments) as usize,
            batch.as_mut_ptr() as usize,
        )? as usize;
        pending.extend_from_slice(&batch[..got.min(BATCH)]);
        if got < BATCH {
            return Ok(pending);
        }
    }
}

/// Restartable-sequence registration of a thread (rseq(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfiguration {
    /// Address of `struct rseq` in the thread; 0 if none is registered.
    pub address: u64,
    /// Its registered size in bytes.
    pub size: u32,
    /// The signature before abort handlers.
    pub signature: u32,
    flags: u32,
    pad: u32,
}

/// The thread's rseq registration (Linux 5.13).
pub fn rseq_configuration(tid: i32) -> Result<RseqConfiguration> {
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    let mut configuration = RseqConfiguration::default();
    let data = ptr::from_mut(&mut configuration) as usize;
    let size = size_of::<RseqConfiguration>();
    request("ptrace(PTRACE_GET_RSEQ_CONFIGURATION)", PTRACE_GET_RSEQ_CONFIGURATION, tid, size, data)?;
    Ok(configuration)
}

/// Whether the thread's system calls are handed back to it as `SIGSYS` (syscall user dispatch, Linux 5.11;
/// asked for by Linux 6.4, `false` on older kernels).
pub fn has_syscall_user_dispatch(tid: i32) -> Result<bool> {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
    const OPERATION: &str = "ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG)";
    // struct ptrace_sud_config: mode, selector, offset, length.
    let mut config = [0_u64; 4];
    let data = config.as_mut_ptr() as usize;
    match request(OPERATION, PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size_of_val(&config), data) {
        Ok(_) => Ok(config[0] != 0),
        Err(error) if matches!(error.errno(), Some(libc::EIO | libc::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// One classic BPF instruction (`struct sock_filter`).
pub type FilterInstruction = [u8; 8];

/// The `index`-th seccomp filter of a thread, 0 being the first installed; `None` past the last.
/// Needs `CAP_SYS_ADMIN` and no seccomp of the caller's own.
pub fn seccomp_filter(tid: i32, index: usize) -> Result<Option<Vec<FilterInstruction>>> {
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    const OPERATION: &str = "ptrace(PTRACE_SECCOMP_GET_FILTER)";
    let length = match request(OPERATION, PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(length) => length as usize,
        Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut program = vec![[0_u8; 8]; length];
    request(OPERATION, PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr() as usize)?;
    Ok(Some(program))
}

/// Whether what the `index`-th seccomp filter of a thread decides is logged (`SECCOMP_FILTER_FLAG_LOG`).
pub fn seccomp_filter_is_logged(tid: i32, index: usize) -> Result<bool> {
    const PTRACE_SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
    const SECCOMP_FILTER_FLAG_LOG: u64 = 1 << 1;
    // struct seccomp_metadata: the filter's number, its flags.
    let mut metadata = [index as u64, 0];
    let (size, data) = (size_of_val(&metadata), metadata.as_mut_ptr() as usize);
    request("ptrace(PTRACE_SECCOMP_GET_METADATA)", PTRACE_SECCOMP_GET_METADATA, tid, size, data)?;
    Ok(metadata[1] & SECCOMP_FILTER_FLAG_LOG != 0)
}

fn decode(status: i32) -> WaitStatus {
    if libc::WIFSTOPPED(status) {
        WaitStatus::Stopped { signal: libc::WSTOPSIG(status), event: status >> 16 }
    } else if libc::WIFSIGNALED(status) {
        WaitStatus::Killed(libc::WTERMSIG(status))
    } else {
        WaitStatus::Exited(libc::WEXITSTATUS(status))
    }
}

/// Waits until the attached thread or child `tid` stops or ends.
pub fn wait(tid: i32) -> Result<WaitStatus> {
    fault::point();
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live i32.
        if unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) } != -1 {
            return Ok(decode(status));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(Error::new("waitpid", format_args!("thread {tid}"), error));
        }
    }
}

/// Like [`wait`], without blocking: `None` if nothing is to be reported.
pub fn try_wait(tid: i32) -> Result<Option<WaitStatus>> {
    let mut status = 0;
    // SAFETY: `status` is a live i32.
    match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) } {
        -1 => Err(Error::last("waitpid", format_args!("thread {tid}"))),
        0 => Ok(None),
        _ => Ok(Some(decode(status))),
    }
}

/// Like [`wait`], but gives up with `ETIMEDOUT` after `limit`: for a thread that may be in an
/// uninterruptible sleep.
pub fn wait_within(tid: i32, limit: Duration) -> Result<WaitStatus> {
    fault::point();
    let started = Instant::now();
    let mut pause = Duration::from_micros(2);
    loop {
        if let Some(status) = try_wait(tid)? {
            return Ok(status);
        }
        if started.elapsed() > limit {
            let why = io::Error::from_raw_os_error(libc::ETIMEDOUT);
            return Err(Error::new("waitpid", format_args!("thread {tid}"), why));
        }
        // The usual stop arrives within microseconds: yield first, sleep only for the rare slow one.
        if started.elapsed() < Duration::from_micros(200) {
            std::thread::yield_now();
        } else {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }
}
