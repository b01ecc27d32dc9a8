//! A checkpoint's manifest: as it comes, and as the body of one whose checksum fits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_image::{FORMAT_VERSION, Manifest};

fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::from_bytes(bytes);
    let header =
        [&b"LIMOSACP"[..], &FORMAT_VERSION.to_le_bytes(), &[0; 4], &(bytes.len() as u64).to_le_bytes()]
            .concat();
    let checksum = blake3::Hasher::new().update(&header).update(bytes).finalize();
    if let Ok(manifest) = Manifest::from_bytes(&[&header[..], checksum.as_bytes(), bytes].concat()) {
        let again = manifest.to_bytes().expect("what was read can be written");
        assert_eq!(Manifest::from_bytes(&again).expect("and read again"), manifest);
    }
});
