//! Migration through a program in ssh's place: this one, run again (so it has no harness of its own).
//!
//! `LIMOSA_SSH` names this program. As `ssh` it gets `-T -o … [-p PORT] [USER@]HOST REMOTE receive`, and plays the other
//! machine according to HOST.

#[path = "../common/mod.rs"]
mod common;

use std::process::{Command, ExitCode};
use std::sync::Arc;

use common::{Content, Host, Scene, World, large_checkpoint, short_limits, small_checkpoint};
use limosa_image::Sink;
use limosa_migrate::{
    Address, Connect, Outcome, Outgoing, Purpose, Received, SSH_VARIABLE, Store, Transport,
};
use limosa_migrate::{receive, unwatched};

const TEST: &str = "ssh";
const RECORDS: &str = "LIMOSA_TEST_RECORDS";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    match arguments.last().map(String::as_str) {
        Some("receive") => return other_machine(&arguments),
        Some("source") => source(),
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
    let store = Store::open(std::env::var_os(RECORDS).expect("a directory")).expect("store");
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

fn source() {
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
