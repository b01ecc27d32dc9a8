//! Limits, cgroups, timers, the auxiliary vector, time-namespace offsets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_kernel::proc::{Limits, TimensOffsets, parse_auxv, parse_cgroup, parse_timers};

fuzz_target!(|bytes: &[u8]| {
    let _ = Limits::parse(bytes);
    let _ = TimensOffsets::parse(bytes);
    let _ = parse_auxv(bytes);
    let _ = parse_cgroup(bytes);
    let _ = parse_timers(bytes);
});
