//! Files by handle instead of path (open_by_handle_at(2)).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::fault;
use crate::proc::FileHandle;
use crate::{Error, Result};

/// Largest handle that the kernel makes (`MAX_HANDLE_SZ`).
const SIZE_MAX: usize = 128;

/// Opens the inode that `handle` names on the filesystem that the open file or directory `mount` lies on, with
/// `O_PATH`. Needs `CAP_DAC_READ_SEARCH`; `ESTALE` if there is no such inode any more, or the filesystem cannot find
/// inodes by handle.
pub fn open(mount: impl AsFd, handle: &FileHandle) -> Result<OwnedFd> {
    fault::point();
    let length = handle.bytes.len();
    if length > SIZE_MAX {
        return Err(Error::malformed("open_by_handle_at", "a file handle", format!("it has {length} bytes")));
    }
    // struct file_handle: size, type, bytes.
    let mut raw = [0_u32; 2 + SIZE_MAX / 4];
    raw[0] = length as u32;
    raw[1] = handle.kind as u32;
    for (word, chunk) in raw[2..].iter_mut().zip(handle.bytes.chunks(4)) {
        let mut bytes = [0; 4];
        bytes[..chunk.len()].copy_from_slice(chunk);
        *word = u32::from_ne_bytes(bytes);
    }
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the pointer is to a live file_handle with room for all its bytes; a result that is not negative is a new
    // descriptor that we own.
    unsafe {
        let mount = mount.as_fd().as_raw_fd();
        let opened = libc::syscall(libc::SYS_open_by_handle_at, mount, raw.as_mut_ptr(), flags);
        if opened < 0 {
            return Err(Error::last("open_by_handle_at", "a file handle"));
        }
        Ok(OwnedFd::from_raw_fd(opened as i32))
    }
}
