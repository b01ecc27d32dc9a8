//! The mount namespace: what is mounted where (mount_namespaces(7)).
//!
//! The container's root and the mounts that every container has are there before the tree is born. This room
//! mounts what is missing: `/proc`, which belongs to the new PID namespace, and file systems of the kernel's that
//! the container mounted itself. Other mounts of its own are refused.

use limosa_kernel::proc::ProcDir;
use limosa_puppet::Program;
use serde::{Deserialize, Serialize};

use super::Namespace;
use crate::error::{CaptureError, Refusal, RestoreError};
use crate::view::ProcessView;

/// File systems that can be mounted again from nothing.
const FROM_NOTHING: [&[u8]; 3] = [b"proc", b"sysfs", b"mqueue"];
/// Points where a container's shell has mounted something already.
const SHELL: [&[u8]; 6] = [b"/", b"/sys", b"/dev", b"/dev/pts", b"/dev/shm", b"/dev/mqueue"];

/// The mounts, parents first.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Mounts(pub Vec<Mount>);

/// A mount.
#[derive(Debug, Serialize, Deserialize)]
pub struct Mount {
    /// Where.
    pub point: serde_bytes::ByteBuf,
    /// Type of the file system.
    pub kind: serde_bytes::ByteBuf,
    /// `MS_*` flags of the mount.
    pub flags: u64,
}

/// `MS_*` by option of mountinfo.
const FLAGS: [(&[u8], u64); 7] = [
    (b"ro", libc::MS_RDONLY),
    (b"nosuid", libc::MS_NOSUID),
    (b"nodev", libc::MS_NODEV),
    (b"noexec", libc::MS_NOEXEC),
    (b"noatime", libc::MS_NOATIME),
    (b"nodiratime", libc::MS_NODIRATIME),
    (b"relatime", libc::MS_RELATIME),
];

fn flags(options: &[u8]) -> u64 {
    let has = |option: &[u8]| options.split(|byte| *byte == b',').any(|one| one == option);
    FLAGS.iter().filter(|(option, _)| has(option)).fold(0, |all, (_, flag)| all | flag)
}

impl Namespace for Mounts {
    fn capture(root: &ProcessView) -> Result<Self, CaptureError> {
        let mut mounts = Vec::new();
        for mount in root.proc.mountinfo()? {
            if SHELL.contains(&mount.point.as_slice()) {
                continue;
            }
            if !FROM_NOTHING.contains(&mount.fs_type.as_slice()) {
                let point = String::from_utf8_lossy(&mount.point).into_owned();
                let kind = String::from_utf8_lossy(&mount.fs_type).into_owned();
                let reason = format!("a {kind} is mounted on {point}, which this version cannot carry");
                return Err(Refusal::process(root.pid, reason, format!("unmount {point} first")).into());
            }
            mounts.push(Mount {
                flags: flags(&mount.options),
                point: mount.point.into(),
                kind: mount.fs_type.into(),
            });
        }
        Ok(Self(mounts))
    }

    fn rebuild(&self, _: &ProcDir, program: &mut Program) -> Result<(), RestoreError> {
        for mount in &self.0 {
            if !FROM_NOTHING.contains(&mount.kind.as_slice()) {
                let kind = String::from_utf8_lossy(&mount.kind);
                return Err(RestoreError::inconsistent(format!("a mount of type {kind}")));
            }
            let (point, kind) = (program.string(&mount.point), program.string(&mount.kind));
            let arguments = [kind.into(), point.into(), kind.into(), mount.flags.into(), 0.into()];
            program.call("mount a file system", libc::SYS_mount, arguments);
        }
        Ok(())
    }
}
