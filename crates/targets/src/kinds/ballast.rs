//! Nothing but private memory: as many MiB as the first option says, all written, none of it zeros. What `make bench`
//! moves. Each answer says how long a fork of it takes.

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

/// Each MiB has a pattern of its own, made again for a check one at a time: a check costs little memory.
const MIB: usize = 1 << 20;

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let mebibytes: usize = match setting.options.first() {
        Some(text) => text.parse().with_context(|| format!("'{text}' is not a number of MiB"))?,
        None => 4,
    };
    ensure!(mebibytes > 0, "a ballast of nothing");
    let mut ballast = Region::anonymous(mebibytes * MIB)?;
    for (number, part) in ballast.bytes_mut().chunks_mut(MIB).enumerate() {
        sys::fill(part, number as u64 + 1);
    }
    Ok(Box::new(move || {
        for (number, part) in ballast.bytes().chunks(MIB).enumerate() {
            sys::compare("ballast", part, &sys::pattern(MIB, number as u64 + 1))?;
        }
        let fork = sys::fork_for_a_moment();
        Ok(format!("mebibytes={mebibytes} fork_ns={}", fork.as_nanos()))
    }))
}
