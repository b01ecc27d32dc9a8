//! How much more memory its control groups allow a process.
//!
//! What a fork takes of a full group, the kernel takes from the largest process in it: the source.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use limosa_kernel::proc::{CgroupLine, Mount, ProcDir};

/// The files of a version of the memory controller.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Lines of `memory.stat`: pages of files, which are taken before any process is ended.
    reclaimable: [&'static str; 2],
}

const VERSION_1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_active_file", "total_inactive_file"],
};
const VERSION_2: Files =
    Files { limit: "memory.max", usage: "memory.current", reclaimable: ["active_file", "inactive_file"] };

/// Bytes that are left in the fullest of the control groups that a process is in; none where nothing is limited, or nothing
/// can be found out.
pub(crate) fn left(process: &ProcDir) -> Option<u64> {
    let groups = process.cgroup().ok()?;
    let mounts = ProcDir::open(std::process::id().cast_signed()).and_then(|own| own.mountinfo()).ok()?;
    groups.iter().filter_map(|group| left_in(group, &mounts)).min()
}

fn left_in(group: &CgroupLine, mounts: &[Mount]) -> Option<u64> {
    let has_memory = |list: &[u8]| list.split(|byte| *byte == b',').any(|name| name == b"memory");
    let (files, mount) = if group.hierarchy == 0 {
        (VERSION_2, mounts.iter().find(|mount| mount.fs_type == b"cgroup2")?)
    } else if has_memory(&group.controllers) {
        let of_memory = |mount: &&Mount| mount.fs_type == b"cgroup" && has_memory(&mount.super_options);
        (VERSION_1, mounts.iter().find(of_memory)?)
    } else {
        return None;
    };
    let (top, path) = (Path::new(OsStr::from_bytes(&mount.point)), Path::new(OsStr::from_bytes(&group.path)));
    let below = path.strip_prefix(OsStr::from_bytes(&mount.root)).ok()?;
    // A limit of a group above binds it, too.
    let levels: Vec<PathBuf> = below.ancestors().map(|level| top.join(level)).collect();
    levels.iter().filter_map(|level| files.left(level)).min()
}

impl Files {
    /// What one group has left. One without a limit says `max`, or a number that is larger than any machine's memory.
    fn left(&self, directory: &Path) -> Option<u64> {
        let read = |name| fs::read_to_string(directory.join(name)).ok();
        let number = |name| read(name)?.trim().parse::<u64>().ok();
        let (limit, usage) = (number(self.limit)?, number(self.usage)?);
        let stat = read("memory.stat").unwrap_or_default();
        let reclaimable: u64 = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(name, _)| self.reclaimable.contains(name))
            .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
            .fold(0, u64::saturating_add);
        Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_the_limit_without_what_cannot_be_reclaimed() {
        let place = std::env::temp_dir().join(format!("limosa-memory-room-{}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        let write = |name: &str, text: &str| fs::write(place.join(name), text).unwrap();
        assert_eq!(VERSION_2.left(&place), None);
        write("memory.max", "max\n");
        write("memory.current", "900\n");
        assert_eq!(VERSION_2.left(&place), None);
        write("memory.max", "1000\n");
        assert_eq!(VERSION_2.left(&place), Some(100));
        write("memory.stat", "anon 500\nactive_file 30\ninactive_file 20\nworkingset 7\n");
        assert_eq!(VERSION_2.left(&place), Some(150));
        write("memory.current", "2000\n");
        assert_eq!(VERSION_2.left(&place), Some(0));
        fs::remove_dir_all(&place).unwrap();
    }
}
