//! System V segments attached in part: what munmap(2) has left of one, parts that are protected otherwise, and one attached
//! for reading only.

use std::ptr;

use anyhow::{Context, Result, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const PAGES: usize = 8;
/// Pages of the first attachment that are unmapped.
const HOLES: [usize; 2] = [0, 4];
/// One that may only be read, until it is allowed again.
const PROTECTED: usize = 2;

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    // SAFETY: takes numbers only.
    let id = sys::check(unsafe { libc::shmget(libc::IPC_PRIVATE, PAGES * PAGE, 0o600) }.into())
        .context("shmget")? as i32;
    // The whole, one page less, and a second attachment of the same, not to be written.
    let parts = Region::attached(id, PAGES * PAGE, 0)?;
    let read_only = Region::attached(id, PAGES * PAGE, libc::SHM_RDONLY)?;
    // SAFETY: takes no structure.
    sys::check(unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) }.into()).context("shmctl")?;
    for page in 0..PAGES {
        sys::fill(parts.part(page * PAGE, PAGE).bytes_mut(), page as u64);
    }
    for hole in HOLES {
        parts.part(hole * PAGE, PAGE).unmap();
    }
    let protected = parts.part(PROTECTED * PAGE, PAGE);
    protected.protect(libc::PROT_READ)?;
    let regions = [parts, read_only];
    let described = sys::mappings(&regions)?;
    let attached = attachments(id)?;
    Ok(Box::new(move || {
        sys::compare_lines("mappings", &sys::mappings(&regions)?, &described)?;
        ensure!(attachments(id)? == attached, "attached {} times, not {attached}", attachments(id)?);
        for page in 0..PAGES {
            let expected = sys::pattern(PAGE, page as u64);
            sys::compare("read only", read_only.part(page * PAGE, PAGE).bytes(), &expected)?;
            if !HOLES.contains(&page) {
                sys::compare("a part", parts.part(page * PAGE, PAGE).bytes(), &expected)?;
            }
        }
        ensure!(read_only.protect(libc::PROT_READ | libc::PROT_WRITE).is_err(), "it can be made writable");
        // It is one segment: what is written here is seen there.
        protected.protect(libc::PROT_READ | libc::PROT_WRITE).context("making a page writable again")?;
        protected.part(0, PAGE).bytes_mut()[0] ^= 0xff;
        let seen = read_only.part(PROTECTED * PAGE, 1).bytes()[0] == protected.bytes()[0];
        protected.part(0, PAGE).bytes_mut()[0] ^= 0xff;
        protected.protect(libc::PROT_READ)?;
        ensure!(seen, "they are two segments");
        Ok(String::new())
    }))
}

/// How often the segment is attached, as the kernel counts it.
fn attachments(id: i32) -> Result<u64> {
    // SAFETY: the kernel writes the structure, for which zeros are valid.
    let status = unsafe {
        let mut status: libc::shmid_ds = std::mem::zeroed();
        sys::check(libc::shmctl(id, libc::IPC_STAT, &raw mut status).into()).context("shmctl")?;
        status
    };
    Ok(status.shm_nattch)
}
