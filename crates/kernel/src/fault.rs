//! Fault injection: the controller that kills itself at its N-th operation on the kernel.
//!
//! With the feature `fault`, every wrapper in this crate that changes or reads a foreign process, and
//! every write of a checkpoint or message of a migration, passes [`point`]. The environment variable
//! `LIMOSA_KILL_AT=N` makes the N-th passage end the process with `SIGKILL`, exactly as `kill -9` from
//! outside would; [`passed`] tells how many there were. Without the feature the function is empty.

/// One operation on the kernel is about to happen.
#[inline]
pub fn point() {
    #[cfg(feature = "fault")]
    counting::pass();
}

/// How many operations have happened so far (0 without the feature `fault`).
pub fn passed() -> u64 {
    #[cfg(feature = "fault")]
    return counting::PASSED.load(std::sync::atomic::Ordering::Relaxed);
    #[cfg(not(feature = "fault"))]
    0
}

#[cfg(feature = "fault")]
mod counting {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    pub(super) static PASSED: AtomicU64 = AtomicU64::new(0);
    static KILL_AT: OnceLock<Option<u64>> = OnceLock::new();

    pub(super) fn pass() {
        let kill_at =
            *KILL_AT.get_or_init(|| std::env::var("LIMOSA_KILL_AT").ok().and_then(|text| text.parse().ok()));
        let number = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
        if kill_at == Some(number) {
            // SAFETY: kill and getpid take no pointers.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}
