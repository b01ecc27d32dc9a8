//! Each kind of target through checkpoint and restore: left running, ended, and restored three times from each checkpoint.
//!
//! A kind is in one of three lists: it makes the round trip; it is refused, with a reason, and goes on; or it is known to
//! come back with something missing (ignored, with what is missing). When a room is built or mended, its kind moves.

use limosa_e2e::programs::Python;
use limosa_e2e::round_trip::{refused, round_trip, round_trip_of};
use limosa_e2e::sandbox::sandboxed;

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
    creds: "creds";
    events: "events";
    files: "files";
    heartbeat: "heartbeat";
    memory: "memory";
    memory_advice: "memory-advice";
    memory_file: "memory-file";
    memory_shared: "memory-shared";
    memory_system_v: "memory-shared" "system-v";
    misc: "misc";
    registers: "registers";
    seccomp: "seccomp";
    signals: "signals";
    sleeps: "sleeps";
    sleep_of_epoll: "sleeps" "epoll_wait";
    terminal: "terminal";
    threads: "threads";
    timers: "timers";
    tree: "tree";
    watchers: "watchers";

    pipes: "pipes";
}

refusals! {
    inet_sockets_are_refused: "sockets-inet" [] "socket";
    unix_sockets_are_refused: "sockets-unix" [] "socket";
}

#[test]
fn python() {
    sandboxed(|sandbox| round_trip_of(sandbox, &Python::start(sandbox)?.into_target()));
}
