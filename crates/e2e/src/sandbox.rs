//! A place of a test's own, which must be as empty after the test as before.
//!
//! A sandboxed test runs itself again, alone, as process 1 of new PID, mount, network, IPC, UTS and cgroup namespaces:
//! nothing can outlive it, ports and PIDs are all its own, and what is left over is plain to see. To Limosa these
//! namespaces are the host.
//!
//! ```text
//! test process ── unshare ── the same test again, as process 1 ── limosa, targets, programs
//! ```
//!
//! `/tmp`, `/run` and `/dev/shm` are empty and its own; the rest of the file system is the machine's.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mount::MountFlags;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait, waitpid};

use crate::wait_for;

const INSIDE: &str = "LIMOSA_E2E_SANDBOX";
/// What a test may leave for a moment: processes that were killed and have yet to go.
const PATIENCE: Duration = Duration::from_secs(5);

/// The sandbox, seen from within.
pub struct Sandbox {
    directory: PathBuf,
    before: Inventory,
}

/// Runs `body` in a sandbox of its own, and fails where the test fails or leaves something behind.
///
/// To be called directly in the test function, with a closure: the closure's name is how the test finds itself again.
pub fn sandboxed<F: FnOnce(&Sandbox) -> Result<()>>(body: F) {
    let outcome = if std::env::var_os(INSIDE).is_some() {
        Sandbox::enter().and_then(|sandbox| {
            body(&sandbox)?;
            sandbox.check_empty()
        })
    } else {
        run_again(std::any::type_name::<F>())
    };
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

/// Runs this test in new namespaces. `closure` is `crate::path::of::test::{{closure}}`.
fn run_again(closure: &str) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "not root: a sandbox needs namespaces (sudo make test)");
    let name = closure.trim_end_matches("::{{closure}}");
    let name = name.split_once("::").map_or(name, |(_, path)| path);
    // Descriptors that this process inherited belong to files outside, which a target in the sandbox must not hold.
    let close_inherited =
        r#"for fd in /proc/self/fd/*; do fd=${fd##*/}; ((fd > 2)) && eval "exec $fd>&-"; done; exec "$@""#;
    let output = Command::new("bash")
        .args(["-c", close_inherited, "bash", "unshare"])
        .args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--net",
            "--ipc",
            "--uts",
            "--cgroup",
            "--",
        ])
        .arg(std::env::current_exe()?)
        .args(["--exact", name, "--include-ignored", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .context("running unshare")?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "in the sandbox ({}):\n{out}\n{err}", output.status);
    // A name that matches no test would pass without having run anything.
    ensure!(out.contains("1 passed"), "the sandbox ran no test called {name}:\n{out}\n{err}");
    print!("{out}");
    Ok(())
}

impl Sandbox {
    fn enter() -> Result<Self> {
        ensure!(std::process::id() == 1, "{INSIDE} is set outside a sandbox");
        for place in ["/tmp", "/run", "/dev/shm"] {
            rustix::mount::mount("tmpfs", place, "tmpfs", MountFlags::empty(), Some(c"mode=1777"))
                .with_context(|| format!("mounting a tmpfs on {place}"))?;
        }
        let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("running ip")?;
        ensure!(status.success(), "ip link set lo up: {status}");
        let directory = PathBuf::from("/tmp/sandbox");
        fs::create_dir(&directory)?;
        // Targets that change their user still write their answers here.
        fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        Ok(Self { before: Inventory::take()?, directory })
    }

    /// Removes the control groups of containers that a failed test leaves, which are the machine's and would outlive it.
    fn remove_control_groups(&self) {
        let mut groups = BTreeSet::new();
        recorded_groups(&self.directory, 3, &mut groups);
        if groups.is_empty() || self.end_all().is_err() {
            return;
        }
        for group in groups {
            let _ = fs::remove_dir(&group);
            // Refused while others have containers.
            let _ = group.parent().filter(|parent| parent.ends_with("limosa")).map(fs::remove_dir);
        }
    }

    /// A directory for the test's files, on a tmpfs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A path in [`Self::directory`].
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Kills every process in the sandbox but the test itself, and waits until all are gone.
    pub fn end_all(&self) -> Result<()> {
        for pid in processes()? {
            let _ = kill_process(pid, Signal::KILL);
        }
        wait_until_alone()
    }

    /// Fails unless everything that was there before the test, and nothing else, is there now. Called at every sandboxed
    /// test's end; a test may call it earlier.
    pub fn check_empty(&self) -> Result<()> {
        wait_until_alone()?;
        let after = Inventory::take()?;
        let left: Vec<_> = after.things.difference(&self.before.things).collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        let lost: Vec<_> = self.before.things.difference(&after.things).collect();
        ensure!(lost.is_empty(), "gone with the test: {lost:?}");
        Ok(())
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.remove_control_groups();
    }
}

/// Those of the containers in the state directories below `directory`, by their records and by what says which groups one
/// that is being made will have. Others in the same hierarchy are not this test's.
fn recorded_groups(directory: &Path, depth: usize, groups: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name() == "containers" {
            for container in fs::read_dir(&path).into_iter().flatten().flatten() {
                for (file, place) in [("config.json", "/cgroup/directories"), ("cgroup.json", "/directories")]
                {
                    let text = fs::read_to_string(container.path().join(file)).unwrap_or_default();
                    let record: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
                    let recorded = record.pointer(place).and_then(|list| list.as_array());
                    groups.extend(
                        recorded.into_iter().flatten().filter_map(|group| group.as_str()).map(PathBuf::from),
                    );
                }
            }
        } else if let Some(depth) = depth.checked_sub(1) {
            recorded_groups(&path, depth, groups);
        }
    }
}

/// Reaps what is dead (process 1 is everyone's last parent) until no other process is there; fails where one stays.
pub fn wait_until_alone() -> Result<()> {
    let mut left = Vec::new();
    let alone = wait_for("the end of all processes", PATIENCE, || {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        left = processes()?;
        Ok(left.is_empty().then_some(()))
    });
    alone.with_context(|| {
        let described: Vec<_> = left.iter().map(|pid| describe(*pid)).collect();
        format!("left behind: {}", described.join("; "))
    })
}

/// All processes of the sandbox but this one.
pub fn processes() -> Result<Vec<Pid>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").context("listing /proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        pids.extend(pid.filter(|pid| pid.as_raw_pid() != 1));
    }
    Ok(pids)
}

/// `root` and all its descendants.
pub fn tree(root: Pid) -> Result<Vec<Pid>> {
    let all: Vec<(Pid, Option<Pid>)> = processes()?.into_iter().map(|pid| (pid, parent(pid))).collect();
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(parent) = tree.get(next).copied() {
        tree.extend(all.iter().filter(|(_, of)| *of == Some(parent)).map(|(pid, _)| *pid));
        next += 1;
    }
    Ok(tree)
}

/// Reaps those of `pids` that are dead until none of them is there; other children of this process stay as they are.
pub fn wait_until_gone(pids: &[Pid]) -> Result<()> {
    wait_for("the end of a process tree", PATIENCE, || {
        for pid in pids {
            let _ = waitpid(Some(*pid), WaitOptions::NOHANG);
        }
        let left = processes()?;
        Ok((!pids.iter().any(|pid| left.contains(pid))).then_some(()))
    })
}

/// The parent: the second field after the command's name, which may hold anything.
fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    Pid::from_raw(stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?)
}

/// A process as `ps` would name it, for messages.
pub fn describe(pid: Pid) -> String {
    let number = pid.as_raw_pid();
    let stat = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    let command = fs::read_to_string(format!("/proc/{number}/cmdline")).unwrap_or_default();
    let state: Vec<_> = stat.split(' ').take(6).collect();
    // How a zombie ended, as wait(2) will tell it.
    let ended = stat.trim_end().rsplit(' ').next().filter(|code| *code != "0").unwrap_or_default();
    format!("{} {:?} {ended}", state.join(" "), command.replace('\0', " "))
}

/// What could be left over.
struct Inventory {
    things: BTreeSet<String>,
}

impl Inventory {
    fn take() -> Result<Self> {
        let mut things = BTreeSet::new();
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // Without the ids, which say nothing about what is mounted where.
            things.insert(format!("mount {}", line.splitn(4, ' ').last().unwrap_or_default()));
        }
        for line in fs::read_to_string("/proc/net/dev")?.lines().skip(2) {
            things.insert(format!("interface {}", line.split(':').next().unwrap_or_default().trim()));
        }
        for place in ["/tmp", "/run", "/dev/shm", "/run/netns", "/var/lib/limosa", "/var/tmp"] {
            for entry in fs::read_dir(place).into_iter().flatten() {
                things.insert(format!("file {}", entry?.path().display()));
            }
        }
        for table in ["shm", "sem", "msg"] {
            let text = fs::read_to_string(format!("/proc/sysvipc/{table}")).unwrap_or_default();
            things.extend(text.lines().skip(1).map(|line| {
                let fields: Vec<_> = line.split_whitespace().take(2).collect();
                format!("System V {table} {}", fields.join(" "))
            }));
        }
        cgroups(Path::new("/sys/fs/cgroup"), 5, &mut things);
        Ok(Self { things })
    }
}

/// Limosa's cgroups. Others come and go with whatever else the machine does.
fn cgroups(directory: &Path, depth: usize, things: &mut BTreeSet<String>) {
    let Some(depth) = depth.checked_sub(1) else { return };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            if entry.file_name().to_string_lossy().contains("limosa") {
                things.insert(format!("cgroup {}", path.display()));
            }
            cgroups(&path, depth, things);
        }
    }
}
