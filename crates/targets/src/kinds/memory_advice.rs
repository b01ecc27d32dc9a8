//! What `madvise(2)`, `mlock(2)` and `MAP_DROPPABLE` said about a mapping, as the kernel shows it in `/proc/self/smaps`.

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const LENGTH: usize = 16 * PAGE;

/// Advice, and the flag of smaps that shows it.
const ADVICE: &[(i32, &str)] = &[
    (libc::MADV_SEQUENTIAL, "sr"),
    (libc::MADV_RANDOM, "rr"),
    (libc::MADV_DONTFORK, "dc"),
    (libc::MADV_DONTDUMP, "dd"),
    (libc::MADV_WIPEONFORK, "wf"),
    (libc::MADV_HUGEPAGE, "hg"),
    (libc::MADV_NOHUGEPAGE, "nh"),
    (libc::MADV_MERGEABLE, "mg"),
];

/// With the option `future` or `future-on-fault`, what is mapped later is locked, too (mlockall(2)).
pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let future = match setting.options.first().map(String::as_str) {
        Some("future") => Some(libc::MCL_FUTURE),
        Some("future-on-fault") => Some(libc::MCL_FUTURE | libc::MCL_ONFAULT),
        _ => None,
    };
    if let Some(flags) = future {
        // SAFETY: it takes a number, and changes no memory.
        sys::check(i64::from(unsafe { libc::mlockall(flags) })).context("mlockall")?;
        return Ok(Box::new(move || check_future(flags)));
    }
    let mut regions = Vec::new();
    for (seed, (advice, flag)) in ADVICE.iter().enumerate() {
        let mut region = fresh(seed as u64)?;
        region.advise(*advice).with_context(|| format!("madvise {advice}"))?;
        ensure!(has_flag(region, flag)?, "the kernel does not show {flag} after madvise {advice}");
        sys::fill(region.bytes_mut(), seed as u64);
        regions.push(region);
    }
    let seed = regions.len() as u64;
    let locked = fresh(seed)?;
    lock(locked, 0)?;
    ensure!(has_flag(locked, "lo")?, "the kernel does not show a locked mapping");
    let on_fault = fresh(seed + 1)?;
    lock(on_fault, libc::MLOCK_ONFAULT)?;
    // It has had letters since Linux 6.2.
    ensure!(
        has_flag(on_fault, "lf")? || has_flag(on_fault, "??")?,
        "the kernel does not show a mapping locked on fault"
    );
    regions.extend([locked, on_fault]);
    let droppable = droppable(seed + 2)?;

    let expected = sys::mappings(&regions)?;
    Ok(Box::new(move || {
        sys::compare_lines("mappings", &sys::mappings(&regions)?, &expected)?;
        for (seed, region) in regions.iter().enumerate() {
            sys::compare("content", region.bytes(), &sys::pattern(LENGTH, seed as u64))?;
        }
        if let Some((region, flags)) = &droppable {
            sys::compare_lines("droppable memory", &sys::mappings(&[*region])?, flags)?;
            // Whole, or gone: a page of it never comes back as something else.
            for (page, expected) in
                region.bytes().chunks(PAGE).zip(sys::pattern(LENGTH, seed + 2).chunks(PAGE))
            {
                ensure!(page == expected || page == [0; PAGE], "droppable memory has changed");
            }
        }
        Ok(String::new())
    }))
}

/// What is mapped now is locked, and there at once or not.
fn check_future(flags: i32) -> Result<String> {
    let region = Region::map(LENGTH, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, None)?;
    ensure!(has_flag(region, "lo")?, "a new mapping is not locked");
    let mut there = [0_u8; LENGTH / PAGE];
    // SAFETY: the region is mapped, and there is a byte for each of its pages.
    sys::check(i64::from(unsafe { libc::mincore(region.address() as *mut _, LENGTH, there.as_mut_ptr()) }))?;
    let expected = u8::from(flags & libc::MCL_ONFAULT == 0);
    ensure!(
        there.iter().all(|page| page & 1 == expected),
        "pages of a new mapping that are there: {there:?}"
    );
    region.unmap();
    Ok(String::new())
}

/// Memory that the kernel may drop (Linux 6.11), and how it shows it; none on older kernels.
fn droppable(seed: u64) -> Result<Option<(Region, String)>> {
    const MAP_DROPPABLE: i32 = 0x08;
    let Ok(mut region) = Region::map(LENGTH, libc::PROT_READ | libc::PROT_WRITE, MAP_DROPPABLE, None) else {
        return Ok(None);
    };
    sys::fill(region.bytes_mut(), seed);
    ensure!(has_flag(region, "dp")?, "the kernel does not show droppable memory");
    Ok(Some((region, sys::mappings(&[region])?)))
}

fn fresh(seed: u64) -> Result<Region> {
    let mut region = Region::anonymous(LENGTH)?;
    sys::fill(region.bytes_mut(), seed);
    Ok(region)
}

fn lock(region: Region, flags: u32) -> Result<()> {
    // `mlock2` even without flags: glibc has it, and it says what it means.
    // SAFETY: the region is mapped.
    sys::check(i64::from(unsafe { libc::mlock2(region.address() as *const _, LENGTH, flags as _) }))
        .context("mlock2")?;
    Ok(())
}

fn has_flag(region: Region, flag: &str) -> Result<bool> {
    Ok(sys::mappings(&[region])?.lines().skip(1).step_by(2).any(|flags| flags.split(' ').any(|f| f == flag)))
}
