//! The memory of another process: process_vm_readv(2), process_vm_writev(2) and `/proc/PID/mem`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use crate::fault;
use crate::{Error, Result};

/// Most ranges that one process_vm call takes (`UIO_MAXIOV`).
const RANGES_MAX: usize = 1024;

/// A range of addresses in another process. What is there is the other process's business: an address
/// is only ever handed to the kernel, never dereferenced here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

fn vectors(ranges: &[Range]) -> Vec<libc::iovec> {
    ranges
        .iter()
        .map(|range| libc::iovec { iov_base: range.start as *mut _, iov_len: range.length as usize })
        .collect()
}

/// Reads the bytes at `ranges` of process `pid` one after the other into `buffer`, which must be
/// exactly as long as the ranges together.
pub fn read_ranges(pid: i32, ranges: &[Range], buffer: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    for group in ranges.chunks(RANGES_MAX) {
        fault::point();
        let wanted: usize = group.iter().map(|range| range.length as usize).sum();
        let local =
            libc::iovec { iov_base: buffer[filled..filled + wanted].as_mut_ptr().cast(), iov_len: wanted };
        let remote = vectors(group);
        // SAFETY: `local` covers `wanted` bytes of `buffer`, borrowed mutably; `remote` is a live array.
        let got = unsafe {
            libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0)
        };
        check("process_vm_readv", pid, group, got, wanted)?;
        filled += wanted;
    }
    Ok(())
}

/// Reads `buffer.len()` bytes at `address` of process `pid`.
pub fn read(pid: i32, address: u64, buffer: &mut [u8]) -> Result<()> {
    read_ranges(pid, &[Range { start: address, length: buffer.len() as u64 }], buffer)
}

/// Writes `bytes` one after the other to `ranges` of process `pid`; the pages must be writable there.
pub fn write_ranges(pid: i32, ranges: &[Range], bytes: &[u8]) -> Result<()> {
    let mut taken = 0;
    for group in ranges.chunks(RANGES_MAX) {
        fault::point();
        let wanted: usize = group.iter().map(|range| range.length as usize).sum();
        let local = libc::iovec {
            iov_base: bytes[taken..taken + wanted].as_ptr().cast_mut().cast(),
            iov_len: wanted,
        };
        let remote = vectors(group);
        // SAFETY: `local` covers `wanted` bytes of `bytes`, which the call only reads.
        let got = unsafe {
            libc::process_vm_writev(pid, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0)
        };
        check("process_vm_writev", pid, group, got, wanted)?;
        taken += wanted;
    }
    Ok(())
}

/// Writes `bytes` at `address` of process `pid`.
pub fn write(pid: i32, address: u64, bytes: &[u8]) -> Result<()> {
    write_ranges(pid, &[Range { start: address, length: bytes.len() as u64 }], bytes)
}

fn check(operation: &'static str, pid: i32, group: &[Range], got: isize, wanted: usize) -> Result<()> {
    let first = group.first().map_or(0, |range| range.start);
    if got < 0 {
        return Err(Error::last(operation, format_args!("process {pid} at {first:#x}")));
    }
    if got as usize != wanted {
        let why = io::Error::new(io::ErrorKind::UnexpectedEof, format!("{got} of {wanted} bytes"));
        return Err(Error::new(operation, format_args!("process {pid} at {first:#x}"), why));
    }
    Ok(())
}

/// `/proc/PID/mem`: reads and writes regardless of page protection (a write to a private page makes a
/// private copy, as a debugger's breakpoint does).
#[derive(Debug)]
pub struct ForeignMemory {
    pid: i32,
    file: File,
}

impl ForeignMemory {
    /// Opens the memory of process `pid`.
    pub fn open(pid: i32) -> Result<Self> {
        fault::point();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|error| Error::new("open", format_args!("/proc/{pid}/mem"), error))?;
        Ok(Self { pid, file })
    }

    /// Fills `buffer` from `address`.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<()> {
        fault::point();
        self.file.read_exact_at(buffer, address).map_err(|error| self.error("read", address, error))
    }

    /// Writes `bytes` at `address`, whatever the protection there.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        fault::point();
        self.file.write_all_at(bytes, address).map_err(|error| self.error("write", address, error))
    }

    fn error(&self, operation: &'static str, address: u64, error: io::Error) -> Error {
        Error::new(operation, format_args!("/proc/{}/mem at {address:#x}", self.pid), error)
    }
}

/// Shared anonymous memory of `size` bytes (rounded up to pages), as a descriptor that any process may map: what
/// mmap(2) with `MAP_SHARED | MAP_ANONYMOUS` makes, opened through `/proc/self/map_files`. Needs
/// `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
pub fn shared_anonymous(size: u64) -> Result<std::os::fd::OwnedFd> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    fault::point();
    let length = (size as usize).max(1).next_multiple_of(4096);
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses an address where nothing is mapped; the mapping is never dereferenced.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), length, protection, MapFlags::SHARED) }
        .map_err(|errno| Error::new("mmap", format_args!("{length} bytes of shared memory"), errno))?;
    let path = format!("/proc/self/map_files/{:x}-{:x}", start.addr(), start.addr() + length);
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    // SAFETY: unmaps exactly the mapping made above, to which no reference exists.
    unsafe { munmap(start, length) }.map_err(|errno| Error::new("munmap", &path, errno))?;
    opened.map(Into::into).map_err(|error| Error::new("open", path, error))
}
