//! The identity of a read-only layer: whether another host's directory holds the same.
//!
//! A migrated container goes on reading and executing files of its read-only layer, so the destination's must
//! hold the same. To compare every byte would take minutes; this compares what tells two installations
//! apart, in a fraction of a second:
//!
//! - `release`: the bytes of `etc/os-release`;
//! - `packages`: the bytes of the package database (`var/lib/dpkg/status`, `lib/apk/db/installed` or
//!   `usr/lib/apk/db/installed`), in which every package has its version;
//! - `files`: path, type, mode, owner, size (of regular files) and target (of links) of what is in the
//!   directories of programs and libraries ([`LISTED`]), breadth first, at most [`MAX_FILES`] of them. Directories
//!   called `__pycache__` are left out: they come and go.
//!
//! Contents of files, times and inode numbers are not compared. A file that was edited in place to the same
//! size is not noticed; the files that a process has *mapped* are compared by the checkpoint itself.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The directories whose files are compared.
pub const LISTED: [&str; 11] = [
    "bin",
    "sbin",
    "lib",
    "lib64",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "usr/libexec",
    "usr/local/bin",
    "usr/local/lib",
];

/// The most files that are compared.
pub const MAX_FILES: usize = 20_000;

/// Package databases, of which usually one exists.
const DATABASES: [&str; 3] = ["var/lib/dpkg/status", "lib/apk/db/installed", "usr/lib/apk/db/installed"];

/// The longest file that is read, bytes.
const MAX_READ: u64 = 64 << 20;

/// What a read-only layer holds: BLAKE3 digests, as hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Of the release file.
    pub release: String,
    /// Of the package database.
    pub packages: String,
    /// Of the listing of files.
    pub files: String,
}

impl Identity {
    /// What differs between two layers, in words for a message, or `None` if they are the same.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        if self.release != other.release {
            Some("they are of different releases (etc/os-release)")
        } else if self.packages != other.packages {
            Some("different packages, or versions of packages, are installed (var/lib/dpkg/status)")
        } else if self.files != other.files {
            Some("the programs or libraries differ (below bin, sbin, lib, usr, usr/local)")
        } else {
            None
        }
    }
}

/// The identity of the layer in directory `root`.
pub fn identity(root: &Path) -> Result<Identity, IdentityError> {
    let release = digest_files(root, &["etc/os-release", "usr/lib/os-release"])?;
    let packages = digest_files(root, &DATABASES)?;
    let files = digest_listing(root)?;
    Ok(Identity { release, packages, files })
}

/// The digest of those of `paths` that exist.
fn digest_files(root: &Path, paths: &[&str]) -> Result<String, IdentityError> {
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        let full = root.join(path);
        let mut content = Vec::new();
        match fs::File::open(&full).and_then(|file| file.take(MAX_READ).read_to_end(&mut content)) {
            Ok(_) => {
                add(&mut hasher, path.as_bytes());
                add(&mut hasher, &content);
            }
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(IdentityError { path: full, source }),
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn digest_listing(root: &Path) -> Result<String, IdentityError> {
    let mut hasher = blake3::Hasher::new();
    let mut pending: VecDeque<PathBuf> = LISTED.iter().map(PathBuf::from).collect();
    let mut files = 0;
    while let Some(path) = pending.pop_front() {
        let full = root.join(&path);
        let failed = |source| IdentityError { path: full.clone(), source };
        let metadata = match fs::symlink_metadata(&full) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(failed)?,
        };
        files += 1;
        if files > MAX_FILES {
            break;
        }
        add(&mut hasher, path.as_os_str().as_bytes());
        let size = if metadata.is_file() { metadata.size() } else { 0 };
        for number in [metadata.mode().into(), metadata.uid().into(), metadata.gid().into(), size] {
            hasher.update(&u64::to_le_bytes(number));
        }
        if metadata.is_symlink() {
            add(&mut hasher, fs::read_link(&full).map_err(failed)?.as_os_str().as_bytes());
        } else if metadata.is_dir() {
            let mut names = Vec::new();
            for entry in fs::read_dir(&full).map_err(failed)? {
                let name = entry.map_err(failed)?.file_name();
                if name != "__pycache__" {
                    names.push(name);
                }
            }
            names.sort_unstable();
            pending.extend(names.into_iter().map(|name| path.join(name)));
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Adds bytes with their length, so that no two lists of byte strings give the same digest.
fn add(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

/// A read-only layer could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {} to compare the read-only layers", path.display())]
pub struct IdentityError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}
