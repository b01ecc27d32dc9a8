//! Archives of layers: `[kind, size, path, link]` and content become entries with right checksums, or the bytes are taken as
//! they are.
#![no_main]

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use limosa_archive::extract;
use tar::{EntryType, Header};

/// Appends an entry whose header says what the fuzzer wants.
fn append(stream: &mut Vec<u8>, kind: u8, path: &[u8], link: &[u8], content: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::new(kind));
    header.set_size(content.len() as u64);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let old = header.as_old_mut();
    for (field, bytes) in [(&mut old.name, path), (&mut old.linkname, link)] {
        let length = bytes.len().min(field.len());
        field[..length].copy_from_slice(&bytes[..length]);
    }
    header.set_cksum();
    stream.extend_from_slice(header.as_bytes());
    stream.extend_from_slice(content);
    stream.resize(stream.len().next_multiple_of(512), 0);
}

struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fuzz_target!(|input: (bool, Vec<(u8, Vec<u8>, Vec<u8>, Vec<u8>)>, Vec<u8>)| {
    let (as_it_is, entries, rest) = input;
    let mut stream = Vec::new();
    if !as_it_is {
        for (kind, path, link, content) in &entries {
            append(&mut stream, *kind, path, link, content);
        }
        append(&mut stream, b'5', b"./", b"", b"");
    }
    stream.extend_from_slice(&rest);
    let place = Place(std::env::temp_dir().join(format!("limosa-fuzz-layer-{}", std::process::id())));
    let upper = place.0.join("upper");
    std::fs::create_dir_all(&upper).expect("a directory");
    let _ = extract(stream.as_slice(), &upper);
    let beside: Vec<_> = std::fs::read_dir(&place.0).expect("the directory").collect();
    assert_eq!(beside.len(), 1, "something is outside of the layer");
});
