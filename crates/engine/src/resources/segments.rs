//! System V segments in an address space (shmat(2)).
//!
//! A segment that is attached as a whole, and protected as shmat(2) does it, comes back by that one call. Of others only parts
//! are left (munmap(2)), or parts are protected otherwise (mprotect(2)): they come from one attachment where their addresses
//! less their offsets are the same. It is made again as a whole, before any other mapping, and what is not to be there unmapped.

use std::collections::BTreeMap;

use limosa_puppet::Program;
use serde::{Deserialize, Serialize};

use super::mapping::{Backing, MappingState};

const PAGE: u64 = 4096;

/// A part of an attached segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Part {
    /// The segment's ID.
    pub id: i32,
    /// Bytes of the segment before it.
    pub offset: u64,
    /// Bytes of the whole segment.
    pub size: u64,
    /// Whether it was attached for writing, too: then mprotect(2) may allow it.
    pub writable: bool,
}

/// An attachment, of which parts are kept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    id: i32,
    start: u64,
    end: u64,
    writable: bool,
    executable: bool,
    /// Start and end, by address.
    kept: Vec<(u64, u64)>,
}

/// What is to be attached for all parts among `mappings`, which are in order; or the first mapping whose attachment would be
/// in the way of another one's parts.
pub(crate) fn attachments(mappings: &[MappingState]) -> Result<Vec<Attachment>, &MappingState> {
    let mut found: BTreeMap<(u64, i32, bool), Attachment> = BTreeMap::new();
    for mapping in mappings {
        let Backing::SystemVPart(Part { id, offset, size, writable }) = mapping.backing else { continue };
        let start = mapping.start.checked_sub(offset).ok_or(mapping)?;
        let last = offset.checked_add(mapping.length);
        let inside =
            size.checked_next_multiple_of(PAGE).filter(|size| last.is_some_and(|last| last <= *size));
        let end = inside.and_then(|size| start.checked_add(size)).ok_or(mapping)?;
        if start % PAGE != 0 {
            return Err(mapping);
        }
        let new = Attachment { id, start, end, writable, executable: false, kept: Vec::new() };
        let one = found.entry((start, id, writable)).or_insert(new);
        if one.end != end {
            return Err(mapping);
        }
        one.executable |= mapping.protection & libc::PROT_EXEC as u32 != 0;
        one.kept.push((mapping.start, mapping.end()));
    }
    let found: Vec<Attachment> = found.into_values().collect();
    for (at, one) in found.iter().enumerate() {
        // Each is made where those before it are already.
        let before = found[..at].iter().flat_map(|other| &other.kept);
        let mut in_the_way = before.filter(|(start, end)| *start < one.end && one.start < *end);
        if in_the_way.next().is_some() {
            let mapping =
                mappings.iter().find(|mapping| Some(mapping.start) == one.kept.first().map(|kept| kept.0));
            return Err(mapping.unwrap_or(&mappings[0]));
        }
    }
    Ok(found)
}

impl Attachment {
    /// Whether it is in `start..end`, if only for a moment.
    pub(crate) fn meets(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }

    /// Adds the calls that leave the kept parts where they were, protected as shmat(2) does it.
    pub(crate) fn make(&self, program: &mut Program) {
        attach(program, self.id, self.start, self.writable, self.executable);
        let mut free = self.start;
        for (start, end) in self.kept.iter().copied().chain([(self.end, self.end)]) {
            if free < start {
                let arguments = [free.into(), (start - free).into()];
                program.call("detach a part of a segment", libc::SYS_munmap, arguments);
            }
            free = end;
        }
    }
}

/// Adds shmat(2) of a whole segment.
pub(crate) fn attach(program: &mut Program, id: i32, start: u64, writable: bool, executable: bool) {
    let mut access = 0;
    if !writable {
        access |= libc::SHM_RDONLY;
    }
    if executable {
        access |= libc::SHM_EXEC;
    }
    let arguments = [id.into(), start.into(), access.into()];
    program.call("attach a System V segment", libc::SYS_shmat, arguments);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(start: u64, pages: u64, id: i32, first: u64) -> MappingState {
        let part = Part { id, offset: first * PAGE, size: 8 * PAGE - 5, writable: true };
        MappingState::plain(start * PAGE, pages * PAGE, libc::PROT_READ, Backing::SystemVPart(part))
    }

    #[test]
    fn parts_of_one_attachment_are_made_together() {
        let mappings = [part(101, 2, 7, 1), part(106, 1, 7, 6), part(108, 8, 9, 0)];
        let found = attachments(&mappings).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].start, found[0].end), (100 * PAGE, 108 * PAGE));
        assert_eq!(found[0].kept.len(), 2);
        let mut program = Program::new();
        found[0].make(&mut program);
        assert_eq!(program.len(), 4, "shmat and three munmap:\n{program}");
    }

    #[test]
    fn what_cannot_be_made_is_found() {
        assert!(attachments(&[part(1, 1, 7, 2)]).is_err(), "before the first address");
        assert!(attachments(&[part(100, 2, 7, 7)]).is_err(), "behind its end");
        assert!(attachments(&[part(100, 2, 7, 0), part(102, 1, 8, 3)]).is_err(), "two in one place");
        let first = [part(100, 2, 7, 0), part(104, 1, 8, 1)];
        assert!(attachments(&first).is_ok(), "one where the other has been unmapped");
    }

    proptest::proptest! {
        #[test]
        fn any_numbers_are_attached_or_refused(start in 0..u64::MAX / 2, length in 0..1_u64 << 48, offset: u64, size: u64) {
            let part = Part { id: 1, offset, size, writable: false };
            let mapping = MappingState::plain(start, length, 0, Backing::SystemVPart(part));
            if let Ok(found) = attachments(std::slice::from_ref(&mapping)) {
                proptest::prop_assert!(found[0].start <= start && start + length <= found[0].end);
            }
        }
    }
}
