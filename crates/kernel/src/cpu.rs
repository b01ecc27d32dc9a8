//! What the processor offers to programs: its features, and the parts of the registers that XSAVE knows.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::fs::File;
use std::io::{BufRead, BufReader};

use crate::error::{Error, Result};
use crate::fault;

/// Leaf of cpuid that tells of XSAVE (Intel SDM volume 1, 13.2).
const LEAF_XSAVE: u32 = 0xD;
/// Bit of ecx of leaf 1: the kernel has turned XSAVE on.
const OSXSAVE: u32 = 1 << 27;
/// Highest leaf.
const LEAF_HIGHEST: u32 = 0;

/// A part of the registers and its place in an XSAVE area of the standard format. Places differ between processors of
/// different makers, and numbers do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Its bit in XCR0 and XSTATE_BV, 2 to 62; 0 and 1 (x87, SSE) have their place in the legacy region.
    pub number: u32,
    /// Bytes from the beginning of the area.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
}

/// The components beyond x87 and SSE that programs may use here (XCR0), by number. None where there is no XSAVE.
pub fn components() -> Vec<Component> {
    if __cpuid(LEAF_HIGHEST).eax < LEAF_XSAVE || __cpuid(1).ecx & OSXSAVE == 0 {
        return Vec::new();
    }
    let enabled = enabled();
    (2..63)
        .filter(|number| enabled & 1 << number != 0)
        .map(|number| {
            let answer = __cpuid_count(LEAF_XSAVE, number);
            Component { number, offset: answer.ebx, size: answer.eax }
        })
        .collect()
}

fn enabled() -> u64 {
    #[target_feature(enable = "xsave")]
    fn read() -> u64 {
        // SAFETY: register 0 is there wherever XSAVE is.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: the kernel has turned XSAVE on, as the caller has found out.
    unsafe { read() }
}

/// The features of the first processor, in the spelling of `/proc/cpuinfo`; all processors of a machine have the same.
pub fn features() -> Result<Vec<String>> {
    const PATH: &str = "/proc/cpuinfo";
    fault::point();
    let failed = |error| Error::new("read", PATH, error);
    // Only as far as needed: the file has a part for each processor.
    for line in BufReader::new(File::open(PATH).map_err(failed)?).lines() {
        let line = line.map_err(failed)?;
        if let Some((name, flags)) = line.split_once(':')
            && name.trim_end() == "flags"
        {
            return Ok(flags.split_ascii_whitespace().map(str::to_owned).collect());
        }
    }
    Err(Error::malformed("read", PATH, "no line of flags"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against what the kernel itself says and does.
    #[test]
    fn components_agree_with_the_features() {
        let features = features().unwrap();
        let has = |name: &str| features.iter().any(|feature| feature == name);
        let components = components();
        let there = |number| components.iter().any(|component| component.number == number);
        assert!(has("sse2"));
        for (number, name) in
            [(2, "avx"), (5, "avx512f"), (6, "avx512f"), (7, "avx512f"), (9, "ospke"), (18, "amx_tile")]
        {
            assert_eq!(there(number), has(name), "component {number} and {name}");
        }
        for component in &components {
            assert!(component.offset >= 576 && component.size > 0, "{component:?}");
        }
    }
}
