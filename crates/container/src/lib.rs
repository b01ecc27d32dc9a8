//! Containers for Limosa to move: running, listing, entering and removing them.
//!
//! Deliberately small: new pid, mount, net, ipc, uts, cgroup and time namespaces, an overlay of a read-only
//! root and a writable layer, a veth pair into a bridge, a control group. No process of Limosa stays behind a
//! running container, but the keeper of its terminal, if it has one. It isolates, but is no fence against hostile programs: they run as the host's root.

mod capture;
mod cgroup;
mod config;
mod exec;
mod fate;
mod foreground;
pub mod groups;
mod link;
mod logs;
pub mod migration;
mod rebuild;
mod registry;
mod root;
pub mod rootfs;
mod run;
mod shell;
mod stop;
mod terminal;
mod undo;

pub use capture::{CapturedContainer, ContainerCaptureError, ContainerState, Source};
pub use cgroup::{Cgroup, CgroupError};
pub use config::{Address, Config, DEFAULT_PATH, Name, Network, ParseError, parse_size};
pub use exec::{ExecError, exec};
pub use foreground::{Ended, join_restored, run_detached_on_terminal, run_in_foreground, run_on_terminal};
pub use limosa_archive as layer;
pub use link::{INTERFACE, LinkError};
pub use logs::{LogsError, copy_log};
pub use rebuild::{
    Changes, Prepared, RebuildError, Restored, check_root, container_state, holds_container, prepare,
};
pub use registry::{DEFAULT_STATE_DIR, Init, Listed, Paths, Record, Registry, RegistryError, Reservation};
pub use root::RootError;
pub use run::{LOG_KEY, RunError, Started, Streams, run, start};
pub use shell::{Shell, ShellError, ShellOptions};
pub use stop::{StopError, remove, stop};
pub use terminal::{AttachError, Attached, Keep, Keeper, attach};

/// `bytes` random bytes as hexadecimal digits.
fn random_hex(bytes: usize) -> String {
    use std::fmt::Write;
    let mut buffer = vec![0_u8; bytes];
    // Names only need to differ: a short read leaves zeros, and a name that is taken is refused.
    let _ = rustix::rand::getrandom(&mut buffer, rustix::rand::GetRandomFlags::empty());
    buffer.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
