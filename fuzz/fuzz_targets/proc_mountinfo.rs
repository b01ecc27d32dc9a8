//! `mountinfo`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_kernel::proc::parse_mountinfo;

fuzz_target!(|bytes: &[u8]| {
    let _ = parse_mountinfo(bytes);
});
