//! The demo itself, small: it judges by its own exit status, so that is what must be right.
//!
//! Needs root, redis-server, and the limosa program built beside this one (`make test` sees to it).

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// How long the client may wait after redis runs again. Lost packets (a peer that was not probed, an ARP request that
/// met an interface which carries nothing yet) cost it a second.
const AFTERWARDS_MS: f64 = 600.0;

fn demo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa-demo"));
    command.args(["--megabytes", "2", "--pause", "0.1"]).args(arguments).stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n{out}\n{err}", output.status)
}

#[test]
fn redis_moves_there_and_back_and_nothing_is_lost_or_left() {
    let output = demo(&["--rounds", "4", "--json"]).output().expect("the demo");
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a summary");
    let migrations = summary["migrations"].as_array().expect("migrations");
    assert_eq!(migrations.len(), 4);
    for migration in migrations {
        let gap = migration["client"]["longest_gap_ms"].as_f64().expect("a gap");
        let frozen = migration["report"]["frozen_us"].as_f64().expect("a freeze") / 1000.0;
        assert!(gap < frozen + AFTERWARDS_MS, "a gap of {gap:.0} ms, frozen {frozen:.0} ms: {migration}");
    }
    assert_eq!(summary["client"]["lost"], 0);
    assert_eq!(summary["client"]["resets"], 0);
    assert!(summary["client"]["increments"].as_u64() > Some(100), "{summary}");
    assert_eq!(summary["left_behind"].as_array().map(Vec::len), Some(0));
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    for after in [100, 700, 1500] {
        let mut command = demo(&["--rounds", "1000"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the demo");
        std::thread::sleep(Duration::from_millis(after));
        kill_process(Pid::from_child(&child), Signal::INT).expect("a process to interrupt");
        let output = child.wait_with_output().expect("its end");
        assert_eq!(output.status.code(), Some(130), "after {after} ms: {}", said(&output));
        assert!(!said(&output).contains("left behind"), "after {after} ms: {}", said(&output));
    }
}

#[test]
fn a_limosa_that_fails_fails_the_demo() {
    let output = demo(&["--limosa", "/bin/false"]).output().expect("the demo");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("limosa run on A"), "{}", said(&output));
}
