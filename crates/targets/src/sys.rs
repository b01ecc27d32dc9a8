//! The raw calls that several kinds need, with the unsafe part in one place.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Pid;

/// Turns the C library's −1 into an error.
pub fn check(returned: i64) -> io::Result<i64> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// Forks; the child runs `body` and exits with its status.
pub fn fork(body: impl FnOnce() -> i32) -> Result<Pid> {
    // SAFETY: targets fork while they have one thread, so the child may do whatever its parent could.
    match check(i64::from(unsafe { libc::fork() }))? {
        0 => std::process::exit(body()),
        pid => Pid::from_raw(pid as i32).context("fork returned no process"),
    }
}

/// Forks a child that ends at once, and waits for it; other threads may exist. Gives how long the fork took.
pub fn fork_for_a_moment() -> Duration {
    let begun = Instant::now();
    // SAFETY: the child makes one call, which is safe after a fork of a process with threads.
    unsafe {
        match libc::fork() {
            0 => libc::_exit(0),
            child => {
                let took = begun.elapsed();
                if child > 0 {
                    libc::waitpid(child, ptr::null_mut(), 0);
                }
                took
            }
        }
    }
}

/// A mapping of this process. It stays mapped as long as the process lives: a target never gives anything back.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    address: usize,
    length: usize,
}

impl Region {
    /// `mmap(2)` anywhere; `file` is a descriptor and an offset, or none for anonymous memory.
    pub fn map(
        length: usize,
        protection: i32,
        flags: i32,
        file: Option<(BorrowedFd<'_>, usize)>,
    ) -> Result<Self> {
        let (descriptor, offset, flags) = match file {
            Some((fd, offset)) => (fd.as_raw_fd(), offset, flags),
            None => (-1, 0, flags | libc::MAP_ANONYMOUS),
        };
        // SAFETY: the kernel chooses an address at which nothing is mapped.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, descriptor, offset as i64) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).with_context(|| format!("mmap of {length} bytes"));
        }
        Ok(Self { address: address as usize, length })
    }

    /// A new System V segment, attached, that ends with its last attachment.
    pub fn segment(length: usize) -> Result<Self> {
        let failed = |what: &'static str| Err(io::Error::last_os_error()).context(what);
        // SAFETY: takes numbers only.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, length, 0o600) };
        if id < 0 {
            return failed("shmget");
        }
        // SAFETY: the kernel chooses an address at which nothing is mapped.
        let address = unsafe { libc::shmat(id, ptr::null(), 0) };
        // SAFETY: takes no structure.
        if unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) } < 0 || address.addr() == usize::MAX {
            return failed("shmat");
        }
        Ok(Self { address: address.addr(), length })
    }

    /// A System V segment of `length` bytes, attached anywhere.
    pub fn attached(id: i32, length: usize, flags: i32) -> Result<Self> {
        // SAFETY: the kernel chooses an address at which nothing is mapped.
        let address = unsafe { libc::shmat(id, ptr::null(), flags) };
        if address.addr() == usize::MAX {
            return Err(io::Error::last_os_error()).context("shmat");
        }
        Ok(Self { address: address.addr(), length })
    }

    /// Private anonymous memory that can be read and written, between two pages that cannot, so that the kernel
    /// merges it with no neighbour. `length` is a multiple of the page size.
    pub fn anonymous(length: usize) -> Result<Self> {
        let fenced = Self::map(length + 2 * 4096, libc::PROT_NONE, libc::MAP_PRIVATE, None)?;
        let region = fenced.part(4096, length);
        region.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(region)
    }

    /// The part of `length` bytes that begins `offset` bytes into this region.
    pub fn part(self, offset: usize, length: usize) -> Self {
        assert!(offset + length <= self.length);
        Self { address: self.address + offset, length }
    }

    /// The first byte's address.
    pub fn address(self) -> usize {
        self.address
    }

    /// The bytes. Only for regions that can be read.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the region is mapped for the life of the process. Another process may write to a shared one;
        // the callers take turns through the request files.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.length) }
    }

    /// The bytes, to be written. Only for regions that can be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; a region is written by one thread.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.length) }
    }

    /// The words, to be written. Only for regions that can be written.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as for `bytes_mut`; regions begin on a page's boundary.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u64, self.length / 8) }
    }

    /// The same memory at another address (`mremap(2)`).
    pub fn moved(self) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel chooses an address at which nothing is mapped.
        let place = unsafe { libc::mmap(ptr::null_mut(), self.length, libc::PROT_NONE, flags, -1, 0) };
        if place == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let old = self.address as *mut libc::c_void;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the new place is nobody's; callers go on with the region that is returned.
        let address = unsafe { libc::mremap(old, self.length, self.length, flags, place) };
        if address == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { address: address.addr(), ..self })
        }
    }

    /// `munmap(2)`.
    pub fn unmap(self) {
        // SAFETY: it takes the region, of which callers keep no copy.
        unsafe { libc::munmap(self.address as *mut _, self.length) };
    }

    /// `madvise(2)`.
    pub fn advise(self, advice: i32) -> io::Result<()> {
        // SAFETY: no one relies on the content of regions that are advised away.
        check(i64::from(unsafe { libc::madvise(self.address as *mut _, self.length, advice) })).map(|_| ())
    }

    /// `mseal(2)`.
    pub fn seal(self) -> io::Result<()> {
        // SAFETY: takes numbers only, and keeps the content.
        check(unsafe { libc::syscall(libc::SYS_mseal, self.address, self.length, 0) }).map(|_| ())
    }

    /// `mprotect(2)`.
    pub fn protect(self, protection: i32) -> io::Result<()> {
        // SAFETY: callers stop using what they protect.
        check(i64::from(unsafe { libc::mprotect(self.address as *mut _, self.length, protection) }))
            .map(|_| ())
    }
}

/// The structure of mappings as `/proc/self/smaps` tells it: for each that begins in one of `regions`, its line and its
/// flags, without those that say what happened to its pages rather than what it is.
pub fn mappings(regions: &[Region]) -> Result<String> {
    let text = fs::read_to_string("/proc/self/smaps").context("reading /proc/self/smaps")?;
    let mut kept = String::new();
    let mut ours = false;
    for line in text.lines() {
        if let Some((start, _)) = line.split_once('-')
            && let Ok(start) = usize::from_str_radix(start, 16)
        {
            ours = regions.iter().any(|r| (r.address..r.address + r.length).contains(&start));
            if ours {
                kept.push_str(line);
                kept.push('\n');
            }
        } else if ours && let Some(flags) = line.strip_prefix("VmFlags:") {
            // "sd" is soft-dirty; "um" and "uw" would be a userfaultfd that Limosa left behind, and are kept.
            let flags: Vec<_> = flags.split_whitespace().filter(|flag| *flag != "sd").collect();
            kept.push_str(&flags.join(" "));
            kept.push('\n');
        }
    }
    Ok(kept)
}

/// Bytes that depend on `seed` and on their position, so that neither a lost nor a moved page goes unseen.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// The bytes that [`fill`] would write.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fill(&mut bytes, seed);
    bytes
}

/// Where `bytes` first differ from `expected`.
pub fn compare(what: &str, bytes: &[u8], expected: &[u8]) -> Result<()> {
    anyhow::ensure!(
        bytes.len() == expected.len(),
        "{what}: {} bytes instead of {}",
        bytes.len(),
        expected.len()
    );
    match bytes.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => anyhow::bail!("{what}: byte {at} is {:#x} instead of {:#x}", bytes[at], expected[at]),
    }
}

/// Like [`compare`], for texts: names the first line that differs.
pub fn compare_lines(what: &str, text: &str, expected: &str) -> Result<()> {
    let (mut now, mut then) = (text.lines(), expected.lines());
    loop {
        match (now.next(), then.next()) {
            (None, None) => return Ok(()),
            (a, b) if a == b => {}
            (a, b) => {
                anyhow::bail!("{what}: {:?} instead of {:?}", a.unwrap_or("nothing"), b.unwrap_or("nothing"))
            }
        }
    }
}

/// `setsockopt(2)`
pub fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes at `value`.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    check(answer.into()).with_context(|| format!("setting option {name} of level {level}"))?;
    Ok(())
}

/// `getsockopt(2)` with a length of `length`: the bytes that it has written, none where it fails.
///
/// No option writes more than 64 bytes with such a length, but filters do, whose length counts instructions of eight.
pub fn option(socket: BorrowedFd<'_>, level: i32, name: i32, length: u32) -> Option<Vec<u8>> {
    assert!(length <= 64, "no room for that much");
    let (mut value, mut length) = ([0_u8; 64 * 8], length);
    // SAFETY: the kernel writes at most 64 bytes, or instructions of eight, at `value`, and the length at `length`.
    let answer = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut length)
    };
    let unit = if (level, name) == (libc::SOL_SOCKET, libc::SO_GET_FILTER) { 8 } else { 1 };
    (answer == 0).then(|| value[..(length as usize * unit).min(value.len())].to_vec())
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
pub fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// `KEY_SPEC_SESSION_KEYRING`, `KEY_SPEC_USER_KEYRING`
pub const SESSION_KEYRING: i32 = -3;
pub const USER_KEYRING: i32 = -4;

/// Joins a new session keyring; gives its number.
pub fn join_session_keyring(name: Option<&CStr>) -> Result<i32> {
    const JOIN_SESSION_KEYRING: i32 = 1;
    let name = name.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: the name is null or a live string with its end.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name) };
    Ok(check(joined).context("joining a session keyring")? as i32)
}

/// keyctl(2) with numbers only.
pub fn keyctl(command: i32, arguments: [i32; 3]) -> io::Result<i32> {
    let [first, second, third] = arguments.map(i64::from);
    // SAFETY: the commands that targets use take numbers, and buffers of no length.
    check(unsafe { libc::syscall(libc::SYS_keyctl, command, first, second, third, 0) })
        .map(|number| number as i32)
}

/// Adds a key of the type `user`; gives its number.
pub fn add_key(name: &str, keyring: i32) -> Result<i32> {
    let name = CString::new(name)?;
    // SAFETY: strings with their ends, and four live bytes.
    let added = unsafe {
        libc::syscall(libc::SYS_add_key, c"user".as_ptr(), name.as_ptr(), c"word".as_ptr(), 4, keyring)
    };
    Ok(check(added).context("adding a key")? as i32)
}

/// The number of the key of that type and name that this thread finds, if it finds one.
pub fn find_key(kind: &CStr, name: &CStr) -> Option<i32> {
    let none = ptr::null::<u8>();
    // SAFETY: strings with their ends, and none that would have somebody make the key.
    let found = unsafe { libc::syscall(libc::SYS_request_key, kind.as_ptr(), name.as_ptr(), none, 0) };
    check(found).ok().map(|number| number as i32)
}

/// A key as `keyctl describe` shows it: `type;owner;group;permissions;name`.
pub fn describe_key(key: i32) -> Result<String> {
    const DESCRIBE: i32 = 6;
    let mut text = [0_u8; 256];
    // SAFETY: a live buffer of the length that is given.
    let length =
        check(unsafe { libc::syscall(libc::SYS_keyctl, DESCRIBE, key, text.as_mut_ptr(), text.len()) })?;
    let text = text.get(..length as usize - 1).context("a long description")?;
    Ok(String::from_utf8_lossy(text).into_owned())
}
