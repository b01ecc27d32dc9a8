//! Transparent huge pages come back huge: they are made before they are filled, which is also faster than to fill small ones.
//!
//! A page is touched in each, and MADV_COLLAPSE (Linux 6.1) makes the whole of it one huge page, whatever the mapping's
//! advice and the system's settings say about faults. (Advice would do the same, but cannot be taken back: a mapping
//! that was advised is never without advice again.) Where the kernel has no huge page to give, pages stay small.

use limosa_puppet::Program;

use crate::pieces::Pieces;
use crate::resources::mapping::Backing;
use crate::state::Body;

/// Bytes of a huge page.
pub(super) const HUGE_PAGE: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// The huge pages of a process that are to be made for `pages`, those of its pages that will be loaded into mappings that
/// it has: by address, whole, in one mapping, and such that nothing else is in them.
pub(super) fn of(body: &Body, pages: &Pieces, kept: &[bool]) -> Vec<u64> {
    let addresses = pages.addresses();
    let mut huge = among(&body.huge_pages, &addresses);
    huge.retain(|block| {
        let end = block + HUGE_PAGE;
        let at = body.mappings.partition_point(|mapping| mapping.end() <= *block);
        let whole = body.mappings.get(at).is_some_and(|mapping| {
            matches!(mapping.backing, Backing::Anonymous) && mapping.start <= *block && end <= mapping.end()
        });
        // What a process was born with is shared: it is not to be touched.
        let inherited = kept.get(at) == Some(&true);
        whole && (!inherited || is_within(&addresses, *block, end))
    });
    huge
}

/// The huge pages in `ranges` that have any of `addresses`. Both are sorted and disjoint; if they are not, fewer are found.
pub(super) fn among(ranges: &[(u64, u64)], addresses: &[(u64, u64)]) -> Vec<u64> {
    let mut huge: Vec<u64> = Vec::new();
    for (start, end) in addresses {
        let first = ranges.partition_point(|(_, behind)| behind <= start);
        for (from, to) in ranges[first..].iter().take_while(|(from, _)| from < end) {
            let begin = (*start).max(*from) / HUGE_PAGE * HUGE_PAGE;
            let blocks = (begin..(*end).min(*to)).step_by(HUGE_PAGE as usize);
            huge.extend(blocks.filter(|block| from <= block && block.saturating_add(HUGE_PAGE) <= *to));
        }
    }
    huge.sort_unstable();
    huge.dedup();
    huge
}

/// Whether one of `ranges`, which are sorted and disjoint, contains `start..end`.
pub(super) fn is_within(ranges: &[(u64, u64)], start: u64, end: u64) -> bool {
    let at = ranges.partition_point(|(_, behind)| *behind <= start);
    ranges.get(at).is_some_and(|(from, to)| *from <= start && end <= *to)
}

/// Adds the calls that make `blocks`, which are mapped and writable, huge pages of zeros.
pub(super) fn make(blocks: &[u64], program: &mut Program) {
    for block in blocks {
        let arguments = [(*block).into(), PAGE.into(), libc::MADV_POPULATE_WRITE.into()];
        program.try_call("touch a huge page", libc::SYS_madvise, arguments);
    }
    for run in blocks.chunk_by(|a, b| a + HUGE_PAGE == *b) {
        let Some(start) = run.first() else { continue };
        let arguments = [(*start).into(), (run.len() as u64 * HUGE_PAGE).into(), libc::MADV_COLLAPSE.into()];
        program.try_call("make huge pages", libc::SYS_madvise, arguments);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    #[test]
    fn only_whole_huge_pages_with_something_in_them_are_made() {
        let ranges = [(2 * M, 8 * M), (12 * M, 15 * M)];
        assert_eq!(among(&ranges, &[(0, 20 * M)]), [2 * M, 4 * M, 6 * M, 12 * M]);
        assert_eq!(among(&ranges, &[(3 * M, 3 * M + PAGE), (3 * M + 2 * PAGE, 5 * M)]), [2 * M, 4 * M]);
        assert_eq!(among(&ranges, &[(8 * M, 12 * M)]), [0; 0]);
        assert_eq!(among(&[(M, 4 * M)], &[(M, 3 * M)]), [2 * M]);
    }

    #[test]
    fn neighbours_are_made_by_one_call() {
        let mut program = Program::new();
        make(&[2 * M, 4 * M, 8 * M], &mut program);
        assert_eq!(program.len(), 3 + 2);
    }
}
