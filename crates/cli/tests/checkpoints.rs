//! What a user can ask about a checkpoint and its making: `inspect`, `verify`, reports, traces. Needs root.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

fn limosa(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.args(arguments).stdin(Stdio::null()).output().expect("limosa")
}

/// What a command that must succeed says on standard output.
fn says(arguments: &[&str]) -> String {
    let output = limosa(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&says(arguments)).expect("JSON")
}

/// A directory, and a process with a pipe that sleeps until the end of the test.
struct Scene {
    directory: TempDir,
    sleeper: Child,
}

impl Scene {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: this test needs root");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let output = fs::File::create(directory.path().join("out")).expect("a file");
        // Descriptors that this process inherited belong to others, and perhaps locks with them.
        let script = r#"for fd in /proc/self/fd/*; do fd=${fd##*/}; ((fd > 2)) && eval "exec $fd>&-"; done; exec setsid sleep 1000"#;
        let mut command = Command::new("bash");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(output).stderr(Stdio::null());
        let sleeper = command.spawn().expect("a process");
        let scene = Self { directory, sleeper };
        while scene.comm() != "sleep" {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Some(scene)
    }

    fn comm(&self) -> String {
        let path = format!("/proc/{}/comm", self.sleeper.id());
        fs::read_to_string(path).unwrap_or_default().trim_end().to_owned()
    }

    fn target(&self) -> String {
        format!("pid:{}", self.sleeper.id())
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.sleeper.kill();
        let _ = self.sleeper.wait();
    }
}

#[test]
fn a_checkpoint_can_be_looked_into_and_verified() {
    let Some(scene) = Scene::new() else { return };
    let (out, trace) = (scene.path("ck"), scene.path("trace.json"));
    let target = scene.target();
    let done = json(&["checkpoint", &target, "--out", &out, "--leave-running", "--trace", &trace, "--json"]);
    let time = |name: &str| done[name].as_u64().unwrap_or_else(|| panic!("{name}: {done}"));
    assert!(time("freeze_us") <= time("first_instruction_us"), "{done}");
    assert!(time("last_page_us") <= time("durable_us") && time("durable_us") <= time("whole_us"), "{done}");

    let events: Value = serde_json::from_slice(&fs::read(&trace).expect("a trace")).expect("JSON");
    let events = events.as_array().expect("events");
    assert!(events.iter().all(|event| event["ph"] == "X" && event["dur"].is_u64()), "{events:?}");
    assert!(events.iter().any(|event| event["name"] == "freeze"), "{events:?}");

    let inspected = json(&["inspect", &out, "--json"]);
    let process = &inspected["tree"]["processes"][0];
    assert_eq!(process["pid"].as_u64(), Some(scene.sleeper.id().into()));
    assert_eq!((process["name"].as_str(), process["state"].as_str()), (Some("sleep"), Some("running")));
    let kinds: Vec<&str> = process["descriptors"]
        .as_array()
        .expect("some")
        .iter()
        .filter_map(|one| one["kind"].as_str())
        .collect();
    // Others are inherited from whatever runs this test.
    assert_eq!(kinds[..3], ["pipe", "file", "file"]);
    assert!(process["memory"]["stored"].as_u64() > Some(0));
    assert!(inspected["container"].is_null());
    assert_eq!(inspected["checkpoint"]["meta"]["id"], done["id"]);

    let text = says(&["inspect", &out]);
    assert!(text.contains(&format!("{} sleep", scene.sleeper.id())) && text.contains(" pipe"), "{text}");
    assert_eq!(json(&["verify", &out, "--json"])["id"], done["id"]);
    assert!(says(&["verify", &out]).contains("whole"));

    let pages = PathBuf::from(&out).join("memory.pages");
    let mut bytes = fs::read(&pages).expect("pages");
    bytes[5000] ^= 1;
    fs::write(&pages, bytes).expect("written");
    let damaged = limosa(&["verify", &out]);
    let message = String::from_utf8(damaged.stderr).expect("text");
    assert_eq!(damaged.status.code(), Some(1));
    assert!(message.contains("memory.pages"), "{message}");
}

#[test]
fn a_trace_that_cannot_be_written_is_found_out_before_anything_is_done() {
    let Some(scene) = Scene::new() else { return };
    let (out, target) = (scene.path("ck"), scene.target());
    let refused = limosa(&["checkpoint", &target, "--out", &out, "--trace", &scene.path("none/trace")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(!PathBuf::from(&out).exists());
    assert_eq!(scene.comm(), "sleep");
}

#[test]
fn completions_and_manual_pages_know_every_subcommand() {
    let directory = tempfile::tempdir().expect("a directory");
    let man = directory.path().to_str().expect("UTF-8");
    says(&["man", "--out", man]);
    let help = says(&["--help"]);
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert!(commands.len() > 10, "{commands:?}");
    for shell in ["bash", "zsh", "fish"] {
        let completions = says(&["completions", shell]);
        for command in &commands {
            assert!(completions.contains(command), "{shell} does not know {command}");
        }
    }
    for command in commands {
        let page = directory.path().join(format!("limosa-{command}.1"));
        assert!(page.exists(), "{}", page.display());
        assert!(says(&[command, "--help"]).contains("Examples:"), "{command} --help has no examples");
    }
}

#[test]
fn what_cannot_be_carried_is_said_all_at_once_and_before_anything_is_frozen() {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let Some(scene) = Scene::new() else { return };
    assert_eq!(json(&["check", &scene.target(), "--json"])["possible"], Value::Bool(true));
    // Two packet sockets, which no room carries.
    let socket = || {
        let (family, kind) = (AddressFamily::PACKET, SocketType::RAW);
        Stdio::from(rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).expect("a socket"))
    };
    let mut holder =
        Command::new("sleep").arg("1000").stdin(socket()).stdout(socket()).spawn().expect("a process");
    let target = format!("pid:{}", holder.id());
    let checked = limosa(&["check", &target, "--json"]);
    let out = scene.path("refused");
    let refused = limosa(&["checkpoint", &target, "--out", &out]);
    let runs = holder.try_wait().expect("a child").is_none();
    holder.kill().expect("killed");
    holder.wait().expect("an end");
    assert_eq!(checked.status.code(), Some(2), "{checked:?}");
    let report: Value = serde_json::from_slice(&checked.stdout).expect("JSON");
    let refusals = report["refusals"].as_array().expect("refusals");
    let numbers: Vec<_> =
        refusals.iter().map(|one| one["subject"]["descriptor"]["number"].as_i64()).collect();
    assert_eq!(numbers, [Some(0), Some(1)], "{report}");
    let message = String::from_utf8(refused.stderr).expect("text");
    assert!(!refused.status.success() && message.contains("2 things"), "{message}");
    assert_eq!(message.matches("packet socket").count(), 2, "{message}");
    assert!(runs && !PathBuf::from(out).exists());
}

#[test]
fn connections_and_processes_outside_are_found_before_anything_is_frozen() {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    let Some(scene) = Scene::new() else { return };
    // A listening socket whose program does not accept, a connection to this process, and a pidfd of it.
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a socket");
    let _client = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let (near, _far) = UnixStream::pair().expect("sockets");
    let this = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
    let mut holder = Command::new("sleep");
    holder
        .arg("1000")
        .stdin(OwnedFd::from(listener))
        .stdout(OwnedFd::from(near))
        .stderr(this.expect("a pidfd"));
    let mut holder = holder.spawn().expect("a process");
    let target = format!("pid:{}", holder.id());
    let checked = limosa(&["check", &target, "--json"]);
    let given_up = limosa(&["check", &target, "--json", "--unaccepted", "close"]);
    let out = scene.path("refused");
    let refused = limosa(&["checkpoint", &target, "--out", &out]);
    holder.kill().expect("killed");
    holder.wait().expect("an end");
    let found = |output: &Output| -> Vec<(i64, String)> {
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let number = |one: &Value| one["subject"]["descriptor"]["number"].as_i64().expect("a descriptor");
        let refusals = report["refusals"].as_array().expect("refusals").iter();
        refusals.map(|one| (number(one), one["reason"].as_str().expect("a reason").to_owned())).collect()
    };
    let reasons = found(&checked);
    for (number, part) in [(0, "1 connections wait in it"), (1, "outside the tree"), (2, "not in the tree")] {
        assert!(reasons.iter().any(|(at, why)| *at == number && why.contains(part)), "{part}: {reasons:?}");
    }
    let numbers: Vec<i64> = found(&given_up).into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, [1, 2]);
    let message = String::from_utf8(refused.stderr).expect("text");
    assert!(message.contains("3 things"), "{message}");
}

#[test]
fn check_tries_every_feature_and_leaves_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: this test needs root");
        return;
    }
    let report = json(&["check", "--json"]);
    let features = report["features"].as_array().expect("features");
    assert!(features.len() > 40 && report["sufficient"] == Value::Bool(true), "{report}");
    for feature in features {
        assert_eq!(feature["available"].as_bool(), Some(feature["why"].is_null()), "{feature}");
        assert!(feature["lost"].as_str().is_some_and(|lost| !lost.is_empty()), "{feature}");
    }
    assert!(says(&["check"]).contains("work here"));
    let groups = fs::read_dir("/sys/fs/cgroup").expect("hierarchies").flatten();
    let left = groups.filter(|group| {
        let below = fs::read_dir(group.path()).into_iter().flatten().flatten();
        below.into_iter().any(|one| one.file_name().to_string_lossy().starts_with("limosa-check."))
    });
    assert_eq!(left.count(), 0);
}

#[test]
fn the_plan_of_a_restore_is_explained_and_then_carried_out() {
    let Some(mut scene) = Scene::new() else { return };
    let (out, target) = (scene.path("ck"), scene.target());
    says(&["checkpoint", &target, "--out", &out]);
    scene.sleeper.wait().expect("it has ended");
    let plan = says(&["restore", &out, "--explain"]);
    let pid = scene.sleeper.id();
    for part in [
        format!("process {pid} is born"),
        format!("process {pid} makes its mappings"),
        format!("process {pid} gets its descriptors and attributes"),
        "make a mapping".to_owned(),
        ": pipe, held as".to_owned(),
    ] {
        assert!(plan.contains(&part), "no {part:?} in\n{plan}");
    }
    let structured = json(&["restore", &out, "--explain", "--json"]);
    let process = &structured["processes"][0];
    assert_eq!((process["pid"].as_u64(), process["kind"].as_str()), (Some(pid.into()), Some("process")));
    let held = structured["descriptions"].as_array().expect("descriptions").iter();
    assert!(held.filter(|one| one["kind"] == "pipe").count() == 1, "{structured}");
    let programs = structured["programs"].as_array().expect("programs");
    // Both forms tell the same calls: a line of the text for each.
    let calls: Vec<&Value> =
        programs.iter().flat_map(|one| one["calls"].as_array().expect("calls")).collect();
    let lines = plan.lines().filter(|line| line.contains(")    "));
    assert_eq!(lines.count(), calls.len());
    let maps = calls.iter().find(|call| call["call"] == "mmap").expect("an mmap");
    assert!(maps["arguments"][0].is_u64() && maps["purpose"].is_string(), "{maps}");
    assert!(!PathBuf::from(format!("/proc/{pid}")).exists(), "nothing was done");
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("a subreaper");
    let (pidfile, trace) = (scene.path("pid"), scene.path("restore.json"));
    let done = json(&["restore", &out, "--detach", "--pidfile", &pidfile, "--trace", &trace, "--json"]);
    assert_eq!(fs::read_to_string(&pidfile).expect("a PID").trim(), pid.to_string());
    assert!(done["first_instruction_us"].as_u64() <= done["whole_us"].as_u64(), "{done}");
    assert!(fs::read_to_string(&trace).expect("a trace").contains("births"));
    assert_eq!(scene.comm(), "sleep");
    let pid = rustix::process::Pid::from_raw(pid as i32);
    rustix::process::kill_process(pid.expect("a PID"), rustix::process::Signal::KILL).expect("killed");
    rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).expect("reaped");
}

#[test]
fn an_interrupted_checkpoint_leaves_nothing_and_the_source_runs() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: this test needs root");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let out = directory.path().join("ck");
    // Enough memory that the checkpoint takes a while.
    let script = "x = b'x' * (192 << 20); print('ready', flush=True); import time; time.sleep(1000)";
    let mut holder = Command::new("python3");
    holder.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut holder = holder.spawn().expect("python3");
    std::io::Read::read_exact(holder.stdout.as_mut().expect("output"), &mut [0; 6]).expect("it is ready");
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.args(["checkpoint", &format!("pid:{}", holder.id()), "--out"]).arg(&out);
    let checkpoint = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("limosa");
    // When its hidden directory is there, it holds signals back.
    while fs::read_dir(directory.path()).expect("a directory").count() == 0 {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    let pid = rustix::process::Pid::from_child(&checkpoint);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("interrupted");
    let ended = checkpoint.wait_with_output().expect("an end");
    let left = fs::read_dir(directory.path()).expect("a directory").count();
    let runs = holder.try_wait().expect("a child").is_none();
    holder.kill().expect("killed");
    holder.wait().expect("an end");
    assert_eq!(ended.status.code(), Some(130), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("the source runs on"), "{ended:?}");
    assert!(left == 0 && runs, "left: {left}, runs: {runs}");
}
