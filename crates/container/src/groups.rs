//! The control groups that a container has made inside its own (cgroups(7)): which there are, what is set in them, and which
//! process is in which.
//!
//! A container that has mounted a hierarchy can make groups there. A restore makes them again once the container's processes exist,
//! moves the processes, and then sets what was set, from the outermost group on: in version 2 a group has its
//! files only if the one around it gives it the controllers, which takes that no process is there.
//!
//! What is carried is in two tables; of a file that is in none nothing is read or written. Memory that was charged to an
//! inner group is charged to the container's own after a restore.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use limosa_engine::Refusal;
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroup, CgroupError};

/// Name of the section that holds them: an array of [`Hierarchy`].
pub const SECTION: &str = "control_groups";

/// More than any container has; against hostile checkpoints.
const GROUPS_MAX: usize = 10_000;
const DEPTH_MAX: usize = 64;
const NAME_MAX: usize = 255;
const VALUE_MAX: usize = 4096;

/// What a group has that nobody has set.
#[derive(Clone, Copy)]
enum Unset {
    Value(&'static str),
    /// What the group around it has.
    Inherited,
}
use Unset::{Inherited, Value};

/// Files of version 2, in the order in which they are written (`Documentation/admin-guide/cgroup-v2.rst` of the kernel).
const UNIFIED: [(&str, Unset); 20] = [
    ("cgroup.max.depth", Value("max")),
    ("cgroup.max.descendants", Value("max")),
    ("cpu.idle", Value("0")),
    ("cpu.max", Value("max 100000")),
    ("cpu.max.burst", Value("0")),
    ("cpu.weight", Value("100")),
    ("cpuset.cpus", Value("")),
    ("cpuset.mems", Value("")),
    ("cpuset.cpus.partition", Value("member")),
    ("io.weight", Value("default 100")),
    ("memory.high", Value("max")),
    ("memory.low", Value("0")),
    ("memory.max", Value("max")),
    ("memory.min", Value("0")),
    ("memory.oom.group", Value("0")),
    ("memory.swap.high", Value("max")),
    ("memory.swap.max", Value("max")),
    ("memory.zswap.max", Value("max")),
    ("memory.zswap.writeback", Value("1")),
    ("pids.max", Value("max")),
];

/// Files of the hierarchies of version 1 that a container has a group in. `memsw` cannot be less than `memory`.
const FORMER: [(&str, Unset); 9] = [
    ("cgroup.clone_children", Inherited),
    ("notify_on_release", Inherited),
    ("memory.limit_in_bytes", Value(UNLIMITED)),
    ("memory.memsw.limit_in_bytes", Value(UNLIMITED)),
    ("memory.soft_limit_in_bytes", Value(UNLIMITED)),
    ("memory.kmem.tcp.limit_in_bytes", Value(UNLIMITED)),
    ("memory.swappiness", Inherited),
    ("memory.move_charge_at_immigrate", Value("0")),
    ("pids.max", Value("max")),
];
/// `PAGE_COUNTER_MAX` pages.
const UNLIMITED: &str = "9223372036854771712";

/// Files in which only this may stand, and what it means if something else does.
const REFUSED: [(&str, &[&str], &str); 6] = [
    ("cgroup.type", &["domain", "domain threaded"], "its threads are in different groups (cgroup.type)"),
    ("cgroup.freeze", &["0"], "it is frozen (cgroup.freeze)"),
    ("io.max", &[""], "it limits devices of this machine (io.max)"),
    ("io.latency", &[""], "it limits devices of this machine (io.latency)"),
    (
        "memory.oom_control",
        &["oom_kill_disable 0"],
        "its processes wait where there is no memory (memory.oom_control)",
    ),
    ("memory.use_hierarchy", &["1"], "it counts without the groups in it (memory.use_hierarchy)"),
];

const CONTROLLERS: [&str; 9] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc", "dmem"];
/// Files that are given to another user so that it can make groups, and the group itself.
const DELEGATED: [&str; 5] = ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "tasks"];

/// What a container has made in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    /// Which one.
    pub kind: Kind,
    /// Groups, each after the one around it. The first is the container's own.
    pub groups: Vec<Group>,
    /// Processes that are not in the container's own: PID in the container, and index of the group.
    pub members: Vec<(i32, usize)>,
}

/// A hierarchy in which containers get a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// That of version 2.
    Unified,
    /// Of version 1, with the memory controller.
    Memory,
    /// Of version 1, with the controller of numbers of processes.
    Pids,
}

/// A control group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its path from the container's own.
    pub path: serde_bytes::ByteBuf,
    /// Files and what stands in them, where that was set.
    pub settings: Vec<(String, String)>,
    /// Controllers that the groups in it have (version 2).
    pub controllers: Vec<String>,
    /// Files that belong to other users than 0: which (none for the group itself), user, group.
    pub owners: Vec<(String, u32, u32)>,
}

impl Kind {
    /// The kind of hierarchy that `directory` is a group of.
    fn of(directory: &Path) -> Option<Self> {
        let has = |file: &str| directory.join(file).exists();
        if has("cgroup.controllers") {
            Some(Self::Unified)
        } else if has("memory.limit_in_bytes") {
            Some(Self::Memory)
        } else {
            has("pids.max").then_some(Self::Pids)
        }
    }

    fn files(self) -> &'static [(&'static str, Unset)] {
        if self == Self::Unified { &UNIFIED } else { &FORMER }
    }
}

/// The paths of all groups in `directory`, from it, each after the one around it; its own, which is empty, is the first.
fn walk(directory: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let mut found = vec![PathBuf::new()];
    let mut next = 0;
    while let Some(path) = found.get(next).cloned() {
        next += 1;
        let place = directory.join(&path);
        let listed = fs::read_dir(&place).map_err(|source| CgroupError::io("list", &place, source))?;
        let mut inner: Vec<PathBuf> = listed
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| path.join(entry.file_name()))
            .collect();
        inner.sort();
        found.append(&mut inner);
    }
    Ok(found)
}

/// The first line of a file of a group; none where the kernel has no such file.
fn read(file: &Path) -> Result<Option<String>, CgroupError> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text.lines().next().unwrap_or_default().trim().to_owned())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        // A file of a controller that has been turned off.
        Err(source) if source.raw_os_error() == Some(95) => Ok(None),
        Err(source) => Err(CgroupError::io("read", file, source)),
    }
}

/// What of the groups that container `init` has made cannot be carried.
pub(crate) fn examine(cgroup: &Cgroup, init: i32) -> Result<Vec<Refusal>, CgroupError> {
    let mut refusals = Vec::new();
    for directory in &cgroup.directories {
        for path in walk(directory)?.iter().skip(1) {
            for (file, allowed, reason) in REFUSED {
                let value = read(&directory.join(path).join(file))?;
                if value.is_some_and(|value| !allowed.contains(&value.as_str())) {
                    let reason =
                        format!("of the control group {} that is in its own, {reason}", path.display());
                    refusals.push(Refusal::process(
                        init,
                        reason,
                        "undo that, or remove the group, and try again",
                    ));
                }
            }
        }
    }
    Ok(refusals)
}

/// What a container has made, whose processes are `members`: by PID here, the PID there.
pub(crate) fn capture(cgroup: &Cgroup, members: &HashMap<i32, i32>) -> Result<Vec<Hierarchy>, CgroupError> {
    let directories =
        cgroup.directories.iter().filter_map(|directory| Some((directory, Kind::of(directory)?)));
    directories.map(|(directory, kind)| capture_one(directory, kind, members)).collect()
}

fn capture_one(directory: &Path, kind: Kind, members: &HashMap<i32, i32>) -> Result<Hierarchy, CgroupError> {
    let mut state = Hierarchy { kind, groups: Vec::new(), members: Vec::new() };
    for path in walk(directory)? {
        let place = directory.join(&path);
        let mut settings = Vec::new();
        for (file, default) in kind.files() {
            let Some(value) = read(&place.join(file))? else { continue };
            let default = match default {
                Value(value) => Some((*value).to_owned()),
                Inherited => place.parent().map(|around| read(&around.join(file))).transpose()?.flatten(),
            };
            if default.as_deref() != Some(value.as_str()) {
                settings.push(((*file).to_owned(), value));
            }
        }
        if !path.as_os_str().is_empty() {
            let procs = fs::read_to_string(place.join("cgroup.procs"))
                .map_err(|source| CgroupError::io("read", &place.join("cgroup.procs"), source))?;
            let inside = procs.lines().filter_map(|line| members.get(&line.parse().ok()?));
            state.members.extend(inside.map(|own| (*own, state.groups.len())));
        }
        let controllers = read(&place.join("cgroup.subtree_control"))?.unwrap_or_default();
        let owner = |file: &&str| {
            let metadata = fs::metadata(place.join(file)).ok()?;
            let (uid, gid) = (metadata.uid(), metadata.gid());
            ((uid, gid) != (0, 0)).then(|| ((*file).to_owned(), uid, gid))
        };
        state.groups.push(Group {
            path: path.as_os_str().as_bytes().to_vec().into(),
            settings,
            controllers: controllers.split_ascii_whitespace().map(str::to_owned).collect(),
            owners: DELEGATED.iter().filter_map(owner).collect(),
        });
    }
    Ok(state)
}

/// Checks that groups of a checkpoint are ones that can be made inside a container's own, and nowhere else.
pub(crate) fn check(states: &[Hierarchy]) -> Result<(), CgroupError> {
    let impossible = |what: String| Err(CgroupError::Impossible { what });
    for state in states {
        if state.groups.len() > GROUPS_MAX || state.groups.first().is_none_or(|own| !own.path.is_empty()) {
            return impossible(format!(
                "{} groups without the container's own, or too many",
                state.groups.len()
            ));
        }
        for (index, group) in state.groups.iter().enumerate() {
            let path = String::from_utf8_lossy(&group.path).into_owned();
            let parts: Vec<&[u8]> = group.path.split(|byte| *byte == b'/').collect();
            let possible = |part: &&[u8]| {
                !part.is_empty()
                    && part.len() <= NAME_MAX
                    && *part != b"."
                    && *part != b".."
                    && !part.contains(&0)
            };
            if index > 0 && (parts.len() > DEPTH_MAX || !parts.iter().all(possible)) {
                return impossible(format!("the name {path:?}"));
            }
            let files = state.kind.files();
            let known = |name: &String| files.iter().any(|(file, _)| file == name);
            let value = |value: &String| value.len() <= VALUE_MAX && !value.contains('\n');
            if let Some((name, _)) = group.settings.iter().find(|(name, set)| !known(name) || !value(set)) {
                return impossible(format!("what is set in {name:?} of {path:?}"));
            }
            let known = |name: &String| CONTROLLERS.contains(&name.as_str());
            if let Some(name) = group.controllers.iter().find(|name| !known(name)) {
                return impossible(format!("the controller {name:?} of {path:?}"));
            }
            let known = |file: &String| DELEGATED.contains(&file.as_str());
            if let Some((file, ..)) = group.owners.iter().find(|(file, ..)| !known(file)) {
                return impossible(format!("the file {file:?} of {path:?}"));
            }
        }
        if state.members.iter().any(|(_, group)| *group >= state.groups.len()) {
            return impossible("a process in a group that is not there".to_owned());
        }
    }
    Ok(())
}

/// Makes the groups inside those of a new container, and puts its processes there: `pids` has the PID here of each PID there.
pub(crate) fn rebuild(
    cgroup: &Cgroup,
    states: &[Hierarchy],
    pids: &HashMap<i32, i32>,
) -> Result<(), CgroupError> {
    check(states)?;
    for state in states {
        let mut here = cgroup.directories.iter().filter(|directory| Kind::of(directory) == Some(state.kind));
        match here.next() {
            Some(directory) => rebuild_one(directory, state, pids)?,
            None if state.groups.len() == 1 => {}
            None => return Err(CgroupError::NoHierarchy { kind: state.kind }),
        }
    }
    Ok(())
}

fn rebuild_one(directory: &Path, state: &Hierarchy, pids: &HashMap<i32, i32>) -> Result<(), CgroupError> {
    let places: Vec<PathBuf> =
        state.groups.iter().map(|group| directory.join(OsStr::from_bytes(&group.path))).collect();
    for place in &places[1..] {
        fs::create_dir(place).map_err(|source| CgroupError::io("make", place, source))?;
    }
    for (own, group) in &state.members {
        // One that has ended is where its parent is.
        if let Some(pid) = pids.get(own) {
            write(&places[*group].join("cgroup.procs"), &pid.to_string())?;
        }
    }
    for (index, (group, place)) in state.groups.iter().zip(&places).enumerate() {
        for (name, value) in &group.settings {
            match write(&place.join(name), value) {
                // The host's choice, whoever has made it: this one may have another.
                Err(error) if index == 0 => {
                    tracing::warn!(%error, "a setting of the container's own group is lost");
                }
                outcome => outcome?,
            }
        }
        for controller in &group.controllers {
            write(&place.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
        for (file, uid, gid) in &group.owners {
            let file = if file.is_empty() { place.clone() } else { place.join(file) };
            std::os::unix::fs::chown(&file, Some(*uid), Some(*gid))
                .map_err(|source| CgroupError::io("chown", &file, source))?;
        }
    }
    Ok(())
}

fn write(file: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(file, value).map_err(|source| CgroupError::Setting {
        file: file.to_owned(),
        value: value.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(path: &[u8]) -> Vec<Hierarchy> {
        let own = Group::default();
        let inner = Group { path: path.to_vec().into(), ..Group::default() };
        vec![Hierarchy { kind: Kind::Unified, groups: vec![own, inner], members: Vec::new() }]
    }

    #[test]
    fn names_that_lead_out_of_the_container_are_refused() {
        assert!(check(&state(b"outer/inner")).is_ok());
        for path in [&b""[..], b"/", b"..", b"a/../../b", b"a//b", b"/a", b"a/", b".", b"a\0b", &[b'a'; 300]]
        {
            assert!(check(&state(path)).is_err(), "{:?}", String::from_utf8_lossy(path));
        }
    }

    #[test]
    fn only_known_files_are_written() {
        let with = |change: fn(&mut Group)| {
            let mut states = state(b"a");
            change(&mut states[0].groups[1]);
            check(&states)
        };
        assert!(with(|group| group.settings.push(("memory.max".into(), "4096".into()))).is_ok());
        for name in ["cgroup.procs", "../memory.max", "cgroup.kill", "memory.limit_in_bytes", ""] {
            let mut states = state(b"a");
            states[0].groups[1].settings.push((name.into(), "1".into()));
            assert!(check(&states).is_err(), "{name}");
        }
        assert!(with(|group| group.settings.push(("pids.max".into(), "1\n2".into()))).is_err());
        assert!(with(|group| group.controllers.push("+cpu".into())).is_err());
        assert!(with(|group| group.owners.push(("../x".into(), 1, 1))).is_err());
        let mut states = state(b"a");
        states[0].members.push((1, 2));
        assert!(check(&states).is_err());
    }
}
