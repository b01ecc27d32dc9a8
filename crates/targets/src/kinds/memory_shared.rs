//! Memory that processes share: anonymous shared memory (with the option `system-v`, a System V segment) of a parent
//! and its children, and pages that a fork left
//! shared until they are written.

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const FORKED: usize = 512 * PAGE;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let mut shared = if setting.options.iter().any(|option| option == "system-v") {
        Region::segment(64 * PAGE)?
    } else {
        Region::map(64 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, None)?
    };
    sys::fill(shared.bytes_mut(), 1);
    let mut forked = Region::anonymous(FORKED)?;
    sys::fill(forked.bytes_mut(), 2);
    let children = (0..2_u8)
        .map(|number| {
            Child::start(&setting.protocol, &format!("child-{number}"), |_| child(number, shared, forked))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut round = 0_u8;
    Ok(Box::new(move || {
        round = round.wrapping_add(1);
        for (number, child) in children.iter().enumerate() {
            shared.bytes_mut()[number] = round;
            child.verify()?;
            ensure!(
                shared.bytes()[32 + number] == round ^ 0xff,
                "what child {number} wrote to shared memory is not seen by its parent"
            );
        }
        sys::compare("shared memory", &shared.bytes()[PAGE..], &sys::pattern(64 * PAGE, 1)[PAGE..])?;
        sys::compare("memory before the fork", forked.bytes(), &sys::pattern(FORKED, 2))?;
        Ok(String::new())
    }))
}

/// A child changes one page of what it inherited, and answers through the memory that it shares.
fn child(number: u8, mut shared: Region, mut forked: Region) -> Result<Box<Verify>> {
    let own = (number as usize + 1) * 10 * PAGE;
    sys::fill(&mut forked.bytes_mut()[own..][..PAGE], 100 + u64::from(number));
    let mut expected = sys::pattern(FORKED, 2);
    sys::fill(&mut expected[own..][..PAGE], 100 + u64::from(number));
    Ok(Box::new(move || {
        let asked = shared.bytes()[number as usize];
        shared.bytes_mut()[32 + number as usize] = asked ^ 0xff;
        sys::compare("shared memory", &shared.bytes()[PAGE..], &sys::pattern(64 * PAGE, 1)[PAGE..])?;
        sys::compare("forked memory", forked.bytes(), &expected).context("in the child")?;
        Ok(String::new())
    }))
}
