//! Registers of a thread, and system calls that were interrupted by freezing it.
//!
//! The thread comes back stopped where it was: often inside a system call that the freeze interrupted. The kernel
//! restarts such a call when the thread runs on, by the value in `rax`; a restored thread is given the same values,
//! so that the kernel does the same. Two cases need help:
//!
//! - `ERESTART_RESTARTBLOCK` (relative sleeps, poll and futex with a timeout) goes by data in the kernel that cannot
//!   be carried. The call is issued again with its arguments; a relative sleep with what was left of it, which the
//!   kernel has written to its `rem`.
//!   Where Limosa has stopped the thread before (pre-copy does, and a freeze that came at the wrong moment), the kernel has put
//!   restart_syscall(2) in the place of the call: which one it was is remembered ([`let_go`]).
//! - Some calls never restart and return `EINTR` for any interruption (epoll_wait(2), semtimedop(2), … see signal(7)).
//!   If no signal is pending, the interruption was the freeze, and the program must not see it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use limosa_kernel::ptrace::{self, Registers};
use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ThreadAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ThreadView;

const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
/// Bytes of the instruction syscall.
const SYSCALL: u64 = 2;

/// Words of `struct user_regs_struct`.
const WORDS: usize = 27;

/// General-purpose and extended registers.
#[derive(Debug, Serialize, Deserialize)]
pub struct ThreadRegisters {
    /// `struct user_regs_struct` (x86-64): r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs
    /// eflags rsp ss fs_base gs_base ds es fs gs.
    pub general: [u64; WORDS],
    /// XSAVE area in the standard format.
    #[serde(with = "serde_bytes")]
    pub extended: Vec<u8>,
}

/// Calls that return `EINTR` for any interruption, stops by a tracer included.
fn returns_eintr(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_io_getevents
            | libc::SYS_msgrcv
            | libc::SYS_msgsnd
    )
}

/// Makes a call that was interrupted only by the freeze restart instead of failing with `EINTR`. Done to the stopped
/// thread itself, so that the process that goes on does not notice either.
pub fn hide_interruption(tid: i32) -> Result<(), CaptureError> {
    let mut registers = ptrace::registers(tid)?;
    let interrupted = registers.rax as i64 == -i64::from(libc::EINTR) && returns_eintr(registers.orig_rax as i64);
    if interrupted && ptrace::pending_signals(tid, false)?.is_empty() && ptrace::pending_signals(tid, true)?.is_empty() {
        registers.rax = ERESTARTNOHAND as u64;
        ptrace::set_registers(tid, &registers)?;
    }
    Ok(())
}

/// Calls that go by data in the kernel and that Limosa has interrupted, by the thread.
static INTERRUPTED: Mutex<BTreeMap<i32, Registers>> = Mutex::new(BTreeMap::new());

/// To be called before a stopped thread goes on: what the stop did to a system call is hidden, or remembered for the next stop.
pub(crate) fn let_go(tid: i32) {
    let Ok(registers) = ptrace::registers(tid) else { return };
    if registers.rax as i64 == ERESTART_RESTARTBLOCK && registers.orig_rax as i64 != libc::SYS_restart_syscall {
        let mut interrupted = INTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner);
        interrupted.insert(tid, registers);
    }
    if let Err(error) = hide_interruption(tid) {
        tracing::debug!(tid, %error, "an interruption could not be hidden");
    }
}

/// Gives a thread that restarts a call by restart_syscall(2), or is just about to, the call itself, if that is known.
fn recall(tid: i32, registers: &mut Registers) {
    let interrupted = INTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(before) = interrupted.get(&tid) else { return };
    let what = |r: &Registers| (r.rsp, r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9);
    if what(registers) != what(before) {
        return;
    }
    let restarts = registers.orig_rax as i64 == libc::SYS_restart_syscall && registers.rip == before.rip;
    let is_about_to = registers.rax as i64 == libc::SYS_restart_syscall && registers.rip == before.rip.wrapping_sub(SYSCALL);
    if restarts {
        registers.orig_rax = before.orig_rax;
    } else if is_about_to {
        registers.rax = before.orig_rax;
    }
}

impl ThreadRegisters {
    /// Where the thread goes on.
    pub fn instruction_pointer(&self) -> u64 {
        self.general[16]
    }

    /// The top of its stack.
    pub fn stack_pointer(&self) -> u64 {
        self.general[19]
    }
}

impl ThreadAttribute for ThreadRegisters {
    type Asked = ();

    fn ask(_: &ThreadView, _: &mut Program) -> Result<(), CaptureError> {
        Ok(())
    }

    fn capture(thread: &ThreadView, (): &(), _: &Outcome) -> Result<Self, CaptureError> {
        let mut registers = ptrace::registers(thread.tid)?;
        recall(thread.tid, &mut registers);
        if registers.orig_rax as i64 >= 0 && registers.rax as i64 == ERESTART_RESTARTBLOCK {
            registers.rax = ERESTARTNOHAND as u64;
            continue_sleep(&mut registers);
        }
        Ok(Self { general: to_words(&registers), extended: ptrace::xstate(thread.tid)? })
    }

    fn rebuild(&self, _: &mut Program) {}

    fn finish(&self, tid: i32) -> Result<(), RestoreError> {
        ptrace::set_xstate(tid, &self.extended)?;
        ptrace::set_registers(tid, &from_words(&self.general))?;
        Ok(())
    }
}

/// A relative sleep goes on with what is left, where the caller asked to be told (`rem`).
fn continue_sleep(registers: &mut Registers) {
    match registers.orig_rax as i64 {
        libc::SYS_nanosleep if registers.rsi != 0 => registers.rdi = registers.rsi,
        libc::SYS_clock_nanosleep if registers.r10 != 0 => registers.rdx = registers.r10,
        _ => {}
    }
}

fn to_words(r: &Registers) -> [u64; WORDS] {
    [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi,
        r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ]
}

fn from_words(words: &[u64; WORDS]) -> Registers {
    let [
        r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp, ss,
        fs_base, gs_base, ds, es, fs, gs,
    ] = *words;
    Registers {
        r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp, ss,
        fs_base, gs_base, ds, es, fs, gs,
    }
}
