//! `stat` and `status`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_kernel::proc::{Stat, Status};

fuzz_target!(|bytes: &[u8]| {
    let _ = Stat::parse(bytes).map(|stat| stat.tty());
    let _ = Status::parse(bytes);
});
