//! What the tests share: content that can be told apart, and a checkpoint with some of everything.
#![allow(dead_code)]

use std::io::Read;
use std::path::Path;

use limosa_image::{Checkpoint, CheckpointWriter, Meta, PAGE, Sink, SpaceId, put};
use serde::{Deserialize, Serialize};

/// Something like what the engine stores for a mapping.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub backing: Backing,
    pub name: Option<String>,
}

#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum Backing {
    Anonymous,
    File { file: u32, offset: u64 },
}

pub fn mappings(count: u64) -> Vec<Mapping> {
    (0..count)
        .map(|number| Mapping {
            start: 0x7f00_0000_0000 + number * 2 * PAGE,
            end: 0x7f00_0000_0000 + (number * 2 + 1) * PAGE,
            backing: if number % 2 == 0 {
                Backing::Anonymous
            } else {
                Backing::File { file: number as u32, offset: number * PAGE }
            },
            name: (number % 3 == 0).then(|| format!("/usr/lib/lib{number}.so")),
        })
        .collect()
}

/// `count` pages, each different from those of any other seed.
pub fn pages(seed: u64, count: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity((count * PAGE) as usize);
    while bytes.len() < (count * PAGE) as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

pub fn meta() -> Meta {
    Meta::new("6.18.0-test", vec!["avx2".into(), "xsave".into()])
}

/// Two spaces, three extents (one of them longer than a chunk), two sections, two blobs.
pub fn fill(sink: &mut dyn Sink) {
    put(sink, "mappings", &mappings(100)).unwrap();
    put(sink, "name", "a small process").unwrap();
    sink.pages(SpaceId(1), 0x40_0000, &pages(1, 3)).unwrap();
    sink.pages(SpaceId(1), 0x40_3000, &pages(2, 300)).unwrap();
    sink.pages(SpaceId(0), 0, &pages(3, 1)).unwrap();
    sink.pages(SpaceId(1), 0x7ffd_0000_0000, &pages(4, 2)).unwrap();
    sink.blob("deleted.1", &mut &b"the content of a deleted file"[..]).unwrap();
    sink.blob("layer.tar", &mut &pages(5, 200)[..]).unwrap();
}

/// Checks that `checkpoint` has exactly what [`fill`] put there.
pub fn assert_filled(checkpoint: &Checkpoint) {
    assert_eq!(checkpoint.state::<Vec<Mapping>>("mappings").unwrap(), mappings(100));
    assert_eq!(checkpoint.state::<&str>("name").unwrap(), "a small process");
    assert_eq!(checkpoint.section_names().collect::<Vec<_>>(), ["mappings", "name"]);
    assert_eq!(checkpoint.spaces(), [SpaceId(0), SpaceId(1)]);
    let [small] = checkpoint.extents(SpaceId(0)) else { panic!("one extent") };
    assert_eq!(read(checkpoint, small), pages(3, 1));
    let [long, stack] = checkpoint.extents(SpaceId(1)) else { panic!("two extents") };
    assert_eq!((long.start, long.length), (0x40_0000, 303 * PAGE));
    assert_eq!(read(checkpoint, long), [pages(1, 3), pages(2, 300)].concat());
    assert_eq!((stack.start, read(checkpoint, stack)), (0x7ffd_0000_0000, pages(4, 2)));
    assert_eq!(checkpoint.blob_names().collect::<Vec<_>>(), ["deleted.1", "layer.tar"]);
    assert_eq!(blob(checkpoint, "deleted.1"), b"the content of a deleted file");
    assert_eq!(blob(checkpoint, "layer.tar"), pages(5, 200));
}

pub fn read(checkpoint: &Checkpoint, extent: &limosa_image::Extent) -> Vec<u8> {
    let mut bytes = vec![0; extent.length as usize];
    checkpoint.read_pages(extent, 0..extent.length, &mut bytes).unwrap();
    bytes
}

pub fn blob(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    checkpoint.blob(name).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// Writes the checkpoint of [`fill`] to `path`.
pub fn write(path: &Path) -> limosa_image::Committed {
    let mut writer = CheckpointWriter::create(path).unwrap();
    fill(&mut writer);
    writer.commit(meta()).unwrap()
}
