//! Pages come back: a puppet reads its own from the file of the checkpoint, while Limosa checks what it reads.
//!
//! ```text
//!   puppet   preadv of batch 1 ──────► preadv of batch 2 ──────► …
//!   Limosa   checksums of batch 1 ───► checksums of batch 2 ───► …
//! ```
//!
//! (What is staged in memory has no checksums.)
//! So each page is copied once, from the page cache to where it belongs, and a second processor has the other half of
//! the work. Nothing that was read runs before all of it has been checked.

use std::os::fd::AsFd;

use limosa_image::{CHUNK, Checkpoint, Extent, SpaceId};
use limosa_puppet::{CallId, Outcome, Program};

use super::{Nursery, descriptors};
use crate::error::RestoreError;
use crate::pieces::{Piece, Pieces};
use crate::plan::NodeId;

/// Bytes of a batch: what was checked is still in a cache that the processors share when the puppet reads it.
const BATCH: u64 = 16 << 20;
/// Most parts of a batch, and of one preadv(2) (`UIO_MAXIOV`).
const MOST_PARTS: usize = 16 << 10;
const MOST_VECTORS: usize = 1024;

/// Pages that lie together, in the file and in the process.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    extent: &'a Extent,
    /// First address.
    start: u64,
    /// First address behind them.
    end: u64,
}

impl Part<'_> {
    /// Where it begins in the file. The index was checked when the checkpoint was opened.
    fn offset(self) -> u64 {
        self.extent.offset + (self.start - self.extent.start)
    }

    fn length(self) -> u64 {
        self.end - self.start
    }
}

/// All pages of `space`.
pub(super) fn whole(checkpoint: &Checkpoint, space: SpaceId) -> Vec<Part<'_>> {
    let whole = |extent| Part { extent, start: extent.start, end: extent.end() };
    checkpoint.extents(space).iter().map(whole).collect()
}

/// Those of the `wanted` pages that are stored.
pub(super) fn stored<'a>(checkpoint: &'a Checkpoint, wanted: &Pieces) -> Vec<Part<'a>> {
    wanted.by_space().flat_map(|(space, pieces)| parts_of(checkpoint.extents(space), pieces)).collect()
}

/// What of `pieces` lies in `extents`; both are sorted.
fn parts_of<'a>(extents: &'a [Extent], pieces: &[Piece]) -> impl Iterator<Item = Part<'a>> {
    pieces.iter().flat_map(move |piece| {
        let first = extents.partition_point(|extent| extent.end() <= piece.start);
        let (start, end) = (piece.start, piece.end);
        extents[first..].iter().take_while(move |extent| extent.start < end).map(move |extent| Part {
            extent,
            start: start.max(extent.start),
            end: end.min(extent.end()),
        })
    })
}

/// Has the puppet of `node` read `parts`, for which its mappings are writable. Returns bytes.
pub(super) fn load(
    nursery: &mut Nursery,
    node: NodeId,
    checkpoint: &Checkpoint,
    parts: &[Part],
) -> Result<u64, RestoreError> {
    let mut loaded = 0;
    let mut checker = Checker { checkpoint, buffer: Vec::new(), last: None };
    for batch in batches(parts, BATCH) {
        let reading = Reading::new(&batch, nursery.socket_number);
        descriptors::send(&nursery.socket, &[checkpoint.pages_fd().as_fd()])?;
        let (puppet, arena) = nursery.puppet(node);
        let running = puppet.start(arena, reading.program)?;
        let checked = batch.iter().try_for_each(|part| checker.check(*part));
        let outcome = puppet.finish(arena, running)?;
        checked?;
        loaded += complete(&reading.calls, &outcome)?;
    }
    Ok(loaded)
}

/// The programs that read `parts`.
pub(super) fn programs(parts: &[Part], socket_number: i32) -> impl Iterator<Item = Program> {
    batches(parts, BATCH).map(move |batch| Reading::new(&batch, socket_number).program)
}

/// Cuts parts into batches of `size` bytes.
fn batches<'a>(parts: &[Part<'a>], size: u64) -> impl Iterator<Item = Vec<Part<'a>>> {
    let mut parts = parts.iter().copied();
    let mut rest = None;
    std::iter::from_fn(move || {
        let (mut batch, mut room) = (Vec::new(), size);
        while let Some(part) = rest.take().or_else(|| parts.next()) {
            let now = Part { end: part.end.min(part.start + room), ..part };
            room -= now.length();
            batch.push(now);
            if now.end < part.end {
                rest = Some(Part { start: now.end, ..part });
            }
            if room == 0 || batch.len() == MOST_PARTS {
                break;
            }
        }
        (!batch.is_empty()).then_some(batch)
    })
}

/// A program that reads pages, and how many bytes each of its calls has to read.
struct Reading {
    program: Program,
    calls: Vec<(CallId, u64)>,
}

impl Reading {
    fn new(batch: &[Part], socket_number: i32) -> Self {
        let mut program = Program::new();
        // Nothing but the socket is open: it lands on the lowest number.
        descriptors::receive(&mut program, socket_number, 1);
        let follows = |a: &Part, b: &Part| a.offset() + a.length() == b.offset();
        let calls = batch
            .chunk_by(follows)
            .flat_map(|run| run.chunks(MOST_VECTORS))
            .map(|run| {
                let vectors: Vec<u64> = run.iter().flat_map(|part| [part.start, part.length()]).collect();
                let vectors = program.words(&vectors);
                let offset = run.first().map_or(0, |part| part.offset());
                let arguments = [0.into(), vectors.into(), run.len().into(), offset.into(), 0.into()];
                let call = program.call("read pages", libc::SYS_preadv, arguments);
                (call, run.iter().map(|part| part.length()).sum())
            })
            .collect();
        program.call("close the file of pages", libc::SYS_close, [0.into()]);
        Self { program, calls }
    }
}

/// How many bytes were read; an error unless it is all: a file may have become shorter, and a page have no place.
fn complete(calls: &[(CallId, u64)], outcome: &Outcome) -> Result<u64, RestoreError> {
    let mut total = 0;
    for (call, expected) in calls {
        let read = outcome.result(*call).unwrap_or(0);
        if read != *expected {
            let what = format!("of {expected} bytes of pages {read} could be read into their process");
            return Err(RestoreError::inconsistent(what));
        }
        total += read;
    }
    Ok(total)
}

/// Compares pages with their checksums, which are of whole chunks: each once for parts that follow each other.
struct Checker<'a> {
    checkpoint: &'a Checkpoint,
    buffer: Vec<u8>,
    /// Offset in the file of the chunk that was checked last.
    last: Option<u64>,
}

impl Checker<'_> {
    fn check(&mut self, part: Part) -> Result<(), RestoreError> {
        if !self.checkpoint.is_checked() {
            return Ok(());
        }
        let extent = part.extent;
        let first = (part.start - extent.start) / CHUNK * CHUNK;
        for chunk in (first..part.end - extent.start).step_by(CHUNK as usize) {
            let offset = Some(extent.offset + chunk);
            if self.last == offset {
                continue;
            }
            let end = (chunk + CHUNK).min(extent.length);
            self.buffer.resize((end - chunk) as usize, 0);
            self.checkpoint.read_pages(extent, chunk..end, &mut self.buffer)?;
            self.last = offset;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use limosa_image::{Meta, Sink, Staging};

    use super::*;

    const PAGE: u64 = 4096;
    const SPACE: SpaceId = SpaceId(1);

    /// A checkpoint with these numbers of pages of one space, each run followed in the file by `between` of another.
    fn checkpoint(runs: &[(u64, u64)], between: u64) -> Checkpoint {
        let mut staging = Staging::new().unwrap();
        for (number, (start, pages)) in runs.iter().enumerate() {
            staging.pages(SPACE, start * PAGE, &vec![1; (pages * PAGE) as usize]).unwrap();
            let other = (number as u64) << 30;
            staging.pages(SpaceId(2), other, &vec![2; (between * PAGE) as usize]).unwrap();
        }
        staging.into_checkpoint(Meta::new("test", Vec::new())).unwrap()
    }

    fn lengths(parts: &[Part]) -> Vec<u64> {
        parts.iter().map(|part| part.length() / PAGE).collect()
    }

    #[test]
    fn batches_hold_all_parts_and_no_more_than_they_may() {
        let checkpoint = checkpoint(&[(1, 3), (100, 12)], 0);
        let batches: Vec<_> = batches(&whole(&checkpoint, SPACE), 4 * PAGE).collect();
        let found: Vec<_> = batches.iter().map(|batch| lengths(batch)).collect();
        assert_eq!(found, [vec![3, 1], vec![4], vec![4], vec![3]]);
        let parts = batches.concat();
        assert!(parts.windows(2).all(|two| two[0].offset() + two[0].length() == two[1].offset()));
    }

    #[test]
    fn parts_that_follow_each_other_in_the_file_are_read_by_one_call() {
        let calls = |between| {
            let checkpoint = checkpoint(&[(1, 1), (8, 2), (32, 1)], between);
            Reading::new(&whole(&checkpoint, SPACE), 7)
                .calls
                .iter()
                .map(|(_, length)| length / PAGE)
                .collect::<Vec<_>>()
        };
        assert_eq!((calls(0), calls(1)), (vec![4], vec![1, 2, 1]));
    }

    #[test]
    fn pieces_are_cut_to_what_is_stored() {
        let checkpoint = checkpoint(&[(1, 2), (5, 1)], 0);
        let piece = |start: u64, end: u64| Piece { space: SPACE, start: start * PAGE, end: end * PAGE };
        let parts: Vec<_> = parts_of(checkpoint.extents(SPACE), &[piece(0, 2), piece(2, 9)]).collect();
        assert_eq!(lengths(&parts), [1, 1, 1]);
        assert_eq!(parts.iter().map(|part| part.offset() / PAGE).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
