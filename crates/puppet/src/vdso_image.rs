//! What a vDSO consists of (vdso(7)): the functions that it exports, and which of its bytes are code.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::arch::redirect::ELF_MACHINE;

/// More symbols than this are not those of a vDSO, which has about a dozen.
const SYMBOLS_MAX: u64 = 512;
const SECTION_SIZE: u64 = 64;
const SYMBOL_SIZE: u64 = 24;

/// A vDSO's functions and code. Its bytes may come from anywhere: everything in here lies inside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdsoImage {
    /// By offset; those with several names have one here.
    pub functions: Vec<VdsoFunction>,
    /// Executable sections.
    pub code: Vec<Range<usize>>,
}

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdsoFunction {
    /// Its name without the prefix `__vdso_`.
    pub name: String,
    /// Where it begins in the image.
    pub offset: usize,
    /// Bytes up to its end, or to the beginning of the next.
    pub room: usize,
}

struct Section {
    kind: u32,
    flags: u64,
    offset: u64,
    size: u64,
    link: u32,
}

impl VdsoImage {
    /// Reads an ELF-64 image for this processor; `None` if it is not one, not whole, or says anything contradictory.
    pub fn parse(image: &[u8]) -> Option<Self> {
        const SHT_DYNSYM: u32 = 11;
        const ALLOCATED_CODE: u64 = 2 | 4;
        super::elf_extent(image)?;
        if half(image, 18)? != ELF_MACHINE || u64::from(half(image, 58)?) != SECTION_SIZE {
            return None;
        }
        let sections: Vec<Section> =
            (0..u64::from(half(image, 60)?)).map(|index| section(image, index)).collect::<Option<_>>()?;
        let code: Vec<Range<usize>> = sections
            .iter()
            .filter(|section| section.flags & ALLOCATED_CODE == ALLOCATED_CODE)
            .map(|section| range(image, section.offset, section.size))
            .collect::<Option<_>>()?;
        let symbols = sections.iter().find(|section| section.kind == SHT_DYNSYM)?;
        let names = sections.get(symbols.link as usize)?;
        let names = &image[range(image, names.offset, names.size)?];
        if symbols.size > SYMBOLS_MAX * SYMBOL_SIZE {
            return None;
        }
        let symbols = &image[range(image, symbols.offset, symbols.size)?];
        let mut functions: BTreeMap<usize, (String, usize)> = BTreeMap::new();
        for symbol in symbols.chunks_exact(SYMBOL_SIZE as usize).filter(|symbol| is_function(symbol)) {
            let (name, body) = function(image, symbol, names)?;
            if !code.iter().any(|code| code.start <= body.start && body.end <= code.end) {
                return None;
            }
            let known = functions.entry(body.start).or_insert_with(|| (name.clone(), body.end));
            if known.0 != name {
                return None;
            }
            known.1 = known.1.min(body.end);
        }
        let starts: Vec<usize> = functions.keys().copied().skip(1).chain([image.len()]).collect();
        let functions = functions
            .into_iter()
            .zip(starts)
            .map(|((offset, (name, end)), next)| VdsoFunction { name, offset, room: end.min(next) - offset })
            .collect();
        Some(Self { functions, code })
    }

    /// Offset of the function `name`.
    pub fn offset_of(&self, name: &str) -> Option<usize> {
        self.functions.iter().find(|function| function.name == name).map(|function| function.offset)
    }
}

/// Whether a symbol is a function that is defined here.
fn is_function(symbol: &[u8]) -> bool {
    const STT_FUNC: u8 = 2;
    symbol.get(4).is_some_and(|info| info & 0xf == STT_FUNC)
        && half(symbol, 6).is_some_and(|section| section != 0)
}

/// Name and body of a function.
fn function(image: &[u8], symbol: &[u8], names: &[u8]) -> Option<(String, Range<usize>)> {
    let name = names.get(word(symbol, 0)? as usize..)?.split(|byte| *byte == 0).next()?;
    let name = std::str::from_utf8(name).ok()?;
    // Linked to address 0, so that an address is an offset.
    let body = range(image, long(symbol, 8)?, long(symbol, 16)?)?;
    Some((name.strip_prefix("__vdso_").unwrap_or(name).to_owned(), body))
}

fn section(image: &[u8], index: u64) -> Option<Section> {
    let at = usize::try_from(long(image, 40)?.checked_add(index * SECTION_SIZE)?).ok()?;
    let header = image.get(at..at.checked_add(SECTION_SIZE as usize)?)?;
    Some(Section {
        kind: word(header, 4)?,
        flags: long(header, 8)?,
        offset: long(header, 24)?,
        size: long(header, 32)?,
        link: word(header, 40)?,
    })
}

/// `size` bytes from `offset` on, if the image has them.
fn range(image: &[u8], offset: u64, size: u64) -> Option<Range<usize>> {
    let end = offset.checked_add(size)?;
    (end <= image.len() as u64).then_some(offset as usize..end as usize)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_le_bytes(*chunk))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The vDSO of the kernel that the test runs on.
    fn own() -> Vec<u8> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let address = |hexadecimal| u64::from_str_radix(hexadecimal, 16).unwrap();
        let (start, end) = (address(start), address(end));
        let mut image = vec![0; (end - start) as usize];
        limosa_kernel::memory::read(std::process::id() as i32, start, &mut image).unwrap();
        image
    }

    #[test]
    fn the_kernels_own_has_the_documented_functions() {
        let image = own();
        let vdso = VdsoImage::parse(&image).unwrap();
        for name in ["clock_gettime", "clock_getres", "gettimeofday", "time", "getcpu"] {
            let offset = vdso.offset_of(name).unwrap_or_else(|| panic!("no {name} in {vdso:?}"));
            assert!(vdso.code.iter().any(|code| code.contains(&offset)));
        }
        // Each has room for what is to lead on from it.
        for function in &vdso.functions {
            let stand_in = crate::arch::redirect::stand_in(&function.name);
            let needed = stand_in.map_or(0, |code| code.len()).max(crate::arch::redirect::jump(0).len());
            assert!(function.room >= needed, "{function:?}");
        }
    }

    /// No panic, and nothing outside of the bytes.
    fn check(image: &[u8]) {
        assert!(crate::elf_extent(image).is_none_or(|extent| extent <= image.len()));
        let Some(vdso) = VdsoImage::parse(image) else { return };
        assert!(vdso.code.iter().all(|code| code.start <= code.end && code.end <= image.len()));
        for function in &vdso.functions {
            let end = function.offset.checked_add(function.room).unwrap();
            assert!(
                vdso.code.iter().any(|code| code.start <= function.offset && end <= code.end),
                "{function:?}"
            );
        }
        assert!(vdso.functions.windows(2).all(|pair| pair[0].offset + pair[0].room <= pair[1].offset));
    }

    #[test]
    fn a_damaged_one_is_refused_or_stays_inside() {
        let whole = own();
        for length in (0..whole.len()).step_by(37) {
            check(&whole[..length]);
        }
        for at in headers(&whole) {
            for value in [0, 1, 0x7f, 0xff] {
                let mut image = whole.clone();
                image[at] = value;
                check(&image);
                let end = (at + 8).min(image.len());
                image[at..end].fill(value);
                check(&image);
            }
        }
    }

    /// Where the ELF header, the sections' headers, the symbols and their names are.
    fn headers(image: &[u8]) -> impl Iterator<Item = usize> + use<> {
        let sections = long(image, 40).unwrap() as usize;
        (0..64).chain(sections..image.len().min(sections + 17 * 64)).chain(0x1d0..0x340)
    }

    /// A number that is likely to be a length, an offset or a count beyond what there is.
    fn odd_number() -> impl Strategy<Value = u64> {
        prop_oneof![any::<u64>(), 0..0x3000_u64, Just(u64::MAX), (0..64_u32).prop_map(|bit| 1 << bit)]
    }

    proptest! {
        #[test]
        fn several_forged_numbers_are_refused_or_stay_inside(
            forged in prop::collection::vec((any::<prop::sample::Index>(), 1..=8_usize, odd_number()), 1..6)
        ) {
            let mut image = own();
            let places: Vec<usize> = headers(&image).collect();
            for (place, width, number) in forged {
                let at = *place.get(&places);
                let end = (at + width).min(image.len());
                let length = end - at;
                image[at..end].copy_from_slice(&number.to_le_bytes()[..length]);
            }
            check(&image);
        }

        #[test]
        fn bytes_behind_the_magic_of_one_are_refused_or_stay_inside(rest: Vec<u8>) {
            check(&rest);
            check(&[b"\x7fELF\x02".as_slice(), &rest].concat());
        }
    }
}
