//! Working directory, root directory and umask (`fs_struct` in the kernel).

use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ProcessAttribute;
use crate::error::{CaptureError, Refusal};
use crate::view::ProcessView;

/// What relative and absolute paths of a process start from.
#[derive(Debug, Serialize, Deserialize)]
pub struct Filesystem {
    /// Absolute path of the working directory, in the mount namespace.
    pub working_directory: serde_bytes::ByteBuf,
    /// Absolute path of the root directory, in the mount namespace.
    pub root: serde_bytes::ByteBuf,
    /// File-creation mask.
    pub umask: u32,
}

/// The working directory and root of a process, which must exist.
pub(crate) fn refuse_deleted(process: &ProcessView) -> Result<(Vec<u8>, Vec<u8>), CaptureError> {
    let (working_directory, root) = (process.proc.cwd()?, process.proc.root()?);
    for (path, name) in [(&working_directory, "working"), (&root, "root")] {
        if path.ends_with(b" (deleted)") {
            let reason = format!("its {name} directory has been deleted");
            return Err(Refusal::process(process.pid, reason, "make it change its directory").into());
        }
    }
    Ok((working_directory, root))
}

impl ProcessAttribute for Filesystem {
    type Asked = ();

    fn ask(_: &ProcessView, _: &mut Program) -> Result<(), CaptureError> {
        Ok(())
    }

    fn capture(process: &ProcessView, (): &(), _: &Outcome) -> Result<Self, CaptureError> {
        let (working_directory, root) = refuse_deleted(process)?;
        Ok(Self {
            working_directory: working_directory.into(),
            root: root.into(),
            umask: process.status.umask.unwrap_or(0o022),
        })
    }

    fn rebuild(&self, program: &mut Program) {
        let directory = program.string(&self.working_directory);
        program.call("go to the working directory", libc::SYS_chdir, [directory.into()]);
        if self.root.as_ref() != b"/" {
            let root = program.string(&self.root);
            program.call("set the root directory", libc::SYS_chroot, [root.into()]);
        }
        program.call("set the umask", libc::SYS_umask, [self.umask.into()]);
    }
}
