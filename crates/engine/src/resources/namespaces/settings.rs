//! The settings of a network namespace: what can be written below `/proc/sys/net` (proc_sys_net(5)).
//!
//! What is there depends on who looks: a thread sees its own network namespace's, and there only what that can change.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::InNetns;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, RestoreError};

const TOP: &str = "/proc/sys/net";
/// Longest value that is believed; the kernel takes a page at most.
const VALUE_MAX: u64 = 4096;
/// What belongs to the hardware or is changed by the kernel itself.
const NOT_OURS: [&str; 1] = ["mtu"];

/// A setting.
#[derive(Debug, Serialize, Deserialize)]
pub struct Setting {
    /// Its path below `/proc/sys/net`.
    pub path: String,
    /// Its value, as it is read and written.
    pub value: serde_bytes::ByteBuf,
}

/// All settings that the network namespace of process `pid` can change, which need not stand still for it.
pub(crate) fn of_process(pid: i32) -> Result<Vec<Setting>, CaptureError> {
    let _inside = InNetns::enter(namespace::of_process(pid, Kind::Network)?)?;
    let fail = |source| CaptureError::Io { what: "reading network settings", pid, source };
    let mut settings = Vec::new();
    let mut directories = vec![PathBuf::from(TOP)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let path = entry.path();
            if entry.file_type().map_err(fail)?.is_dir() {
                directories.push(path);
            } else if entry.metadata().is_ok_and(|found| found.mode() & 0o600 == 0o600)
                && !NOT_OURS.iter().any(|name| path.ends_with(name))
                // Some have no value until one is written.
                && let Ok(value) = value(&path)
                && let Some(path) = path.strip_prefix(TOP).ok().and_then(Path::to_str)
            {
                settings.push(Setting { path: path.to_owned(), value: value.into() });
            }
        }
    }
    // Those of all interfaces before those of one, which they overwrite.
    settings.sort_by(|a, b| (!is_of_all(&a.path), &a.path).cmp(&(!is_of_all(&b.path), &b.path)));
    Ok(settings)
}

fn is_of_all(path: &str) -> bool {
    path.split('/').any(|part| part == "all") || path == "ipv4/ip_forward"
}

fn value(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut value = Vec::new();
    fs::File::open(path)?.take(VALUE_MAX).read_to_end(&mut value)?;
    Ok(value)
}

/// Gives the network namespace of the calling thread the settings that it does not have already. One that this kernel
/// does not have, or refuses, is left alone, with a warning.
pub fn write(settings: &[Setting]) -> Result<(), RestoreError> {
    let fail = |step| RestoreError::rebuild("network settings", step);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(TOP, flags, Mode::empty()).map_err(fail("open"))?;
    for setting in settings {
        if setting.value.len() as u64 > VALUE_MAX {
            return Err(RestoreError::inconsistent(format!(
                "a network setting of {} bytes",
                setting.value.len()
            )));
        }
        if let Err(errno) = set(&top, setting) {
            let (path, value) = (&setting.path, String::from_utf8_lossy(&setting.value));
            tracing::warn!(path, value = value.trim_end(), %errno, "a network setting cannot be put back");
        }
    }
    Ok(())
}

fn set(top: &OwnedFd, setting: &Setting) -> rustix::io::Result<()> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let file = rustix::fs::openat2(top.as_fd(), &setting.path, flags, Mode::empty(), resolve)?;
    let mut now = vec![0; VALUE_MAX as usize];
    let length = rustix::io::read(&file, &mut now).unwrap_or(0);
    if now.get(..length) == Some(setting.value.as_slice()) {
        return Ok(());
    }
    rustix::io::pwrite(&file, &setting.value, 0).map(drop)
}
