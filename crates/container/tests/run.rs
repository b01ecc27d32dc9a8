//! Containers run, are entered, end, and leave nothing behind. Needs root.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use common::{Host, config, eventually};
use limosa_container::{
    Config, ExecError, RegistryError, RunError, Shell, ShellError, ShellOptions, StopError, Streams, exec,
    remove, run, start, stop,
};
use limosa_kernel::namespace::{Kind, TimeOffsets, of_process};
use limosa_kernel::spawn::Exit;

const PATIENCE: Duration = Duration::from_secs(5);

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(|&word| word.to_owned()).collect()
}

fn log(host: &Host, config: &Config) -> String {
    fs::read_to_string(host.registry.paths(&config.name).log()).expect("a log")
}

/// Runs a shell script to its end: its exit and its output. The container is removed.
fn script(host: &Host, config: &Config) -> (Exit, String) {
    let started = run(&host.registry, config).expect("a container");
    let exit = started.process.wait().expect("an end");
    let output = log(host, config);
    remove(&host.registry, &config.name, false).expect("removed");
    (exit, output)
}

#[test]
fn a_container_is_listed_entered_stopped_and_removed() {
    let Some(host) = Host::new() else { return };
    let config = config("life", &["sleep", "1000"]);
    let name = &config.name;
    let started = run(&host.registry, &config).expect("a container");
    let list = host.registry.list().expect("a list");
    let record = list[0].1.as_ref().expect("a record");
    assert_eq!((&list[0].0, record.running()), (name, Some(started.process.pid())));
    assert_eq!(record.config, config);

    let inside = format!("test $(hostname) = {name} && test \"$(ps -o comm= 1)\" = sleep && exit 7");
    let exit = exec(&host.registry, name, &words(&["sh", "-c", &inside]), false).expect("an exit");
    assert_eq!(exit, Exit::Status(7));
    let refused = exec(&host.registry, name, &words(&["no-such-program"]), false).expect_err("refused");
    assert!(matches!(refused, ExecError::Command { .. }), "{refused}");

    let refused = run(&host.registry, &config).expect_err("the name is taken");
    assert!(matches!(refused, RunError::Registry(RegistryError::Exists { .. })), "{refused}");
    let refused = remove(&host.registry, name, false).expect_err("it runs");
    assert!(matches!(refused, StopError::Running { .. }), "{refused}");

    stop(&host.registry, name, Duration::from_millis(100)).expect("stopped");
    assert_eq!(started.process.wait().expect("an end"), Exit::Signal(9));
    assert_eq!(host.registry.load(name).expect("a record").running(), None);
    let refused = exec(&host.registry, name, &words(&["true"]), false).expect_err("it is stopped");
    assert!(matches!(refused, ExecError::NotRunning { .. }), "{refused}");
    stop(&host.registry, name, PATIENCE).expect("stopping twice is stopping");
    remove(&host.registry, name, false).expect("removed");
    host.assert_clean();
}

#[test]
fn every_namespace_but_the_users_is_the_containers_own() {
    let Some(host) = Host::new() else { return };
    let config = config("spaces", &["sleep", "1000"]);
    let started = run(&host.registry, &config).expect("a container");
    let identity = |pid: i32, kind: Kind| {
        let path = format!("/proc/{pid}/ns/{}", kind.file_name());
        fs::metadata(path).expect("a namespace").ino()
    };
    let own = std::process::id() as i32;
    for kind in [Kind::Cgroup, Kind::Ipc, Kind::Mount, Kind::Network, Kind::Pid, Kind::Time, Kind::Uts] {
        assert_ne!(identity(started.process.pid(), kind), identity(own, kind), "{kind}");
    }
    assert_eq!(identity(started.process.pid(), Kind::User), identity(own, Kind::User));
    remove(&host.registry, &config.name, true).expect("removed");
    started.process.wait().expect("an end");
    host.assert_clean();
}

#[test]
fn output_and_exit_status_are_kept_and_changes_stay_in_the_layer() {
    let Some(host) = Host::new() else { return };
    let mut config = config(
        "output",
        &[
            "sh",
            "-c",
            "echo out; echo err >&2; echo $GREETING; cat; touch /tmp/new; rm -f /etc/hostname; exit 3",
        ],
    );
    config.environment.insert("GREETING".to_owned(), "hello".to_owned());
    let host_name = fs::read("/etc/hostname").ok();
    let started = run(&host.registry, &config).expect("a container");
    assert_eq!(started.process.wait().expect("an end"), Exit::Status(3));
    assert_eq!(log(&host, &config), "out\nerr\nhello\n");
    assert!(host.registry.paths(&config.name).upper().join("tmp/new").exists());
    assert_eq!(fs::read("/etc/hostname").ok(), host_name);
    remove(&host.registry, &config.name, false).expect("removed");
    host.assert_clean();
}

#[test]
fn a_container_has_its_devices_and_only_its_own_mounts() {
    let Some(host) = Host::new() else { return };
    let check = "set -e; echo x > /dev/null; head -c 4 /dev/urandom | wc -c; test -c /dev/ptmx; touch /dev/shm/x
        ! touch /sys/x 2> /dev/null; test $(stat -c %a /tmp) = 1777; ls /proc/self/fd | wc -l; cut -d' ' -f2 /proc/mounts";
    let (exit, output) = script(&host, &config("devices", &["sh", "-c", check]));
    assert_eq!(exit, Exit::Status(0), "{output}");
    let expected = "4\n4\n/\n/sys\n/dev\n/dev/pts\n/dev/shm\n/dev/mqueue\n/proc\n";
    assert_eq!(output, expected);
    host.assert_clean();
}

#[test]
fn the_state_directory_does_not_show_in_the_read_only_layer() {
    let state = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let Some(host) = Host::with_state(state) else { return };
    let path = host.state.path().display();
    let check = format!("test ! -e {path} && test -d $(dirname {path}) && echo hidden");
    let (exit, output) = script(&host, &config("hidden", &["sh", "-c", &check]));
    assert_eq!((exit, output.as_str()), (Exit::Status(0), "hidden\n"));
    host.assert_clean();
}

#[test]
fn memory_is_limited() {
    let Some(host) = Host::new() else { return };
    let mut config = config("memory", &["sh", "-c", "head -c 200M /dev/zero | tail | wc -c"]);
    config.memory = Some(50 << 20);
    let started = run(&host.registry, &config).expect("a container");
    started.process.wait().expect("an end");
    // `tail` wants to keep the one line without end, and is killed for it.
    assert!(log(&host, &config).lines().any(|line| line == "0"), "{}", log(&host, &config));
    remove(&host.registry, &config.name, false).expect("removed");
    host.assert_clean();
}

/// One command to redis, in the inline form, and its answer.
fn redis(address: &str, command: &str) -> std::io::Result<String> {
    let address = address.parse().expect("an address");
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_millis(500))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(stream, "{command}\r\n")?;
    let mut answer = [0; 64];
    let length = stream.read(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).trim().to_owned())
}

#[test]
fn redis_answers_over_the_bridge_and_stops_when_asked() {
    let Some(host) = Host::new() else { return };
    if !Path::new("/usr/bin/redis-server").exists() {
        eprintln!("SKIPPED: there is no redis-server");
        return;
    }
    let mut config =
        config("redis", &["redis-server", "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", ""]);
    config.network = Some("br0,ip=10.0.0.7/24,gw=10.0.0.1,ip=fd00::7/64".parse().expect("a network"));
    let started = run(&host.registry, &config).expect("a container");
    eventually("redis answers", || {
        redis("10.0.0.7:6379", "SET key value").is_ok_and(|answer| answer == "+OK")
    });
    assert_eq!(redis("[fd00::7]:6379", "GET key").expect("an answer"), "$5\r\nvalue");
    let routes = exec(
        &host.registry,
        &config.name,
        &words(&["sh", "-c", "ip route | grep -q 'default via 10.0.0.1 dev eth0'"]),
        false,
    );
    assert_eq!(routes.expect("an exit"), Exit::Status(0));

    let record = host.registry.load(&config.name).expect("a record");
    record.disconnect().expect("disconnected");
    assert!(redis("10.0.0.7:6379", "PING").is_err(), "it is cut off");
    record.connect().expect("connected");
    record.announce().expect("announced");
    eventually("redis answers again", || {
        redis("10.0.0.7:6379", "PING").is_ok_and(|answer| answer == "+PONG")
    });

    stop(&host.registry, &config.name, PATIENCE).expect("stopped");
    assert_eq!(started.process.wait().expect("an end"), Exit::Status(0), "it had time to end by itself");
    assert!(log(&host, &config).contains("ready to exit"));
    remove(&host.registry, &config.name, false).expect("removed");
    host.assert_clean();
}

#[test]
fn a_run_that_fails_leaves_nothing() {
    type Case = (Config, fn(&RunError) -> bool);
    let Some(host) = Host::new() else { return };
    let network = |text: &str| Some(text.parse().expect("a network"));
    let good = config("failing", &["true"]);
    let cases: Vec<Case> = vec![
        (Config { command: words(&["no-such-program"]), ..good.clone() }, |error| {
            matches!(error, RunError::Command { .. })
        }),
        (
            Config { command: words(&["/etc/passwd"]), ..good.clone() },
            |error| matches!(error, RunError::Command { source, .. } if source.errno() == Some(13)),
        ),
        (Config { command: Vec::new(), ..good.clone() }, |error| matches!(error, RunError::Command { .. })),
        (Config { command: words(&["a\0b"]), ..good.clone() }, |error| {
            matches!(error, RunError::Command { .. })
        }),
        (Config { rootfs: "/no/such/directory".into(), ..good.clone() }, |error| {
            matches!(error, RunError::Shell(ShellError::NoRoot { .. }))
        }),
        (Config { network: network("br9,ip=10.0.0.7/24"), ..good.clone() }, |error| {
            matches!(error, RunError::Shell(ShellError::Link(_)))
        }),
        (Config { network: network("br0,ip=10.0.0.7/24,gw=192.168.9.9"), ..good.clone() }, |error| {
            matches!(error, RunError::Shell(ShellError::Link(_)))
        }),
        (
            Config {
                network: network("br0,ip=10.0.0.7/24"),
                command: words(&["no-such-program"]),
                ..good.clone()
            },
            |error| matches!(error, RunError::Command { .. }),
        ),
    ];
    for (config, expected) in cases {
        let refused = run(&host.registry, &config).expect_err("refused");
        assert!(expected(&refused), "{refused:?}");
        host.assert_clean();
    }
}

#[test]
fn a_shell_waits_to_be_connected_and_has_the_clocks_it_was_told() {
    let Some(host) = Host::new() else { return };
    let mut config = config("shell", &["sh", "-c", "cut -d' ' -f1 /proc/uptime; exec sleep 1000"]);
    config.network = Some("br0,ip=10.0.0.7/24".parse().expect("a network"));
    let reservation = host.registry.reserve(&config.name).expect("a name");
    let mac = [2, 0, 0, 0, 0, 7];
    let options = ShellOptions {
        time_offsets: TimeOffsets { monotonic: (5_000_000, 1), boottime: (6_000_000, 2) },
        connect: false,
        mac: Some(mac),
        ..ShellOptions::default()
    };
    let shell = Shell::prepare(&config, reservation.paths(), &options).expect("a shell");
    assert_eq!(shell.namespaces().count(), 6);
    let output = fs::File::create(reservation.paths().log()).expect("a log");
    let held = start(&shell, Streams::Log(output.into())).expect("a process");
    let process = held.release().expect("a program");
    eventually("it has written its uptime", || !log(&host, &config).is_empty());
    let uptime: f64 = log(&host, &config).trim().parse().expect("a number");
    assert!((6_000_000.0..7_000_000.0).contains(&uptime), "{uptime}");

    // A port nobody listens on refuses; a container that is cut off is silent.
    let knock =
        || TcpStream::connect_timeout(&"10.0.0.7:9".parse().expect("an address"), Duration::from_millis(300));
    let refused = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    assert!(!knock().is_err_and(|error| refused(&error)), "it is not connected yet");
    shell.connect().expect("connected");
    shell.announce().expect("announced");
    eventually("it is reached", || knock().is_err_and(|error| refused(&error)));
    let entries = fs::read_to_string("/proc/thread-self/net/arp").expect("neighbours");
    assert!(entries.contains("02:00:00:00:00:07"), "{entries}");

    drop(process.signal(rustix::process::Signal::KILL));
    process.wait().expect("an end");
    drop(shell);
    drop(reservation);
    host.assert_clean();
}

#[test]
fn a_shell_gets_its_proc_from_any_first_process() {
    use limosa_kernel::spawn::{Spawn, Step};
    use std::os::fd::AsFd;
    let Some(host) = Host::new() else { return };
    let config = config("proc", &["true"]);
    let reservation = host.registry.reserve(&config.name).expect("a name");
    let shell = Shell::prepare(&config, reservation.paths(), &ShellOptions::default()).expect("a shell");
    let steps = shell
        .namespaces()
        .map(|(kind, descriptor)| Step::Enter(descriptor.try_clone_to_owned().expect("a copy"), kind))
        .collect();
    let first = Spawn { new_pid_namespace: true, steps, program: None }.start().expect("a process");
    let pid_namespace = of_process(first.pid(), Kind::Pid).expect("a namespace");
    shell.mount_proc(pid_namespace.as_fd()).expect("a mount");
    let one = fs::read_to_string(format!("/proc/{}/root/proc/1/status", first.pid())).expect("its own /proc");
    assert!(one.contains("NSpid:\t1\n"), "{one}");
    drop((first, shell, reservation));
    host.assert_clean();
}

#[test]
fn a_pid_that_was_used_again_is_not_the_container() {
    let Some(host) = Host::new() else { return };
    let config = config("reused", &["true"]);
    let started = run(&host.registry, &config).expect("a container");
    started.process.wait().expect("an end");
    // Processes are told apart by when they started, in ticks of 10 ms. A PID cannot be used again within one, but this
    // test once was: its own process had started in the same tick as the container's.
    std::thread::sleep(Duration::from_millis(30));
    let mut other = std::process::Command::new("sleep").arg("60").spawn().expect("another process");
    let mut record = started.record;
    let init = record.init.as_mut().expect("a first process");
    // As if the PID were now the other process's.
    init.pid = other.id() as i32;
    host.registry.save(&record).expect("saved");
    let running = host.registry.load(&config.name).map(|record| record.running());
    let stopped = stop(&host.registry, &config.name, PATIENCE);
    let survived = other.try_wait().expect("its state").is_none();
    other.kill().expect("a signal");
    other.wait().expect("an end");
    assert_eq!(running.expect("a record"), None);
    stopped.expect("nothing is killed");
    assert!(survived, "the other process was ended");
    remove(&host.registry, &config.name, false).expect("removed");
    host.assert_clean();
}

#[test]
fn a_damaged_record_is_refused_and_can_be_removed() {
    let Some(host) = Host::new() else { return };
    let config = config("damaged", &["true"]);
    run(&host.registry, &config).expect("a container").process.wait().expect("an end");
    let record = host.registry.load(&config.name).expect("a record");
    record.cgroup.remove().expect("removed");
    fs::write(host.registry.paths(&config.name).config(), b"{\"version\": 1").expect("written");
    let refused = host.registry.load(&config.name).expect_err("damaged");
    assert!(matches!(refused, RegistryError::Malformed { .. }), "{refused}");
    assert!(remove(&host.registry, &config.name, false).is_err());
    remove(&host.registry, &config.name, true).expect("removed");
    host.assert_clean();
}

#[test]
fn the_read_only_layer_is_identified_in_no_time() {
    use limosa_container::rootfs::identity;
    let whole = identity(Path::new("/")).expect("an identity");
    let began = std::time::Instant::now();
    assert_eq!(identity(Path::new("/")).expect("an identity"), whole);
    let took = began.elapsed();
    eprintln!("identity of /: {took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");

    let small = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(small.path().join("usr/bin")).expect("directories");
    fs::create_dir_all(small.path().join("etc")).expect("directories");
    fs::write(small.path().join("etc/os-release"), "ID=small\n").expect("a file");
    let at_first = identity(small.path()).expect("an identity");
    assert_eq!(at_first.difference(&at_first), None);
    assert!(at_first.difference(&whole).is_some_and(|text| text.contains("release")));
    fs::write(small.path().join("usr/bin/program"), "x").expect("a file");
    let later = identity(small.path()).expect("an identity");
    assert!(at_first.difference(&later).is_some_and(|text| text.contains("programs")));
}

#[test]
fn what_a_killed_limosa_left_is_removed_and_what_is_being_made_is_not() {
    let Some(host) = Host::new() else { return };
    let config = config("stale", &["true"]);
    let reservation = host.registry.reserve(&config.name).expect("a name");
    let shell = Shell::prepare(&config, reservation.paths(), &ShellOptions::default()).expect("a shell");
    host.registry.sweep().expect("swept");
    assert!(reservation.paths().upper().exists(), "it is still being made");
    assert!(host.registry.list().expect("a list").is_empty(), "it is not there yet");
    let refused = host.registry.reserve(&config.name).expect_err("the name is taken");
    assert!(matches!(refused, RegistryError::Exists { .. }), "{refused}");

    // Neither is undone, as if their owner had been killed here.
    shell.keep();
    reservation.keep();
    host.registry.sweep().expect("swept");
    host.assert_clean();
}

#[test]
fn a_tree_that_was_built_by_others_is_registered() {
    use limosa_kernel::spawn::{Spawn, Step};
    let Some(host) = Host::new() else { return };
    let config = config("adopted", &["true"]);
    let reservation = host.registry.reserve(&config.name).expect("a name");
    let upper = reservation.paths().upper();
    fs::set_permissions(&upper, std::os::unix::fs::PermissionsExt::from_mode(0o711)).expect("a mode");
    let options = ShellOptions { new_layer: false, ..ShellOptions::default() };
    let shell = Shell::prepare(&config, reservation.paths(), &options).expect("a shell");
    assert_eq!(
        fs::metadata(&upper).expect("attributes").mode() & 0o777,
        0o711,
        "the layer's own mode is kept"
    );
    let steps = shell
        .cgroup()
        .open()
        .expect("groups")
        .into_iter()
        .map(|file| Step::JoinCgroup(file.into()))
        .collect();
    let first = Spawn { new_pid_namespace: true, steps, program: None }.start().expect("a process");
    let record = shell.register(&host.registry, reservation, first.pid()).expect("a record");
    assert_eq!(record.running(), Some(first.pid()));
    assert_eq!(host.registry.load(&config.name).expect("a record"), record);
    assert_eq!(record.cgroup.processes(), [first.pid()]);
    drop(first);
    remove(&host.registry, &config.name, false).expect("removed");
    host.assert_clean();
}
