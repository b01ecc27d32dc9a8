//! The content of private memory: copied out of frozen processes, put into puppets.
//!
//! One interface for how memory is captured (from the frozen process, or from its twin while it runs on) and how it comes
//! back (eagerly).

use limosa_image::{Checkpoint, Extent, Sink, SpaceId};
use limosa_kernel::memory::{self, ForeignMemory, Range};

use crate::error::{CaptureError, RestoreError};
use crate::pieces::{Piece, Pieces};
use crate::resources::mapping::MappingState;
use crate::sharing::{OwnRuns, Run};
use crate::state::{Body, Pages};

const PAGE: usize = 4096;
/// Larger buffers leave the processor's caches and are slower.
const BUFFER: usize = 256 * 1024;
static NOTHING: Pieces = Pieces::EMPTY;
/// Most ranges that are read by one call.
const MOST_RANGES: usize = 512;

/// Gives out spaces for page data.
#[derive(Debug, Default)]
pub struct SpaceAllocator(u32);

impl SpaceAllocator {
    /// A space that is not used yet.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> SpaceId {
        self.0 += 1;
        SpaceId(self.0)
    }
}

/// How pages are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As fast as can be: by process_vm_readv(2), where that does no harm.
    Direct,
    /// Never so that the process that is read gets a copy of its own of a page that it shares.
    Unshared,
}

/// Copies private pages of process `pid`, which stands still, into `sink`: those that `runs` gives for each mapping.
/// Returns bytes stored.
pub fn copy_out(
    pid: i32,
    mappings: &[MappingState],
    runs: &OwnRuns,
    space: SpaceId,
    sink: &mut dyn Sink,
    way: Way,
) -> Result<u64, CaptureError> {
    let (mut foreign, mut buffer, mut stored) = (None, vec![0; BUFFER], 0);
    for (mapping, runs) in mappings.iter().zip(runs) {
        let readable = mapping.protection & libc::PROT_READ as u32 != 0;
        let direct = |run: &Run| readable && !run.shared && way == Way::Direct;
        let zeros = |run: &Run| (mapping.starts_as_zeros() && !run.again).then_some(&NOTHING);
        let alike = |a: &Run, b: &Run| (direct(a), zeros(a).is_some()) == (direct(b), zeros(b).is_some());
        for runs in runs.chunk_by(alike) {
            let Some(first) = runs.first() else { continue };
            for group in groups(runs.iter().map(|run| (run.start, run.end))) {
                let bytes = &mut buffer[..length(&group)];
                if direct(first) {
                    memory::read_ranges(pid, &group, bytes)?;
                } else {
                    // process_vm_readv honours the protection, and unshares what it reads; /proc/PID/mem does neither.
                    let foreign = open(&mut foreign, pid)?;
                    let mut at = 0;
                    for range in &group {
                        let end = at + range.length as usize;
                        foreign.read(range.start, &mut bytes[at..end])?;
                        at = end;
                    }
                }
                for (start, bytes) in parts(&group, bytes) {
                    store(sink, space, start, bytes, zeros(first), &mut |piece| {
                        stored += piece.end - piece.start;
                    })?;
                }
            }
        }
    }
    Ok(stored)
}

/// Copies pages of a process that runs, from one mapping, into `sink`; those that it drops meanwhile are left out, and pages
/// of zeros as [`store`] does it. What is stored is returned.
pub fn copy_running(
    (pid, space): (i32, SpaceId),
    runs: &[(u64, u64)],
    readable: bool,
    zeros: Option<&Pieces>,
    sink: &mut dyn Sink,
) -> Result<Vec<Piece>, CaptureError> {
    let mut stored = Vec::new();
    if runs.is_empty() {
        return Ok(stored);
    }
    let (mut foreign, mut buffer) = (None, vec![0; BUFFER]);
    let mut note = |piece| stored.push(piece);
    for group in groups(runs.iter().copied()) {
        let bytes = &mut buffer[..length(&group)];
        if readable && memory::read_ranges(pid, &group, bytes).is_ok() {
            for (start, bytes) in parts(&group, bytes) {
                store(sink, space, start, bytes, zeros, &mut note)?;
            }
            continue;
        }
        // Something of it is gone, or not to be read by the process itself.
        let foreign = open(&mut foreign, pid)?;
        for range in &group {
            for start in (range.start..range.start + range.length).step_by(PAGE) {
                if foreign.read(start, &mut bytes[..PAGE]).is_ok() {
                    store(sink, space, start, &bytes[..PAGE], zeros, &mut note)?;
                }
            }
        }
    }
    Ok(stored)
}

/// The memory of `pid`, opened when it is first needed.
fn open(foreign: &mut Option<ForeignMemory>, pid: i32) -> Result<&ForeignMemory, CaptureError> {
    match foreign {
        Some(foreign) => Ok(foreign),
        none => Ok(none.insert(ForeignMemory::open(pid)?)),
    }
}

/// Cuts runs of pages into what is read at once: as much as fits a buffer, in as many ranges as the kernel takes.
fn groups(mut runs: impl Iterator<Item = (u64, u64)>) -> impl Iterator<Item = Vec<Range>> {
    let mut rest = None;
    std::iter::from_fn(move || {
        let (mut group, mut room) = (Vec::new(), BUFFER as u64);
        while room > 0 && group.len() < MOST_RANGES {
            let Some((start, end)) = rest.take().or_else(|| runs.next()) else { break };
            let length = (end - start).min(room);
            group.push(Range { start, length });
            room -= length;
            rest = (start + length < end).then_some((start + length, end));
        }
        (!group.is_empty()).then_some(group)
    })
}

/// Bytes in all ranges.
fn length(group: &[Range]) -> usize {
    group.iter().map(|range| range.length as usize).sum()
}

/// What was read of each range, one after the other.
fn parts<'a>(group: &'a [Range], mut bytes: &'a [u8]) -> impl Iterator<Item = (u64, &'a [u8])> {
    group.iter().map(move |range| {
        let (part, rest) = bytes.split_at(range.length as usize);
        bytes = rest;
        (range.start, part)
    })
}

/// Stores pages, and gives what was stored to `note`. With `zeros`, pages of zeros are left out that are not among those: they
/// need not be replaced, because nothing was stored in their places.
fn store(
    sink: &mut dyn Sink,
    space: SpaceId,
    start: u64,
    bytes: &[u8],
    zeros: Option<&Pieces>,
    note: &mut dyn FnMut(Piece),
) -> Result<(), CaptureError> {
    let address = |at: usize| start + at as u64;
    let mut put = |begin: usize, end: usize| -> Result<(), CaptureError> {
        if begin < end {
            sink.pages(space, address(begin), &bytes[begin..end])?;
            note(Piece { space, start: address(begin), end: address(end) });
        }
        Ok(())
    };
    let mut begin = 0;
    if let Some(replaced) = zeros {
        for (at, page) in (0..).step_by(PAGE).zip(bytes.chunks(PAGE)).filter(|(_, page)| is_zero(page)) {
            let end = at + page.len();
            if replaced.within(space, address(at), address(end)).next().is_none() {
                put(begin, at)?;
                begin = end;
            }
        }
    }
    put(begin, bytes.len())
}

/// Whether all bytes are zero; most pages that are not differ in their first words.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(128).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Whether any of `extents`, or of the pages that are `inherited`, lies in the mapping.
pub fn has_pages(extents: &[Extent], inherited: &[Piece], mapping: &MappingState) -> bool {
    let first = extents.partition_point(|extent| extent.end() <= mapping.start);
    let heir = inherited.partition_point(|piece| piece.end <= mapping.start);
    extents.get(first).is_some_and(|extent| extent.start < mapping.end())
        || inherited.get(heir).is_some_and(|piece| piece.start < mapping.end())
}

/// Whether pages are put into the mapping of `body` from outside.
pub fn fills(checkpoint: &Checkpoint, body: &Body, mapping: &MappingState) -> bool {
    let extents = checkpoint.extents(body.pages.own());
    let has_pages = has_pages(extents, body.pages.inherited(), mapping);
    mapping.is_private() && (has_pages || body.vdso.touches(mapping))
}

/// Gives what is stored of `range` of a process's memory to `use_bytes`, with the address of each part: what it inherits
/// first, and what is its own last. Checked, like everything read.
pub fn read_stored(
    checkpoint: &Checkpoint,
    pages: &Pages,
    (from, to): (u64, u64),
    mut use_bytes: impl FnMut(u64, &[u8]),
) -> Result<(), RestoreError> {
    let inherited = pages.inherited().iter().filter_map(|piece| piece.within(from, to));
    let own = Piece { space: pages.own(), start: from, end: to };
    let mut buffer = Vec::new();
    for piece in inherited.chain([own]) {
        let extents = checkpoint.extents(piece.space);
        let first = extents.partition_point(|extent| extent.end() <= piece.start);
        for extent in extents[first..].iter().take_while(|extent| extent.start < piece.end) {
            let (start, end) = (extent.start.max(piece.start), extent.end().min(piece.end));
            buffer.resize((end - start) as usize, 0);
            checkpoint.read_pages(extent, start - extent.start..end - extent.start, &mut buffer)?;
            use_bytes(start, &buffer);
        }
    }
    Ok(())
}

/// Which pages of `pieces` are stored: the others are what their mappings make of them.
pub fn stored(checkpoint: &Checkpoint, pieces: &Pieces) -> Pieces {
    let of_space = |(space, pieces): (SpaceId, &[Piece])| {
        let extents = checkpoint.extents(space).iter();
        let ranges: Vec<_> = extents.map(|extent| (extent.start, extent.end())).collect();
        let pieces: Pieces = pieces.iter().copied().collect();
        pieces.inside_of(&ranges)
    };
    pieces.by_space().flat_map(|group| of_space(group).iter().collect::<Vec<_>>()).collect()
}
