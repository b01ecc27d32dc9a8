//! Memory that forked processes share copy-on-write: a parent, three children and a grandchild, of which each has changed
//! something since. Besides the content of every page, each checks that it still shares what it shared.
//!
//! The option is the size of the large part in MiB.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::child::Child;
use crate::protocol::Protocol;
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const MIB: usize = 8;
const PAGES: usize = 64;
const CHILDREN: usize = 3;

/// What everybody had when the family was one process.
#[derive(Clone, Copy)]
struct Estate {
    /// Nobody changes it.
    common: Region,
    /// The parent has written all of it since.
    rewritten: Region,
    /// The parent has given back all of it since.
    dropped: Region,
    /// Each child has changed other pages of it.
    changed: Region,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let mib = setting.options.first().map_or(Ok(MIB), |option| option.parse()).context("the size in MiB")?;
    let part = |length: usize, seed: u64| -> Result<Region> {
        let mut region = Region::anonymous(length)?;
        sys::fill(region.bytes_mut(), seed);
        Ok(region)
    };
    let mut estate = Estate {
        common: part(mib << 20, 1)?,
        rewritten: part(PAGES * PAGE, 2)?,
        dropped: part(PAGES * PAGE, 3)?,
        changed: part(PAGES * PAGE, 4)?,
    };
    let children: Vec<Child> = (0..CHILDREN)
        .map(|number| {
            Child::start(&setting.protocol, &format!("child-{number}"), |own| child(estate, own, number))
        })
        .collect::<Result<_>>()?;
    sys::fill(estate.rewritten.bytes_mut(), 12);
    estate.dropped.advise(libc::MADV_DONTNEED)?;
    let regions = [estate.common, estate.rewritten, estate.dropped, estate.changed];
    let expected = sys::mappings(&regions)?;
    Ok(Box::new(move || {
        let length = PAGES * PAGE;
        sys::compare_lines("the parent's mappings", &sys::mappings(&regions)?, &expected)?;
        check_common(estate.common)?;
        sys::compare("the parent's rewritten pages", estate.rewritten.bytes(), &sys::pattern(length, 12))?;
        ensure!(
            estate.dropped.bytes().iter().all(|byte| *byte == 0),
            "the parent's dropped pages are not zero"
        );
        sys::compare("the parent's unchanged pages", estate.changed.bytes(), &sys::pattern(length, 4))?;
        ensure!(shared(estate.rewritten)? == 0, "somebody shares what the parent wrote for itself");
        children.iter().try_for_each(|child| child.verify().map(|_| ()))?;
        Ok(format!("{} kB shared", shared(estate.common)?))
    }))
}

/// The pages of the common part are all there, and shared.
fn check_common(common: Region) -> Result<()> {
    let length = common.bytes().len();
    sys::compare("the common part", common.bytes(), &sys::pattern(length, 1))?;
    let shared = shared(common)?;
    ensure!(shared == length / 1024, "{shared} of {} kB of the common part are shared", length / 1024);
    Ok(())
}

/// How much of a region is mapped by somebody else as well, in kB.
fn shared(region: Region) -> Result<usize> {
    let text = fs::read_to_string("/proc/self/smaps").context("reading /proc/self/smaps")?;
    let begins = format!("{:x}-", region.address());
    let lines = text.lines().skip_while(|line| !line.starts_with(&begins));
    let counts = lines.take_while(|line| !line.starts_with("VmFlags:")).filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let kb = rest.split_whitespace().next()?.parse::<usize>().ok()?;
        name.starts_with("Shared_").then_some(kb)
    });
    Ok(counts.sum())
}

/// A child writes page `number`, gives back another one and protects a third. The last one has a child of its own, which
/// shares these changes.
fn child(mut estate: Estate, protocol: &Protocol, number: usize) -> Result<Box<Verify>> {
    let (written, given_back, protected) = (number, PAGES / 2 + number, PAGES - 8 + number);
    sys::fill(page(&mut estate.changed, written), 100 + number as u64);
    estate.changed.part(given_back * PAGE, PAGE).advise(libc::MADV_DONTNEED)?;
    estate.changed.part(protected * PAGE, PAGE).protect(libc::PROT_READ)?;
    let regions = [
        estate.common,
        estate.rewritten,
        estate.dropped,
        estate.changed,
        estate.changed.part(protected * PAGE, PAGE),
        estate.changed.part((protected + 1) * PAGE, (PAGES - protected - 1) * PAGE),
    ];
    let expected = sys::mappings(&regions)?;
    let mut changed = sys::pattern(PAGES * PAGE, 4);
    sys::fill(&mut changed[written * PAGE..(written + 1) * PAGE], 100 + number as u64);
    changed[given_back * PAGE..(given_back + 1) * PAGE].fill(0);
    let check = move || -> Result<String> {
        let length = PAGES * PAGE;
        sys::compare_lines("mappings", &sys::mappings(&regions)?, &expected)?;
        check_common(estate.common)?;
        sys::compare("what the parent rewrote", estate.rewritten.bytes(), &sys::pattern(length, 2))?;
        sys::compare("what the parent dropped", estate.dropped.bytes(), &sys::pattern(length, 3))?;
        sys::compare("the changed part", estate.changed.bytes(), &changed)?;
        for (what, region) in [("rewrote", estate.rewritten), ("dropped", estate.dropped)] {
            let shared = shared(region)?;
            ensure!(
                shared == length / 1024,
                "{shared} kB of what the parent {what} are shared by the others"
            );
        }
        Ok(String::new())
    };
    if number + 1 < CHILDREN {
        return Ok(Box::new(check));
    }
    let grandchild = Child::start(protocol, "grandchild", |_| Ok(Box::new(check.clone())))?;
    Ok(Box::new(move || {
        grandchild.verify()?;
        check()
    }))
}

fn page(region: &mut Region, number: usize) -> &mut [u8] {
    &mut region.bytes_mut()[number * PAGE..(number + 1) * PAGE]
}
