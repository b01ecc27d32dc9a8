//! A visit: a stopped thread of a running process runs programs for us, and heals itself if we die.
//!
//! ```text
//!   thread stopped ──► stub and data area into the padding behind the vDSO's last section
//!        │             rip = stub, signals blocked but S
//!        ▼
//!   mmap scratch ──stop S──► program written into scratch
//!        ▼
//!   walk program ──stop S──► results read (any number of programs)
//!        ▼
//!   munmap scratch ─stop S─► registers and mask set back by ptrace; still stopped
//!        ▼
//!   (nobody attached: S means nothing, the stub loads mask and registers from its data area and jumps back)
//! ```
//!
//! S is a signal that is ignored by default and that the process does not catch, so it is nothing to a
//! process nobody traces. The stack is never touched: a goroutine's has no room below it. The data area
//! may only be written while no thread's `rip` is in the stub ([`step_out_of_stub`]).

use std::time::Duration;

use limosa_kernel::memory::{self, ForeignMemory};
use limosa_kernel::ptrace::{self, Registers, WaitStatus};

use crate::arch;
use crate::program::{Outcome, Program};

/// Longest time a visited thread may take for one step. Programs only ask; none of their calls sleeps.
const PATIENCE: Duration = Duration::from_secs(10);
const SCRATCH_UNIT: usize = 64 * 1024;

/// Why a visit failed.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    /// A kernel operation on the thread failed.
    #[error(transparent)]
    Kernel(#[from] limosa_kernel::Error),
    /// The process has no vDSO, or one without room for the stub.
    #[error("process {pid} has no room behind its vDSO for {needed} bytes; it cannot be asked for its state")]
    NoRoom {
        /// The process.
        pid: i32,
        /// Bytes needed.
        needed: usize,
    },
    /// Every signal that could say "done" is caught by the process.
    #[error("process {pid} catches SIGURG, SIGWINCH, SIGCHLD and SIGCONT; none is left to report with")]
    NoSignal {
        /// The process.
        pid: i32,
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
    /// The thread ended or stopped in an unexpected way.
    #[error("thread {tid} stopped unexpectedly while it was asked for its state: {status:?}")]
    Lost {
        /// The thread.
        tid: i32,
        /// What waitpid said.
        status: WaitStatus,
    },
}

/// Where a process's vDSO is, and the padding behind its last section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vdso {
    /// First address of the mapping.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// First address of the padding, 64-byte aligned.
    pub padding: u64,
}

impl Vdso {
    /// Finds the padding by the ELF headers of the vDSO at `start..end` of the process.
    pub fn locate(pid: i32, memory: &ForeignMemory, start: u64, end: u64) -> Result<Self, VisitError> {
        let needed = arch::VISITOR.len();
        let mut image = vec![0; (end - start).min(1 << 20) as usize];
        memory.read(start, &mut image)?;
        let used = elf_extent(&image).ok_or(VisitError::NoRoom { pid, needed })?;
        let padding = (start + used as u64).next_multiple_of(64);
        if padding + needed as u64 > end {
            return Err(VisitError::NoRoom { pid, needed });
        }
        Ok(Self { start, end, padding })
    }

    fn stub_contains(&self, address: u64) -> bool {
        (self.padding..self.end).contains(&address)
    }
}

/// Bytes of an ELF-64 image that its headers, segments and sections cover.
pub fn elf_extent(image: &[u8]) -> Option<usize> {
    let half = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?) as usize);
    let word =
        |at: usize| Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?) as usize);
    if image.get(..4)? != b"\x7fELF" {
        return None;
    }
    let (segments, sections) = (word(32)?, word(40)?);
    let (segment_size, segment_count, section_size, section_count) =
        (half(54)?, half(56)?, half(58)?, half(60)?);
    let mut extent = 64;
    let mut cover = |offset: usize, length: usize| {
        extent = extent.max(offset.checked_add(length)?);
        Some(())
    };
    cover(segments, segment_size * segment_count)?;
    cover(sections, section_size * section_count)?;
    for index in 0..segment_count {
        let header = segments.checked_add(index * segment_size)?;
        cover(word(header.checked_add(8)?)?, word(header.checked_add(32)?)?)?;
    }
    for index in 0..section_count {
        let header = sections.checked_add(index * section_size)?;
        cover(word(header.checked_add(24)?)?, word(header.checked_add(32)?)?)?;
    }
    (extent <= image.len()).then_some(extent)
}

/// A signal that the process ignores by default and does not catch (`caught` is `SigCgt` of its status).
fn reporting_signal(pid: i32, caught: u64) -> Result<i32, VisitError> {
    [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD, libc::SIGCONT]
        .into_iter()
        .find(|signal| caught & (1 << (signal - 1)) == 0)
        .ok_or(VisitError::NoSignal { pid })
}

/// A thread that runs programs for us. Ends with [`Visit::end`]; dropped without it, the thread heals
/// itself as soon as it is resumed or detached.
#[derive(Debug)]
pub struct Visit {
    pid: i32,
    tid: i32,
    vdso: Vdso,
    signal: i32,
    original: Registers,
    mask: u64,
    scratch: u64,
    scratch_size: usize,
    fresh: bool,
    swallowed: Vec<i32>,
}

impl Visit {
    /// Begins a visit of the stopped thread `tid` of process `pid`, with scratch memory for programs of at
    /// most `room` bytes. `caught` are the signals that the process has handlers for.
    pub fn begin(
        pid: i32,
        tid: i32,
        vdso: Vdso,
        memory: &ForeignMemory,
        caught: u64,
        room: usize,
    ) -> Result<Self, VisitError> {
        let signal = reporting_signal(pid, caught)?;
        let original = ptrace::registers(tid)?;
        let mask = ptrace::signal_mask(tid)?;
        let scratch_size = room.next_multiple_of(SCRATCH_UNIT);
        let mut code = arch::VISITOR.to_vec();
        let data = arch::visitor_layout().data;
        code[data..].copy_from_slice(&data_area(&original, mask, [pid, tid, signal]));
        memory.write(vdso.padding, &code)?;
        let mut registers = original;
        registers.rip = vdso.padding;
        registers.orig_rax = u64::MAX;
        registers.rax = libc::SYS_mmap as u64;
        registers.rdi = 0;
        registers.rsi = scratch_size as u64;
        registers.rdx = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        registers.r10 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        registers.r8 = u64::MAX;
        registers.r9 = 0;
        registers.r13 = scratch_size as u64;
        // From here on the thread heals itself: first the registers, then the mask that the stub sets back.
        ptrace::set_registers(tid, &registers)?;
        ptrace::set_signal_mask(tid, !(1 << (signal - 1)))?;
        let mut visit = Self {
            pid,
            tid,
            vdso,
            signal,
            original,
            mask,
            scratch: 0,
            scratch_size,
            fresh: true,
            swallowed: Vec::new(),
        };
        visit.step()?;
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
        let rendered = program.render(self.scratch);
        let image = rendered.image();
        if image.len() > self.scratch_size {
            return Err(VisitError::NoRoom { pid: self.pid, needed: image.len() });
        }
        // The first op's header goes last: a half-written program is an END.
        memory::write(self.pid, self.scratch + 8, &image[8..])?;
        memory::write(self.pid, self.scratch, &image[..8])?;
        if !self.fresh {
            let mut registers = ptrace::registers(self.tid)?;
            registers.rip = self.vdso.padding + arch::visitor_layout().walk as u64;
            registers.rbx = self.scratch;
            registers.r14 = 0;
            registers.orig_rax = u64::MAX;
            ptrace::set_registers(self.tid, &registers)?;
        }
        self.fresh = false;
        self.step()?;
        let mut after = vec![0; image.len()];
        memory::read(self.pid, self.scratch, &mut after)?;
        Ok(rendered.outcome(after))
    }

    /// Ends the visit: the scratch is unmapped and the thread is stopped with its own registers and mask.
    /// Returns the registers as they are to be checkpointed.
    pub fn end(mut self) -> Result<Registers, VisitError> {
        if self.fresh {
            self.step()?;
        }
        self.step()?;
        self.leave()?;
        Ok(self.original)
    }

    fn leave(&mut self) -> Result<(), VisitError> {
        // The reverse of `begin`: registers last, so that a death in between still finds the stub in charge.
        ptrace::set_signal_mask(self.tid, self.mask)?;
        ptrace::set_registers(self.tid, &self.original)?;
        for signal in self.swallowed.drain(..) {
            limosa_kernel::task::signal_thread(self.pid, self.tid, signal)?;
        }
        Ok(())
    }

    /// Resumes the thread until it says S again.
    fn step(&mut self) -> Result<(), VisitError> {
        ptrace::resume(self.tid, 0)?;
        loop {
            match ptrace::wait_within(self.tid, PATIENCE)? {
                WaitStatus::Stopped { signal, event: 0 } if signal == self.signal && self.is_ours()? => {
                    return Ok(());
                }
                // SIGSTOP cannot be blocked; it is sent again when the visit is over.
                WaitStatus::Stopped { signal, event: 0 } => {
                    if signal != self.signal {
                        self.swallowed.push(signal);
                    }
                    ptrace::resume(self.tid, 0)?;
                }
                WaitStatus::Stopped { event: ptrace::EVENT_STOP, .. } => ptrace::resume(self.tid, 0)?,
                status => return Err(VisitError::Lost { tid: self.tid, status }),
            }
        }
    }

    /// Whether the signal the thread stopped for is the stub's own tgkill, not somebody else's signal.
    fn is_ours(&self) -> Result<bool, VisitError> {
        const SI_TKILL: i32 = -6;
        let info = ptrace::siginfo(self.tid)?;
        let code = i32::from_le_bytes([info[8], info[9], info[10], info[11]]);
        let rip = ptrace::registers(self.tid)?.rip;
        Ok(code == SI_TKILL && self.vdso.stub_contains(rip))
    }
}

/// The data area: what the stub loads when nobody is attached.
fn data_area(registers: &Registers, mask: u64, [pid, tid, signal]: [i32; 3]) -> Vec<u8> {
    let (rip, rax) = restarted(registers);
    let flags = flags_word(registers.eflags);
    let r = registers;
    let words = [
        rip, rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
        r.r15, mask, flags,
    ];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    for number in [pid, tid, signal, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
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
/// lets it leave. Returns stopped.
pub fn step_out_of_stub(tid: i32, vdso: &Vdso) -> Result<(), VisitError> {
    for _ in 0..1000 {
        if !vdso.stub_contains(ptrace::registers(tid)?.rip) {
            return Ok(());
        }
        ptrace::resume(tid, 0)?;
        std::thread::sleep(Duration::from_micros(50));
        ptrace::interrupt(tid)?;
        match ptrace::wait_within(tid, PATIENCE)? {
            // The stub's own reports to nobody: let them pass until the interrupt's stop comes.
            WaitStatus::Stopped { .. } => {}
            status => return Err(VisitError::Lost { tid, status }),
        }
    }
    Err(VisitError::Lost {
        tid,
        status: WaitStatus::Stopped { signal: libc::SIGTRAP, event: ptrace::EVENT_STOP },
    })
}
