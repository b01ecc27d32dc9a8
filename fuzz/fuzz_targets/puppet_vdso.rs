//! The vDSO's ELF image, as another process or a checkpoint has it: this process's own, with bytes written over it.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use limosa_puppet::{VdsoImage, elf_extent};

fn own() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let line = maps.lines().find(|line| line.ends_with("[vdso]")).expect("a vDSO");
        let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
        let address = |text| u64::from_str_radix(text, 16).expect("an address");
        let (start, end) = (address(start), address(end));
        let mut image = vec![0; (end - start) as usize];
        File::open("/proc/self/mem").and_then(|memory| memory.read_exact_at(&mut image, start)).expect("memory");
        image
    })
}

fuzz_target!(|input: (Option<u16>, Vec<(u16, Vec<u8>)>)| {
    let (length, writes) = input;
    let mut image = own().to_vec();
    for (at, bytes) in &writes {
        let rest = image.get_mut(usize::from(*at)..).unwrap_or_default();
        let length = bytes.len().min(rest.len());
        rest[..length].copy_from_slice(&bytes[..length]);
    }
    image.truncate(length.map_or(usize::MAX, usize::from));
    assert!(elf_extent(&image).is_none_or(|extent| extent <= image.len()));
    let Some(vdso) = VdsoImage::parse(&image) else { return };
    assert!(vdso.code.iter().all(|code| code.start <= code.end && code.end <= image.len()));
    for function in &vdso.functions {
        let end = function.offset + function.room;
        assert!(vdso.code.iter().any(|code| code.start <= function.offset && end <= code.end));
    }
});
