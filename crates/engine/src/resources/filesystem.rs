//! Working directory, root directory and umask (`fs_struct` in the kernel).

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use super::{ProcessAttribute, paths};
use crate::error::{CaptureError, Refusal};
use crate::view::ProcessView;

const DELETED: &[u8] = b" (deleted)";

/// What relative and absolute paths of a process start from.
#[derive(Debug, Serialize, Deserialize)]
pub struct Filesystem {
    /// Absolute path of the working directory, in the mount namespace; if that has been deleted, of the nearest one
    /// above it that is there.
    pub working_directory: serde_bytes::ByteBuf,
    /// Whether it has been deleted: it is made anew, and deleted.
    #[serde(default)]
    pub deleted: bool,
    /// Absolute path of the root directory, in the mount namespace.
    pub root: serde_bytes::ByteBuf,
    /// File-creation mask.
    pub umask: u32,
}

/// Whether a link of `/proc/PID` leads to a directory that has been deleted, and not to one of such a name.
fn is_deleted(process: &ProcessView, link: &str, path: &[u8]) -> bool {
    let gone = || std::fs::metadata(format!("/proc/{}/{link}", process.pid)).is_ok_and(|found| found.nlink() == 0);
    path.ends_with(DELETED) && gone()
}

/// The root directory of a process, which must exist.
pub(crate) fn root(process: &ProcessView) -> Result<Vec<u8>, CaptureError> {
    let root = process.proc.root()?;
    if is_deleted(process, "root", &root) {
        let remedy = "end it, and start it with a root directory that is there";
        return Err(Refusal::process(process.pid, "its root directory has been deleted", remedy).into());
    }
    Ok(root)
}

impl ProcessAttribute for Filesystem {
    type Asked = ();

    fn ask(_: &ProcessView, _: &mut Program) -> Result<(), CaptureError> {
        Ok(())
    }

    fn capture(process: &ProcessView, (): &(), _: &Outcome) -> Result<Self, CaptureError> {
        let (root, mut directory) = (root(process)?, process.proc.cwd()?);
        let deleted = is_deleted(process, "cwd", &directory);
        if deleted {
            let namespace = format!("/proc/{}/root", process.pid);
            // Paths are the mount namespace's, not those of a process that has changed its root.
            let top = if root == b"/" { Path::new(&namespace) } else { Path::new("/") };
            directory = paths::nearest_directory(top, &directory);
        }
        Ok(Self {
            working_directory: directory.into(),
            deleted,
            root: root.into(),
            umask: process.status.umask.unwrap_or(0o022),
        })
    }

    fn rebuild(&self, program: &mut Program) {
        let directory = program.string(&self.working_directory);
        program.call("go to the working directory", libc::SYS_chdir, [directory.into()]);
        if self.deleted {
            // One that processes share comes back as one for each: it is empty, and nothing can be made in it.
            let name = program.string(b".limosa-deleted");
            program.call("make the deleted working directory", libc::SYS_mkdir, [name.into(), 0o755.into()]);
            program.call("go there", libc::SYS_chdir, [name.into()]);
            let itself = program.string(b"../.limosa-deleted");
            program.call("delete it", libc::SYS_rmdir, [itself.into()]);
        }
        if self.root.as_ref() != b"/" {
            let root = program.string(&self.root);
            program.call("set the root directory", libc::SYS_chroot, [root.into()]);
        }
        program.call("set the umask", libc::SYS_umask, [self.umask.into()]);
    }
}
