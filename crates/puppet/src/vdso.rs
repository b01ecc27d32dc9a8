//! The place of the visitor in a running process: the padding behind the vDSO's last section.
//!
//! ```text
//!   start                     padding              padding + stride        end
//!   │ ELF headers … sections │ slot 0: stub, data │ slot 1: stub, data │ … │
//! ```
//!
//! The padding is zeros, executable, part of every process, and read by nobody. A slot that is not zeros was
//! left by a controller that was killed in mid-visit; a visit that ends regularly wipes its slot. A thread may
//! still depend on a slot that was left behind although its `rip` is elsewhere: a signal that came while the
//! stub set the mask back has its handler return into the stub. So a visit takes a clean slot if there is one,
//! and else the one left behind longest ago.

use limosa_kernel::memory::ForeignMemory;

use crate::arch;
use crate::visit::VisitError;

/// A vDSO that is larger than this is not one.
const VDSO_MAX: u64 = 1 << 20;

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

/// A place for one visitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its first address.
    pub address: u64,
    /// Greater than that of all slots left behind.
    pub generation: u32,
}

impl Vdso {
    /// Finds the padding by the ELF headers of the vDSO at `start..end` of the process.
    pub fn locate(pid: i32, memory: &ForeignMemory, start: u64, end: u64) -> Result<Self, VisitError> {
        let needed = arch::VISITOR.len();
        let no_room = VisitError::NoRoom { pid, needed };
        let length = end.saturating_sub(start);
        if length > VDSO_MAX {
            return Err(no_room);
        }
        let mut image = vec![0; length as usize];
        memory.read(start, &mut image)?;
        let Some(used) = elf_extent(&image) else { return Err(no_room) };
        let padding = (start + used as u64).next_multiple_of(64);
        if padding + needed as u64 > end {
            return Err(no_room);
        }
        Ok(Self { start, end, padding })
    }

    /// Whether `address` is where stubs are.
    pub(crate) fn stub_contains(&self, address: u64) -> bool {
        (self.padding..self.end).contains(&address)
    }

    /// The slot for the next visit.
    pub(crate) fn choose_slot(&self, memory: &ForeignMemory) -> Result<Slot, VisitError> {
        let mut padding = vec![0; (self.end - self.padding) as usize];
        memory.read(self.padding, &mut padding)?;
        let slot = choose(&padding, arch::VISITOR.len());
        Ok(Slot { address: self.padding + slot.address, ..slot })
    }
}

/// The best slot of `size` bytes in the padding, its address counted from the padding's start.
fn choose(padding: &[u8], size: usize) -> Slot {
    let stride = size.next_multiple_of(64);
    let mut clean = None;
    let mut oldest: Option<(u32, usize)> = None;
    let mut newest = 0;
    for at in (0..padding.len()).step_by(stride) {
        let Some(slot) = padding.get(at..at + size) else { break };
        if slot.iter().all(|byte| *byte == 0) {
            clean = clean.or(Some(at));
            continue;
        }
        // The generation is the last word of the data area, and so of the slot.
        let word = slot.last_chunk::<4>().copied().unwrap_or_default();
        let generation = u32::from_le_bytes(word);
        newest = newest.max(generation);
        if oldest.is_none_or(|(age, _)| generation < age) {
            oldest = Some((generation, at));
        }
    }
    let at = clean.or(oldest.map(|(_, at)| at)).unwrap_or(0);
    Slot { address: at as u64, generation: newest.wrapping_add(1) }
}

/// Bytes of an ELF-64 image that its headers, segments and sections cover; `None` if it is not one.
pub fn elf_extent(image: &[u8]) -> Option<usize> {
    const CLASS_64: u8 = 2;
    let half = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?) as usize);
    let word =
        |at: usize| Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?) as usize);
    if image.get(..5)? != [0x7f, b'E', b'L', b'F', CLASS_64] {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_slot_is_taken_before_the_oldest_one_left_behind() {
        let mut padding = vec![0; 300];
        assert_eq!(choose(&padding, 100), Slot { address: 0, generation: 1 });
        padding[0] = 0x0f;
        padding[96] = 7;
        assert_eq!(choose(&padding, 100), Slot { address: 128, generation: 8 });
        padding[128] = 0x0f;
        padding[128 + 96] = 6;
        assert_eq!(choose(&padding, 100), Slot { address: 128, generation: 8 });
    }

    #[test]
    fn nothing_but_a_whole_64_bit_image_has_an_extent() {
        let mut image = vec![0_u8; 256];
        assert_eq!(elf_extent(&image), None);
        image[..5].copy_from_slice(b"\x7fELF\x02");
        assert_eq!(elf_extent(&image), Some(64));
        image[40..48].copy_from_slice(&128_u64.to_le_bytes());
        image[58..60].copy_from_slice(&64_u16.to_le_bytes());
        image[60..62].copy_from_slice(&1_u16.to_le_bytes());
        assert_eq!(elf_extent(&image), Some(192));
        image[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(elf_extent(&image), None, "sections beyond the address space");
        image[4] = 1;
        assert_eq!(elf_extent(&image), None, "a 32-bit image");
    }
}
