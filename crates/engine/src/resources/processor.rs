//! What a tree needs of the processor that it comes back on.
//!
//! Two rules, of which the second is the default:
//!
//! - *Registers*: each part of the registers that is in use must be there: a part of the XSAVE area whose bit is set in
//!   XSTATE_BV and that is not all zeros, which is what a new process has. Nothing can lift this rule.
//! - *Features*: every instruction that a program could have found here must be there, too. Programs look once, when they
//!   start, and choose their code by it (the C library its `memcpy`, OpenSSL its ciphers, Go its maps). The choice lies in
//!   their memory and comes back with it, whatever the registers hold at this instant. What they would do on a processor
//!   without the instructions is to die of SIGILL, perhaps hours later. `--cpu registers` lifts this rule for programs that are
//!   known not to choose.
//!
//! Features are in the manifest, so that they can be compared before anything else is read; what registers hold is seen in
//! them. Their places in an XSAVE area differ between makers of processors (the Intel SDM leaves them to cpuid): the
//! checkpoint notes those of its processor, and a restore moves each part to its place here. What a signal handler has
//! interrupted lies in such an area on the stack, which is not touched: the kernel finds it wrong where the places differ.

use std::collections::BTreeSet;

use limosa_kernel::cpu;
use serde::{Deserialize, Serialize};

use crate::error::RestoreError;
use crate::state::Tree;

/// `XSTATE_BV`, the first word of an XSAVE area's header, and where the header ends.
const XSTATE_BV: usize = 512;
const HEADER_END: usize = 576;
/// Largest XSAVE area that makes sense; those of today are below 12 KiB.
const AREA_MAX: usize = 64 * 1024;
/// The component of protection keys, and what the kernel gives each new process in it (`init_pkru_value`).
const PKRU: u32 = 9;
const PKRU_DEFAULT: [u8; 4] = 0x5555_5554_u32.to_le_bytes();
/// Data of AMX tiles: only for processes that have asked for them (`ARCH_REQ_XCOMP_PERM`).
pub(crate) const TILE_DATA: u32 = 18;

/// Features that make instructions available to programs, in the spelling of `/proc/cpuinfo`. Others are the kernel's, or
/// make known instructions faster.
const INSTRUCTIONS: &[&str] = &[
    "3dnow",
    "3dnowext",
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_complex",
    "amx_fp16",
    "amx_int8",
    "amx_tile",
    "apx",
    "avx",
    "avx10",
    "avx2",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_bmm",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_ifma",
    "avx_ne_convert",
    "avx_vnni",
    "avx_vnni_int16",
    "avx_vnni_int8",
    "bmi1",
    "bmi2",
    "cldemote",
    "clflush",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "cmpccxadd",
    "cx16",
    "cx8",
    "enqcmd",
    "f16c",
    "fma",
    "fma4",
    "fpu",
    "fsgsbase",
    "fxsr",
    "gfni",
    "hle",
    "lahf_lm",
    "lwp",
    "mmx",
    "mmxext",
    "monitorx",
    "movbe",
    "movdir64b",
    "movdiri",
    "mpx",
    "mwaitx",
    "ospke",
    "pclmulqdq",
    "pni",
    "popcnt",
    "prefetchi",
    "ptwrite",
    "rao_int",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha512",
    "sha_ni",
    "sm3",
    "sm4",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "tsc",
    "tsxldtrk",
    "user_shstk",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
];

/// Which features must be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// All that the checkpoint lists, and those that registers need.
    #[default]
    Features,
    /// Those that registers in use need.
    Registers,
}

/// Where the parts of the registers are in the XSAVE areas of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout(pub Vec<(u32, u32, u32)>);

impl Layout {
    /// That of this processor.
    pub fn here() -> Self {
        Self(cpu::components().into_iter().map(|part| (part.number, part.offset, part.size)).collect())
    }

    /// Bytes of an area with all parts.
    fn length(&self) -> usize {
        self.0.iter().map(|(_, offset, size)| *offset as usize + *size as usize).fold(HEADER_END, usize::max)
    }

    /// Parts that do not overlap, each once, behind the header.
    fn check(&self) -> Result<(), RestoreError> {
        let mut places: Vec<_> =
            self.0.iter().map(|(number, offset, size)| (*offset, *size, *number)).collect();
        places.sort_unstable();
        let numbers: BTreeSet<_> = places.iter().map(|(_, _, number)| *number).collect();
        let mut free_from = HEADER_END;
        for (offset, size, number) in &places {
            let end = (*offset as usize).saturating_add(*size as usize);
            if (*offset as usize) < free_from || end > AREA_MAX || !(2..63).contains(number) {
                let what = format!("part {number} of the registers at {offset} with {size} bytes");
                return Err(RestoreError::inconsistent(what));
            }
            free_from = end;
        }
        if numbers.len() == places.len() {
            Ok(())
        } else {
            Err(RestoreError::inconsistent("a part of the registers is in two places"))
        }
    }
}

/// What programs can find on this processor, sorted.
pub fn features() -> limosa_kernel::Result<Vec<String>> {
    let mut features = cpu::features()?;
    features.retain(|feature| INSTRUCTIONS.contains(&feature.as_str()));
    features.sort_unstable();
    features.dedup();
    Ok(features)
}

/// Those of `wanted` that this processor does not have.
pub fn missing(wanted: &[String]) -> limosa_kernel::Result<Vec<String>> {
    let here = cpu::features()?;
    Ok(wanted.iter().filter(|feature| !here.contains(feature)).cloned().collect())
}

/// The feature that a part of the registers comes with, and what it is in words.
fn feature_of(number: u32) -> (&'static str, &'static str) {
    match number {
        2 => ("avx", "the vector registers of AVX"),
        3 | 4 => ("mpx", "the bounds of MPX"),
        5..=7 => ("avx512f", "the vector or mask registers of AVX-512"),
        PKRU => ("ospke", "rights of protection keys"),
        17 | TILE_DATA => ("amx_tile", "the tiles of AMX"),
        19 => ("apx", "the general registers of APX"),
        _ => ("", "a part of the registers that Limosa does not know"),
    }
}

/// The parts of an XSAVE area that differ from what each new process has, by number. One without a known place may.
fn in_use(area: &[u8], layout: &Layout) -> Vec<u32> {
    let Some(used) = area.get(XSTATE_BV..).and_then(|header| header.first_chunk()) else { return Vec::new() };
    let used = u64::from_le_bytes(*used);
    let holds_something = |number: &u32| {
        let marked = used & 1 << number != 0;
        match (number, part(area, layout, *number)) {
            // The kernel gives the value also where it is not marked.
            (&PKRU, Some(rights)) => !rights.starts_with(&PKRU_DEFAULT),
            (_, Some(bytes)) => marked && bytes.iter().any(|byte| *byte != 0),
            (_, None) => marked,
        }
    };
    (2..63).filter(holds_something).collect()
}

fn part<'a>(area: &'a [u8], layout: &Layout, number: u32) -> Option<&'a [u8]> {
    let (_, offset, size) = layout.0.iter().find(|(found, _, _)| *found == number)?;
    area.get(*offset as usize..)?.get(..*size as usize)
}

/// What the registers of the tree need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// The part of the registers.
    pub component: u32,
    /// The feature, in the spelling of `/proc/cpuinfo`; empty if the part is not known.
    pub feature: &'static str,
    /// What of the first process that needs it, for a person.
    pub what: String,
}

/// What the registers of the tree need, each once, by component.
pub fn needs(tree: &Tree) -> Vec<Need> {
    let here = Layout::here();
    let layout = tree.registers.as_ref().unwrap_or(&here);
    let mut needs: Vec<Need> = Vec::new();
    let mut add = |component: u32, of: String| {
        let (feature, what) = feature_of(component);
        if needs.iter().all(|need| need.component != component) {
            needs.push(Need { component, feature, what: format!("{what} ({of})") });
        }
    };
    for (process, body) in tree.living() {
        for thread in &body.threads {
            for component in in_use(&thread.state.registers.extended, layout) {
                add(component, format!("in use by thread {} of process {}", thread.tid, process.pid));
            }
        }
        if body.state.prctl_state.permitted & 1 << TILE_DATA != 0 {
            add(TILE_DATA, format!("asked for by process {}", process.pid));
        }
    }
    needs.sort_by_key(|need| need.component);
    needs
}

/// Checks that this processor has what the tree needs by `rule`; `features` are those that its programs may have found.
pub fn check(tree: &Tree, features: &[String], rule: Rule) -> Result<(), RestoreError> {
    if let Some(layout) = &tree.registers {
        layout.check()?;
    }
    check_on(tree, &Layout::here())?;
    let missing = if rule == Rule::Features { missing(features)? } else { Vec::new() };
    if missing.is_empty() {
        return Ok(());
    }
    Err(RestoreError::Processor {
        missing: names(&missing),
        why: "programs choose their code by it when they start, and would die of SIGILL".into(),
        remedy: "restore it on a processor that has all of it, or, if these programs do not choose, with --cpu registers",
    })
}

/// Checks that a processor with the parts `here` has those that are in use.
fn check_on(tree: &Tree, here: &Layout) -> Result<(), RestoreError> {
    let there = |need: &Need| here.0.iter().any(|(number, _, _)| *number == need.component);
    let needs: Vec<Need> = needs(tree).into_iter().filter(|need| !there(need)).collect();
    if needs.is_empty() {
        return Ok(());
    }
    let name = |need: &Need| match need.feature {
        "" => format!("XSAVE component {}", need.component),
        feature => feature.to_owned(),
    };
    let mut missing: Vec<String> = needs.iter().map(name).collect();
    missing.dedup();
    let why: Vec<&str> = needs.iter().map(|need| need.what.as_str()).collect();
    Err(RestoreError::Processor {
        missing: names(&missing),
        why: format!("the checkpoint holds {}", why.join(" and ")),
        remedy: "restore it on a processor that has it",
    })
}

/// A list for a person. Names come from a checkpoint or a peer.
pub fn names(features: &[String]) -> String {
    crate::summary::printable(features.join(", ").as_bytes())
}

/// Moves all parts of the registers to their places on this processor. After [`check`].
pub fn adapt(tree: &mut Tree) {
    let here = Layout::here();
    let Some(there) = tree.registers.clone().filter(|there| *there != here) else { return };
    for thread in tree.living_mut().flat_map(|body| &mut body.threads) {
        let area = &mut thread.state.registers.extended;
        *area = moved(area, &there, &here);
    }
    tree.registers = Some(here);
}

/// An XSAVE area with its parts at other places. Parts that are not in use are left out.
fn moved(area: &[u8], from: &Layout, to: &Layout) -> Vec<u8> {
    let mut moved = vec![0; to.length()];
    let head = area.len().min(HEADER_END);
    moved[..head].copy_from_slice(&area[..head]);
    // x87 and SSE are where they were.
    let mut used = area.get(XSTATE_BV).map_or(0, |bits| u64::from(*bits) & 0b11);
    for number in in_use(area, from) {
        let Some((_, offset, size)) = to.0.iter().find(|(found, _, _)| *found == number) else { continue };
        if let Some(bytes) = part(area, from, number) {
            let bytes = &bytes[..bytes.len().min(*size as usize)];
            moved[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
            used |= 1 << number;
        }
    }
    // Left out, it would be zero: all rights to all keys.
    if let Some((_, offset, size)) = to.0.iter().find(|(number, _, _)| *number == PKRU)
        && used & 1 << PKRU == 0
        && *size as usize >= PKRU_DEFAULT.len()
    {
        moved[*offset as usize..][..PKRU_DEFAULT.len()].copy_from_slice(&PKRU_DEFAULT);
        used |= 1 << PKRU;
    }
    moved[XSTATE_BV..][..8].copy_from_slice(&used.to_le_bytes());
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(layout: &Layout, filled: &[(u32, u8)]) -> Vec<u8> {
        let mut area = vec![0; layout.length()];
        let mut used = 0b11_u64;
        for (number, byte) in filled {
            let (_, offset, size) = layout.0.iter().find(|(found, _, _)| found == number).unwrap();
            area[*offset as usize..][..*size as usize].fill(*byte);
            used |= 1 << number;
        }
        area[XSTATE_BV..][..8].copy_from_slice(&used.to_le_bytes());
        area
    }

    /// Parts of AVX, AVX-512 and protection keys, where Intel's and AMD's processors have them.
    fn makers() -> [Layout; 2] {
        [
            Layout(vec![(2, 576, 256), (5, 1088, 64), (6, 1152, 512), (7, 1664, 1024), (9, 2688, 8)]),
            Layout(vec![(2, 576, 256), (5, 832, 64), (6, 896, 512), (7, 1408, 1024), (9, 2432, 8)]),
        ]
    }

    #[test]
    fn parts_move_between_makers() {
        let [intel, amd] = makers();
        let original = area(&intel, &[(2, 1), (5, 2), (6, 3), (7, 4), (9, 5)]);
        let there = moved(&original, &intel, &amd);
        assert_eq!(there, area(&amd, &[(2, 1), (5, 2), (6, 3), (7, 4), (9, 5)]));
        assert_eq!(moved(&there, &amd, &intel), original);
    }

    #[test]
    fn zeros_are_not_in_use_and_protection_keys_have_a_value_of_their_own() {
        let [intel, amd] = makers();
        let mut original = area(&intel, &[(2, 1), (7, 0), (9, 0)]);
        assert_eq!(in_use(&original, &intel), [2, 9]);
        original[2688..][..4].copy_from_slice(&PKRU_DEFAULT);
        assert_eq!(in_use(&original, &intel), [2]);
        let there = moved(&original, &intel, &amd);
        assert_eq!(there[2432..][..4], PKRU_DEFAULT);
        assert_eq!(in_use(&there, &amd), [2]);
    }

    #[test]
    fn hostile_layouts_are_found() {
        for parts in [
            vec![(2, 0, 64)],
            vec![(2, 576, 256), (5, 600, 64)],
            vec![(2, u32::MAX, u32::MAX)],
            vec![(2, 576, 8), (2, 600, 8)],
            vec![(63, 576, 8)],
            vec![(1, 576, 8)],
        ] {
            assert!(Layout(parts.clone()).check().is_err(), "{parts:?}");
        }
        for layout in makers() {
            layout.check().unwrap();
        }
        Layout::here().check().unwrap();
    }

    #[test]
    fn short_areas_are_not_read_beyond_their_end() {
        let [intel, amd] = makers();
        let whole = area(&intel, &[(2, 1), (7, 4)]);
        for length in [0, 1, 512, 515, 575, 576, 700, 1700] {
            assert_eq!(moved(&whole[..length], &intel, &amd).len(), amd.length());
        }
    }
}
