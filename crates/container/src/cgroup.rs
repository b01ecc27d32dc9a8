//! A container's control groups: one group in each hierarchy that matters (cgroups(7)).
//!
//! Where the unified hierarchy has the memory controller it is used alone. Otherwise the limits go to the
//! memory and pids hierarchies of version 1, as far as they are mounted; the unified hierarchy, without
//! controllers, still counts and names the container's processes.
//! A group is called `limosa/NAME-RANDOM`: two state directories may have containers of the same name.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::Name;

/// The group below which all containers' groups lie.
const PARENT: &str = "limosa";

/// The groups of one container. Data: dropping it does not remove them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its directories, one in each hierarchy.
    pub directories: Vec<PathBuf>,
}

/// A hierarchy that is mounted here.
struct Hierarchy {
    mount_point: PathBuf,
    unified: bool,
    /// Its controllers, of those that matter here.
    memory: bool,
    pids: bool,
}

impl Cgroup {
    /// Makes the groups of a new container, with a limit of `memory` bytes. `announce` is told which they will
    /// be before the first of them is made. On failure none is left.
    pub fn create<E: From<CgroupError>>(
        name: &Name,
        memory: Option<u64>,
        announce: impl FnOnce(&Self) -> Result<(), E>,
    ) -> Result<Self, E> {
        let hierarchies = hierarchies()?;
        if memory.is_some() && !hierarchies.iter().any(|hierarchy| hierarchy.memory) {
            return Err(CgroupError::NoMemoryController.into());
        }
        let group = Path::new(PARENT).join(format!("{name}-{}", crate::random_hex(4)));
        let directories = hierarchies.iter().map(|hierarchy| hierarchy.mount_point.join(&group)).collect();
        let cgroup = Self { directories };
        announce(&cgroup)?;
        for (hierarchy, directory) in hierarchies.iter().zip(&cgroup.directories) {
            if let Err(error) = create_in(hierarchy, directory, memory) {
                let _ = cgroup.remove();
                return Err(error.into());
            }
        }
        Ok(cgroup)
    }

    /// The `cgroup.procs` of each group, open for writing: what a process needs to join.
    pub fn open(&self) -> Result<Vec<File>, CgroupError> {
        self.directories
            .iter()
            .map(|directory| {
                let file = directory.join("cgroup.procs");
                OpenOptions::new()
                    .write(true)
                    .open(&file)
                    .map_err(|source| CgroupError::io("open", &file, source))
            })
            .collect()
    }

    /// The PIDs of the processes in it, in the caller's PID namespace.
    pub fn processes(&self) -> Vec<i32> {
        let Some(directory) = self.directories.first() else { return Vec::new() };
        let mut found = Vec::new();
        for group in inside_out(directory) {
            let list = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            found.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        found
    }

    /// What its path contains in any hierarchy, and no other group's: `/limosa/NAME-RANDOM`.
    pub fn mark(&self) -> Option<String> {
        let name = self.directories.first()?.file_name()?.to_str()?;
        Some(format!("/{PARENT}/{name}"))
    }

    /// Freezes the group's processes, or lets them run on (`cgroup.freeze`, version 2). Stays so when this
    /// process ends.
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        match self.freezer() {
            Some(file) => fs::write(&file, if frozen { "1" } else { "0" })
                .map_err(|source| CgroupError::io("write", &file, source)),
            None if frozen => Err(CgroupError::NoFreezer),
            None => Ok(()),
        }
    }

    /// Whether [`Self::freeze`] has frozen it, or somebody else has by the same file.
    pub fn is_frozen(&self) -> bool {
        self.freezer().and_then(|file| fs::read_to_string(file).ok()).is_some_and(|text| text.trim() == "1")
    }

    /// Fails where [`Self::freeze`] would find nothing to freeze by.
    pub fn check_freezer(&self) -> Result<(), CgroupError> {
        self.freezer().map(drop).ok_or(CgroupError::NoFreezer)
    }

    fn freezer(&self) -> Option<PathBuf> {
        let mut files = self.directories.iter().map(|directory| directory.join("cgroup.freeze"));
        files.find(|file| file.exists())
    }

    /// Removes the groups; one that is gone already is no error. The last processes may need a moment to
    /// leave: waits up to two seconds for them.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for directory in &self.directories {
            let mut tries = 200;
            // Those that the container has made inside first.
            for group in inside_out(directory) {
                loop {
                    match fs::remove_dir(&group) {
                        Ok(()) => break,
                        Err(source) if source.kind() == io::ErrorKind::NotFound => break,
                        Err(source) if source.kind() == io::ErrorKind::ResourceBusy && tries > 0 => {
                            tries -= 1;
                            std::thread::sleep(Duration::from_millis(10));
                        }
                        Err(source) => return Err(CgroupError::io("remove", &group, source)),
                    }
                }
            }
            if let Some(parent) = directory.parent().filter(|parent| parent.ends_with(PARENT)) {
                // Refused while other containers are there.
                let _ = fs::remove_dir(parent);
            }
        }
        Ok(())
    }
}

/// A group and all that are in it, each before the one around it.
fn inside_out(directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![directory.to_owned()];
    let mut next = 0;
    while let Some(group) = found.get(next) {
        let inner = fs::read_dir(group).into_iter().flatten().flatten();
        let inner = inner.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut inner: Vec<PathBuf> = inner.map(|entry| entry.path()).collect();
        found.append(&mut inner);
        next += 1;
    }
    found.reverse();
    found
}

/// Makes one group.
fn create_in(hierarchy: &Hierarchy, directory: &Path, memory: Option<u64>) -> Result<(), CgroupError> {
    let parent = hierarchy.mount_point.join(PARENT);
    // The parent goes away with its last child, perhaps just now with another container's.
    let mut made = Err(io::ErrorKind::NotFound.into());
    for _ in 0..16 {
        match fs::create_dir(&parent) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(CgroupError::io("make", &parent, source));
            }
            _ => {}
        }
        if hierarchy.unified && (hierarchy.memory || hierarchy.pids) {
            for level in [&hierarchy.mount_point, &parent] {
                delegate(level, hierarchy, memory.is_some())?;
            }
        }
        made = fs::create_dir(directory);
        if !matches!(&made, Err(source) if source.kind() == io::ErrorKind::NotFound) {
            break;
        }
    }
    made.map_err(|source| CgroupError::io("make", directory, source))?;
    if let (Some(memory), true) = (memory, hierarchy.memory) {
        let file = directory.join(if hierarchy.unified { "memory.max" } else { "memory.limit_in_bytes" });
        fs::write(&file, memory.to_string()).map_err(|source| CgroupError::Limit {
            file,
            value: memory,
            source,
        })?;
    }
    Ok(())
}

/// Lets the groups below `level` have the controllers. Only a limit that was asked for makes this a must.
fn delegate(level: &Path, hierarchy: &Hierarchy, must: bool) -> Result<(), CgroupError> {
    let file = level.join("cgroup.subtree_control");
    for (controller, available) in [("+memory", hierarchy.memory), ("+pids", hierarchy.pids)] {
        if !available {
            continue;
        }
        match fs::write(&file, controller) {
            Err(source) if must && controller == "+memory" && source.kind() != io::ErrorKind::NotFound => {
                return Err(CgroupError::Delegate { file, controller: "memory", source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The hierarchies a container gets a group in.
fn hierarchies() -> Result<Vec<Hierarchy>, CgroupError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(|source| CgroupError::io("read", path, source))?;
    let mut list: Vec<Hierarchy> = text.lines().filter_map(parse_hierarchy).collect();
    if list.iter().any(|hierarchy| hierarchy.unified && hierarchy.memory) {
        list.retain(|hierarchy| hierarchy.unified);
    } else {
        list.retain(|hierarchy| hierarchy.unified || hierarchy.memory || hierarchy.pids);
    }
    // A hierarchy that is mounted in several places is still one.
    let mut seen = (false, false, false);
    list.retain(|hierarchy| {
        let slot = match hierarchy {
            Hierarchy { unified: true, .. } => &mut seen.0,
            Hierarchy { memory: true, .. } => &mut seen.1,
            _ => &mut seen.2,
        };
        !std::mem::replace(slot, true)
    });
    Ok(list)
}

/// A line of mountinfo (proc_pid_mountinfo(5)): mount point in field 5; type and options after the dash.
fn parse_hierarchy(line: &str) -> Option<Hierarchy> {
    let (fields, rest) = line.split_once(" - ")?;
    let mount_point = PathBuf::from(fields.split(' ').nth(4)?);
    let mut rest = rest.split(' ');
    let kind = rest.next()?;
    match kind {
        "cgroup2" => {
            let controllers = fs::read_to_string(mount_point.join("cgroup.controllers")).unwrap_or_default();
            let has = |name| controllers.split_ascii_whitespace().any(|controller| controller == name);
            Some(Hierarchy { unified: true, memory: has("memory"), pids: has("pids"), mount_point })
        }
        "cgroup" => {
            let options = rest.nth(1)?;
            let has = |name| options.split(',').any(|option| option == name);
            Some(Hierarchy { unified: false, memory: has("memory"), pids: has("pids"), mount_point })
        }
        _ => None,
    }
}

/// A control group could not be made, joined or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No version 2 hierarchy.
    #[error(
        "the container has no control group of version 2, without which it cannot be frozen for a migration: mount that \
         hierarchy (`mount -t cgroup2 none /sys/fs/cgroup/unified`) and start the container again"
    )]
    NoFreezer,
    /// Nothing here can limit memory.
    #[error(
        "this host has no memory controller mounted, so a memory limit cannot be kept: leave out --memory, or mount the cgroup2 filesystem at /sys/fs/cgroup"
    )]
    NoMemoryController,
    /// A controller is not for sub-groups to use.
    #[error("cannot enable the {controller} controller through {}: run limosa in the root cgroup, or have it delegated", file.display())]
    Delegate {
        /// The file written to.
        file: PathBuf,
        /// The controller.
        controller: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no such hierarchy.
    #[error(
        "the container has made control groups in a hierarchy that this host does not have ({kind:?}): mount it, or have the \
         container remove them before the checkpoint"
    )]
    NoHierarchy {
        /// Which one.
        kind: crate::groups::Kind,
    },
    /// What a checkpoint says of control groups cannot be.
    #[error(
        "the checkpoint is inconsistent: control groups: {what}; it was damaged, or written by a program with a fault"
    )]
    Impossible {
        /// What does not fit.
        what: String,
    },
    /// A group that a container had made could not be made as it was.
    #[error("cannot write {value:?} to {}, as the container had it: give control groups here the same controllers", file.display())]
    Setting {
        /// The file written to.
        file: PathBuf,
        /// The value.
        value: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A limit was refused.
    #[error("cannot set {} to {value}", file.display())]
    Limit {
        /// The file written to.
        file: PathBuf,
        /// The value.
        value: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_line_of_mountinfo_is_a_hierarchy_or_none(line: String, kind in "cgroup2?", rest: String) {
            let _ = parse_hierarchy(&line);
            if let Some(found) = parse_hierarchy(&format!("1 2 3 4 /nowhere - {kind} {rest}")) {
                proptest::prop_assert_eq!(found.unified, kind == "cgroup2");
            }
        }
    }

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let memory =
            parse_hierarchy("35 31 0:31 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory");
        let memory = memory.expect("a hierarchy");
        assert!(memory.memory && !memory.pids && !memory.unified);
        assert_eq!(memory.mount_point, Path::new("/sys/fs/cgroup/memory"));
        assert!(parse_hierarchy("22 27 0:21 / /proc rw,relatime - proc proc rw").is_none());
        assert!(parse_hierarchy("").is_none());
    }
}
