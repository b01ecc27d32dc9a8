//! Threads that were stopped inside the vDSO go on until they are out of it.
//!
//! On another kernel the vDSO is another one, and its predecessor's code without its data is of no use to a thread in
//! the middle of it. The next instruction of its own is less than a microsecond away, but a single step is no way to
//! get there: a thread whose tracer is killed while it steps is killed by `SIGTRAP` (40 of 40 on Linux 6.18). So the
//! thread runs on for a moment and is interrupted again, as if it had been stopped later.
//!
//! One that is never found outside (or that job control has stopped inside) stays: its checkpoint is good on kernels
//! with the same vDSO, and others refuse it.

use std::ops::Range;
use std::time::{Duration, Instant};

use limosa_kernel::proc::MappingName;
use limosa_kernel::{memory, ptrace};

use super::{Frozen, FrozenProcess, settle, stop_threads};
use crate::error::CaptureError;
use crate::resources::vdso;

/// How often each thread is looked at, and for how long: a thread that does nothing but ask for the time is found
/// outside one time in five, and on a busy machine a wake-up takes milliseconds.
const ROUNDS: usize = 50;
const PATIENCE: Duration = Duration::from_millis(50);
/// How long all of it may take at most.
const LONGEST: Duration = Duration::from_millis(500);
/// How long one runs on: the wake-up takes about as long as this.
const MOMENT: Duration = Duration::from_micros(50);

impl Frozen {
    /// Lets threads leave the vDSO. What they start meanwhile is stopped like everything else.
    pub(super) fn clear_vdso(&mut self) -> Result<(), CaptureError> {
        let started = Instant::now();
        for round in 1.. {
            let mut ran = false;
            for process in &mut self.processes {
                let inside = inside(process)?;
                for tid in &inside {
                    run_on(process, *tid)?;
                }
                if !inside.is_empty() {
                    ran = true;
                    stop_threads(&mut self.seized, process)?;
                }
            }
            if !ran {
                return Ok(());
            }
            self.gather()?;
            let taken = started.elapsed();
            if (round >= ROUNDS && taken > PATIENCE) || taken > LONGEST {
                tracing::debug!(round, ?taken, "threads stay inside the vDSO");
                break;
            }
        }
        Ok(())
    }
}

fn run_on(process: &mut FrozenProcess, tid: i32) -> Result<(), CaptureError> {
    match ptrace::resume(tid, 0) {
        // Ended by another that ran on just now (execve(2), exit_group(2)).
        Err(error) if error.is_gone() => return Ok(()),
        outcome => outcome?,
    }
    std::thread::sleep(MOMENT);
    match ptrace::interrupt(tid) {
        Err(error) if error.is_gone() => {}
        outcome => outcome?,
    }
    if let Some(stop) = settle(tid)? {
        process.job_stopped = process.job_stopped.or(stop.job_control());
    }
    Ok(())
}

/// Threads of the process that stand in its vDSO.
fn inside(process: &FrozenProcess) -> Result<Vec<i32>, CaptureError> {
    if process.job_stopped.is_some() {
        return Ok(Vec::new());
    }
    let mut threads = Vec::new();
    let mut ranges = None;
    for tid in &process.threads {
        let registers = match ptrace::registers(*tid) {
            Err(error) if error.is_gone() => continue,
            outcome => outcome?,
        };
        // A thread that sleeps in a system call is somewhere else: no call that a vDSO makes sleeps for long.
        if (registers.orig_rax as i64) < 0 || is_made_by_vdso(registers.orig_rax as i64) {
            if ranges.is_none() {
                ranges = Some(code(process)?);
            }
            if ranges.iter().flatten().any(|range| range.contains(&registers.rip)) {
                threads.push(*tid);
            }
        }
    }
    Ok(threads)
}

/// System calls that a vDSO makes where it cannot answer itself.
fn is_made_by_vdso(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_clock_gettime
            | libc::SYS_clock_getres
            | libc::SYS_gettimeofday
            | libc::SYS_time
            | libc::SYS_getcpu
            | libc::SYS_getrandom
    )
}

/// Where the process has code of a vDSO: the kernel's, and that of an earlier kernel which leads there.
fn code(process: &FrozenProcess) -> Result<Vec<Range<u64>>, CaptureError> {
    let auxv = process.proc.auxv()?;
    let start = auxv.iter().find(|(kind, _)| *kind == vdso::AT_SYSINFO_EHDR).map_or(0, |(_, start)| *start);
    if let Some(own) = vdso::own()? {
        let mut image = vec![0; own.state.image.len()];
        if memory::read(process.pid, start, &mut image).is_ok() && image == own.state.image {
            return Ok(std::iter::once(start..start.saturating_add(own.state.length)).collect());
        }
    }
    let maps = process.proc.maps()?;
    let is_code = |mapping: &limosa_kernel::proc::Mapping| {
        mapping.name == MappingName::Vdso || (mapping.start..mapping.end).contains(&start)
    };
    Ok(maps.iter().filter(|mapping| is_code(mapping)).map(|mapping| mapping.start..mapping.end).collect())
}
