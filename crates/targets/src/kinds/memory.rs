//! Private anonymous memory: a large pattern, holes that were never touched, protections, the heap's break, the
//! stack, and pages that threads keep rewriting while they are frozen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const PATTERN: usize = 8 << 20;
const BREAK: usize = 256 << 10;

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let mut pattern = Region::anonymous(PATTERN)?;
    sys::fill(pattern.bytes_mut(), 1);

    // Every fourth page written; the others were never touched, and read as zeros.
    let mut sparse = Region::anonymous(1024 * PAGE)?;
    for page in (0..1024).step_by(4) {
        sparse.bytes_mut()[page * PAGE] = 0xa5;
    }
    let mut guarded = Region::anonymous(3 * PAGE)?;
    sys::fill(guarded.bytes_mut(), 2);
    guarded.part(0, PAGE).protect(libc::PROT_NONE)?;
    guarded.part(2 * PAGE, PAGE).protect(libc::PROT_READ)?;
    let reserved = Region::map(64 << 20, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE, None)?;
    let stack_like = Region::map(
        16 * PAGE,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_STACK | libc::MAP_NORESERVE,
        None,
    )?;

    let mut given_back = Region::anonymous(4 * PAGE)?;
    sys::fill(given_back.bytes_mut(), 3);
    let broken = Break::grow()?;
    let writers = Writers::start(3)?;
    let regions = [pattern, sparse, guarded, reserved, stack_like];
    let expected = sys::mappings(&regions)?;
    Ok(Box::new(move || {
        sys::compare_lines("mappings", &sys::mappings(&regions)?, &expected)?;
        sys::compare("pattern", pattern.bytes(), &sys::pattern(PATTERN, 1))?;
        check_sparse(sparse)?;
        sys::compare(
            "read-only page",
            guarded.part(2 * PAGE, PAGE).bytes(),
            &sys::pattern(3 * PAGE, 2)[2 * PAGE..],
        )?;
        broken.check()?;
        check_given_back(given_back)?;
        ensure!(deepen(160) == 12_880, "the stack's frames were damaged");
        writers.check()?;
        Ok(String::new())
    }))
}

fn check_sparse(sparse: Region) -> Result<()> {
    for (number, page) in sparse.bytes().chunks(PAGE).enumerate() {
        let first = if number % 4 == 0 { 0xa5 } else { 0 };
        ensure!(page[0] == first, "sparse page {number} begins with {:#x}", page[0]);
        ensure!(page[1..].iter().all(|byte| *byte == 0), "sparse page {number} is not zero");
    }
    Ok(())
}

/// Memory given back reads as zeros, as allocators rely on; a restore that mapped an image would show old contents.
fn check_given_back(mut region: Region) -> Result<()> {
    region.advise(libc::MADV_DONTNEED)?;
    ensure!(region.bytes().iter().all(|byte| *byte == 0), "pages given back are not zero");
    sys::fill(region.bytes_mut(), 3);
    Ok(())
}

/// Uses `depth` frames of 16 KiB, so that the stack must still grow on its own; gives 1 + … + depth.
#[inline(never)]
fn deepen(depth: u64) -> u64 {
    let mut frame = [0_u8; 16 << 10];
    sys::fill(std::hint::black_box(&mut frame), depth);
    let below = if depth == 1 { 0 } else { deepen(depth - 1) };
    let whole = frame == *sys::pattern(16 << 10, depth);
    if whole { below + depth } else { 0 }
}

/// Memory from `sbrk(2)`.
struct Break {
    start: usize,
}

impl Break {
    fn grow() -> Result<Self> {
        let start = sbrk(BREAK).context("growing the break")?;
        sys::fill(program_break_bytes(start, BREAK), 4);
        Ok(Self { start })
    }

    fn check(&self) -> Result<()> {
        sys::compare("memory from brk", program_break_bytes(self.start, BREAK), &sys::pattern(BREAK, 4))?;
        let next = sbrk(PAGE).context("growing the break again")?;
        ensure!(
            next >= self.start + BREAK,
            "the break went from {:#x} down to {next:#x}",
            self.start + BREAK
        );
        let fresh = program_break_bytes(next, PAGE);
        ensure!(fresh.iter().all(|byte| *byte == 0), "fresh memory from brk is not zero");
        fresh[0] = 1;
        Ok(())
    }
}

fn sbrk(by: usize) -> Result<usize> {
    // SAFETY: the break only grows, by memory that is used here alone.
    let old = unsafe { libc::sbrk(by as isize) } as usize;
    ensure!(old != usize::MAX, "sbrk: {}", std::io::Error::last_os_error());
    Ok(old)
}

fn program_break_bytes(start: usize, length: usize) -> &'static mut [u8] {
    // SAFETY: the range came from sbrk and belongs to its one caller on the main thread.
    unsafe { std::slice::from_raw_parts_mut(start as *mut u8, length) }
}

/// Threads that rewrite a page of their own all the time and notice when it is not what they last wrote.
struct Writers {
    rounds: Arc<Vec<AtomicU64>>,
    damaged: Arc<AtomicU64>,
}

impl Writers {
    fn start(count: usize) -> Result<Self> {
        let rounds: Arc<Vec<_>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
        let damaged = Arc::new(AtomicU64::new(0));
        for number in 0..count {
            let (rounds, damaged) = (Arc::clone(&rounds), Arc::clone(&damaged));
            let mut region = Region::anonymous(64 * PAGE)?;
            thread::Builder::new().name(format!("writer-{number}")).spawn(move || {
                loop {
                    let round = rounds[number].load(Ordering::Relaxed);
                    for page in region.bytes_mut().chunks_mut(PAGE) {
                        if page[..8] != round.to_le_bytes() || page[PAGE - 8..] != round.to_le_bytes() {
                            damaged.fetch_add(1, Ordering::Relaxed);
                        }
                        page[..8].copy_from_slice(&(round + 1).to_le_bytes());
                        page[PAGE - 8..].copy_from_slice(&(round + 1).to_le_bytes());
                    }
                    rounds[number].store(round + 1, Ordering::Relaxed);
                    thread::sleep(Duration::from_micros(200));
                }
            })?;
        }
        Ok(Self { rounds, damaged })
    }

    fn check(&self) -> Result<()> {
        let before: Vec<_> = self.rounds.iter().map(|r| r.load(Ordering::Relaxed)).collect();
        thread::sleep(Duration::from_millis(50));
        for (number, (round, before)) in self.rounds.iter().zip(before).enumerate() {
            ensure!(round.load(Ordering::Relaxed) > before, "writer {number} stands still at {before}");
        }
        let damaged = self.damaged.load(Ordering::Relaxed);
        ensure!(damaged == 0, "{damaged} pages lost a write");
        Ok(())
    }
}
