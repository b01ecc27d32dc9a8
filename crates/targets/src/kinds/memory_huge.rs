//! Transparent huge pages: of a mapping that was advised to have them, and of one that was not and got them by
//! `MADV_COLLAPSE`; with a page beside them that is small where the kernel did not make it huge.
//!
//! With the option `forked` a child shares all of it.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys::{self, Region};

const HUGE_PAGE: usize = 2 << 20;
const COUNT: usize = 3;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let advised = aligned()?;
    advised.advise(libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
    let mut regions = [advised, aligned()?];
    for (seed, region) in regions.iter_mut().enumerate() {
        sys::fill(&mut region.bytes_mut()[..COUNT * HUGE_PAGE], seed as u64);
        region.part(0, COUNT * HUGE_PAGE).advise(libc::MADV_COLLAPSE).context("MADV_COLLAPSE")?;
        region.bytes_mut()[COUNT * HUGE_PAGE] = 7;
    }
    let huge = regions.map(huge_kb);
    for huge in &huge {
        let huge = huge.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        ensure!(*huge >= COUNT * HUGE_PAGE / 1024, "the kernel made {huge} kB of huge pages only");
    }
    let huge: Vec<usize> = huge.into_iter().flatten().collect();
    let expected = sys::mappings(&regions)?;
    let check = move || -> Result<String> {
        sys::compare_lines("mappings", &sys::mappings(&regions)?, &expected)?;
        for (seed, (region, huge)) in regions.iter().zip(&huge).enumerate() {
            let (filled, rest) = region.bytes().split_at(COUNT * HUGE_PAGE);
            sys::compare("huge pages", filled, &sys::pattern(COUNT * HUGE_PAGE, seed as u64))?;
            ensure!(rest[0] == 7, "the small page begins with {}", rest[0]);
            let now = huge_kb(*region)?;
            ensure!(now == *huge, "{now} kB of huge pages instead of {huge}");
        }
        Ok(String::new())
    };
    if setting.options.first().is_some_and(|option| option == "forked") {
        let again = check.clone();
        let child = Child::start(&setting.protocol, "child", move |_| Ok(Box::new(again)))?;
        return Ok(Box::new(move || {
            child.verify()?;
            check()
        }));
    }
    Ok(Box::new(check))
}

/// Memory that begins where a huge page can, and ends one page after the last.
fn aligned() -> Result<Region> {
    let region = Region::anonymous((COUNT + 1) * HUGE_PAGE + 4096)?;
    let offset = region.address().next_multiple_of(HUGE_PAGE) - region.address();
    if offset > 0 {
        region.part(0, offset).protect(libc::PROT_NONE)?;
    }
    Ok(region.part(offset, COUNT * HUGE_PAGE + 4096))
}

/// How much of the mapping is huge pages, in kB.
fn huge_kb(region: Region) -> Result<usize> {
    let text = fs::read_to_string("/proc/self/smaps").context("reading /proc/self/smaps")?;
    let begins = format!("{:x}-", region.address());
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&begins));
    let line = lines.find_map(|line| line.strip_prefix("AnonHugePages:")).context("no AnonHugePages")?;
    line.split_whitespace().next().context("no number")?.parse().context("AnonHugePages")
}
