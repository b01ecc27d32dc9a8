//! A checkpoint's memory index, for page files of several lengths; the magic and the counts that fit are given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_image::check_index;

fuzz_target!(|input: (u64, u16, &[u8])| {
    let (pages_length, extents, bytes) = input;
    let _ = check_index(bytes, pages_length);
    let size = usize::from(extents) * 40;
    if bytes.len() < size {
        return;
    }
    let checksums = (bytes.len() - size) / 4;
    let mut index = b"LIMOSAIX\x01\0\0\0\0\0\0\0".to_vec();
    for number in [u64::from(extents), checksums as u64, pages_length, 0] {
        index.extend_from_slice(&number.to_le_bytes());
    }
    index.extend_from_slice(&bytes[..size + checksums * 4]);
    if let Ok(count) = check_index(&index, pages_length) {
        assert_eq!(count, usize::from(extents));
        // Extents overlap nowhere, so that many need that many pages.
        assert!(count as u64 <= pages_length / 4096);
    }
});
