//! A visit: a stopped thread of a running process runs programs for us, and heals itself if we die.
//!
//! ```text
//!   thread stopped ──► stub and data area into the padding behind the vDSO's last section
//!        │             rip = stub, signals blocked but S
//!        ▼
//!   mmap scratch ──report──► program written into scratch
//!        ▼
//!   walk program ──report──► results read (any number of programs)
//!        ▼
//!   munmap scratch ─report─► registers and mask set back by ptrace, the padding wiped; still stopped
//!        ▼
//!   (nobody attached: a report means nothing, the stub loads mask and registers from its data area
//!    and jumps back)
//! ```
//!
//! The stack is never touched: a goroutine's has no room below it. The data area may only be written while no
//! thread's `rip` is in the stub ([`step_out_of_stub`]).
//!
//! A report is `tgkill(own process, own thread, S)`; a step is done when the thread stops right behind that
//! call. What S is depends on the thread ([`Reporting`]):
//!
//! - A signal that is ignored by default, that the process does not catch and the thread does not block: it
//!   becomes a signal-delivery stop for the controller and is nothing without one. One stop for each report.
//!   (Not a blocked one: it could be pending for `sigwait` or a signalfd, and would be lost. Not `SIGCONT`:
//!   sending it cancels stops.)
//! - 0, if there is none (Go programs catch every signal): the thread then runs from system call to system
//!   call, and the return of the report's call is the stop. Two stops for each call of a program.
//!
//! # What a program may contain
//! It may have to complete unattended: nothing in it may sleep, and what it does must be harmless.
//! Under a seccomp filter attach with `Options::SUSPEND_SECCOMP`; a stub whose controller dies then needs the
//! filter's leave for getpid, gettid, mmap, munmap, tgkill, rt_sigprocmask and the calls of the program.
//!
//! An interrupted system call starts again when the stub goes on unattended, as if the signals that came in
//! the meantime had come right before it. Calls that unblock signals atomically (ppoll, sigsuspend) still end
//! with `EINTR` then, because those signals are blocked outside of them.
//!
//! Not visited (a typed refusal): threads in 32-bit mode, and threads under syscall user dispatch.

use std::time::{Duration, Instant};

use limosa_kernel::memory::{self, ForeignMemory};
use limosa_kernel::ptrace::{self, Registers, WaitStatus};

use crate::arch;
use crate::program::{Outcome, Program};
use crate::vdso::{Slot, Vdso};

/// Longest time a visited thread may take for one step. Programs only ask; none of their calls sleeps.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a thread may be silent before we look whether it still lives (see [`ended_unseen`]).
const GLANCE: Duration = Duration::from_millis(20);
const SCRATCH_UNIT: usize = 64 * 1024;
/// The code segment of 64-bit user mode.
const USER_CS: u64 = 0x33;

/// Why a visit failed.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    /// A kernel operation on the thread failed.
    #[error(transparent)]
    Kernel(#[from] limosa_kernel::Error),
    /// The process has no 64-bit vDSO, or one without room for the stub.
    #[error("process {pid} has no room behind its vDSO for {needed} bytes; it cannot be asked for its state")]
    NoRoom {
        /// The process.
        pid: i32,
        /// Bytes needed.
        needed: usize,
    },
    /// The thread runs 32-bit code.
    #[error("thread {tid} runs 32-bit code, which cannot be asked for its state; run a 64-bit build of it")]
    Compat {
        /// The thread.
        tid: i32,
    },
    /// The thread's system calls are handed back to it as signals.
    #[error(
        "thread {tid} has syscall user dispatch switched on (as Wine does); it cannot be asked for its state"
    )]
    UserDispatch {
        /// The thread.
        tid: i32,
    },
    /// The thread could not map scratch memory.
    #[error(
        "thread {tid} cannot map {bytes} bytes of scratch memory: {source}; raise its address-space limit"
    )]
    Scratch {
        /// The thread.
        tid: i32,
        /// Bytes asked for.
        bytes: usize,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A program is larger than the room asked for at the beginning.
    #[error("a program of {size} bytes for thread {tid} exceeds the {room} bytes of its scratch memory")]
    TooLarge {
        /// The thread.
        tid: i32,
        /// Bytes of the program.
        size: usize,
        /// Bytes of scratch.
        room: usize,
    },
    /// The thread ended: it was killed, or its process exited.
    #[error("thread {tid} ended while it was asked for its state")]
    Ended {
        /// The thread.
        tid: i32,
    },
    /// The thread stopped in an unexpected way; it has its own registers again.
    #[error("thread {tid} stopped unexpectedly while it was asked for its state: {status:?}")]
    Lost {
        /// The thread.
        tid: i32,
        /// What waitpid said.
        status: WaitStatus,
    },
    /// The thread does not leave the stub of an earlier visit.
    #[error("thread {tid} does not leave the code of an earlier, interrupted checkpoint; try again")]
    Stuck {
        /// The thread.
        tid: i32,
    },
}

impl VisitError {
    /// Whether the thread is simply no longer there.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Ended { .. } => true,
            Self::Kernel(error) => error.is_gone(),
            _ => false,
        }
    }
}

/// The result of a call that is only being entered (and behind which the thread already stands).
const ENTERED: u64 = -(libc::ENOSYS as i64) as u64;

/// A system call to be looked at, and who looks.
type Pause<'a> = Option<(i64, &'a mut dyn FnMut(u64))>;

/// How the thread's reports reach us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reporting {
    /// As this signal.
    Signal(i32),
    /// As the return of a system call.
    SyscallExit,
}

impl Reporting {
    /// For a thread that blocks the signals `mask` of a process that has handlers for `caught`.
    fn choose(caught: u64, mask: u64) -> Self {
        [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD]
            .into_iter()
            .find(|signal| (caught | mask) & bit(*signal) == 0)
            .map_or(Self::SyscallExit, Self::Signal)
    }

    /// What tgkill is to send.
    fn signal(self) -> i32 {
        match self {
            Self::Signal(signal) => signal,
            Self::SyscallExit => 0,
        }
    }

    /// The thread's mask during the visit.
    fn mask(self) -> u64 {
        match self {
            Self::Signal(signal) => !bit(signal),
            Self::SyscallExit => u64::MAX,
        }
    }

    fn resume(self, tid: i32, signal: i32) -> limosa_kernel::Result<()> {
        match self {
            Self::Signal(_) => ptrace::resume(tid, signal),
            Self::SyscallExit => ptrace::resume_to_syscall_delivering(tid, signal),
        }
    }

    /// Whether a stop without an event is the report made right before `address`. Others may send S, too.
    fn is_made(self, tid: i32, signal: i32, address: u64) -> limosa_kernel::Result<bool> {
        if !self.may_be(signal) {
            return Ok(false);
        }
        let registers = ptrace::registers(tid)?;
        Ok(registers.rip == address && (self != Self::SyscallExit || registers.rax != ENTERED))
    }

    /// Whether this is how a report's stop looks. (The attacher's options decide whether bit 7 marks
    /// system-call stops; a real SIGTRAP is blocked.)
    fn may_be(self, signal: i32) -> bool {
        match self {
            Self::Signal(own) => signal == own,
            Self::SyscallExit => signal & 0x7f == libc::SIGTRAP,
        }
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// A thread that runs programs for us. Ends with [`Visit::end`]; dropped without it, the thread heals
/// itself as soon as it is resumed or detached.
#[derive(Debug)]
pub struct Visit<'m> {
    pid: i32,
    tid: i32,
    memory: &'m ForeignMemory,
    slot: Slot,
    reporting: Reporting,
    original: Registers,
    mask: u64,
    scratch: u64,
    scratch_size: usize,
    fresh: bool,
    born: Vec<i32>,
}

impl<'m> Visit<'m> {
    /// Begins a visit of the stopped thread `tid` of process `pid` (numbers in the caller's PID namespace),
    /// with scratch memory for programs of at most `room` bytes. `caught` are the signals that the process
    /// has handlers for, read after all its threads were stopped. No other thread of the process may be
    /// in a visit.
    pub fn begin(
        pid: i32,
        tid: i32,
        vdso: Vdso,
        memory: &'m ForeignMemory,
        caught: u64,
        room: usize,
    ) -> Result<Self, VisitError> {
        let mut original = ptrace::registers(tid)?;
        if original.cs != USER_CS {
            return Err(VisitError::Compat { tid });
        }
        if ptrace::has_syscall_user_dispatch(tid)? {
            return Err(VisitError::UserDispatch { tid });
        }
        abort_critical_section(pid, tid, &mut original)?;
        let mask = ptrace::signal_mask(tid)?;
        let reporting = Reporting::choose(caught, mask);
        let scratch_size = room.max(1).next_multiple_of(SCRATCH_UNIT);
        let slot = vdso.choose_slot(memory)?;
        let mut code = arch::VISITOR.to_vec();
        let data = arch::visitor_layout().data;
        code[data..].copy_from_slice(&data_area(&original, mask, reporting.signal(), slot.generation));
        memory.write(slot.address, &code)?;
        // From here on the thread heals itself: first the registers, then the mask that the stub sets back.
        ptrace::set_registers(tid, &first_registers(&original, slot.address, scratch_size))?;
        ptrace::set_signal_mask(tid, reporting.mask())?;
        let (scratch, fresh, born) = (0, true, Vec::new());
        let mut visit =
            Self { pid, tid, memory, slot, reporting, original, mask, scratch, scratch_size, fresh, born };
        visit.step(arch::visitor_layout().mapped)?;
        visit.scratch = ptrace::registers(tid)?.r12;
        if visit.scratch > u64::MAX - 4096 {
            let source = std::io::Error::from_raw_os_error(-(visit.scratch as i64) as i32);
            visit.leave()?;
            return Err(VisitError::Scratch { tid, bytes: scratch_size, source });
        }
        Ok(visit)
    }

    /// Runs `program` in the thread.
    pub fn run(&mut self, program: Program) -> Result<Outcome, VisitError> {
        self.run_watched(program, None)
    }

    /// The same; whenever the thread is about to make the system call `number`, `look` is given its first argument: a
    /// descriptor, say, that the program opened and is about to close again, so that it does so unattended, too.
    pub fn run_pausing(
        &mut self,
        program: Program,
        number: i64,
        look: &mut dyn FnMut(u64),
    ) -> Result<Outcome, VisitError> {
        self.run_watched(program, Some((number, look)))
    }

    fn run_watched(&mut self, program: Program, pause: Pause<'_>) -> Result<Outcome, VisitError> {
        let rendered = program.render(self.scratch);
        let image = rendered.image();
        if image.len() > self.scratch_size {
            return Err(VisitError::TooLarge { tid: self.tid, size: image.len(), room: self.scratch_size });
        }
        // The first op's header goes last: a half-written program is an END.
        memory::write(self.pid, self.scratch + 8, &image[8..])?;
        memory::write(self.pid, self.scratch, &image[..8])?;
        if !self.fresh {
            let mut registers = ptrace::registers(self.tid)?;
            registers.rip = self.slot.address + arch::visitor_layout().walk;
            registers.rbx = self.scratch;
            registers.r14 = 0;
            registers.orig_rax = u64::MAX;
            ptrace::set_registers(self.tid, &registers)?;
        }
        self.fresh = false;
        self.step_pausing(arch::visitor_layout().finished, pause)?;
        let mut after = vec![0; image.len()];
        memory::read(self.pid, self.scratch, &mut after)?;
        Ok(rendered.outcome(after))
    }

    /// The children that the programs have made so far (PIDs in the caller's PID namespace), if the thread was attached
    /// with [`ptrace::Options::TRACE_CLONE`]: they are attached, too, and about to stop before their first instruction.
    pub fn born(&self) -> &[i32] {
        &self.born
    }

    /// Ends the visit: the scratch is unmapped and the thread is stopped with its own registers and mask.
    /// Returns the registers as they are to be checkpointed. The stop is one in which the kernel still
    /// decides about restarting an interrupted system call, whatever the thread is told to do next.
    pub fn end(mut self) -> Result<Registers, VisitError> {
        if self.fresh {
            self.step(arch::visitor_layout().finished)?;
        }
        self.step(arch::visitor_layout().unmapped)?;
        self.leave()?;
        Ok(self.original)
    }

    fn leave(&mut self) -> Result<(), VisitError> {
        if self.reporting == Reporting::SyscallExit {
            // From the return of a system call the kernel goes straight to user mode, without looking whether
            // the registers now say that a call is to be restarted. An interrupt's stop is as good as a signal's.
            ptrace::interrupt(self.tid)?;
            ptrace::resume(self.tid, 0)?;
            match wait(self.tid)? {
                WaitStatus::Stopped { event: ptrace::EVENT_STOP, .. } => {}
                status => return Err(VisitError::Lost { tid: self.tid, status }),
            }
        }
        self.put_back()
    }

    /// The reverse of `begin`: registers after the mask, so that a death in between still finds the stub in
    /// charge, and the stub wiped last.
    fn put_back(&self) -> Result<(), VisitError> {
        ptrace::set_signal_mask(self.tid, self.mask)?;
        ptrace::set_registers(self.tid, &self.original)?;
        self.memory.write(self.slot.address, &vec![0; arch::VISITOR.len()])?;
        Ok(())
    }

    /// Resumes the thread until it has made the report that ends at `done`, an offset in the stub.
    fn step(&mut self, done: u64) -> Result<(), VisitError> {
        self.step_pausing(done, None)
    }

    fn step_pausing(&mut self, done: u64, mut pause: Pause<'_>) -> Result<(), VisitError> {
        let done = self.slot.address + done;
        let mut deliver = 0;
        loop {
            match &pause {
                Some(_) => ptrace::resume_to_syscall_delivering(self.tid, deliver)?,
                None => self.reporting.resume(self.tid, deliver)?,
            }
            deliver = 0;
            match wait(self.tid)? {
                WaitStatus::Stopped { signal, event: 0 } => {
                    if self.reporting.is_made(self.tid, signal, done)? {
                        return Ok(());
                    }
                    let on_its_way = Reporting::SyscallExit.may_be(signal);
                    if let (Some((number, look)), true) = (&mut pause, on_its_way) {
                        let registers = ptrace::registers(self.tid)?;
                        if registers.orig_rax == *number as u64 && registers.rax == ENTERED {
                            look(registers.rdi);
                        }
                        continue;
                    }
                    match signal {
                        // Somebody else's S, as harmless as ours; or on its way from call to call.
                        _ if self.reporting.may_be(signal) => {}
                        // SIGSTOP cannot be blocked. Delivered, it stops the process when it is let go; the
                        // visited thread reports the group stop and goes on for us.
                        libc::SIGSTOP => deliver = signal,
                        _ => return self.give_up(WaitStatus::Stopped { signal, event: 0 }),
                    }
                }
                WaitStatus::Stopped { event: ptrace::EVENT_CLONE, .. } => {
                    self.born.push(ptrace::event_message(self.tid)? as i32);
                }
                // A group stop or somebody's interrupt.
                WaitStatus::Stopped { .. } => {}
                WaitStatus::Exited(_) | WaitStatus::Killed(_) => {
                    return Err(VisitError::Ended { tid: self.tid });
                }
            }
        }
    }

    /// The thread faulted in the stub: it gets its own registers back, and the fault is not delivered.
    fn give_up(&self, status: WaitStatus) -> Result<(), VisitError> {
        self.put_back()?;
        Err(VisitError::Lost { tid: self.tid, status })
    }
}

/// Waits for the thread's next stop, at most [`PATIENCE`].
fn wait(tid: i32) -> Result<WaitStatus, VisitError> {
    let started = Instant::now();
    loop {
        match ptrace::wait_within(tid, GLANCE) {
            Err(error) if error.errno() == Some(libc::ETIMEDOUT) => {
                if ended_unseen(tid) {
                    return Err(VisitError::Ended { tid });
                }
                if started.elapsed() > PATIENCE {
                    return Err(error.into());
                }
            }
            other => return Ok(other?),
        }
    }
}

/// Whether the thread is dead, although waitpid says nothing of it: the end of a process's first thread is
/// reported only after those of all others, which their tracer, perhaps we, must have waited for.
fn ended_unseen(tid: i32) -> bool {
    match std::fs::read_to_string(format!("/proc/{tid}/stat")) {
        Ok(stat) => {
            let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
            matches!(state, Some('Z' | 'X'))
        }
        Err(error) => matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
    }
}

/// The registers with which the stub begins: the arguments of its mmap.
fn first_registers(original: &Registers, stub: u64, scratch_size: usize) -> Registers {
    Registers {
        rip: stub,
        orig_rax: u64::MAX,
        rdi: 0,
        rsi: scratch_size as u64,
        rdx: (libc::PROT_READ | libc::PROT_WRITE) as u64,
        r10: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64,
        r8: u64::MAX,
        r9: 0,
        r13: scratch_size as u64,
        ..*original
    }
}

/// A thread that is stopped inside a restartable sequence is sent to its abort handler, as preemption would do.
/// Otherwise the kernel forgets the sequence while the thread is in the stub, and it would go on half-way
/// through as if it had not been interrupted.
fn abort_critical_section(pid: i32, tid: i32, registers: &mut Registers) -> Result<(), VisitError> {
    /// Offset of `rseq_cs` in `struct rseq`.
    const DESCRIPTOR: u64 = 8;
    if registers.orig_rax as i64 >= 0 {
        // In a system call; sequences contain none.
        return Ok(());
    }
    let rseq = ptrace::rseq_configuration(tid)?;
    if rseq.address == 0 {
        return Ok(());
    }
    let mut pointer = [0; 8];
    // struct rseq_cs: version and flags (u32 each), start, length, abort handler.
    let mut descriptor = [0; 32];
    if memory::read(pid, rseq.address.wrapping_add(DESCRIPTOR), &mut pointer).is_err()
        || pointer == [0; 8]
        || memory::read(pid, u64::from_le_bytes(pointer), &mut descriptor).is_err()
    {
        return Ok(()); // In no sequence, or one for which the kernel will kill the thread, not we.
    }
    let word = |at: usize| u64::from_le_bytes(descriptor[at..at + 8].try_into().unwrap_or_default());
    let (start, length, abort) = (word(8), word(16), word(24));
    if registers.rip.wrapping_sub(start) < length {
        registers.rip = abort;
    }
    Ok(())
}

/// The data area: what the stub loads when nobody is attached.
fn data_area(registers: &Registers, mask: u64, signal: i32, generation: u32) -> Vec<u8> {
    let (rip, rax) = restarted(registers);
    let flags = flags_word(registers.eflags);
    let r = registers;
    let words = [
        rip, rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
        r.r15, mask, flags,
    ];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend_from_slice(&signal.to_le_bytes());
    bytes.extend_from_slice(&generation.to_le_bytes());
    bytes
}

/// Flags as the stub wants them: `al` the overflow flag, `ah` what sahf takes, bit 16 the direction flag.
fn flags_word(eflags: u64) -> u64 {
    (eflags >> 11 & 1) | (eflags & 0xff) << 8 | (eflags >> 10 & 1) << 16
}

/// `rip` and `rax` with which an interrupted system call starts again, as the kernel's own
/// `arch_do_signal_or_restart` would set them.
fn restarted(registers: &Registers) -> (u64, u64) {
    const ERESTARTSYS: i64 = -512;
    const ERESTARTNOINTR: i64 = -513;
    const ERESTARTNOHAND: i64 = -514;
    const ERESTART_RESTARTBLOCK: i64 = -516;
    if (registers.orig_rax as i64) < 0 {
        return (registers.rip, registers.rax);
    }
    match registers.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => (registers.rip - 2, registers.orig_rax),
        ERESTART_RESTARTBLOCK => (registers.rip - 2, libc::SYS_restart_syscall as u64),
        _ => (registers.rip, registers.rax),
    }
}

/// If the stopped thread is still in a stub that an earlier, killed controller left (it is on its way out),
/// lets it leave. Returns with the thread stopped by an interrupt.
pub fn step_out_of_stub(tid: i32, vdso: &Vdso) -> Result<(), VisitError> {
    let started = Instant::now();
    let mut pause = Duration::from_micros(50);
    while started.elapsed() < PATIENCE {
        if !vdso.stub_contains(ptrace::registers(tid)?.rip) {
            return Ok(());
        }
        ptrace::resume(tid, 0)?;
        std::thread::sleep(pause);
        // On a busy machine it may not have run at all.
        pause = (pause * 2).min(Duration::from_millis(20));
        // An interrupt of a thread that is stopped already (job control had stopped it, and the interrupt by which it was
        // seized came on top) would only stop it again as soon as it is resumed, for ever.
        let mut stopped = ptrace::try_wait(tid)?;
        if !matches!(stopped, Some(WaitStatus::Stopped { event: ptrace::EVENT_STOP, .. })) {
            ptrace::interrupt(tid)?;
        }
        loop {
            match stopped.take().map_or_else(|| wait(tid), Ok)? {
                WaitStatus::Stopped { event: ptrace::EVENT_STOP, .. } => break,
                // The stub's own reports, and signals that the process has waited for since its mask was set back.
                WaitStatus::Stopped { signal, event: 0 } => ptrace::resume(tid, signal)?,
                WaitStatus::Stopped { .. } => ptrace::resume(tid, 0)?,
                WaitStatus::Exited(_) | WaitStatus::Killed(_) => return Err(VisitError::Ended { tid }),
            }
        }
    }
    Err(VisitError::Stuck { tid })
}
