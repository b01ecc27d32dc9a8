//! The program as a user sees it: `run`, `ps`, `exec`, `logs`, `stop` and `rm`. Needs root.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use limosa_container::Registry;
use limosa_migrate::record::{Departure, DepartureRecord};
use limosa_migrate::{MigrationId, Store};
use rustix::process::{Pid, Signal, WaitOptions};
use serde_json::Value;
use tempfile::TempDir;

/// A state directory of its own, and a process that inherits the orphans of those it starts.
struct Host {
    state: TempDir,
}

impl Host {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: this test needs root");
            return None;
        }
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("a subreaper");
        Some(Self { state: tempfile::tempdir_in("/dev/shm").expect("a directory") })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
        command.arg("--state-dir").arg(self.state.path()).args(arguments).stdin(Stdio::null());
        command
    }

    fn limosa(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("limosa")
    }

    /// What a subcommand that must succeed says on standard output.
    fn says(&self, arguments: &[&str]) -> String {
        let output = self.limosa(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    fn list(&self) -> Value {
        serde_json::from_str(&self.says(&["ps", "--json"])).expect("JSON")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for container in self.list().as_array().into_iter().flatten() {
            self.limosa(&["rm", "--force", container["name"].as_str().unwrap_or_default()]);
        }
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    }
}

/// The processes whose parent this test is, by command name, zombies left out.
fn children() -> Vec<String> {
    let own = format!("PPid:\t{}", std::process::id());
    let processes = std::fs::read_dir("/proc").expect("processes").flatten();
    let statuses = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("status")).ok());
    statuses
        .filter(|status| status.lines().any(|line| line == own) && !status.contains("State:\tZ"))
        .filter_map(|status| Some(status.lines().next()?.strip_prefix("Name:\t")?.to_owned()))
        .collect()
}

#[test]
fn a_detached_container_leaves_no_process_of_limosa() {
    let Some(host) = Host::new() else { return };
    assert_eq!(
        host.says(&["run", "one", "--detach", "--", "sh", "-c", "echo hello; exec sleep 1000"]),
        "one\n"
    );
    // The shell needs a moment to become its command.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while children() == ["sh"] && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(children(), ["sleep"]);
    let list = host.list();
    assert_eq!(
        (list[0]["name"].as_str(), list[0]["state"].as_str()),
        (Some("one"), Some("running")),
        "{list}"
    );
    let table = host.says(&["ps"]);
    assert!(table.lines().nth(1).is_some_and(|line| line.starts_with("one   running")), "{table}");
    assert_eq!(host.says(&["logs", "one"]), "hello\n");
    let log: Value = serde_json::from_str(&host.says(&["logs", "one", "--json"])).expect("JSON");
    assert_eq!((log["container"].as_str(), log["log"].as_str()), (Some("one"), Some("hello\n")));

    let mut cat = host.command(&["exec", "one", "--", "cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("limosa");
    cat.stdin.take().expect("input").write_all(b"through the container").expect("written");
    let output = cat.wait_with_output().expect("an end");
    assert_eq!(output.stdout, b"through the container");
    assert_eq!(host.limosa(&["exec", "one", "--", "sh", "-c", "exit 9"]).status.code(), Some(9));

    let refused = host.limosa(&["rm", "one"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("limosa stop one"), "{refused:?}");
    assert_eq!(host.says(&["stop", "--timeout", "0", "one"]), "one\n");
    assert_eq!(host.list()[0]["state"].as_str(), Some("stopped"));
    assert_eq!(host.says(&["rm", "one"]), "one\n");
    assert_eq!(host.list(), Value::Array(Vec::new()));
    assert!(children().is_empty());
}

#[test]
fn the_foreground_shows_output_and_passes_on_the_exit_status() {
    let Some(host) = Host::new() else { return };
    let output =
        host.limosa(&["run", "a", "--env", "WORD=b c", "--", "sh", "-c", "echo $WORD; echo d >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(output.stdout, b"b c\nd\n");
    for (name, command, code) in
        [("b", "no-such-program", 127), ("c", "/etc/passwd", 126), ("a", "true", 125)]
    {
        let output = host.limosa(&["run", name, "--", command]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let message = String::from_utf8(output.stderr).expect("text");
        assert!(message.starts_with("limosa: ") && message.lines().count() == 1, "{message}");
    }
}

#[test]
fn a_signal_reaches_the_container() {
    let Some(host) = Host::new() else { return };
    let script = "trap 'echo asked; exit 5' TERM; echo ready; while :; do sleep 0.02; done";
    let mut run = host.command(&["run", "signals", "--", "sh", "-c", script]);
    let mut child = run.stdout(Stdio::piped()).spawn().expect("limosa");
    let mut output = child.stdout.take().expect("output");
    let mut ready = [0; 6];
    output.read_exact(&mut ready).expect("it is ready");
    let pid = Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::TERM).expect("a signal");
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("the rest");
    assert_eq!((rest.as_str(), child.wait().expect("an end").code()), ("asked\n", Some(5)));
}

#[test]
fn a_terminal_goes_through_to_the_container() {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    let Some(host) = Host::new() else { return };
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let outside = openpt(flags).expect("a terminal");
    unlockpt(&outside).expect("unlocked");
    let inside = ioctl_tiocgptpeer(&outside, flags).expect("its other end");
    let mut size = rustix::termios::tcgetwinsize(&inside).expect("a size");
    (size.ws_row, size.ws_col) = (33, 99);
    rustix::termios::tcsetwinsize(&inside, size).expect("set");
    let before = rustix::termios::tcgetattr(&inside).expect("attributes").local_modes;
    let end = || Stdio::from(inside.try_clone().expect("a copy"));
    let mut run = host.command(&[
        "run",
        "terminal",
        "--tty",
        "--",
        "sh",
        "-c",
        "read line; stty size; tty; exit $line",
    ]);
    let mut child = run.stdin(end()).stdout(end()).stderr(end()).spawn().expect("limosa");
    let mut outside = File::from(outside);
    outside.write_all(b"6\n").expect("typed");
    let exit = child.wait().expect("an end");
    assert_eq!(rustix::termios::tcgetattr(&inside).expect("attributes").local_modes, before, "as it was");
    let mut shown = vec![0; 4096];
    let length = outside.read(&mut shown).expect("shown");
    let shown = String::from_utf8_lossy(&shown[..length]).into_owned();
    assert!(shown.contains("33 99\r\n/dev/pts/0"), "{shown:?}");
    assert_eq!(exit.code(), Some(6), "{shown:?}");
    assert!(host.says(&["logs", "terminal"]).contains("33 99"));
}

#[test]
fn following_a_log_ends_with_the_container() {
    let Some(host) = Host::new() else { return };
    host.says(&["run", "log", "--detach", "--", "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.1; done"]);
    assert_eq!(host.says(&["logs", "--follow", "log"]), "1\n2\n3\n");
}

/// Limosa is killed while it makes a container, at many moments. The container then either runs and is
/// listed, or nothing of it is left once the next one is made.
#[test]
fn machine_a_killed_run_leaves_a_whole_container_or_none() {
    let Some(host) = Host::new() else { return };
    let name = format!("victim{}", std::process::id());
    let arguments = ["run", &name, "--detach", "--", "sleep", "1000"];
    let began = Instant::now();
    assert!(host.limosa(&arguments).status.success());
    let whole = began.elapsed();
    host.says(&["rm", "--force", &name]);
    let mut seen = [0, 0];
    for step in 0..60 {
        let mut run = host.command(&arguments);
        let mut child = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("limosa");
        std::thread::sleep(whole * step / 50);
        child.kill().expect("killed");
        child.wait().expect("an end");
        // What was held at its gate ends by itself.
        let deadline = Instant::now() + Duration::from_secs(5);
        let runs = loop {
            let list = host.list();
            let runs = list[0]["state"].as_str() == Some("running");
            if children().len() == usize::from(runs) {
                break runs;
            }
            assert!(Instant::now() < deadline, "processes nobody knows: {:?}, listed: {list}", children());
            std::thread::sleep(Duration::from_millis(5));
        };
        seen[usize::from(runs)] += 1;
        host.limosa(&["rm", "--force", &name]);
        assert!(host.limosa(&arguments).status.success(), "the name is free again");
        host.says(&["rm", "--force", &name]);
        let groups = std::fs::read_dir("/sys/fs/cgroup").expect("hierarchies").flatten();
        let left: Vec<_> = groups
            .flat_map(|hierarchy| {
                std::fs::read_dir(hierarchy.path().join("limosa")).into_iter().flatten().flatten()
            })
            .filter(|group| group.file_name().to_string_lossy().starts_with(&name))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    }
    eprintln!("killed before it ran: {}, after: {}", seen[0], seen[1]);
    assert!(seen[0] > 0, "no kill came in time");
}

/// What a container has in memory filesystems, what it mounted, and its System V objects, as it sees them.
const DESCRIBE: &str = "cd /; find dev/shm mnt/memory -printf '%p %M %U %G %s %T@ %l\\n' | sort; \
    cat /dev/shm/dir/file /mnt/memory/a /mnt/memory/below/b; \
    sed 's/^[0-9]* [0-9]* [0-9:]*//; s/ - overlay .*//' /proc/self/mountinfo | grep -v ' / / '; \
    awk '{print $1, $2, $3, $4}' /proc/sysvipc/shm /proc/sysvipc/sem; \
    awk '{print $1, $2, $3, $4, $5}' /proc/sysvipc/msg; find /dev/mqueue -type f -printf '%p %M %U %G\\n'; \
    cat /proc/sys/fs/mqueue/*";

#[test]
fn mounts_and_system_v_objects_come_back() {
    let Some(host) = Host::new() else { return };
    host.says(&["run", "state", "--detach", "--", "sleep", "1000"]);
    let furnish = "set -e; touch /dev/mqueue/jobs; chmod 640 /dev/mqueue/jobs; chown 7:8 /dev/mqueue/jobs; \
        echo 20 > /proc/sys/fs/mqueue/msg_max; mkdir /dev/shm/dir; echo shared > /dev/shm/dir/file; ln -s file /dev/shm/dir/link; \
        chmod 640 /dev/shm/dir/file; chown 7:8 /dev/shm/dir/file; truncate -s 100000 /dev/shm/sparse; \
        mkdir -p /mnt/memory /mnt/view; mount -t tmpfs -o size=1m,mode=750,nosuid memory /mnt/memory; \
        echo inside > /mnt/memory/a; mkdir /mnt/memory/below; mount -t tmpfs below /mnt/memory/below; \
        echo deeper > /mnt/memory/below/b; mount -o remount,bind,ro,nosuid /mnt/memory; \
        mount --bind /etc /mnt/view; ipcmk -M 10000; ipcmk -S 3; ipcmk -Q";
    host.says(&["exec", "state", "--", "sh", "-c", furnish]);
    let describe = || host.says(&["exec", "state", "--", "sh", "-c", DESCRIBE]);
    let before = describe();
    assert!(before.contains("shared\ninside\ndeeper\n") && before.contains("/etc /mnt/view"), "{before}");

    let out = host.state.path().join("checkpoint").to_string_lossy().into_owned();
    host.says(&["checkpoint", "state", "--out", &out]);
    for _ in 0..2 {
        host.says(&["restore", &out, "--detach"]);
        assert_eq!(describe(), before);
        host.says(&["stop", "--timeout", "0", "state"]);
        host.says(&["rm", "state"]);
    }
}

/// A process in a group inside the container's was refused, and an empty one was lost, with its limits.
#[test]
fn control_groups_inside_a_containers_come_back() {
    let Some(host) = Host::new() else { return };
    let idle = "sleep 1000 & exec sleep 1000";
    host.says(&["run", "groups", "--detach", "--", "sh", "-c", idle]);
    // Whatever this host has; a process can be in one group of each hierarchy.
    let furnish = "set -e; mkdir -p /mnt/two /mnt/pids; until other=$(grep -lx sleep /proc/[2-9]*/comm); do true; done; other=$(echo $other | cut -d/ -f3); \
        if mount -t cgroup2 two /mnt/two; then mkdir -p /mnt/two/outer/inner '/mnt/two/with space'; \
            echo 1234 > /mnt/two/outer/cgroup.max.depth; echo $other > /mnt/two/outer/inner/cgroup.procs; \
            chown 7:8 /mnt/two/outer /mnt/two/outer/cgroup.procs; fi; \
        if mount -t cgroup -o pids pids /mnt/pids 2>&-; then mkdir -p /mnt/pids/few/fewer /mnt/pids/none; \
            echo 7 > /mnt/pids/few/pids.max; echo $other > /mnt/pids/few/fewer/cgroup.procs; fi";
    host.says(&["exec", "groups", "--", "sh", "-c", furnish]);
    let describe = || {
        let look = "cd /mnt; find two pids -type d -printf '%p %U:%G\\n' | sort; \
            find two pids -name pids.max -o -name cgroup.max.depth -o -name cgroup.procs | sort | \
            while read f; do echo \"$f $(stat -c %u \"$f\")\" $(grep -v \"^$$\\$\" \"$f\"); done | grep -v '^[^/]*/cgroup.procs'";
        host.says(&["exec", "groups", "--", "sh", "-c", look])
    };
    let before = describe();
    assert!(
        before.contains("two/outer/inner/cgroup.procs 0 ") && before.contains("two/with space 0:0"),
        "{before}"
    );

    let out = host.state.path().join("checkpoint").to_string_lossy().into_owned();
    host.says(&["checkpoint", "groups", "--out", &out]);
    for _ in 0..2 {
        host.says(&["restore", &out, "--detach"]);
        assert_eq!(describe(), before);
        host.says(&["stop", "--timeout", "0", "groups"]);
        host.says(&["rm", "groups"]);
    }
    host.says(&["restore", &out, "--detach"]);
    // What cannot be carried is found without freezing it.
    host.says(&["exec", "groups", "--", "sh", "-c", "echo 1 > /mnt/two/outer/cgroup.freeze"]);
    let refused = host.limosa(&["check", "groups"]);
    host.says(&["exec", "groups", "--", "sh", "-c", "echo 0 > /mnt/two/outer/cgroup.freeze"]);
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(!refused.status.success() && said.contains("outer") && said.contains("it is frozen"), "{said}");
}

/// `ps` said "running" of a container that was frozen for a migration whose outcome nobody knew.
#[test]
fn a_frozen_container_is_listed_as_such_with_the_migration_that_is_undecided() {
    let Some(host) = Host::new() else { return };
    host.says(&["run", "ice", "--detach", "--", "sleep", "1000"]);
    let record = Registry::new(host.state.path()).load(&"ice".parse().expect("a name")).expect("a record");
    if record.cgroup.freeze(true).is_err() {
        return eprintln!("SKIPPED: this test needs control groups of version 2");
    }
    let line = host.list()[0].clone();
    assert_eq!((line["state"].as_str(), &line["migration"]), (Some("frozen"), &Value::Null), "{line}");

    let store = Store::open(host.state.path().join("migrations")).expect("a store");
    let departure = |container: &str, instance: String| DepartureRecord {
        id: MigrationId::random().expect("an id"),
        container: container.to_owned(),
        destination: "ssh://root@b.example".to_owned(),
        departure: Departure::HandingOver,
        instance,
        closed: false,
    };
    // Neither of another container nor of an earlier one of this name.
    store.put_departure(&departure("snow", record.instance())).expect("recorded");
    store.put_departure(&departure("ice", "1:1".to_owned())).expect("recorded");
    assert_eq!(host.list()[0]["migration"], Value::Null);
    let open = departure("ice", record.instance());
    store.put_departure(&open).expect("recorded");
    let line = host.list()[0].clone();
    assert_eq!(line["state"].as_str(), Some("frozen"), "{line}");
    assert_eq!(line["migration"]["id"].as_str(), Some(open.id.to_string().as_str()), "{line}");
    assert_eq!(line["migration"]["outcome"].as_str(), Some("undecided"), "{line}");
    let table = host.says(&["ps"]);
    assert!(table.lines().nth(1).is_some_and(|line| line.starts_with("ice   frozen")), "{table}");
    let note =
        "ice was handed over, and is frozen: whether it runs at ssh://root@b.example is not known yet.";
    assert!(table.contains(note), "{table}");
    record.cgroup.freeze(false).expect("thawed");
    assert_eq!(host.list()[0]["state"].as_str(), Some("running"));
}

/// What a container has set up in its network namespace, as it sees it.
const DESCRIBE_NETWORK: &str = "ip -o addr | sed 's/ valid_lft.*//; s/ nodad//'; ip -o link | sed 's/ link-netnsid.*//'; \
    ip route show table all proto static; ip route show proto boot; ip neigh show nud permanent; \
    cd /proc/sys/net; cat core/somaxconn ipv4/ip_forward ipv4/conf/all/rp_filter ipv4/conf/lo/forwarding \
    ipv4/ip_unprivileged_port_start ipv4/ping_group_range ipv6/conf/lo/hop_limit";

#[test]
fn what_a_container_set_up_in_its_network_comes_back() {
    let Some(host) = Host::new() else { return };
    host.says(&["run", "net", "--detach", "--", "sleep", "1000"]);
    let set_up = "set -e; ip link set lo mtu 9000; ip addr add 10.9.9.1/24 brd + label lo:1 dev lo; ip addr add 10.4.4.1 peer 10.4.4.2/32 dev lo; ip addr add fd00:9::1/64 dev lo; \
        ip route add 10.8.0.0/16 dev lo metric 7; ip route add 10.6.0.0/16 dev lo src 10.9.9.1; \
        ip route add blackhole 10.7.0.0/16 table 1000 proto static; ip -6 route add fd00:8::/64 dev lo proto static; \
        ip neigh add 10.9.9.9 lladdr 02:00:00:00:00:09 dev lo nud permanent; cd /proc/sys/net; \
        echo 77 > core/somaxconn; echo 1 > ipv4/ip_forward; echo 0 > ipv4/conf/lo/forwarding; \
        echo 2 > ipv4/conf/all/rp_filter; echo 80 > ipv4/ip_unprivileged_port_start; \
        echo 0 1000 > ipv4/ping_group_range; echo 33 > ipv6/conf/lo/hop_limit";
    host.says(&["exec", "net", "--", "sh", "-c", set_up]);
    let describe = || host.says(&["exec", "net", "--", "sh", "-c", DESCRIBE_NETWORK]);
    let before = describe();
    for known in
        ["10.9.9.1/24", "10.8.0.0/16", "blackhole", "fd00:8::/64", "02:00:00:00:00:09", "\n77\n1\n2\n0\n80\n"]
    {
        assert!(before.contains(known), "no {known} in {before}");
    }
    let out = host.state.path().join("checkpoint").to_string_lossy().into_owned();
    host.says(&["checkpoint", "net", "--out", &out]);
    for _ in 0..2 {
        host.says(&["restore", &out, "--detach"]);
        assert_eq!(describe(), before);
        host.says(&["stop", "--timeout", "0", "net"]);
        host.says(&["rm", "net"]);
    }
}

#[test]
fn interfaces_rules_and_packet_filters_of_a_container_are_refused() {
    let Some(host) = Host::new() else { return };
    host.says(&["run", "net", "--detach", "--", "sleep", "1000"]);
    let out = host.state.path().join("checkpoint").to_string_lossy().into_owned();
    for (make, unmake, word) in [
        ("ip link add own0 type veth peer own1", "ip link del own0", "which it made itself"),
        ("ip rule add to 10.1.0.0/16 table 7", "ip rule del to 10.1.0.0/16 table 7", "a routing rule"),
        (
            "ip route add 10.2.0.0/16 dev lo mtu 1400",
            "ip route del 10.2.0.0/16",
            "a route that is not carried",
        ),
        ("nft add table ip mine", "nft delete table ip mine", "nftables table mine"),
    ] {
        host.says(&["exec", "net", "--", "sh", "-c", make]);
        let refused = host.limosa(&["checkpoint", "net", "--out", &out]);
        assert_eq!(refused.status.code(), Some(1), "{make}: {refused:?}");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains(word), "no {word} in {said}");
        host.says(&["exec", "net", "--", "sh", "-c", unmake]);
    }
    host.says(&["checkpoint", "net", "--out", &out, "--leave-running"]);
}
