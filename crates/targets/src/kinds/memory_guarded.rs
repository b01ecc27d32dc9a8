//! Memory that its own process can do less with: guard regions (`MADV_GUARD_INSTALL`, Linux 6.13), sealed mappings (mseal(2),
//! 6.10), and memory that the kernel may drop (`MAP_DROPPABLE`, 6.11).

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const PAGES: usize = 16;
const MADV_GUARD_INSTALL: i32 = 102;
/// Pages that are guarded.
const GUARDED: [usize; 3] = [3, 4, 9];

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let mut guarded = Region::anonymous(PAGES * PAGE)?;
    sys::fill(guarded.bytes_mut(), 1);
    for page in GUARDED {
        guarded.part(page * PAGE, PAGE).advise(MADV_GUARD_INSTALL).context("MADV_GUARD_INSTALL")?;
    }
    let mut sealed = Region::anonymous(PAGES * PAGE)?;
    sys::fill(sealed.bytes_mut(), 2);
    let constant = sealed.part(4 * PAGE, 4 * PAGE);
    constant.protect(libc::PROT_READ)?;
    constant.seal().context("mseal")?;
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let mut droppable = Region::map(PAGES * PAGE, read_write, libc::MAP_DROPPABLE, None)?;
    sys::fill(droppable.bytes_mut(), 3);
    let regions = [guarded, sealed, constant, sealed.part(8 * PAGE, 8 * PAGE), droppable];
    let expected = sys::mappings(&regions)?;
    Ok(Box::new(move || {
        sys::compare_lines("mappings", &sys::mappings(&regions)?, &expected)?;
        check_guards(guarded)?;
        sys::compare("the sealed memory", sealed.bytes(), &sys::pattern(PAGES * PAGE, 2))?;
        let changed = constant.protect(read_write).err().and_then(|error| error.raw_os_error());
        ensure!(changed == Some(libc::EPERM), "mprotect of sealed memory: {changed:?}");
        check_droppable(droppable)?;
        Ok(String::new())
    }))
}

/// A page that is guarded cannot be faulted in; the others are whole.
fn check_guards(region: Region) -> Result<()> {
    let expected = sys::pattern(PAGES * PAGE, 1);
    for page in 0..PAGES {
        let part = region.part(page * PAGE, PAGE);
        if GUARDED.contains(&page) {
            ensure!(part.advise(libc::MADV_POPULATE_READ).is_err(), "page {page} is not guarded");
        } else {
            sys::compare("a page beside guards", part.bytes(), &expected[page * PAGE..][..PAGE])?;
        }
    }
    Ok(())
}

/// The kernel may have dropped any page, which is one of zeros then.
fn check_droppable(region: Region) -> Result<()> {
    let expected = sys::pattern(PAGES * PAGE, 3);
    for (page, expected) in region.bytes().chunks(PAGE).zip(expected.chunks(PAGE)) {
        if page.iter().any(|byte| *byte != 0) {
            sys::compare("droppable memory", page, expected)?;
        }
    }
    Ok(())
}
