//! The targets themselves, without Limosa: each sets itself up, verifies itself more than once, and leaves nothing.

use limosa_e2e::sandbox::sandboxed;
use limosa_e2e::target::Target;

macro_rules! targets {
    ($($name:ident: $kind:literal $($option:literal)*;)*) => {$(
        #[test]
        fn $name() {
            sandboxed(|sandbox| {
                let target = Target::start(sandbox, $kind, &[$($option),*])?;
                for _ in 0..2 {
                    target.verify()?;
                }
                target.quit()?;
                Ok(())
            });
        }
    )*};
}

targets! {
    creds: "creds";
    events: "events";
    files: "files";
    heartbeat: "heartbeat";
    locks: "locks";
    memory: "memory";
    memory_advice: "memory-advice";
    memory_file: "memory-file";
    memory_forked: "memory-forked";
    memory_guarded: "memory-guarded";
    memory_huge: "memory-huge";
    memory_shared: "memory-shared";
    misc: "misc";
    odd_files: "odd-files";
    pipes: "pipes";
    registers: "registers";
    seccomp: "seccomp";
    signals: "signals";
    sleeps: "sleeps";
    sleeps_that_stopping_interrupts: "sleeps" "epoll_wait" "sigtimedwait" "recv-timeout";
    sockets_inet: "sockets-inet";
    sockets_unix: "sockets-unix";
    terminal: "terminal";
    threads: "threads";
    timers: "timers";
    tree: "tree";
    watchers: "watchers";
}
