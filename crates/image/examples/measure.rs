//! Measures what `docs/format.md` quotes: `cargo run --release -p limosa-image --example measure DIR`.
//!
//! DIR is on the filesystem to be measured; what is written there is removed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use limosa_image::{Checkpoint, CheckpointWriter, Meta, PAGE, Sink, SpaceId, Staging, put};
use serde::{Deserialize, Serialize};

const ROUNDS: usize = 31;

#[derive(Serialize, Deserialize)]
enum Backing {
    Anonymous,
    File { file: u32, offset: u64, shared: bool },
    Stack,
    Vdso,
}

#[derive(Serialize, Deserialize)]
struct Mapping {
    start: u64,
    end: u64,
    protection: u32,
    flags: u32,
    backing: Backing,
    name: Option<String>,
    advice: Vec<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<u32>,
}

fn mappings(count: u64) -> Vec<Mapping> {
    let mapping = |number: u64| Mapping {
        start: 0x7f00_0000_0000 + number * 2 * PAGE,
        end: 0x7f00_0000_0000 + (number * 2 + 1) * PAGE,
        protection: (number % 8) as u32,
        flags: 0x22,
        backing: match number % 4 {
            0 => Backing::Anonymous,
            1 => Backing::File { file: number as u32, offset: number * PAGE, shared: number % 8 == 1 },
            2 => Backing::Stack,
            _ => Backing::Vdso,
        },
        name: number.is_multiple_of(3).then(|| format!("/usr/lib/x86_64-linux-gnu/lib{}.so", number % 50)),
        advice: if number.is_multiple_of(10) { vec![14] } else { Vec::new() },
        key: None,
    };
    (0..count).map(mapping).collect()
}

/// The median and the smallest of [`ROUNDS`] runs.
fn times(mut run: impl FnMut() -> Duration) -> String {
    let mut times = (0..ROUNDS).map(|_| run()).collect::<Vec<_>>();
    times.sort();
    format!("median {:?}, smallest {:?}", times[ROUNDS / 2], times[0])
}

/// A process of 4 MiB: 40 mappings, 30 extents.
fn small(sink: &mut dyn Sink, mappings: &[Mapping], page_data: &[u8]) {
    put(sink, "tasks", &mappings[..5]).expect("state");
    put(sink, "mappings", mappings).expect("state");
    for (number, data) in page_data.chunks(35 * PAGE as usize).enumerate() {
        sink.pages(SpaceId(0), 0x40_0000 + number as u64 * 64 * PAGE, data).expect("pages");
    }
}

fn main() {
    let home = PathBuf::from(std::env::args().nth(1).expect("usage: measure DIR"));
    let path = home.join("limosa-measure");
    let (list, data) = (mappings(40), vec![0x5a; 4 << 20]);
    let meta = Meta::new("6.18", vec!["avx2".into()]);
    let mut parts = Vec::new();
    let total = times(|| {
        let begin = Instant::now();
        let mut writer = CheckpointWriter::create(&path).expect("create");
        let created = begin.elapsed();
        small(&mut writer, &list, &data);
        let filled = begin.elapsed();
        let committed = writer.commit(meta.clone()).expect("commit");
        let whole = begin.elapsed();
        parts.push((created, filled.saturating_sub(created), committed.write, committed.sync));
        std::fs::remove_dir_all(&path).expect("remove");
        whole
    });
    println!("checkpoint of 4 MiB: {total}");
    let empty = times(|| {
        let begin = Instant::now();
        let mut writer = CheckpointWriter::create(&path).expect("create");
        small(&mut writer, &list, &data[..64 << 10]);
        let committed = writer.commit(meta.clone()).expect("commit");
        let whole = begin.elapsed().saturating_sub(committed.sync);
        std::fs::remove_dir_all(&path).expect("remove");
        whole
    });
    println!("checkpoint of 64 KiB, without the synchronization: {empty}");
    parts.sort_by_key(|part| part.0 + part.1 + part.2 + part.3);
    println!("  create, fill, write, sync of the median: {:?}", parts[ROUNDS / 2]);
    measure_reading(&path, &list, &data, &meta);
    let staged = times(|| {
        let begin = Instant::now();
        let mut staging = Staging::new().expect("staging");
        small(&mut staging, &list, &data);
        staging.into_checkpoint(meta.clone()).expect("checkpoint");
        begin.elapsed()
    });
    println!("the same into memory: {staged}");
    measure_state();
    measure_pages(&path, &meta);
}

fn measure_reading(path: &Path, list: &[Mapping], data: &[u8], meta: &Meta) {
    let mut writer = CheckpointWriter::create(path).expect("create");
    small(&mut writer, list, data);
    writer.commit(meta.clone()).expect("commit");
    let opened = times(|| {
        let begin = Instant::now();
        Checkpoint::open(path).expect("open");
        begin.elapsed()
    });
    let verified = times(|| {
        let begin = Instant::now();
        limosa_image::verify(path).expect("verify");
        begin.elapsed()
    });
    println!("open it: {opened}\nverify it: {verified}");
    std::fs::remove_dir_all(path).expect("remove");
}

fn measure_state() {
    let list = mappings(100_000);
    let encode = times(|| {
        let begin = Instant::now();
        limosa_image::cbor::encode(&list).expect("encode");
        begin.elapsed()
    });
    let bytes = limosa_image::cbor::encode(&list).expect("encode");
    let decode = times(|| {
        let begin = Instant::now();
        let list: Vec<Mapping> = limosa_image::cbor::decode(&bytes).expect("decode");
        let time = begin.elapsed();
        drop(list);
        time
    });
    println!("100,000 mappings, {} bytes: encode {encode}; decode {decode}", bytes.len());
}

/// 512 MiB in calls of 256 KiB, and 128 MiB of single pages that do not continue each other.
fn measure_pages(path: &Path, meta: &Meta) {
    let run = |size: u64, piece: u64, stride: u64| {
        let data = vec![0x5a; piece as usize];
        let begin = Instant::now();
        let mut writer = CheckpointWriter::create(path).expect("create");
        for number in 0..size / piece {
            writer.pages(SpaceId(0), number * stride, &data).expect("pages");
        }
        let filled = begin.elapsed();
        writer.commit(meta.clone()).expect("commit");
        let durable = begin.elapsed();
        let begin = Instant::now();
        let checkpoint = Checkpoint::open(path).expect("open");
        let opened = begin.elapsed();
        for extent in checkpoint.all_extents() {
            checkpoint.verify_extent(extent).expect("verify");
        }
        let rate = |time: Duration| (size >> 10) as u32 as f64 * 1024.0 / time.as_secs_f64() / 1e9;
        println!(
            "{} MiB by {} KiB: fill {:.2} GB/s, durable after {durable:?}; open {opened:?}, verify {:.2} GB/s",
            size >> 20,
            piece >> 10,
            rate(filled),
            rate(begin.elapsed().saturating_sub(opened))
        );
        std::fs::remove_dir_all(path).expect("remove");
    };
    for _ in 0..3 {
        run(512 << 20, 256 << 10, 256 << 10);
        run(128 << 20, PAGE, 2 * PAGE);
    }
}
