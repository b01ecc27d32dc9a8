//! Looking for what the demo left behind: processes, namespaces, interfaces, mounts, control groups, files.
//!
//! The machine goes on living meanwhile, so that "before" and "after" cannot be compared: everything the demo makes
//! carries its mark instead, the process ID of the demo in a name or in the environment.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait, waitpid};

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where files could be left.
const PLACES: [&str; 7] =
    ["/tmp", "/var/tmp", "/run", "/run/netns", "/dev/shm", "/var/lib/limosa", "/var/lib/limosa/containers"];

/// By what things of the demo are known.
#[derive(Debug)]
pub struct Traces {
    /// In the environment of its processes.
    pub mark: String,
    /// Its container.
    pub name: String,
    /// Its files.
    pub directory: PathBuf,
    /// Its network namespaces' inode numbers.
    pub namespaces: [u64; 3],
}

/// Reaps all children that have ended. Only while no [`limosa_stage::Running`] waits for one of them.
pub fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// Reaps children that have ended, but for `running`, which somebody waits for. A process of a container whose parent
/// outside was killed is such a child, and the container's first process does not end before it is reaped.
pub fn reap_orphans(running: Pid) {
    let this = rustix::process::getpid();
    for pid in all_processes() {
        if pid != running && parent(pid) == Some(this) {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

impl Traces {
    /// Kills what is still running (after a failure, perhaps) and reaps it: what does not go.
    pub fn end_processes(&self) -> Vec<String> {
        let begun = Instant::now();
        loop {
            reap();
            let left = self.processes();
            if left.is_empty() || begun.elapsed() > PATIENCE {
                return left.iter().map(|pid| format!("process {}", describe(*pid))).collect();
            }
            for pid in left {
                let _ = kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The demo's processes: marked, or children of this one; in its namespaces, whatever they are.
    fn processes(&self) -> Vec<Pid> {
        all_processes().into_iter().filter(|pid| self.is_ours(*pid)).collect()
    }

    fn is_ours(&self, pid: Pid) -> bool {
        let this = rustix::process::getpid();
        if pid == this {
            return false;
        }
        let directory = format!("/proc/{}", pid.as_raw_pid());
        let environment = fs::read(format!("{directory}/environ")).unwrap_or_default();
        let marked = environment.split(|byte| *byte == 0).any(|entry| entry == self.mark.as_bytes());
        let net = inode(Path::new(&format!("{directory}/ns/net")));
        marked || parent(pid) == Some(this) || net.is_some_and(|net| self.namespaces.contains(&net))
    }

    /// What is left, one line each.
    pub fn look(&self) -> Result<Vec<String>> {
        let mut left = BTreeSet::new();
        for pid in self.processes() {
            left.insert(format!("process {}", describe(pid)));
        }
        for pid in all_processes() {
            self.mounts_seen_by(pid, &mut left);
        }
        for line in fs::read_to_string("/proc/net/dev")?.lines().skip(2) {
            let name = line.split(':').next().unwrap_or_default().trim();
            // `limosa run` calls the host's end of a container's cable so.
            if name.starts_with("lmredisde") {
                left.insert(format!("interface {name}"));
            }
        }
        for place in PLACES {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                if self.is_name_of_ours(&entry.file_name()) {
                    left.insert(format!("file {}", entry.path().display()));
                }
            }
        }
        self.cgroups(Path::new("/sys/fs/cgroup"), 6, &mut left);
        Ok(left.into_iter().collect())
    }

    fn is_name_of_ours(&self, name: &std::ffi::OsStr) -> bool {
        let name = name.as_bytes();
        let holds = |part: &[u8]| name.windows(part.len()).any(|window| window == part);
        holds(self.name.as_bytes()) || self.directory.file_name().is_some_and(|own| holds(own.as_bytes()))
    }

    /// Mounts of the demo's files, and network namespaces held by a mount, in the mount namespace of a process.
    fn mounts_seen_by(&self, pid: Pid, left: &mut BTreeSet<String>) {
        let text = fs::read_to_string(format!("/proc/{}/mountinfo", pid.as_raw_pid())).unwrap_or_default();
        let directory = self.directory.to_string_lossy();
        let namespaces = self.namespaces.map(|inode| format!("net:[{inode}]"));
        for line in text.lines() {
            if line.contains(&*directory) || namespaces.iter().any(|namespace| line.contains(namespace)) {
                left.insert(format!("mount {line}"));
            }
        }
    }

    fn cgroups(&self, directory: &Path, depth: usize, left: &mut BTreeSet<String>) {
        let Some(depth) = depth.checked_sub(1) else { return };
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if self.is_name_of_ours(&entry.file_name()) {
                    left.insert(format!("control group {}", entry.path().display()));
                }
                self.cgroups(&entry.path(), depth, left);
            }
        }
    }
}

fn all_processes() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// The number in a namespace's link, `net:[NUMBER]`.
fn inode(link: &Path) -> Option<u64> {
    let target = fs::read_link(link).ok()?;
    target.to_str()?.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

/// The parent: the second field after the command's name, which may hold anything.
fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?;
    Pid::from_raw(parent.parse().ok()?)
}

fn describe(pid: Pid) -> String {
    let number = pid.as_raw_pid();
    let stat = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    let command = fs::read_to_string(format!("/proc/{number}/cmdline")).unwrap_or_default();
    let stat: Vec<_> = stat.split(' ').take(4).collect();
    format!("{} {}", stat.join(" "), command.replace('\0', " ").trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traces(directory: &Path) -> Traces {
        let id = std::process::id();
        Traces {
            mark: format!("LIMOSA_STAGE=test-{id}"),
            name: format!("redis-demo-test-{id}"),
            directory: directory.to_owned(),
            namespaces: [0; 3],
        }
    }

    #[test]
    fn what_is_left_is_found_and_what_is_not_is_not() {
        let directory = tempfile::Builder::new().prefix("limosa-demo-test-").tempdir().expect("a directory");
        let traces = traces(directory.path());
        let found = traces.look().expect("an inventory");
        assert!(found.iter().any(|one| one.contains("limosa-demo-test-")), "{found:?}");
        directory.close().expect("it goes away");
        assert_eq!(traces.look().expect("an inventory"), Vec::<String>::new());
    }

    #[test]
    fn a_marked_process_is_found_and_ended() {
        let directory = tempfile::Builder::new().prefix("limosa-demo-test-").tempdir().expect("a directory");
        let traces = traces(directory.path());
        let (key, value) = traces.mark.split_once('=').expect("a variable");
        let mut child =
            std::process::Command::new("sleep").arg("100").env(key, value).spawn().expect("a process");
        let pid = Pid::from_child(&child);
        assert!(traces.is_ours(pid));
        let _ = child.kill();
        let _ = child.wait();
        assert!(!traces.is_ours(pid));
    }
}
