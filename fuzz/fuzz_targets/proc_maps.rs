//! `maps` and `smaps`; every mapping that is accepted has a length.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_kernel::proc::{parse_maps, parse_smaps};

fuzz_target!(|bytes: &[u8]| {
    for mapping in parse_maps(bytes).into_iter().chain(parse_smaps(bytes)).flatten() {
        assert!(mapping.start < mapping.end);
    }
});
