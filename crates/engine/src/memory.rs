//! The content of private memory: copied out of frozen processes, put into puppets.
//!
//! One interface for how memory is captured (from the frozen process, or from its twin while it runs on) and how it comes
//! back (eagerly).

use limosa_image::{Checkpoint, Extent, Sink, SpaceId};
use limosa_kernel::memory::{self, ForeignMemory, Range};

use crate::error::{CaptureError, RestoreError};
use crate::pieces::{Piece, Pieces};
use crate::resources::mapping::MappingState;
use crate::sharing::OwnRuns;
use crate::state::{Body, Pages};

const PAGE: usize = 4096;
/// Larger buffers leave the processor's caches and are slower.
const BUFFER: usize = 256 * 1024;
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
    let mut foreign = None;
    let mut copier = Copier { pid, space, sink, buffer: vec![0; BUFFER], ranges: Vec::new(), stored: 0 };
    for (mapping, runs) in mappings.iter().zip(runs) {
        let readable = mapping.protection & libc::PROT_READ as u32 != 0;
        let mut skipped_zeros = false;
        for run in runs {
            let length = run.length();
            let skip_zeros = mapping.starts_as_zeros() && !run.again;
            if skip_zeros != skipped_zeros {
                copier.flush(skipped_zeros)?;
                skipped_zeros = skip_zeros;
            }
            if readable && !run.shared && way == Way::Direct {
                copier.add(run.start, length, skip_zeros)?;
            } else {
                // process_vm_readv honours the protection, and unshares what it reads; /proc/PID/mem does neither.
                if foreign.is_none() {
                    foreign = Some(ForeignMemory::open(pid)?);
                }
                if let Some(foreign) = &foreign {
                    copier.copy_protected(foreign, run.start, length, skip_zeros)?;
                }
            }
        }
        copier.flush(skipped_zeros)?;
    }
    Ok(copier.stored)
}

/// Copies pages of a process that runs, from one mapping, into `sink`; those that it drops meanwhile are left out, and pages
/// of zeros that have not been `given` before if `skip_zeros`. What is stored is returned.
pub fn copy_running(
    (pid, space): (i32, SpaceId),
    runs: &[(u64, u64)],
    (readable, skip_zeros): (bool, bool),
    given: &Pieces,
    sink: &mut dyn Sink,
) -> Result<Vec<Piece>, CaptureError> {
    let mut stored = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let foreign = ForeignMemory::open(pid)?;
    let mut put = |start: u64, bytes: &[u8]| -> Result<(), CaptureError> {
        let mut begin = 0;
        let mut flush = |begin: usize, end: usize| -> Result<(), CaptureError> {
            if begin < end {
                sink.pages(space, start + begin as u64, &bytes[begin..end])?;
                stored.push(Piece { space, start: start + begin as u64, end: start + end as u64 });
            }
            Ok(())
        };
        for (index, page) in bytes.chunks(PAGE).enumerate().filter(|(_, page)| skip_zeros && is_zero(page)) {
            let at = start + (index * PAGE) as u64;
            if given.within(space, at, at + PAGE as u64).next().is_none() {
                flush(begin, index * PAGE)?;
                begin = index * PAGE + page.len();
            }
        }
        flush(begin, bytes.len())
    };
    for group in Groups::of(runs) {
        let length = group.iter().map(|range| range.length as usize).sum();
        let bytes = &mut buffer[..length];
        if readable && memory::read_ranges(pid, &group, bytes).is_ok() {
            let mut at = 0;
            for range in &group {
                put(range.start, &bytes[at..at + range.length as usize])?;
                at += range.length as usize;
            }
            continue;
        }
        // Something of it is gone, or not to be read by the process itself.
        for range in &group {
            for start in (range.start..range.start + range.length).step_by(PAGE) {
                if foreign.read(start, &mut bytes[..PAGE]).is_ok() {
                    put(start, &bytes[..PAGE])?;
                }
            }
        }
    }
    Ok(stored)
}

/// Ranges that one call reads: as many as fit a buffer, and the kernel takes.
struct Groups<'a> {
    runs: std::slice::Iter<'a, (u64, u64)>,
    rest: Option<(u64, u64)>,
}

impl<'a> Groups<'a> {
    fn of(runs: &'a [(u64, u64)]) -> Self {
        Self { runs: runs.iter(), rest: None }
    }
}

impl Iterator for Groups<'_> {
    type Item = Vec<Range>;

    fn next(&mut self) -> Option<Vec<Range>> {
        let (mut group, mut room) = (Vec::new(), BUFFER as u64);
        while room > 0 && group.len() < MOST_RANGES {
            let Some((start, end)) = self.rest.take().or_else(|| self.runs.next().copied()) else { break };
            let length = (end - start).min(room);
            group.push(Range { start, length });
            room -= length;
            self.rest = (start + length < end).then_some((start + length, end));
        }
        (!group.is_empty()).then_some(group)
    }
}

/// Gathers runs of pages until the buffer is full, and reads them by one call.
struct Copier<'a> {
    pid: i32,
    space: SpaceId,
    sink: &'a mut dyn Sink,
    buffer: Vec<u8>,
    ranges: Vec<Range>,
    stored: u64,
}

impl Copier<'_> {
    fn gathered(&self) -> usize {
        self.ranges.iter().map(|range| range.length as usize).sum()
    }

    fn add(&mut self, mut start: u64, mut length: u64, skip_zeros: bool) -> Result<(), CaptureError> {
        while length > 0 {
            let room = (self.buffer.len() - self.gathered()) as u64;
            let part = length.min(room);
            self.ranges.push(Range { start, length: part });
            start += part;
            length -= part;
            if part == room || self.ranges.len() == MOST_RANGES {
                self.flush(skip_zeros)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self, skip_zeros: bool) -> Result<(), CaptureError> {
        let total = self.gathered();
        memory::read_ranges(self.pid, &self.ranges, &mut self.buffer[..total])?;
        let mut at = 0;
        for range in std::mem::take(&mut self.ranges) {
            let bytes = &self.buffer[at..at + range.length as usize];
            self.stored += store(self.sink, self.space, range.start, bytes, skip_zeros)?;
            at += range.length as usize;
        }
        Ok(())
    }

    fn copy_protected(
        &mut self,
        foreign: &ForeignMemory,
        start: u64,
        length: u64,
        skip_zeros: bool,
    ) -> Result<(), CaptureError> {
        self.flush(skip_zeros)?;
        let mut done = 0;
        while done < length {
            let part = (length - done).min(self.buffer.len() as u64) as usize;
            foreign.read(start + done, &mut self.buffer[..part])?;
            self.stored += store(self.sink, self.space, start + done, &self.buffer[..part], skip_zeros)?;
            done += part as u64;
        }
        Ok(())
    }
}

/// Stores pages, leaving out pages of zeros if `skip_zeros`. Returns bytes stored.
fn store(
    sink: &mut dyn Sink,
    space: SpaceId,
    start: u64,
    bytes: &[u8],
    skip_zeros: bool,
) -> Result<u64, CaptureError> {
    if !skip_zeros {
        sink.pages(space, start, bytes)?;
        return Ok(bytes.len() as u64);
    }
    let (mut stored, mut begin) = (0, 0);
    let mut put = |begin: usize, end: usize| -> Result<u64, CaptureError> {
        if begin < end {
            sink.pages(space, start + begin as u64, &bytes[begin..end])?;
        }
        Ok((end - begin) as u64)
    };
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        if is_zero(page) {
            stored += put(begin, index * PAGE)?;
            begin = (index + 1) * PAGE;
        }
    }
    stored += put(begin.min(bytes.len()), bytes.len())?;
    Ok(stored)
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
