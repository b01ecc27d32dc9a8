//! Words of `/proc/PID/pagemap`: both readings agree.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_kernel::pagemap::{Categories, Frame, categories};

fuzz_target!(|input: (Option<u64>, Vec<u64>)| {
    let (zero_frame, words) = input;
    for word in words {
        let page = categories(word, zero_frame);
        assert_eq!(page.contains(Categories::PRESENT), matches!(Frame::of(word), Frame::Present(_)));
        assert_eq!(page.contains(Categories::SWAPPED), matches!(Frame::of(word), Frame::Swapped(_)));
    }
});
