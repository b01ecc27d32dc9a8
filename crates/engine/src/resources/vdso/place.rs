//! A free place in an address space.

use super::super::mapping::MappingState;

/// Below this the kernel maps nothing for unprivileged processes (`vm.mmap_min_addr`), with room to spare.
const LOWEST: u64 = 1 << 20;
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// Room left below a stack and above the heap, which grow.
const GROWTH: u64 = 1 << 30;

/// The place of `length` bytes that is nearest to `near`, away from what grows: below a stack, and above `heap_end`.
pub(super) fn free_place(mappings: &[MappingState], near: u64, length: u64, heap_end: u64) -> Option<u64> {
    let ends = mappings.iter().map(MappingState::end);
    let starts = mappings.iter().map(|mapping| (mapping.start, mapping.flags & libc::MAP_GROWSDOWN != 0));
    let gaps = std::iter::once(LOWEST).chain(ends).zip(starts.chain([(TASK_SIZE, false)]));
    gaps.filter_map(|(start, (end, grows))| {
        let heap = start <= heap_end && heap_end <= end;
        let start = if heap { start.max(heap_end).checked_add(GROWTH)? } else { start.max(LOWEST) };
        let end = if grows { end.checked_sub(GROWTH)? } else { end.min(TASK_SIZE) };
        let (start, last) = (start.next_multiple_of(4096), end.checked_sub(length)? & !4095);
        (start <= last).then(|| near.clamp(start, last) & !4095)
    })
    .min_by_key(|place| place.abs_diff(near))
}

#[cfg(test)]
mod tests {
    use super::super::super::mapping::Backing;
    use super::*;

    fn mapping(start: u64, end: u64, flags: i32) -> MappingState {
        MappingState { flags, ..MappingState::plain(start, end - start, 3, Backing::Anonymous) }
    }

    #[test]
    fn the_nearest_gap_that_fits_is_taken() {
        let mappings =
            [mapping(0x10_0000_0000, 0x10_0001_0000, 0), mapping(0x10_0001_4000, 0x10_0002_0000, 0)];
        assert_eq!(free_place(&mappings, 0x10_0001_4000, 0x4000, 0), Some(0x10_0001_0000));
        // Too large for the gap: below the lower one, or above the upper one, whichever is nearer.
        assert_eq!(free_place(&mappings, 0x10_0001_4000, 0x5000, 0), Some(0x10_0002_0000));
        assert_eq!(free_place(&mappings, 0x10_0000_0000, 0x5000, 0), Some(0x0f_ffff_b000));
    }

    #[test]
    fn what_grows_is_left_alone() {
        let stack = mapping(0x7ffd_0000_0000, 0x7ffd_0002_1000, libc::MAP_GROWSDOWN);
        let heap = mapping(0x5555_0000_0000, 0x5555_0010_0000, 0);
        let all = [heap, stack];
        assert_eq!(free_place(&all, 0x7ffd_0000_0000, 0x8000, 0x5555_0010_0000), Some(0x7ffd_0002_1000));
        assert_eq!(free_place(&all, 0x5555_0011_0000, 0x8000, 0x5555_0010_0000), Some(0x5554_ffff_8000));
        let [heap, stack] = all;
        let all = [heap, stack, mapping(0x7ffd_0002_1000, TASK_SIZE, 0)];
        let place = free_place(&all, 0x7ffd_0000_0000, 0x8000, 0x5555_0010_0000).unwrap();
        assert_eq!(place, 0x7ffd_0000_0000 - GROWTH - 0x8000);
    }

    #[test]
    fn a_full_address_space_has_none() {
        assert_eq!(free_place(&[mapping(LOWEST, TASK_SIZE, 0)], LOWEST, 4096, 0), None);
        assert_eq!(free_place(&[], u64::MAX, 8192, 0), Some(TASK_SIZE - 8192));
    }
}
