//! No damage goes unnoticed: every file cut short or made longer at several places, and single bits
//! flipped all over the checkpoint, are refused by `verify` and by opening and reading everything, and
//! the message names the file.

mod common;

use std::error::Error;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use common::write;
use limosa_image::{Checkpoint, verify};

const FILES: [&str; 6] =
    ["manifest", "state", "memory.index", "memory.pages", "blobs/deleted.1", "blobs/layer.tar"];

/// A whole checkpoint in a directory of its own.
fn checkpoint() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("checkpoint");
    write(&path);
    read_all(&path).unwrap();
    verify(&path).unwrap();
    (home, path)
}

/// What a restore does: opens the checkpoint and reads all of it.
fn read_all(path: &Path) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(path)?;
    for extent in checkpoint.all_extents() {
        checkpoint.read_pages(extent, 0..extent.length, &mut vec![0; extent.length as usize])?;
    }
    for name in checkpoint.blob_names() {
        checkpoint.blob(name)?.read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

fn assert_refused(path: &Path, file: &str, what: &str) {
    let verified = verify(path).expect_err(&format!("verify accepts {what}")).to_string();
    assert!(verified.contains(file), "{what}: verify says {verified:?}");
    let read = read_all(path).expect_err(&format!("open and read accept {what}")).to_string();
    assert!(read.contains(file), "{what}: reading says {read:?}");
}

/// Replaces the content of `file`, asserts that this is refused, and puts the old content back.
fn assert_change_refused(path: &Path, file: &str, what: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let full = path.join(file);
    let whole = fs::read(&full).unwrap();
    let mut damaged = whole.clone();
    change(&mut damaged);
    assert_ne!(whole, damaged);
    fs::write(&full, damaged).unwrap();
    assert_refused(path, file, what);
    fs::write(&full, whole).unwrap();
}

#[test]
fn every_truncation_is_found() {
    let (_home, path) = checkpoint();
    for file in FILES {
        let length = path.join(file).metadata().unwrap().len() as usize;
        let mut cuts = vec![0, 1, 7, 8, 24, 40, 48, 56, 88, 4095, 4096, 8192, 1 << 20, length / 2];
        cuts.extend([length - 4096.min(length), length - 4, length - 1]);
        for cut in cuts.into_iter().filter(|cut| *cut < length) {
            assert_change_refused(&path, file, &format!("{file} cut to {cut} of {length} bytes"), |bytes| {
                bytes.truncate(cut);
            });
        }
    }
    read_all(&path).unwrap();
}

#[test]
fn every_addition_is_found() {
    let (_home, path) = checkpoint();
    for file in FILES {
        for more in [1, 4, 40, 4096] {
            assert_change_refused(&path, file, &format!("{file} with {more} bytes more"), |bytes| {
                bytes.resize(bytes.len() + more, 0);
            });
        }
    }
}

/// Flips one bit of `file` in place, asserts that this is refused, and flips it back.
fn assert_flip_refused(path: &Path, file: &str, at: u64, bit: u8) {
    use std::os::unix::fs::FileExt;
    let opened = fs::OpenOptions::new().read(true).write(true).open(path.join(file)).unwrap();
    let mut byte = [0];
    opened.read_exact_at(&mut byte, at).unwrap();
    opened.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
    assert_refused(path, file, &format!("{file} with bit {bit} of byte {at} flipped"));
    opened.write_all_at(&byte, at).unwrap();
}

#[test]
fn a_thousand_flipped_bits_are_found() {
    let (_home, path) = checkpoint();
    // A fixed seed: what fails once can be looked at again.
    let mut random = common::pages(2026, 8).into_iter();
    let mut next = || {
        let bytes = random.by_ref().take(8).collect::<Vec<_>>();
        u64::from_le_bytes(bytes.try_into().unwrap())
    };
    for file in FILES {
        let length = path.join(file).metadata().unwrap().len();
        // 170 of each file, or small ones and headers would hardly ever be hit.
        for _ in 0..170 {
            assert_flip_refused(&path, file, next() % length, (next() % 8) as u8);
        }
    }
    read_all(&path).unwrap();
}

#[test]
fn every_bit_of_the_small_files_counts() {
    let (_home, path) = checkpoint();
    for file in ["manifest", "memory.index"] {
        let length = path.join(file).metadata().unwrap().len();
        for at in 0..length {
            assert_flip_refused(&path, file, at, (at % 8) as u8);
        }
    }
}

#[test]
fn every_missing_file_is_found() {
    let (home, path) = checkpoint();
    for file in FILES {
        let aside = home.path().join("aside");
        fs::rename(path.join(file), &aside).unwrap();
        assert_refused(&path, file, &format!("a checkpoint without {file}"));
        fs::rename(&aside, path.join(file)).unwrap();
    }
}

#[test]
fn a_foreign_file_is_found() {
    let (_home, path) = checkpoint();
    for file in ["notes", "blobs/other", ".hidden"] {
        fs::write(path.join(file), "?").unwrap();
        let message = verify(&path).unwrap_err().to_string();
        assert!(message.contains(file), "{message}");
        fs::remove_file(path.join(file)).unwrap();
    }
    verify(&path).unwrap();
}

/// A checkpoint that was made to lead its reader elsewhere, or to make it wait.
#[test]
fn only_regular_files_are_opened_and_no_link_is_followed() {
    let (home, path) = checkpoint();
    for file in FILES {
        let aside = home.path().join("aside");
        fs::rename(path.join(file), &aside).unwrap();
        symlink(&aside, path.join(file)).unwrap();
        assert_refused(&path, file, &format!("a link in the place of {file}"));
        fs::remove_file(path.join(file)).unwrap();

        rustix::fs::mknodat(rustix::fs::CWD, path.join(file), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        assert_refused(&path, file, &format!("a FIFO in the place of {file}"));
        fs::remove_file(path.join(file)).unwrap();

        fs::create_dir(path.join(file)).unwrap();
        assert_refused(&path, file, &format!("a directory in the place of {file}"));
        fs::remove_dir(path.join(file)).unwrap();
        fs::rename(&aside, path.join(file)).unwrap();
    }
    fs::rename(path.join("blobs"), home.path().join("blobs")).unwrap();
    symlink(home.path().join("blobs"), path.join("blobs")).unwrap();
    assert_refused(&path, "blobs/deleted.1", "a link in the place of blobs");
}
