//! Each kind of target through checkpoint and restore: left running, ended, and restored three times from each checkpoint.
//!
//! A kind is in one of three lists: it makes the round trip; it is refused, with a reason, and goes on; or it is known to
//! come back with something missing (ignored, with what is missing). When a room is built or mended, its kind moves.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::programs::Python;
use limosa_e2e::round_trip::{refused, round_trip, round_trip_of};
use limosa_e2e::sandbox::{sandboxed, wait_until_alone};
use limosa_e2e::target::Target;
use limosa_e2e::wait_for;
use rustix::process::Pid;

macro_rules! round_trips {
    ($($(#[$attribute:meta])* $name:ident: $kind:literal $($option:literal)*;)*) => {$(
        #[test]
        $(#[$attribute])*
        fn $name() {
            sandboxed(|sandbox| round_trip(sandbox, $kind, &[$($option),*]));
        }
    )*};
}

macro_rules! refusals {
    ($($name:ident: $kind:literal [$($option:literal)*] $word:literal;)*) => {$(
        #[test]
        fn $name() {
            sandboxed(|sandbox| refused(sandbox, $kind, &[$($option),*], &[$word]));
        }
    )*};
}

round_trips! {
    ballast: "ballast";
    creds: "creds";
    eventfds: "eventfds";
    events: "events";
    files: "files";
    heartbeat: "heartbeat";
    keyrings: "keyrings";
    locks: "locks";
    memory: "memory";
    memory_advice: "memory-advice";
    memory_locked_in_future: "memory-advice" "future";
    memory_locked_in_future_on_fault: "memory-advice" "future-on-fault";
    memory_file: "memory-file";
    memory_forked: "memory-forked";
    memory_guarded: "memory-guarded";
    memory_huge: "memory-huge";
    memory_huge_forked: "memory-huge" "forked";
    memory_segments: "memory-segments";
    memory_shared: "memory-shared";
    memory_system_v: "memory-shared" "system-v";
    message_queues: "message-queues";
    misc: "misc";
    odd_files: "odd-files";
    registers: "registers";
    seccomp: "seccomp";
    signals: "signals";
    sleeps: "sleeps";
    sleep_of_epoll: "sleeps" "epoll_wait";
    #[ignore = "needs a processor with protection keys: crates/vm runs it on an emulated one"]
    protection_keys: "protection-keys";
    terminal: "terminal";
    threads: "threads";
    timers: "timers";
    tree: "tree";
    vdso: "vdso";
    watchers: "watchers";
    writers: "writers";
    writers_with_churn: "writers" "churn";

    pipes: "pipes";
    inet_sockets: "sockets-inet";
    options_of_sockets: "socket-options";
    unix_sockets: "sockets-unix";
    unix_connections_not_accepted: "sockets-unix" "silent";
    peers_of_unix_sockets: "sockets-peers";
    descriptors_in_flight: "in-flight";
    netlink_sockets: "netlink";
    queues_of_udp_sockets: "udp-queues";
    one_descriptor_in_flight: "sockets-unix" "in-flight";
}

refusals! {
    tcp_connections_never_accepted_are_refused: "sockets-inet" ["tcp" "waiting"] "wait in it";
    unix_connections_with_data_never_accepted_are_refused: "sockets-unix" ["waiting"] "wait in it";
    an_epoll_in_flight_is_refused: "in-flight" ["watching"] "it is only in flight";
    an_epoll_in_flight_behind_others_is_refused: "in-flight" ["watching" "behind"] "it is only in flight";
    a_descriptor_in_flight_that_sends_signals_is_refused: "in-flight" ["signals"] "it sends signals";
    a_changed_vdso_is_refused: "vdso" ["changed"] "changed its code";
    an_answer_of_netlink_is_refused: "netlink" ["unread"] "answers of the kernel that are not read";
    a_netfilter_socket_is_refused: "netlink" ["netfilter"] "a netlink socket of protocol 12";
    io_uring_is_refused: "refused" ["io-uring"] "it is an io_uring";
    userfaultfd_is_refused: "refused" ["userfaultfd"] "it is a userfaultfd";
    fanotify_is_refused: "refused" ["fanotify"] "it is a fanotify group";
    perf_is_refused: "refused" ["perf"] "performance counter";
    bpf_is_refused: "refused" ["bpf"] "BPF";
    tun_is_refused: "refused" ["tun"] "it is a TUN/TAP device";
    fuse_is_refused: "refused" ["fuse"] "FUSE";
    a_namespace_is_refused: "refused" ["network-namespace"] "descriptor of a namespace";
    a_file_of_a_thread_is_refused: "refused" ["thread-file"] "not there yet";
    asynchronous_io_is_refused: "refused" ["aio"] "io_setup";
    a_filter_in_ebpf_is_refused: "refused" ["bpf-filter"] "SO_ATTACH_BPF";
    an_l2tp_socket_is_refused: "refused" ["l2tp"] "UDP_ENCAP";
    a_datagram_that_was_begun_is_refused: "refused" ["begun"] "it has begun a datagram";
    a_datagram_that_was_begun_over_ipv6_is_refused: "refused" ["begun-six"] "it has begun a datagram";
    a_flow_label_is_refused: "refused" ["flow-label"] "flow label";
    a_flow_label_that_is_not_used_is_refused: "refused" ["unused-label"] "flow label";
    signed_segments_are_refused: "refused" ["signed"] "TCP_MD5SIG";
    a_saved_syn_is_refused: "refused" ["saved-syn"] "TCP_SAVE_SYN";
    a_socket_from_another_namespace_is_refused: "refused" ["from-elsewhere"] "another network namespace";
    a_registration_with_a_message_queue_is_refused: "refused" ["mq-notify"] "mq_notify";
    a_lease_that_is_being_broken_is_refused: "refused" ["lease"] "is being broken";
    a_watched_directory_is_refused: "refused" ["dnotify"] "F_NOTIFY";
    a_key_in_a_session_keyring_is_refused: "refused" ["keys"] "its session keyring, _ses, has keys in it";
    a_key_of_a_thread_is_refused: "refused" ["own-keys"] "in the keyring of its thread";
    landlock_is_refused: "refused" ["landlock"] "Landlock restricts it";
    landlock_of_a_thread_is_refused: "refused" ["landlock-thread"] "Landlock restricts it";
}

/// A running target is not told what a frozen one would not be: a socket whose peer lies in the second message of a queue,
/// which is not looked at while it runs, once was connected "to a process outside the tree".
#[test]
fn what_is_in_flight_is_checked_while_it_runs() {
    sandboxed(|sandbox| {
        for (options, status) in
            [(&[][..], 0), (&["watching"], 2), (&["signals"], 2), (&["watching", "behind"], 0)]
        {
            let target = Target::start(sandbox, "in-flight", options)?;
            let tree = format!("pid:{}", target.root().as_raw_pid());
            let said = limosa::run(sandbox, ["check", &tree])?;
            ensure!(said.status == Some(status), "{options:?}: {said:?}");
            let place = format!("process {}, in flight in descriptor", target.root().as_raw_pid());
            ensure!(status == 0 || said.out.contains(&place), "{said:?}");
            target.verify()?;
            target.quit()?;
            sandbox.end_all()?;
        }
        Ok(())
    });
}

/// A monitor that was away has missed messages, and is told once; a checkpoint that leaves it running tells it nothing.
#[test]
fn monitors_are_told_that_they_have_missed_messages() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "netlink", &[])?;
        let out = sandbox.path("out");
        limosa::checkpoint(sandbox, target.root(), &sandbox.path("kept"), Source::GoesOn, &[])?
            .success("checkpoint")?;
        ensure!(target.verify()?.starts_with("0 monitors"), "the source was told");
        limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
        wait_until_alone()?;
        limosa::restore(sandbox, &out, &[])?;
        for wanted in ["3 monitors", "0 monitors"] {
            let said = target.verify()?;
            ensure!(said.starts_with(wanted), "{said} instead of {wanted}");
        }
        sandbox.end_all()?;
        // A port ID that another has is named.
        let port = target.root().as_raw_pid().to_string();
        let other = Target::start(sandbox, "netlink", &["port", &port])?;
        let error =
            limosa::restore(sandbox, &out, &[]).err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(error.contains("port ID") && error.contains("another process"), "{error}");
        other.quit()?;
        Ok(())
    });
}

/// The restored process would have mapped whatever hides the file.
#[test]
fn a_mapped_file_that_is_hidden_by_a_mount_is_refused() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "memory-file", &[])?;
        let mapped = sandbox.path("memory-file.mapped");
        std::fs::write(sandbox.path("other"), std::fs::read(&mapped)?)?;
        rustix::mount::mount_bind(sandbox.path("other"), &mapped)?;
        let said = limosa::checkpoint(sandbox, target.root(), &sandbox.path("out"), Source::Ends, &[])?;
        rustix::mount::unmount(&mapped, rustix::mount::UnmountFlags::empty())?;
        ensure!(said.status == Some(1) && said.err.contains("another file is at its path now"), "{said:?}");
        target.verify()?;
        target.quit()?;
        sandbox.end_all()
    });
}

/// A child that unshared its network namespace once came back in its parent's, without a word.
#[test]
fn a_child_in_a_namespace_of_its_own_is_refused() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "refused", &["child-namespace"])?;
        let said = limosa::checkpoint(sandbox, target.root(), &sandbox.path("out"), Source::Ends, &[])?;
        ensure!(
            said.status == Some(1) && said.err.contains("namespace of its own within the tree (net)"),
            "{said:?}"
        );
        target.verify()?;
        target.quit()?;
        sandbox.end_all()
    });
}

/// The sleep(1) that `parent` starts.
fn sleep_under(parent: &Child) -> Result<Pid> {
    let children = format!("/proc/{0}/task/{0}/children", parent.id());
    wait_for("sleep(1)", Duration::from_secs(5), || {
        let children = std::fs::read_to_string(&children)?;
        let child = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
        let command = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Ok(child.filter(|pid| command(*pid) == "sleep\n").and_then(Pid::from_raw))
    })
}

/// `flock FILE PROGRAM` holds the lock, too, and would keep it: the restore once failed for that.
#[test]
fn a_lock_that_others_hold_too_is_refused() {
    sandboxed(|sandbox| {
        let file = sandbox.path("lock");
        let mut outsider = Command::new("flock")
            .arg(&file)
            .args(["setsid", "sleep", "1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let root = sleep_under(&outsider)?;
        let out = sandbox.path("out");
        let said = limosa::checkpoint(sandbox, root, &out, Source::Ends, &[])?;
        let named = format!("process {} (flock) outside of the tree", outsider.id());
        ensure!(said.status == Some(1) && said.err.contains(&named), "{said:?}");
        ensure!(said.err.contains(&format!("process {}, descriptor 3", root.as_raw_pid())), "{said:?}");
        rustix::process::test_kill_process(root)?;
        // Without the outsider it is carried.
        outsider.kill()?;
        outsider.wait()?;
        limosa::checkpoint(sandbox, root, &out, Source::Ends, &[])?.success("checkpoint")?;
        wait_until_alone()?;
        ensure!(limosa::restore(sandbox, &out, &[])? == root);
        let free = Command::new("flock").arg("--nonblock").arg(&file).arg("true").status()?;
        ensure!(!free.success(), "the restored program has no lock");
        sandbox.end_all()
    });
}

/// A process in a control group of its own came back in that of the root, without a word.
#[test]
fn a_child_in_another_control_group_is_refused() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "memory-forked", &["1"])?;
        let root = target.root().as_raw_pid();
        let children = std::fs::read_to_string(format!("/proc/{root}/task/{root}/children"))?;
        let child = children.split_whitespace().last().unwrap_or_default();
        // The hierarchy of version 1 that everybody has, or that of version 2.
        let places = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new);
        let place = places.into_iter().find(|place| place.join("cgroup.procs").exists());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let group = place.context("no control groups")?.join(format!("stray-{}", now.as_nanos()));
        std::fs::create_dir(&group)?;
        std::fs::write(group.join("cgroup.procs"), child)?;
        let said = limosa::checkpoint(sandbox, target.root(), &sandbox.path("out"), Source::Ends, &[]);
        let verified = target.verify();
        sandbox.end_all()?;
        std::fs::remove_dir(&group)?;
        let said = said?;
        verified?;
        ensure!(said.status == Some(1) && said.err.contains("it is in another control group"), "{said:?}");
        ensure!(said.err.contains(&format!("process {child}:")) && said.err.contains("/stray-"), "{said:?}");
        Ok(())
    });
}

/// A pair of interfaces with addresses, and nobody behind them.
fn make_interface(name: &str) -> Result<()> {
    let ip = |line: &str| -> Result<()> {
        let status = Command::new("ip").args(line.split(' ')).status()?;
        ensure!(status.success(), "ip {line}: {status}");
        Ok(())
    };
    ip(&format!("link add {name} type veth peer name {name}-peer"))?;
    for address in ["fd77::1/64", "fd77::2/64"] {
        ip(&format!("address add {address} dev {name} nodad"))?;
    }
    ip(&format!("link set {name} up"))?;
    ip(&format!("link set {name}-peer up"))
}

fn remove_interface(name: &str) -> Result<()> {
    ensure!(Command::new("ip").args(["link", "delete", name]).status()?.success(), "ip link delete {name}");
    Ok(())
}

/// No call lists a socket's groups: they were lost once, without a word. The interface has another index after the restore.
#[test]
fn multicast() {
    sandboxed(|sandbox| {
        make_interface("groups")?;
        round_trip(sandbox, "multicast", &["groups"])?;
        let target = Target::start(sandbox, "multicast", &["groups"])?;
        let out = sandbox.path("out");
        limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
        wait_until_alone()?;
        remove_interface("groups")?;
        let missing = limosa::restore(sandbox, &out, &[]).err().map(|error| format!("{error:#}"));
        ensure!(
            missing
                .as_ref()
                .is_some_and(|error| error.contains("on interface groups cannot be restored here")),
            "not refused: {missing:?}"
        );
        make_interface("others")?;
        make_interface("groups")?;
        remove_interface("others")?;
        limosa::restore(sandbox, &out, &[])?;
        target.verify()?;
        target.quit()?;
        sandbox.end_all()?;
        remove_interface("groups")
    });
}

#[test]
fn python() {
    sandboxed(|sandbox| round_trip_of(sandbox, &Python::start(sandbox)?.into_target()));
}

/// A program on a terminal that `script`, which is not in its tree, shows.
struct Shown {
    script: Child,
    program: Pid,
    terminal: PathBuf,
}

impl Shown {
    fn start() -> Result<Self> {
        let script = Command::new("script")
            .args(["-qc", "stty -echo; exec sleep 1000", "/dev/null"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let program = sleep_under(&script)?;
        Ok(Self { script, program, terminal: terminal_of(program)? })
    }

    fn end(mut self) -> Result<()> {
        self.script.kill()?;
        self.script.wait()?;
        Ok(())
    }
}

fn terminal_of(program: Pid) -> Result<PathBuf> {
    Ok(std::fs::read_link(format!("/proc/{}/fd/0", program.as_raw_pid()))?)
}

#[test]
fn a_terminal_shown_by_others_is_refused() {
    sandboxed(|sandbox| {
        let shown = Shown::start()?;
        let said = limosa::checkpoint(sandbox, shown.program, &sandbox.path("out"), Source::Ends, &[])?;
        shown.end()?;
        sandbox.end_all()?;
        ensure!(said.status == Some(1) && said.err.contains("whoever shows this terminal"), "{said:?}");
        ensure!(said.err.contains("--external tty="), "no remedy: {said:?}");
        Ok(())
    });
}

/// Named with `--external`, it is another one after the restore, with the settings of the former.
#[test]
fn a_terminal_shown_by_others_is_bound_to_another() {
    sandboxed(|sandbox| {
        let (from, to) = (Shown::start()?, Shown::start()?);
        let named = |terminal: &Path| format!("--external=tty={}", terminal.display());
        let echoes = |terminal: &Path| -> Result<bool> {
            let terminal = std::fs::File::open(terminal)?;
            Ok(rustix::termios::tcgetattr(terminal)?.local_modes.contains(rustix::termios::LocalModes::ECHO))
        };
        let out = sandbox.path("out");
        ensure!(!echoes(&from.terminal)?, "stty has done nothing");
        limosa::checkpoint(sandbox, from.program, &out, Source::Ends, &[&named(&from.terminal)])?
            .success("checkpoint")?;
        let changed = Command::new("stty").arg("echo").stdin(std::fs::File::open(&to.terminal)?).status()?;
        ensure!(changed.success() && echoes(&to.terminal)?, "stty has done nothing");
        for _ in 0..2 {
            let restored = limosa::restore(sandbox, &out, &[&named(&to.terminal)])?;
            ensure!(
                restored == from.program && terminal_of(restored)? == to.terminal,
                "not on the other terminal"
            );
            ensure!(!echoes(&to.terminal)?, "the terminal's settings were not put back");
            rustix::process::kill_process(restored, rustix::process::Signal::KILL)?;
            wait_for("its end", Duration::from_secs(5), || {
                Ok(rustix::process::waitpid(Some(restored), rustix::process::WaitOptions::NOHANG)?)
            })?;
        }
        let missing = limosa::run(sandbox, ["restore".as_ref(), out.as_os_str()])?;
        ensure!(missing.status == Some(1) && missing.err.contains("--external tty=PATH"), "{missing:?}");
        from.end()?;
        to.end()?;
        sandbox.end_all()
    });
}

/// A restore that failed because another process had the PID of one of the tree's children used to end that process, as
/// if it were the child.
#[test]
fn a_process_that_has_a_childs_pid_is_left_alone() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "memory-forked", &["1"])?;
        let root = target.root().as_raw_pid();
        let children = std::fs::read_to_string(format!("/proc/{root}/task/{root}/children"))?;
        let child: i32 = children.split_whitespace().last().unwrap_or_default().parse()?;
        let out = sandbox.path("out");
        limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
        wait_until_alone()?;
        std::fs::write("/proc/sys/kernel/ns_last_pid", (child - 1).to_string())?;
        let mut other = Command::new("sleep").arg("1000").spawn()?;
        ensure!(other.id() == child as u32, "process {} has not the PID {child}", other.id());
        let error = limosa::restore(sandbox, &out, &[]).err().map(|error| format!("{error:#}"));
        ensure!(other.try_wait()?.is_none(), "the other process was ended");
        other.kill()?;
        other.wait()?;
        let error = error.unwrap_or_default();
        ensure!(error.contains(&child.to_string()), "{child} is not named: {error}");
        limosa::restore(sandbox, &out, &[])?;
        target.quit()?;
        Ok(())
    });
}
