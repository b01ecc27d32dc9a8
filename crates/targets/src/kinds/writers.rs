//! Threads that rewrite memory of all kinds at full speed. Each writes its pages one after the other, generation after
//! generation, and before it writes a page it checks every word of the former one. So a checkpoint in which a page is of
//! another instant than the registers, by one word, shows in the next round.
//!
//! With the option `churn` they map, unmap, move, fork, and give back memory between rounds.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::MemfdFlags;

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
const LENGTH: usize = 1 << 20;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// What a writer says of itself.
#[derive(Default)]
struct Progress {
    generation: AtomicU64,
    wrong: AtomicU64,
}

struct Writer {
    name: &'static str,
    progress: Arc<Progress>,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let churn = setting.options.iter().any(|option| option == "churn");
    let inherited = Region::anonymous(LENGTH)?;
    let mut inherited_too = inherited;
    rewrite(&mut inherited_too, 1, 0);
    let child = Child::start(&setting.protocol, "child", move |_| {
        let writers = vec![start("inherited", inherited, 1, false)?];
        Ok(Box::new(move || verify(&writers)))
    })?;
    let path = setting.protocol.beside("written");
    std::fs::write(&path, vec![0; LENGTH])?;
    let file = std::fs::File::options().read(true).write(true).open(&path)?;
    let memfd = rustix::fs::memfd_create("limosa-target", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memfd, LENGTH as u64)?;
    let shared = Region::map(LENGTH, READ_WRITE, libc::MAP_SHARED, None)?;
    let of_memfd = Region::map(LENGTH, READ_WRITE, libc::MAP_SHARED, Some((memfd.as_fd(), 0)))?;
    let of_file = Region::map(LENGTH, READ_WRITE, libc::MAP_PRIVATE, Some((file.as_fd(), 0)))?;
    let roomy = Region::anonymous(2 * HUGE_PAGE)?;
    let huge = roomy.part(roomy.address().next_multiple_of(HUGE_PAGE) - roomy.address(), HUGE_PAGE);
    huge.advise(libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
    let not_inherited = Region::anonymous(LENGTH)?;
    not_inherited.advise(libc::MADV_DONTFORK).context("MADV_DONTFORK")?;
    let wiped = Region::anonymous(LENGTH)?;
    wiped.advise(libc::MADV_WIPEONFORK).context("MADV_WIPEONFORK")?;
    let writers = vec![
        start("private", Region::anonymous(LENGTH)?, 0, churn)?,
        start("huge", huge, 0, false)?,
        start("shared", shared, 0, false)?,
        start("memfd", of_memfd, 0, false)?,
        start("file", of_file, 0, false)?,
        start("also inherited", inherited, 1, false)?,
        start("not inherited", not_inherited, 0, false)?,
        start("wiped", wiped, 0, false)?,
    ];
    Ok(Box::new(move || {
        child.verify()?;
        verify(&writers)
    }))
}

fn verify(writers: &[Writer]) -> Result<String> {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let before: Vec<_> = writers.iter().map(|writer| read(&writer.progress.generation)).collect();
    for (writer, before) in writers.iter().zip(before) {
        // Two rounds: then every word was checked once since.
        for _ in 0..1000 {
            let wrong = read(&writer.progress.wrong);
            ensure!(wrong == 0, "{wrong} words of the memory '{}' are of another instant", writer.name);
            if read(&writer.progress.generation) > before + 2 {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        ensure!(read(&writer.progress.generation) > before + 2, "'{}' stands still", writer.name);
    }
    Ok(String::new())
}

/// Starts a writer of memory that holds `generation`.
fn start(name: &'static str, mut region: Region, mut generation: u64, churn: bool) -> Result<Writer> {
    let progress = Arc::new(Progress::default());
    let shared = Arc::clone(&progress);
    let work = move || {
        let mut emptied = 0;
        loop {
            generation += 1;
            let wrong = rewrite(&mut region, generation, emptied);
            shared.wrong.fetch_add(wrong, Ordering::Relaxed);
            shared.generation.store(generation, Ordering::Relaxed);
            if churn {
                emptied = self::churn(&mut region, generation);
            }
            // Leaves some of what may be a single core to the others.
            thread::sleep(Duration::from_micros(300));
        }
    };
    thread::Builder::new().name(name.into()).spawn(work).context("starting a thread")?;
    Ok(Writer { name, progress })
}

/// What a word is in a generation; in the first one, zero.
fn word(generation: u64, at: usize) -> u64 {
    generation.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul(at as u64 | 1)
}

/// Checks that all words are of the former generation, those of the first `emptied` bytes zero, and writes this one's.
/// Gives how many were not.
fn rewrite(region: &mut Region, generation: u64, emptied: usize) -> u64 {
    let mut wrong = 0;
    for (page, words) in region.words_mut().chunks_mut(PAGE / 8).enumerate() {
        let first = page * PAGE / 8;
        let former = if page * PAGE < emptied { 0 } else { generation - 1 };
        for (at, value) in words.iter().enumerate() {
            wrong += u64::from(*value != word(former, first + at));
        }
        for (at, value) in words.iter_mut().enumerate() {
            *value = word(generation, first + at);
        }
    }
    wrong
}

/// Changes the address space; gives how many of the first bytes are zero now.
fn churn(region: &mut Region, generation: u64) -> usize {
    let half = LENGTH / 2;
    match generation % 4 {
        0 => {
            if let Ok(mut passing) = Region::map(half, READ_WRITE, libc::MAP_PRIVATE, None) {
                rewrite(&mut passing, 1, half);
                passing.unmap();
            }
            0
        }
        1 => {
            if let Ok(moved) = region.moved() {
                *region = moved;
            }
            0
        }
        2 => usize::from(region.part(0, half).advise(libc::MADV_DONTNEED).is_ok()) * half,
        _ => {
            let _ = sys::fork_for_a_moment();
            0
        }
    }
}
