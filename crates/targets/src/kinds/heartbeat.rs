//! A beat every 100 µs on `CLOCK_MONOTONIC`, and the largest gap between two: how long a freeze was, seen from inside.
//!
//! After every beat the file `RESULT.beats` holds three little-endian u64: beats so far, largest gap and time of
//! the last beat, both in nanoseconds. A check starts a new largest gap.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys;

const BEAT: Duration = Duration::from_micros(100);

#[derive(Default)]
struct Beats {
    count: AtomicU64,
    largest_gap: AtomicU64,
    backwards: AtomicU64,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let file = File::create(setting.protocol.beside("beats")).context("creating the file of beats")?;
    let beats = Arc::new(Beats::default());
    let shared = Arc::clone(&beats);
    thread::Builder::new().name("heartbeat".into()).spawn(move || beat(&file, &shared))?;
    let mut seen = 0;
    Ok(Box::new(move || {
        thread::sleep(Duration::from_millis(20));
        let count = beats.count.load(Ordering::Relaxed);
        ensure!(count > seen, "no beat since the last check: still {count}");
        seen = count;
        let backwards = beats.backwards.load(Ordering::Relaxed);
        ensure!(backwards == 0, "CLOCK_MONOTONIC went backwards {backwards} times");
        let gap = beats.largest_gap.swap(0, Ordering::Relaxed);
        Ok(format!("beats={count} largest_gap_us={}", gap / 1000))
    }))
}

fn beat(file: &File, beats: &Beats) {
    let mut last = sys::monotonic();
    loop {
        thread::sleep(BEAT);
        let now = sys::monotonic();
        if now < last {
            beats.backwards.fetch_add(1, Ordering::Relaxed);
        }
        beats.largest_gap.fetch_max(now.saturating_sub(last), Ordering::Relaxed);
        last = now;
        let count = beats.count.fetch_add(1, Ordering::Relaxed) + 1;
        let record = [count, beats.largest_gap.load(Ordering::Relaxed), now].map(u64::to_le_bytes).concat();
        let _ = file.write_at(&record, 0);
    }
}
