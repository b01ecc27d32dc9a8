//! Finding a path of an inode.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Most entries of directories that are looked at for one inode.
const SEARCH_MAX: usize = 300_000;

/// The path, seen from `root`, of the inode with that number on the filesystem mounted at `point`, which is a path
/// below `root`. Breadth first: what programs watch or keep lies rarely deep. None where it is not found among the
/// first few hundred thousand entries.
pub(super) fn search(root: &Path, point: &Path, inode: u64) -> Option<Vec<u8>> {
    let found = breadth_first(point, inode)?;
    let path = found.strip_prefix(root).ok()?;
    Some([b"/", path.as_os_str().as_bytes()].concat())
}

fn breadth_first(point: &Path, inode: u64) -> Option<PathBuf> {
    let top = std::fs::metadata(point).ok()?;
    if top.ino() == inode {
        return Some(point.to_owned());
    }
    let mut left = SEARCH_MAX;
    let mut queue = std::collections::VecDeque::from([point.to_owned()]);
    while let Some(directory) = queue.pop_front() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            left = left.checked_sub(1)?;
            if entry.ino() == inode {
                return Some(entry.path());
            }
            let same_filesystem = || entry.metadata().is_ok_and(|found| found.dev() == top.dev());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && same_filesystem() {
                queue.push_back(entry.path());
            }
        }
    }
    None
}

/// The nearest directory above `path` that is there, seen from `root`; paths are absolute and without `..`.
pub(super) fn nearest_directory(root: &Path, path: &[u8]) -> Vec<u8> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let is_there = |above: &&Path| {
        let relative = above.strip_prefix("/").unwrap_or(above);
        std::fs::symlink_metadata(root.join(relative)).is_ok_and(|found| found.is_dir())
    };
    let above = path.ancestors().skip(1).find(is_there).unwrap_or(Path::new("/"));
    above.as_os_str().as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_found_by_breadth_and_a_lost_directory_by_what_is_left() {
        let root = std::env::temp_dir().join(format!("limosa-paths-{}", std::process::id()));
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/b/file"), "x").unwrap();
        let inode = std::fs::metadata(root.join("a/b/file")).unwrap().ino();
        assert_eq!(search(&root, &root, inode).as_deref(), Some(&b"/a/b/file"[..]));
        assert_eq!(nearest_directory(&root, b"/a/b/gone/deeper"), b"/a/b");
        assert_eq!(nearest_directory(&root, b"/gone"), b"/");
        std::fs::remove_dir_all(root).unwrap();
    }
}
