//! Pre-copy: memory is stored while the processes run, again and again what they wrote meanwhile, until little is left for
//! the freeze.
//!
//! ```text
//!   stopped ── visit: userfaultfd ─► watched ─┬─► take what was written, protect it again, store it ─┐
//!                                             └──────────────── a round ◄── much is left ────────────┤
//!   frozen ── what was written since, and what was never stored ◄──────────── little is left ────────┘
//!        └──► what was stored and is not there any more is forgotten
//! ```
//!
//! The kernel notes writes itself (`WP_ASYNC`): no process ever waits for Limosa, and when Limosa dies and its descriptors are
//! closed, nothing of it is left in them. The tree is stopped for a moment to begin with, because a mapping must be watched
//! as a whole. What cannot be watched counts as written: mappings and processes made since the last
//! round, another program after execve(2), and pages that are shared copy-on-write, which wait for the freeze, where it is
//! known with whom. Memory objects (`MAP_SHARED`) are stored while everything is frozen.
//!
//! A page that a device or another process writes to while it is pinned, without a fault, is not seen to be written: a
//! read(2) with `O_DIRECT` that lasts from before a round until after it is the case to know.

use std::time::{Duration, Instant};

use limosa_image::{Sink, SpaceId, Stage};
use limosa_kernel::pagemap::{Categories, Filter, PageRun, PagemapScanner};
use limosa_kernel::proc::{Mapping, MappingName, ProcDir, Prot};
use limosa_kernel::task;
use limosa_kernel::userfaultfd::{self, WriteWatch};
use limosa_puppet::Program;
use serde::Serialize;

use crate::error::CaptureError;
use crate::freeze::Frozen;
use crate::memory::{self, SpaceAllocator};
use crate::pieces::{Piece, Pieces};
use crate::preflight::{self, Member};
use crate::resources::vdso;
use crate::sharing::{OwnRuns, Run};
use crate::state::{Life, Process};
use crate::view::ProcessView;
use crate::visits::{run_inside_pausing, visit_stopped};

/// There are never more.
const MOST_ROUNDS: usize = 30;
/// Mappings that are new since are watched, too, if there is more in them.
const MUCH_NEW: u64 = 1 << 20;
/// The tree is stopped for that no more often than this.
const MOST_ARMS: usize = 3;
/// As much may always be left.
const LITTLE: u64 = 256 << 10;
/// A round that leaves more than this share of what the one before left gains too little to go on for.
const PROGRESS: (u64, u64) = (7, 8);
/// Of private anonymous memory no page belongs to a file, so that nobody needs to look.
const WRITTEN: Filter = Filter::OWN_WRITTEN.for_anonymous();
/// The end of what a process can map.
const ALL: std::ops::Range<u64> = 0..0x7fff_ffff_f000;

/// What a round did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Round {
    /// Bytes that it stored.
    pub bytes: u64,
    /// How long it took, in microseconds.
    pub duration_us: u64,
    /// Bytes that had been written again when it was over.
    pub left: u64,
}

/// A tree whose memory was stored but for what is being written. Dropped, nothing of it is left in the processes.
#[derive(Debug, Default)]
pub(crate) struct Precopy {
    watched: Vec<Watched>,
    spaces: SpaceAllocator,
}

#[derive(Debug)]
struct Watched {
    pid: i32,
    start_time: u64,
    space: SpaceId,
    watch: WriteWatch,
    /// What the sink has of it.
    given: Pieces,
    /// What of that has been taken note of as written since, and not been stored again: pages that were shared with a forked
    /// child then, or could not be read.
    stale: Pieces,
    /// Whether page frames can be seen: otherwise an empty page of a file's mapping could be taken for a modified one.
    sees_frames: bool,
}

/// Why there is no pre-copy.
pub(crate) enum Unavailable {
    /// The kernel, or Limosa's privileges, do not allow it.
    Missing(String),
    /// Something failed on the way.
    Failed(CaptureError),
}

impl<E: Into<CaptureError>> From<E> for Unavailable {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Precopy {
    /// Stores the memory of the tree rooted at `root`, which runs, until what is left can be stored in `goal`, or as long as
    /// that comes nearer. What each round did is added to `rounds`.
    pub(crate) fn run(
        root: i32,
        sink: &mut dyn Sink,
        goal: Duration,
        rounds: &mut Vec<Round>,
    ) -> Result<Self, Unavailable> {
        let mut precopy = Self::default();
        if !PagemapScanner::open(&ProcDir::open(root)?)?.has_scan() {
            return Err(Unavailable::Missing("this kernel has no PAGEMAP_SCAN (Linux 6.7)".into()));
        }
        precopy.watch(root)?;
        for arms in 1.. {
            loop {
                let left = rounds.last().map(|round| round.left);
                sink.stage(Stage::Round { number: rounds.len() as u32 + 1, left });
                let round = precopy.round(sink)?;
                rounds.push(round);
                tracing::debug!(?round, "pre-copy");
                if is_enough(rounds, goal) {
                    break;
                }
            }
            if arms == MOST_ARMS || rounds.len() >= MOST_ROUNDS || precopy.unwatched(root)? <= MUCH_NEW {
                break;
            }
            precopy.watch(root)?;
        }
        Ok(precopy)
    }

    /// Watches all mappings of all processes, as far as they can be. The tree stands still meanwhile.
    fn watch(&mut self, root: i32) -> Result<(), Unavailable> {
        let frozen = Frozen::stop(root)?;
        for process in frozen.processes.iter().filter(|process| !process.threads.is_empty()) {
            let start_time = process.proc.stat()?.start_time;
            let known = |one: &Watched| one.is(process.pid, start_time);
            let at = match self.watched.iter().position(known) {
                Some(at) => at,
                None => {
                    self.watched.push(Watched::begin(process.pid, start_time, &mut self.spaces)?);
                    self.watched.len() - 1
                }
            };
            self.watched[at].add(&process.proc)?;
        }
        Ok(frozen.release()?)
    }

    /// Bytes that no round has seen, because they are in mappings or processes that are new.
    fn unwatched(&self, root: i32) -> Result<u64, CaptureError> {
        let filter =
            Filter { none_of: Filter::OWN_DATA.none_of.union(Categories::WP_ALLOWED), ..Filter::OWN_DATA };
        let mut bytes = 0;
        for Member { proc, .. } in preflight::members(root)? {
            let mut runs = Vec::new();
            let scanned = PagemapScanner::open(&proc).and_then(|mut it| it.scan(ALL, &filter, &mut runs));
            unless_gone(scanned.map_err(Into::into), ())?;
            bytes += runs.iter().map(PageRun::len).sum::<u64>();
        }
        Ok(bytes)
    }

    fn round(&mut self, sink: &mut dyn Sink) -> Result<Round, CaptureError> {
        let (begun, mut round) = (Instant::now(), Round::default());
        let mut gone = Vec::new();
        for watched in &mut self.watched {
            match unless_gone(watched.round(sink).map(Some), None)? {
                Some(bytes) => round.bytes += bytes,
                None => gone.push(watched.space),
            }
        }
        // It is not known how much of them was stored before they ended, or their first threads did.
        for space in &gone {
            sink.forget(*space, ALL.start, ALL.end)?;
        }
        self.watched.retain(|watched| !gone.contains(&watched.space));
        round.duration_us = begun.elapsed().as_micros() as u64;
        for watched in &self.watched {
            round.left += unless_gone(watched.left(), 0)?;
        }
        Ok(round)
    }

    /// The space that the pages of a process are in, if any are.
    pub(crate) fn space_of(&self, view: &ProcessView) -> Option<SpaceId> {
        let it = self.watched.iter().find(|one| one.is(view.pid, view.stat.start_time));
        it.map(|watched| watched.space)
    }

    /// Where the spaces of everything else come from.
    pub(crate) fn spaces(&mut self) -> SpaceAllocator {
        std::mem::take(&mut self.spaces)
    }

    /// Of a frozen tree: takes what is stored, and as it was, out of `runs`, and what is not there any more out of the sink.
    pub(crate) fn settle(
        &mut self,
        views: &[ProcessView],
        processes: &[Process],
        runs: &mut [OwnRuns],
        sink: &mut dyn Sink,
    ) -> Result<(), CaptureError> {
        for watched in &mut self.watched {
            let alive = |life: &Life| matches!(life, Life::Alive(_));
            let is_it = |view: &ProcessView| watched.is(view.pid, view.stat.start_time);
            let place = views.iter().position(is_it).filter(|at| alive(&processes[*at].life));
            let gone = match place {
                Some(at) => watched.settle(&views[at], &mut runs[at])?,
                None => std::mem::take(&mut watched.given),
            };
            for piece in gone.iter() {
                sink.forget(piece.space, piece.start, piece.end - piece.start)?;
            }
        }
        Ok(())
    }
}

/// Whether another round would not pay.
fn is_enough(rounds: &[Round], goal: Duration) -> bool {
    let Some(last) = rounds.last() else { return false };
    // A round of a few pages says little about how fast they go.
    let telling =
        rounds.iter().rev().find(|round| round.bytes > 4 * LITTLE).or(rounds.first()).unwrap_or(last);
    let rate = telling.bytes.max(1) as f64 / telling.duration_us.max(1) as f64;
    let fits = last.left <= LITTLE || last.left as f64 / rate <= goal.as_micros() as f64;
    let stuck = match rounds {
        [.., before, last] => last.left.saturating_mul(PROGRESS.1) > before.left.saturating_mul(PROGRESS.0),
        _ => false,
    };
    fits || stuck || rounds.len() >= MOST_ROUNDS
}

impl Watched {
    /// Has a frozen process make a userfaultfd, which is taken from it in the moment before it closes it again.
    fn begin(pid: i32, start_time: u64, spaces: &mut SpaceAllocator) -> Result<Self, Unavailable> {
        let mut program = Program::new();
        let made = program.call("make a userfaultfd", libc::SYS_userfaultfd, [userfaultfd::FLAGS.into()]);
        program.call("close it", libc::SYS_close, [made.into()]);
        let pidfd = task::pidfd_open(pid)?;
        let mut taken = None;
        let outcome = visit_stopped(pid, |view| {
            let mut take = |number| taken = Some(task::pidfd_getfd(&pidfd, number as i32));
            run_inside_pausing(view, program, libc::SYS_close, &mut take)
        })?;
        let taken = match (taken, outcome.result(made)) {
            (Some(taken), _) => taken?,
            (None, Err(error)) => return Err(Unavailable::Missing(format!("process {pid}: {error}"))),
            (None, Ok(_)) => return Err(CaptureError::Ended { pid }.into()),
        };
        let watch = WriteWatch::begin(taken).map_err(|error| match error.errno() {
            Some(libc::EINVAL) => {
                Unavailable::Missing("this kernel's userfaultfd has no WP_ASYNC (Linux 6.7)".into())
            }
            _ => error.into(),
        })?;
        let sees_frames = limosa_kernel::pagemap::sees_frames();
        Ok(Self {
            pid,
            start_time,
            space: spaces.next(),
            watch,
            given: Pieces::EMPTY,
            stale: Pieces::EMPTY,
            sees_frames,
        })
    }

    /// Whether this is it: numbers are used again.
    fn is(&self, pid: i32, start_time: u64) -> bool {
        self.pid == pid && self.start_time == start_time
    }

    /// The process, if it is still the same.
    fn open(&self) -> Result<ProcDir, CaptureError> {
        let proc = ProcDir::open(self.pid)?;
        if self.is(self.pid, proc.stat()?.start_time) {
            Ok(proc)
        } else {
            Err(CaptureError::Ended { pid: self.pid })
        }
    }

    /// Watches all mappings that can be, of a process that stands still.
    fn add(&mut self, proc: &ProcDir) -> Result<(), CaptureError> {
        for mapping in proc.maps()?.iter().filter(|mapping| self.can_watch(mapping)) {
            if let Err(error) = self.watch.add(mapping.start..mapping.end) {
                tracing::debug!(pid = self.pid, start = mapping.start, %error, "not watched");
            }
        }
        Ok(())
    }

    /// Stores what was written since the last round. Bytes stored.
    fn round(&mut self, sink: &mut dyn Sink) -> Result<u64, CaptureError> {
        let proc = self.open()?;
        let mut scanner = PagemapScanner::open(&proc)?;
        let (mut taken, mut copied): (Vec<Piece>, Vec<Piece>) = Default::default();
        for mapping in proc.maps()?.iter().filter(|mapping| self.can_watch(mapping)) {
            let range = mapping.start..mapping.end;
            let filter = if mapping.inode == 0 { WRITTEN } else { Filter::OWN_WRITTEN };
            let mut written = Vec::new();
            scanner.take_written(range, &filter, &mut written)?;
            let piece = |run: &PageRun| Piece { space: self.space, start: run.start, end: run.end };
            taken.extend(written.iter().map(piece));
            let mut runs = Vec::with_capacity(written.len());
            for run in &written {
                runs.extend(alone(&scanner, run)?);
            }
            let zeros = (mapping.inode == 0).then_some(&self.given);
            let readable = mapping.prot.contains(Prot::READ);
            copied.extend(memory::copy_running((self.pid, self.space), &runs, readable, zeros, sink)?);
        }
        let stored = copied.iter().map(|piece| piece.end - piece.start).sum();
        let copied: Pieces = copied.into_iter().collect();
        let stale: Pieces = self.stale.iter().chain(taken).collect();
        self.given = self.given.iter().chain(copied.iter()).collect();
        self.stale = stale.without(&copied).and(&self.given);
        Ok(stored)
    }

    fn can_watch(&self, mapping: &Mapping) -> bool {
        !mapping.shared
            && mapping.name != MappingName::Vsyscall
            && !vdso::is_part(mapping)
            && (mapping.inode == 0 || self.sees_frames)
    }

    /// Bytes that were written since the last round.
    fn left(&self) -> Result<u64, CaptureError> {
        let mut scanner = PagemapScanner::open(&self.open()?)?;
        let mut runs = Vec::new();
        let written = Filter::OWN_WRITTEN;
        let watched = Filter { all_of: written.all_of.union(Filter::OWN_CLEAN.all_of), ..written };
        scanner.scan(ALL, &watched, &mut runs)?;
        Ok(runs.iter().map(PageRun::len).sum())
    }

    /// Takes what is stored and clean out of `own`; what is stored and not in it any more is returned.
    fn settle(&mut self, view: &ProcessView, own: &mut OwnRuns) -> Result<Pieces, CaptureError> {
        let mut runs = Vec::new();
        PagemapScanner::open(view.proc)?.scan(ALL, &Filter::OWN_CLEAN.for_anonymous(), &mut runs)?;
        let pieces = |start, end| Piece { space: self.space, start, end };
        let clean: Pieces = runs.iter().map(|run| pieces(run.start, run.end)).collect();
        let there: Pieces = own.iter().flatten().map(|run| pieces(run.start, run.end)).collect();
        let gone = self.given.without(&there);
        let good = self.given.without(&self.stale).and(&clean);
        let changed = there.without(&good);
        let again = changed.and(&self.given);
        let first = changed.without(&self.given);
        for mapping in own {
            *mapping = mapping.iter().flat_map(|run| parts(*run, self.space, &first, &again)).collect();
        }
        Ok(gone)
    }
}

/// The parts of a run that are stored for the first time, or again.
fn parts(run: Run, space: SpaceId, first: &Pieces, again: &Pieces) -> Vec<Run> {
    let cut = |pieces: &Pieces, again: bool| {
        let within = pieces.within(space, run.start, run.end);
        within.map(|piece| Run { start: piece.start, end: piece.end, again, ..run }).collect::<Vec<_>>()
    };
    let mut parts = cut(first, false);
    parts.extend(cut(again, true));
    parts.sort_unstable_by_key(|run| run.start);
    parts
}

/// The parts of a run that are the process's alone.
fn alone(scanner: &PagemapScanner, run: &PageRun) -> Result<Vec<(u64, u64)>, CaptureError> {
    const PAGE: u64 = 4096;
    let (mut parts, mut start) = (Vec::new(), run.start);
    scanner.maybe_shared(run, |address, _| {
        if start < address {
            parts.push((start, address));
        }
        start = address + PAGE;
    })?;
    if start < run.end {
        parts.push((start, run.end));
    }
    Ok(parts)
}

/// `otherwise`, if the process has ended meanwhile.
fn unless_gone<T>(outcome: Result<T, CaptureError>, otherwise: T) -> Result<T, CaptureError> {
    match outcome {
        Err(CaptureError::Ended { .. }) => Ok(otherwise),
        Err(CaptureError::Kernel(error)) if error.is_gone() => Ok(otherwise),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn round(bytes: u64, milliseconds: u64, left: u64) -> Round {
        Round { bytes, duration_us: milliseconds * 1000, left }
    }

    #[test]
    fn rounds_go_on_while_that_pays() {
        let goal = Duration::from_millis(10);
        assert!(!is_enough(&[], goal));
        assert!(is_enough(&[round(1024 * MIB, 1000, 100 << 10)], goal), "next to nothing is left");
        assert!(is_enough(&[round(1024 * MIB, 1024, 9 * MIB)], goal), "9 MiB take 9 ms");
        assert!(!is_enough(&[round(1024 * MIB, 1024, 90 * MIB)], goal));
        let shrinking = [round(1024 * MIB, 1024, 90 * MIB), round(90 * MIB, 90, 30 * MIB)];
        assert!(!is_enough(&shrinking, goal));
        let stuck = [round(1024 * MIB, 1024, 90 * MIB), round(90 * MIB, 90, 85 * MIB)];
        assert!(is_enough(&stuck, goal), "it writes as fast as it is stored");
        assert!(is_enough(&[round(100 * MIB, 1, 90 * MIB); MOST_ROUNDS], Duration::ZERO));
    }

    #[test]
    fn a_run_is_cut_into_what_is_new_and_what_changed() {
        let pieces = |ranges: &[(u64, u64)]| -> Pieces {
            ranges.iter().map(|(start, end)| Piece { space: SpaceId(1), start: *start, end: *end }).collect()
        };
        let run = Run { start: 10, end: 30, shared: true, again: false };
        let found = parts(run, SpaceId(1), &pieces(&[(0, 12), (20, 22)]), &pieces(&[(14, 16), (28, 90)]));
        let found: Vec<_> = found.iter().map(|run| (run.start, run.end, run.again, run.shared)).collect();
        assert_eq!(
            found,
            [(10, 12, false, true), (14, 16, true, true), (20, 22, false, true), (28, 30, true, true)]
        );
    }
}
