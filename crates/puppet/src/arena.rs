//! The arena: memory that the controller and all residents of one restore share, at one address in each.
//!
//! ```text
//!   base          resident stub (one page, read and execute)
//!   base + 4096   mailboxes and programs, allocated upwards (read and write)
//! ```
//!
//! It is a memfd, mapped shared. Only our own stub runs while it is mapped: it is unmapped everywhere before
//! the first restored thread runs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::arch;

const PAGE: u64 = 4096;

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The kernel refused.
    #[error("setting up the memory shared with puppets: {step}: {source}")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// No address is free in all processes.
    #[error("no gap of {size} bytes is free in all address spaces of the checkpoint")]
    NoGap {
        /// Bytes wanted.
        size: u64,
    },
    /// All used up.
    #[error("the memory shared with puppets ({size} bytes) is used up; the checkpoint has too many objects")]
    Full {
        /// Bytes there were.
        size: u64,
    },
}

/// A part of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// First address, the same in the controller and in every resident.
    pub address: u64,
    /// Bytes.
    pub length: usize,
}

/// Memory shared between the controller and its residents.
#[derive(Debug)]
pub struct Arena {
    memory: OwnedFd,
    base: u64,
    size: u64,
    next: u64,
}

impl Arena {
    /// An arena of `size` bytes (sparse) at an address for which `is_free(start, end)` holds: free, that is,
    /// in every address space that will be built.
    pub fn new(size: u64, is_free: impl Fn(u64, u64) -> bool) -> Result<Self, ArenaError> {
        let fail = |step| move |errno: rustix::io::Errno| ArenaError::Kernel { step, source: errno.into() };
        let memory = rustix::fs::memfd_create("limosa-arena", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(fail("memfd_create"))?;
        rustix::fs::ftruncate(&memory, size).map_err(fail("ftruncate"))?;
        rustix::io::pwrite(&memory, &arch::RESIDENT, 0).map_err(fail("pwrite"))?;
        let base = Self::map(&memory, size, is_free)?;
        Ok(Self { memory, base, size, next: base + PAGE })
    }

    /// Maps it at the first candidate that is free there and here.
    fn map(memory: &OwnedFd, size: u64, is_free: impl Fn(u64, u64) -> bool) -> Result<u64, ArenaError> {
        use rustix::mm::{MapFlags, ProtFlags};
        let fixed = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE;
        let data = ProtFlags::READ | ProtFlags::WRITE;
        // Far below where the kernel maps by itself and far above where programs are linked.
        for candidate in (1..0x7f_u64).map(|step| step << 40) {
            if !is_free(candidate, candidate + size) {
                continue;
            }
            // SAFETY: FIXED_NOREPLACE maps only where nothing is mapped, so no Rust object is touched.
            let mapped =
                unsafe { rustix::mm::mmap(candidate as *mut _, size as usize, data, fixed, memory, 0) };
            match mapped {
                Ok(_) => {}
                Err(rustix::io::Errno::EXIST) => continue,
                Err(errno) => return Err(ArenaError::Kernel { step: "mmap", source: errno.into() }),
            }
            // SAFETY: the page belongs to the mapping made above, which nothing refers to yet.
            unsafe {
                rustix::mm::mprotect(
                    candidate as *mut _,
                    PAGE as usize,
                    rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::EXEC,
                )
            }
            .map_err(|errno| ArenaError::Kernel { step: "mprotect", source: errno.into() })?;
            return Ok(candidate);
        }
        Err(ArenaError::NoGap { size })
    }

    /// Its first address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The memfd behind it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Address of the place in the stub where a resident waits for commands.
    pub(crate) fn wait_address(&self) -> u64 {
        self.base + *arch::RESIDENT_WAIT as u64
    }

    /// Address of a system-call instruction in the stub.
    pub fn syscall_address(&self) -> u64 {
        let at = arch::RESIDENT.windows(2).position(|code| code == arch::SYSCALL_INSTRUCTION).unwrap_or(0);
        self.base + at as u64
    }

    /// Takes `length` zeroed bytes, 64-byte aligned.
    pub fn allocate(&mut self, length: usize) -> Result<Slice, ArenaError> {
        let address = self.next;
        let next = (address + length as u64).next_multiple_of(64);
        if next > self.base + self.size {
            return Err(ArenaError::Full { size: self.size });
        }
        self.next = next;
        Ok(Slice { address, length })
    }

    /// Writes `bytes` into `slice`.
    pub fn write(&self, slice: Slice, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= slice.length, "a write stays inside its slice");
        // SAFETY: `allocate` made the slice inside the mapping, the assertion keeps the write inside the
        // slice, and residents read it only after the command word's release store.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                (slice.address as usize + offset) as *mut u8,
                bytes.len(),
            );
        }
    }

    /// Copies the first `length` bytes of `slice`.
    pub fn read(&self, slice: Slice, length: usize) -> Vec<u8> {
        assert!(length <= slice.length, "a read stays inside its slice");
        let mut bytes = vec![0; length];
        // SAFETY: as in `write`; the resident that wrote it has said "done" (acquire load).
        unsafe { std::ptr::copy_nonoverlapping(slice.address as *const u8, bytes.as_mut_ptr(), length) };
        bytes
    }

    /// The futex word at the start (`index` 0: command) or 4 bytes in (1: done) of a mailbox.
    pub(crate) fn word(&self, mailbox: Slice, index: usize) -> &AtomicU32 {
        assert!(mailbox.length >= 8 && index < 2, "a mailbox has two words");
        // SAFETY: the address lies in the mapping, which lives as long as `self`, is 4-byte aligned, and is
        // only accessed atomically.
        unsafe { AtomicU32::from_ptr((mailbox.address as usize + index * 4) as *mut u32) }
    }

    /// Wakes the resident that waits for a change of the command word.
    pub(crate) fn ring(&self, mailbox: Slice) {
        let word = self.word(mailbox, 0);
        word.fetch_add(1, Ordering::Release);
        // SAFETY: the futex word is live; FUTEX_WAKE reads no other memory.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
    }

    /// Sleeps until the done word is no longer `seen`, at most `limit`.
    pub(crate) fn sleep_on_done(&self, mailbox: Slice, seen: u32, limit: std::time::Duration) {
        let timeout =
            libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // SAFETY: the futex word and the timeout are live.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word(mailbox, 1).as_ptr(),
                libc::FUTEX_WAIT,
                seen,
                &raw const timeout,
            )
        };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`; borrows of it cannot outlive `self`.
        unsafe {
            let _ = rustix::mm::munmap(self.base as *mut _, self.size as usize);
        }
    }
}
