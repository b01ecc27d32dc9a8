//! Mappings of files: private ones with modified pages, shared ones, memfds with seals, a mapping of a deleted file.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{Setting, Verify};
use crate::sys::{self, Region};

const PAGE: usize = 4096;
const PAGES: usize = 64;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

struct State {
    path: PathBuf,
    private: Region,
    shared: Region,
    file: File,
    memfd: OwnedFd,
    windows: [Region; 2],
    private_window: Region,
    deleted: Region,
    /// Its path leads to another file.
    replaced: Region,
    round: u8,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let path = setting.protocol.beside("mapped");
    fs::write(&path, sys::pattern(PAGES * PAGE, 1)).context("writing the file to map")?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut private = Region::map(PAGES * PAGE, READ_WRITE, libc::MAP_PRIVATE, Some((file.as_fd(), 0)))?;
    for page in (0..PAGES).step_by(3) {
        sys::fill(&mut private.bytes_mut()[page * PAGE..][..PAGE], page as u64);
    }
    let shared_path = setting.protocol.beside("shared");
    fs::write(&shared_path, vec![0; 4 * PAGE])?;
    let file = OpenOptions::new().read(true).write(true).open(&shared_path)?;
    // The second page on, so that the offset counts.
    let shared = Region::map(3 * PAGE, READ_WRITE, libc::MAP_SHARED, Some((file.as_fd(), PAGE)))?;

    let memfd = rustix::fs::memfd_create("limosa-target", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memfd, 16 * PAGE as u64)?;
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
    let window = || Region::map(8 * PAGE, READ_WRITE, libc::MAP_SHARED, Some((memfd.as_fd(), 4 * PAGE)));
    let mut windows = [window()?, window()?];
    sys::fill(windows[0].bytes_mut(), 7);
    let mut private_window = Region::map(16 * PAGE, READ_WRITE, libc::MAP_PRIVATE, Some((memfd.as_fd(), 0)))?;
    private_window.bytes_mut()[0] = 0x77;

    let deleted_path = setting.protocol.beside("deleted");
    fs::write(&deleted_path, sys::pattern(2 * PAGE, 8))?;
    let deleted_file = File::open(&deleted_path)?;
    let deleted = Region::map(2 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE, Some((deleted_file.as_fd(), 0)))?;
    fs::remove_file(&deleted_path)?;
    drop(deleted_file);

    let replaced_path = setting.protocol.beside("replaced");
    fs::write(&replaced_path, sys::pattern(2 * PAGE, 9))?;
    let replaced_file = File::open(&replaced_path)?;
    let replaced =
        Region::map(2 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE, Some((replaced_file.as_fd(), 0)))?;
    fs::write(setting.protocol.beside("newer"), sys::pattern(2 * PAGE, 10))?;
    fs::rename(setting.protocol.beside("newer"), &replaced_path)?;
    drop(replaced_file);

    let round = 0;
    let mut state =
        State { path, private, shared, file, memfd, windows, private_window, deleted, replaced, round };
    // The deleted file's and the memfd's inodes may change, so only the mappings of named files are compared as text.
    let named = [private, shared];
    let expected = sys::mappings(&named)?;
    Ok(Box::new(move || {
        sys::compare_lines("mappings", &sys::mappings(&named)?, &expected)?;
        state.check()?;
        Ok(String::new())
    }))
}

impl State {
    fn check(&mut self) -> Result<()> {
        self.round = self.round.wrapping_add(1);
        self.check_private()?;
        self.check_shared()?;
        self.check_memfd()?;
        sys::compare("replaced file's mapping", self.replaced.bytes(), &sys::pattern(2 * PAGE, 9))?;
        sys::compare("deleted file's mapping", self.deleted.bytes(), &sys::pattern(2 * PAGE, 8))
    }

    fn check_private(&self) -> Result<()> {
        let original = sys::pattern(PAGES * PAGE, 1);
        for (page, bytes) in self.private.bytes().chunks(PAGE).enumerate() {
            if page % 3 == 0 {
                sys::compare("modified page", bytes, &sys::pattern(PAGE, page as u64))?;
            } else {
                sys::compare("page of the file", bytes, &original[page * PAGE..][..PAGE])?;
            }
        }
        sys::compare("the file itself", &fs::read(&self.path)?, &original)
    }

    fn check_shared(&mut self) -> Result<()> {
        self.shared.bytes_mut()[PAGE] = self.round;
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, 2 * PAGE as u64)?;
        ensure!(byte[0] == self.round, "a write to the shared mapping does not reach the file");
        self.file.write_all_at(&[self.round ^ 0xff], 3 * PAGE as u64)?;
        let seen = self.shared.bytes()[2 * PAGE];
        ensure!(seen == self.round ^ 0xff, "a write to the file does not reach the shared mapping");
        Ok(())
    }

    fn check_memfd(&mut self) -> Result<()> {
        let [first, second] = &mut self.windows;
        sys::compare(
            "memfd",
            &second.bytes()[1..],
            &{
                let mut expected = sys::pattern(8 * PAGE, 7);
                expected[0] = second.bytes()[0];
                expected
            }[1..],
        )?;
        first.bytes_mut()[0] = self.round;
        ensure!(second.bytes()[0] == self.round, "two mappings of one memfd are not the same memory");
        let mut byte = [0];
        rustix::io::pread(&self.memfd, &mut byte, 4 * PAGE as u64)?;
        ensure!(byte[0] == self.round, "the memfd's mapping and its descriptor are not the same memory");
        ensure!(self.private_window.bytes()[0] == 0x77, "a private page of a memfd lost its change");
        ensure!(self.private_window.bytes()[PAGE] == 0, "a private mapping of a memfd changed");
        let seals = rustix::fs::fcntl_get_seals(&self.memfd)?;
        ensure!(seals == SealFlags::SHRINK | SealFlags::GROW, "the memfd's seals are {seals:?}");
        let size = rustix::fs::fstat(&self.memfd)?.st_size;
        ensure!(size == 16 * PAGE as i64, "the memfd has {size} bytes");
        Ok(())
    }
}
