//! Migration through a program in ssh's place: this one, run again (so it has no harness of its own).
//!
//! `LIMOSA_SSH` names this program. As `ssh` it gets `-T -o … [-p PORT] [USER@]HOST REMOTE receive`, and plays the other
//! machine according to HOST.

#[path = "../common/mod.rs"]
mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use common::{Content, Host, Scene, World, large_checkpoint, short_limits, small_checkpoint};
use limosa_image::Sink;
use limosa_migrate::{
    Address, Connect, Outcome, Outgoing, Purpose, Received, SSH_VARIABLE, Store, Transport,
};
use limosa_migrate::{MigrationId, Offer};
use limosa_migrate::{receive, unwatched};

const TEST: &str = "ssh";
const RECORDS: &str = "LIMOSA_TEST_RECORDS";
/// Below the directory of records: the container runs at the destination.
const MARKER: &str = "running";
/// Below the directory of records: the point at which the next receiver is killed.
const KILL_AT: &str = "kill-at";
const DOOMED_ID: &str = "LIMOSA_TEST_ID";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    match arguments.last().map(String::as_str) {
        Some("receive") => return other_machine(&arguments),
        Some("source") => source(),
        Some("doomed") => doomed(),
        // What cargo-nextest asks of every test program.
        _ if has("--list") => {
            if !has("--ignored") {
                println!("{TEST}: test");
            }
        }
        _ => run_source(),
    }
    ExitCode::SUCCESS
}

/// Runs the source with this program in ssh's place.
fn run_source() {
    let this = std::env::current_exe().expect("this program");
    let records = tempfile::tempdir().expect("directory");
    let mut command = Command::new(&this);
    command.arg("source").env(SSH_VARIABLE, &this).env(RECORDS, records.path());
    assert!(command.status().expect("the source").success());
}

fn other_machine(arguments: &[String]) -> ExitCode {
    let host = arguments.iter().rev().nth(2).expect("a host").as_str();
    let store = Store::open(records()).expect("store");
    match host {
        "root@works" | "impatient" => {
            assert!(host != "root@works" || arguments.windows(2).any(|pair| pair == ["-p", "2222"]));
            let transport = Transport::stdio().expect("standard input and output");
            let mut host = Host::new(&Arc::new(World::default()));
            let received = receive(transport, &mut host, &store, &short_limits(), unwatched());
            if let Ok(Received::Started { .. }) = received {
                let mut expected = Content::default();
                large_checkpoint(&mut expected).expect("checkpoint");
                assert_eq!(host.content, expected);
            }
            received.map_or(ExitCode::FAILURE, |_| ExitCode::SUCCESS)
        }
        "spawned" => spawn(arguments),
        "survives" => {
            let transport = Transport::stdio().expect("standard input and output");
            let mut host = Host::new(&Arc::new(World::default()));
            host.marker = Some(records().join(MARKER));
            // The source may be killed, or this process: the test looks at what is left.
            let _ = receive(transport, &mut host, &store, &short_limits(), unwatched());
            ExitCode::SUCCESS
        }
        "unreachable" => {
            eprintln!("ssh: connect to host unreachable port 22: No route to host");
            ExitCode::from(255)
        }
        "chatty" => {
            println!("Today's motd: be kind");
            ExitCode::SUCCESS
        }
        _ => panic!("an unknown host {host}"),
    }
}

fn records() -> PathBuf {
    std::env::var_os(RECORDS).expect("a directory for records").into()
}

/// Runs a receiver that is killed at the point that the test chose, or one that is not if it chose none.
fn spawn(arguments: &[String]) -> ExitCode {
    let at = records().join(KILL_AT);
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let host = arguments.len() - 3;
    arguments[host] = "survives";
    // What was meant for the source's process is not inherited.
    command.args(arguments).env_remove("LIMOSA_KILL_AT");
    if let Ok(point) = std::fs::read_to_string(&at) {
        std::fs::remove_file(&at).expect("it is there");
        command.env("LIMOSA_KILL_AT", point);
    }
    let status = command.status().expect("a receiver");
    ExitCode::from(u8::from(!status.success()))
}

fn source() {
    a_receiver_killed_anywhere_leaves_one_owner();
    a_source_killed_anywhere_leaves_one_owner();
    a_container_moves();
    what_ssh_says_is_passed_on();
    a_hand_over_that_comes_too_late_is_settled();
}

fn a_container_moves() {
    let scene = Scene::new(short_limits());
    let mut address: Address = "ssh://root@works:2222".parse().expect("address");
    let transport = address.connect(Purpose::Migrate, &scene.limits).expect("connect");
    let outgoing = Outgoing::connect(transport, &scene.limits, unwatched()).expect("greet");
    let mut sending = outgoing.negotiate(&scene.offer).expect("offer");
    large_checkpoint(&mut sending).expect("send");
    let ready = sending.finish().expect("ready");
    let counters = ready.counters();
    assert!(counters.bytes_sent > 5 << 20 && counters.messages_sent > 30, "{counters:?}");
    let outcome =
        ready.hand_over(&scene.source, &mut address, || Ok::<_, std::io::Error>(())).expect("hand over");
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
}

fn what_ssh_says_is_passed_on() {
    let scene = Scene::new(short_limits());
    for (address, expected) in [("ssh://unreachable", "No route to host"), ("ssh://chatty", "be kind")] {
        let mut address: Address = address.parse().expect("address");
        let transport = address.connect(Purpose::Migrate, &scene.limits).expect("the program runs");
        let Err(error) = Outgoing::connect(transport, &scene.limits, unwatched()) else {
            panic!("{address:?} greeted");
        };
        assert!(error.to_string().contains(expected), "{error}");
    }
}

fn a_hand_over_that_comes_too_late_is_settled() {
    let scene = Scene::new(short_limits());
    let mut address: Address = "ssh://impatient".parse().expect("address");
    let transport = address.connect(Purpose::Migrate, &scene.limits).expect("connect");
    let outgoing = Outgoing::connect(transport, &scene.limits, unwatched()).expect("greet");
    let mut sending = outgoing.negotiate(&scene.offer).expect("offer");
    small_checkpoint(&mut sending as &mut dyn Sink).expect("send");
    let ready = sending.finish().expect("ready");
    // The destination gives up before the source gets to it.
    let slow = || {
        std::thread::sleep(short_limits().hand_over + std::time::Duration::from_millis(300));
        Ok::<_, std::io::Error>(())
    };
    let outcome = ready.hand_over(&scene.source, &mut address, slow).expect("an outcome");
    assert!(matches!(outcome, Outcome::Kept { .. }), "{outcome:?}");
    let again = limosa_migrate::settle(&scene.source, scene.offer.id, &mut address, &scene.limits);
    assert_eq!(again.expect("settle"), outcome);
}

/// A migration to `address`; an error is one before the hand-over.
fn migrate(address: &str, offer: &Offer, store: &Store) -> Result<Outcome, String> {
    let limits = short_limits();
    let mut address: Address = address.parse().expect("address");
    let transport = address.connect(Purpose::Migrate, &limits).expect("the program runs");
    let outgoing = Outgoing::connect(transport, &limits, unwatched()).map_err(|error| error.to_string())?;
    let mut sending = outgoing.negotiate(offer).map_err(|error| error.to_string())?;
    small_checkpoint(&mut sending).map_err(|error| error.to_string())?;
    let ready = sending.finish().map_err(|error| error.to_string())?;
    ready.hand_over(store, &mut address, || Ok::<_, std::io::Error>(())).map_err(|error| error.to_string())
}

fn a_receiver_killed_anywhere_leaves_one_owner() {
    let marker = records().join(MARKER);
    let (mut moved, mut kept) = (0, 0);
    for point in 1.. {
        let scene = Scene::new(short_limits());
        std::fs::write(records().join(KILL_AT), point.to_string()).expect("write");
        let outcome = migrate("ssh://spawned", &scene.offer, &scene.source);
        let runs_there = std::fs::remove_file(&marker).is_ok();
        let ours = matches!(outcome, Err(_) | Ok(Outcome::Kept { .. }));
        let theirs = matches!(outcome, Ok(Outcome::Moved(_)));
        assert!(
            ours != theirs && theirs == runs_there,
            "killed at {point}: {outcome:?}, there: {runs_there}"
        );
        let record = Store::open(records()).expect("store").arrival(scene.offer.id).expect("record");
        moved += u32::from(theirs);
        kept += u32::from(ours);
        if record.is_some_and(|record| record.acknowledged) && theirs && moved > 3 {
            break;
        }
        assert!(point < 100, "a migration has fewer points");
    }
    assert!(kept >= 8 && moved >= 4, "both ends occur: kept {kept}, moved {moved}");
}

/// The source's process that is killed.
fn doomed() {
    let id = std::env::var(DOOMED_ID).expect("id").parse().expect("id");
    let store = Store::open(records().join("source")).expect("store");
    let _ = migrate("ssh://spawned", &Offer::new(id, "redis"), &store);
}

fn a_source_killed_anywhere_leaves_one_owner() {
    let marker = records().join(MARKER);
    let store = Store::open(records().join("source")).expect("store");
    let (mut moved, mut kept) = (0, 0);
    for point in 1.. {
        let id = MigrationId::random().expect("id");
        let mut doomed = Command::new(std::env::current_exe().expect("this program"));
        doomed.arg("doomed").env(DOOMED_ID, id.to_string()).env("LIMOSA_KILL_AT", point.to_string());
        let killed = doomed.status().expect("the source").signal().is_some();
        // Without a record the source never gave up what it owns. With one, it asks.
        let mut theirs = false;
        if store.departure(id).expect("record").is_some() {
            let mut address: Address = "ssh://spawned".parse().expect("address");
            match limosa_migrate::settle(&store, id, &mut address, &short_limits()).expect("settle") {
                Outcome::Moved(_) => theirs = true,
                Outcome::Kept { .. } => {}
                Outcome::Unknown { why } => panic!("killed at {point}: {why}"),
            }
        }
        // For a receiver that might still start it, if it were wrong.
        std::thread::sleep(std::time::Duration::from_millis(150));
        let runs_there = std::fs::remove_file(&marker).is_ok();
        assert_eq!(theirs, runs_there, "killed at {point}");
        moved += u32::from(theirs);
        kept += u32::from(!theirs);
        if !killed {
            break;
        }
        assert!(point < 100, "a migration has fewer points");
    }
    assert!(kept >= 10 && moved >= 3, "both ends occur: kept {kept}, moved {moved}");
}
