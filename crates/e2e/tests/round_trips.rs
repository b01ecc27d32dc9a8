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
    heartbeat: "heartbeat";
    memory: "memory";
    memory_advice: "memory-advice";
    memory_shared: "memory-shared";
    registers: "registers";
    signals: "signals";
    sleeps: "sleeps";
    threads: "threads";

    #[ignore = "restore gives EINVAL for an open file (O_PATH beside O_LARGEFILE, most likely)"]
    files: "files";
    #[ignore = "the timer slack comes back as the default"]
    misc: "misc";
    #[ignore = "a pipe in packet mode comes back with other packets"]
    pipes: "pipes";
    #[ignore = "the last of the POSIX timers, which is not armed, does not come back"]
    timers: "timers";
    #[ignore = "the child subreaper is no longer one"]
    tree: "tree";
}

refusals! {
    events_are_refused: "events" [] "eventfd";
    mapping_of_a_deleted_file_is_refused: "memory-file" [] "deleted";
    epoll_is_refused: "sleeps" ["epoll_wait"] "eventpoll";
    inet_sockets_are_refused: "sockets-inet" [] "socket";
    seccomp_is_refused: "seccomp" [] "seccomp";
    terminals_are_refused: "terminal" [] "ptmx";
    unix_sockets_are_refused: "sockets-unix" [] "socket";
}

#[test]
fn python() {
    sandboxed(|sandbox| round_trip_of(sandbox, &Python::start(sandbox)?.into_target()));
}
