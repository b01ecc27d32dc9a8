//! `fdinfo` of every kind of file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_kernel::proc::FdInfo;

fuzz_target!(|bytes: &[u8]| {
    let _ = FdInfo::parse(bytes);
});
