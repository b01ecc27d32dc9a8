//! Twins: copies that frozen processes make of themselves by fork, so that they need not wait until their memory is stored.
//!
//! ```text
//!   process, frozen ─ visit: clone3 ─► twin: close_range, prctl(PR_SET_NAME), exit_group ─► stopped on its way out
//!        │ thaws                                                      (PTRACE_EVENT_EXIT: its memory is all there)
//!        │ runs, and copies each page that it writes to                       │ its pages are stored
//!        └ visited once more: wait4 ◄──────────────────────────────────────── ends
//! ```
//!
//! It has no descriptors, so that what the source closes is closed. Its exit signal is 0: without `__WALL` the source's own
//! wait(2) does not see it. If Limosa dies, the kernel detaches the twin, which then ends. What it leaves is a zombie that
//! only its parent can reap: `limosa guard` has it reaped, or the next checkpoint.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use limosa_image::{Sink, SpaceId};
use limosa_kernel::memory::ForeignMemory;
use limosa_kernel::proc::{ProcDir, Stat, TaskState};
use limosa_kernel::ptrace::{self, Options, WaitStatus};
use limosa_puppet::{Program, ProgramError, Visit};

use crate::checkpoint::reap_inside;
use crate::error::CaptureError;
use crate::freeze::Frozen;
use crate::memory::{self, Way};
use crate::memory_mode::MemoryMode;
use crate::memory_room;
use crate::precopy::Precopy;
use crate::preflight;
use crate::report::Report;
use crate::resources::mapping::MappingState;
use crate::sharing::OwnRuns;
use crate::state::{Life, Process};
use crate::view::ProcessView;
use crate::visits::{locate_vdso, visit_running};

/// Its name in `/proc/PID/stat`.
const NAME: &str = "limosa-twin";
/// Longest wait for a twin to come to its stop, or to end, which takes as long as giving back its memory.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest time that a twin may take, after Limosa's death, to take its name.
const NAMELESS: Duration = Duration::from_millis(300);
const PAUSE: Duration = Duration::from_micros(200);

/// Whether a process is a twin, or what is left of one.
pub(crate) fn is_twin(stat: &Stat) -> bool {
    stat.exit_signal == 0 && stat.comm.as_slice() == NAME.as_bytes()
}

/// A twin. Dropped, it ends and is reaped.
#[derive(Debug)]
struct Twin {
    pid: i32,
    /// As its parent calls it.
    own_pid: i32,
    parent: i32,
    state: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// On its way to its stop.
    Leaving,
    /// Stopped, with all its memory.
    Parked,
    /// Its memory is being given back.
    Ending,
}

impl Twin {
    /// Has a frozen process fork. The inner error is the kernel's refusal, with which the process goes on as before.
    fn fork(view: &ProcessView) -> Result<Result<Self, io::Error>, CaptureError> {
        let mut child = Program::new();
        let name = child.string(NAME.as_bytes());
        child.try_call("close all descriptors", libc::SYS_close_range, [0.into(), u32::MAX.into(), 0.into()]);
        child.try_call("take a name", libc::SYS_prctl, [libc::PR_SET_NAME.into(), name.into()]);
        // A filter that forbids one of these would forbid it once Limosa is dead; the child must end in any case.
        for number in [libc::SYS_exit_group, libc::SYS_exit] {
            child.try_call("end", number, [0.into()]);
        }
        let mut program = Program::new();
        // struct clone_args: no flags, exit signal 0.
        let arguments = program.words(&[0; 8]);
        let call = program.fork("fork a twin", arguments, 64, child);
        let foreign = ForeignMemory::open(view.pid)?;
        let vdso = locate_vdso(view, &foreign)?;
        trace(view.pid, Options::TRACE_CLONE)?;
        let caught = view.status.signals.caught;
        let mut visit = Visit::begin(view.pid, view.pid, vdso, &foreign, caught, program.size())?;
        let outcome = visit.run(program);
        let born = visit.born().first().map(|pid| Self::begin(*pid, view.pid)).transpose();
        let (outcome, born) = (outcome?, born?);
        visit.end()?;
        trace(view.pid, Options::empty())?;
        match (outcome.result(call), born) {
            (Ok(_), Some(twin)) => Ok(Ok(twin)),
            (Err(ProgramError::Call { source, .. }), _) => Ok(Err(source)),
            (Err(source), _) => Err(CaptureError::Question { pid: view.pid, source }),
            (Ok(_), None) => Err(CaptureError::Ended { pid: view.pid }),
        }
    }

    /// A child that has just been born, and is about to stop before its first instruction: it is to stop at its last one.
    fn begin(pid: i32, parent: i32) -> Result<Self, CaptureError> {
        match ptrace::wait_within(pid, PATIENCE)? {
            WaitStatus::Stopped { .. } => {}
            WaitStatus::Exited(_) | WaitStatus::Killed(_) => return Err(CaptureError::Ended { pid }),
        }
        let proc = ProcDir::open(pid)?;
        let own_pid = proc.status()?.own_pid();
        // What the source writes from now on costs its control group as much again. If that is too much, the kernel is to take
        // it from the twin and not to end the source.
        if let Err(error) = proc.end_first_when_memory_is_short() {
            tracing::debug!(twin = pid, parent, %error, "where memory is short, the source may be ended instead of its twin");
        }
        let twin = Self { pid, own_pid, parent, state: Stage::Leaving };
        trace(pid, Options::TRACE_EXIT)?;
        ptrace::resume(pid, 0)?;
        Ok(twin)
    }

    /// Waits until it stands still.
    fn park(&mut self) -> Result<(), CaptureError> {
        while self.state == Stage::Leaving {
            match ptrace::wait_within(self.pid, PATIENCE)? {
                WaitStatus::Stopped { event: ptrace::EVENT_EXIT, .. } => self.state = Stage::Parked,
                WaitStatus::Stopped { .. } => ptrace::resume(self.pid, 0)?,
                WaitStatus::Exited(_) | WaitStatus::Killed(_) => {
                    return Err(CaptureError::Ended { pid: self.pid });
                }
            }
        }
        Ok(())
    }

    /// Lets it go: it gives its memory back.
    fn leave(&mut self) -> Result<(), CaptureError> {
        self.park()?;
        if self.state == Stage::Parked {
            ptrace::resume(self.pid, 0)?;
            self.state = Stage::Ending;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), CaptureError> {
        self.leave()?;
        let begun = Instant::now();
        while let WaitStatus::Stopped { .. } = ptrace::wait_within(self.pid, PATIENCE)? {
            if begun.elapsed() > PATIENCE {
                return Ok(());
            }
            ptrace::resume(self.pid, 0)?;
        }
        reap(self.parent, &[self.own_pid])
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::debug!(twin = self.pid, parent = self.parent, %error, "a twin is left to be reaped");
        }
    }
}

/// Has a thread that is attached tell of `events`; otherwise it stays attached as [`seize`] does it.
fn trace(tid: i32, events: Options) -> Result<(), CaptureError> {
    let options = Options::TRACE_SYSGOOD | events;
    Ok(ptrace::set_options(tid, options | Options::SUSPEND_SECCOMP)
        .or_else(|_| ptrace::set_options(tid, options))?)
}

/// Has a running process reap `children`, twins that have ended: its first thread stops for a moment, and is in no stub of a
/// killed checkpoint afterwards.
fn reap(parent: i32, children: &[i32]) -> Result<(), CaptureError> {
    // If it has ended, they have another parent, which reaps whoever comes to it.
    let reaped =
        visit_running(parent, |view| if children.is_empty() { Ok(()) } else { reap_inside(view, children) });
    reaped.map(drop)
}

/// Memory that is still to be stored, while the tree runs on. Dropped, nothing of it is left in the tree.
#[derive(Debug, Default)]
pub struct Remainder {
    parts: Vec<Part>,
    /// Why processes could not fork, so that their memory was stored while they were frozen.
    refused: Option<(i32, io::Error)>,
    /// What is watched, to be let go when the tree runs.
    precopy: Precopy,
}

#[derive(Debug)]
struct Part {
    twin: Twin,
    /// Its place in the tree.
    process: usize,
    mappings: Vec<MappingState>,
    runs: OwnRuns,
    space: SpaceId,
}

/// Has every process of a frozen tree fork that has memory which a child inherits; takes what their twins have out of `runs`.
pub(crate) fn fork_all(
    views: &[ProcessView],
    processes: &[Process],
    runs: &mut [OwnRuns],
) -> Result<Remainder, CaptureError> {
    let mut remainder = Remainder::default();
    for (index, ((view, process), runs)) in views.iter().zip(processes).zip(runs).enumerate() {
        let Life::Alive(body) = &process.life else { continue };
        let inherits = |mapping: &MappingState| {
            let excepted = [libc::MADV_DONTFORK, libc::MADV_WIPEONFORK];
            !mapping.advice.iter().any(|advice| excepted.contains(advice))
        };
        if !body.mappings.iter().zip(&*runs).any(|(mapping, runs)| inherits(mapping) && !runs.is_empty()) {
            continue;
        }
        let fork = match lacks_room(view.proc)? {
            Some(error) => Err(error),
            None => Twin::fork(view)?,
        };
        match fork {
            Ok(twin) => {
                let take = |(mapping, runs): (_, &mut Vec<_>)| {
                    if inherits(mapping) { std::mem::take(runs) } else { Vec::new() }
                };
                let inherited = body.mappings.iter().zip(runs.iter_mut()).map(take).collect();
                let space = body.pages.own();
                remainder.parts.push(Part {
                    twin,
                    process: index,
                    mappings: Vec::new(),
                    runs: inherited,
                    space,
                });
            }
            Err(error) => remainder.refused = Some((view.own_pid, error)),
        }
    }
    Ok(remainder)
}

/// Why a process is not to fork, if its control group has too little memory left for it.
fn lacks_room(process: &ProcDir) -> Result<Option<io::Error>, CaptureError> {
    /// What a fork takes beside page tables: stacks and structures of the kernel, the first pages that are written.
    const FORK: u64 = 1 << 20;
    /// A fork needs at most one byte of page tables and descriptions of mappings for so many of memory.
    const MEMORY_PER_TABLES: u64 = 128;
    const PAGE: u64 = 4096;
    let resident = u64::try_from(process.stat()?.resident).unwrap_or(0).saturating_mul(PAGE);
    let needed = FORK + resident / MEMORY_PER_TABLES;
    Ok(memory_room::left(process).filter(|left| *left < needed).map(|left| {
        io::Error::other(format!(
            "its control group has {} KiB of memory left, a fork may take {}",
            left >> 10,
            needed >> 10
        ))
    }))
}

impl Remainder {
    /// Whether there is nothing left to be stored.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Keeps what is watched until it is dropped.
    pub(crate) fn keep(&mut self, precopy: Precopy) {
        self.precopy = precopy;
    }

    /// What has become of `plan`.
    pub(crate) fn explain(&self, plan: &MemoryMode) -> MemoryMode {
        let mut explained = plan.clone();
        if let Some((pid, error)) = &self.refused {
            let reason = &plan.reason;
            explained.reason = format!(
                "{reason}; but process {pid} could not fork ({error}): its memory was stored while it was frozen"
            );
        }
        explained
    }

    /// Takes what it needs to know of the mappings, when nobody else needs it any more.
    pub(crate) fn take_mappings(&mut self, processes: &mut [Process]) {
        for part in &mut self.parts {
            if let Some(Life::Alive(body)) = processes.get_mut(part.process).map(|process| &mut process.life)
            {
                part.mappings = std::mem::take(&mut body.mappings);
            }
        }
    }

    /// Stores it.
    pub fn copy_out(&mut self, sink: &mut dyn Sink, report: &mut Report) -> Result<(), CaptureError> {
        if self.is_empty() {
            return Ok(());
        }
        report.phase("twins", |report| {
            for part in &mut self.parts {
                let parent = part.twin.parent;
                let of_twin = |error| match error {
                    CaptureError::Write(_) => error,
                    source => CaptureError::Twin { pid: parent, source: Box::new(source) },
                };
                part.twin.park().map_err(of_twin)?;
                let (pid, way) = (part.twin.pid, Way::Unshared);
                report.page_bytes += memory::copy_out(pid, &part.mappings, &part.runs, part.space, sink, way)
                    .map_err(of_twin)?;
                part.twin.leave()?;
            }
            Ok(())
        })
    }
}

/// Has frozen processes reap what killed checkpoints have left with them.
pub(crate) fn reap_leftovers(frozen: &Frozen, views: &[ProcessView]) -> Result<(), CaptureError> {
    for (parent, child) in &frozen.leftovers {
        if let Some(view) = views.iter().find(|view| view.pid == *parent) {
            reap_inside(view, &[*child])?;
        }
    }
    Ok(())
}

/// Has the running processes of the tree rooted at `root` reap the twins of a checkpoint that was killed, and waits for
/// those that are on their way out.
pub fn sweep(root: i32) -> Result<(), CaptureError> {
    let begun = Instant::now();
    // One that was about to fork when Limosa died will still do it, unless it is known to have left the stub.
    let mut out_of_stub = HashSet::new();
    loop {
        let (mut waiting, mut failed) = (false, None);
        // Twins that have ended, by the parents that may have some.
        let mut ended: HashMap<i32, Vec<i32>> = HashMap::new();
        for member in preflight::members(root).or_else(|error| if_gone(error, Vec::new()))? {
            let looked = member.proc.stat().and_then(|stat| Ok(Some((stat, member.proc.status()?))));
            let Some((stat, status)) =
                looked.map_err(CaptureError::from).or_else(|error| if_gone(error, None))?
            else {
                continue;
            };
            match (is_twin(&stat), status.state) {
                (true, TaskState::Zombie) => ended.entry(member.parent).or_default().push(status.own_pid()),
                (true, _) => waiting = true,
                (false, TaskState::Zombie) => {}
                (false, _) => {
                    // Perhaps one that has not got its name yet: before, it has nothing to do but to take it.
                    waiting |= stat.exit_signal == 0 && member.pid != root && begun.elapsed() < NAMELESS;
                    ended.entry(member.pid).or_default();
                }
            }
        }
        for (parent, children) in ended {
            if !children.is_empty() || !out_of_stub.contains(&parent) {
                // The killed checkpoint may still be tracing them, or the parent: its files are closed before its tracees are
                // let go. So this is over only when there is no twin left to be seen.
                waiting = true;
                match reap(parent, &children) {
                    Ok(()) => drop(out_of_stub.insert(parent)),
                    Err(error) => failed = Some(error),
                }
            }
        }
        if !waiting || begun.elapsed() > PATIENCE {
            return failed.map_or(Ok(()), Err);
        }
        std::thread::sleep(PAUSE);
    }
}

/// `otherwise`, if what was looked at has ended meanwhile.
fn if_gone<T>(error: CaptureError, otherwise: T) -> Result<T, CaptureError> {
    match error {
        CaptureError::Kernel(error) if error.is_gone() => Ok(otherwise),
        error => Err(error),
    }
}
