//! What the tests that run containers share. They act in a network namespace of their own, so nothing shows
//! on the host.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use limosa_container::{Config, Registry};
use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::rtnetlink::{LinkChange, Rtnetlink, link_name};
use tempfile::TempDir;

/// A host to run containers on: a state directory and, in a network namespace, the bridge `br0`.
pub struct Host {
    pub state: TempDir,
    pub registry: Registry,
    before: Traces,
}

impl Host {
    /// A new host, or `None`, loudly, without root.
    pub fn new() -> Option<Self> {
        Self::with_state(tempfile::tempdir_in("/dev/shm").expect("a directory"))
    }

    /// A new host with its state in a given directory.
    pub fn with_state(state: TempDir) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: this test needs root");
            return None;
        }
        namespace::unshare(&[Kind::Network]).expect("a network namespace");
        let mut network = Rtnetlink::open().expect("a connection");
        network.create_bridge("br0").expect("a bridge");
        for (name, address) in [("lo", None), ("br0", Some("10.0.0.1"))] {
            let index = network.link(name).expect("links").expect("a link").header.index;
            network.set_link(index, LinkChange { up: Some(true), ..LinkChange::default() }).expect("up");
            if let Some(address) = address {
                network.add_address(index, address.parse().expect("an address"), 24).expect("an address");
                network.add_address(index, "fd00::1".parse().expect("an address"), 64).expect("an address");
            }
        }
        let registry = Registry::new(state.path());
        let before = Traces::of(state.path());
        Some(Self { state, registry, before })
    }

    /// Asserts that nothing is on the host that was not there at first.
    pub fn assert_clean(&self) {
        assert_eq!(Traces::of(self.state.path()), self.before);
    }
}

/// What containers could leave behind. Other tests run beside this one: only what is ours is looked at.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    mounts: Vec<String>,
    links: BTreeSet<String>,
    children: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    files: BTreeSet<String>,
}

impl Traces {
    fn of(state: &Path) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let links = Rtnetlink::open().expect("a connection").links().expect("links");
        let children = fs::read_dir("/proc/self/task").expect("threads").flat_map(|task| {
            let children = fs::read_to_string(task.expect("a thread").path().join("children"));
            children.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        });
        Self {
            mounts: mounts.lines().map(str::to_owned).collect(),
            links: links.iter().filter_map(link_name).map(str::to_owned).collect(),
            children: children.collect(),
            cgroups: own_cgroups(),
            files: fs::read_dir(state)
                .expect("a listing")
                .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
                .filter(|name| name != "containers")
                .chain(
                    fs::read_dir(state.join("containers"))
                        .into_iter()
                        .flatten()
                        .map(|entry| entry.expect("an entry").path().display().to_string())
                        .filter(|path| !path.ends_with("/.lock")),
                )
                .collect(),
        }
    }
}

/// A name for a container of this test process.
pub fn name(base: &str) -> String {
    format!("{base}-{}", std::process::id())
}

/// The groups of containers whose names are of this process (see [`name`]).
fn own_cgroups() -> BTreeSet<String> {
    let own = format!("-{}-", std::process::id());
    let hierarchies = fs::read_dir("/sys/fs/cgroup").expect("hierarchies");
    let mut groups = BTreeSet::new();
    for hierarchy in hierarchies.flatten().map(|entry| entry.path()).chain(["/sys/fs/cgroup".into()]) {
        for group in fs::read_dir(hierarchy.join("limosa")).into_iter().flatten().flatten() {
            if group.file_name().to_string_lossy().contains(&own) {
                groups.insert(group.path().display().to_string());
            }
        }
    }
    groups
}

/// A container that runs `command`.
pub fn config(base: &str, command: &[&str]) -> Config {
    Config {
        name: name(base).parse().expect("a name"),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        environment: std::collections::BTreeMap::new(),
        rootfs: "/".into(),
        rootfs_identity: None,
        network: None,
        memory: None,
        terminal: false,
    }
}

/// Waits until `condition` holds, at most ten seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "not in ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
