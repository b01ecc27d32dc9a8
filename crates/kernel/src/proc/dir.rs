//! One process's directory in `/proc`, opened once.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::fdinfo::FdInfo;
use super::maps::{self, Mapping};
use super::misc::{self, CgroupLine, Limits, PosixTimer, TimensOffsets};
use super::mountinfo::{self, Mount};
use super::stat::Stat;
use super::status::Status;
use super::text::{self, Decimal, ParseError, Parsed};
use crate::{Error, Result, fault};

/// `/proc/PID` or `/proc/PID/task/TID`, held open: when the process has ended and its number belongs to
/// another, every method fails with `ESRCH` ([`Error::is_gone`]) instead of reading about the other.
///
/// A zombie has no memory: its `maps`, `auxv`, `pagemap` and the like are empty, or fail with `ESRCH` as if
/// it were gone, as the kernel's version has it. Look at [`Stat::state`] before.
///
/// Files are read with several `read` calls: what they say is one moment's truth only for a stopped process.
#[derive(Debug)]
pub struct ProcDir {
    dir: OwnedFd,
    path: String,
}

/// A kind of namespace, as a name in `/proc/PID/ns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum NsKind {
    Cgroup,
    Ipc,
    Mnt,
    Net,
    Pid,
    /// That of children made from now on (after `unshare` or `setns`).
    PidForChildren,
    Time,
    /// That of children made from now on.
    TimeForChildren,
    User,
    Uts,
}

impl NsKind {
    /// All kinds.
    pub const ALL: [Self; 10] = [
        Self::Cgroup,
        Self::Ipc,
        Self::Mnt,
        Self::Net,
        Self::Pid,
        Self::PidForChildren,
        Self::Time,
        Self::TimeForChildren,
        Self::User,
        Self::Uts,
    ];

    /// The name in `/proc/PID/ns`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Ipc => "ipc",
            Self::Mnt => "mnt",
            Self::Net => "net",
            Self::Pid => "pid",
            Self::PidForChildren => "pid_for_children",
            Self::Time => "time",
            Self::TimeForChildren => "time_for_children",
            Self::User => "user",
            Self::Uts => "uts",
        }
    }
}

/// What tells one namespace (or file) from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// `st_dev`
    pub dev: u64,
    /// `st_ino`
    pub ino: u64,
}

impl ProcDir {
    /// Opens `/proc/PID`.
    pub fn open(pid: i32) -> Result<Self> {
        Self::open_at(rustix::fs::CWD, "/proc", &pid.to_string())
    }

    /// Opens the directory of one thread: `/proc/PID/task/TID` of an open `/proc/PID`.
    pub fn task(&self, tid: i32) -> Result<Self> {
        Self::open_at(self.dir.as_fd(), &self.path, &format!("task/{tid}"))
    }

    fn open_at(base: BorrowedFd<'_>, base_path: &str, name: &str) -> Result<Self> {
        fault::point();
        let path = format!("{base_path}/{name}");
        let opened = if base_path == "/proc" { &path } else { name };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(base, opened, flags, Mode::empty())
            .map_err(|errno| Error::new("openat", &path, errno))?;
        Ok(Self { dir, path })
    }

    /// The path it was opened by, for messages.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Opens a file or what a link of the directory points to: `pagemap`, `mem`, `ns/net`, `exe`, `fd/7`.
    pub fn open_file(&self, name: &str, flags: OFlags) -> Result<OwnedFd> {
        fault::point();
        rustix::fs::openat(&self.dir, name, flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| Error::new("openat", self.named(name), errno))
    }

    /// The whole content of a file.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let mut content = Vec::with_capacity(4096);
        self.read_into(name, &mut content)?;
        Ok(content)
    }

    /// The whole content of a file, in a buffer that may be used again; what was in it is dropped.
    pub fn read_into(&self, name: &str, content: &mut Vec<u8>) -> Result<()> {
        content.clear();
        let file = self.open_file(name, OFlags::RDONLY)?;
        loop {
            content.reserve(4096);
            match rustix::io::read(&file, spare_capacity(content)) {
                Ok(0) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::new("read", self.named(name), errno)),
            }
        }
    }

    /// Calls `take` for each line of a long file that need not be kept whole.
    fn each_line(&self, name: &str, mut take: impl FnMut(&[u8]) -> Parsed<()>) -> Result<()> {
        let malformed = |error: ParseError| Error::malformed("parse", self.named(name), error.to_string());
        let file = self.open_file(name, OFlags::RDONLY)?;
        // The kernel gives at most a page at a time, unless one line is longer.
        let mut buffer = Vec::with_capacity(3 * 4096);
        loop {
            buffer.reserve(4096);
            match rustix::io::read(&file, spare_capacity(&mut buffer)) {
                Ok(0) => return text::lines(&buffer).try_for_each(take).map_err(malformed),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::new("read", self.named(name), errno)),
            }
            let whole = memchr::memrchr(b'\n', &buffer).map_or(0, |at| at + 1);
            let lines = buffer.get(..whole).unwrap_or_default();
            text::lines(lines).try_for_each(&mut take).map_err(malformed)?;
            buffer.drain(..whole);
        }
    }

    fn parsed<T>(&self, name: &str, parse: impl FnOnce(&[u8]) -> Parsed<T>) -> Result<T> {
        let content = self.read(name)?;
        parse(&content).map_err(|error| Error::malformed("parse", self.named(name), error.to_string()))
    }

    fn number<T: Decimal>(&self, name: &'static str) -> Result<T> {
        self.parsed(name, |content| text::decimal(content.trim_ascii(), name))
    }

    fn named(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }

    /// `stat`
    pub fn stat(&self) -> Result<Stat> {
        self.parsed("stat", Stat::parse)
    }

    /// `status`
    pub fn status(&self) -> Result<Status> {
        self.parsed("status", Status::parse)
    }

    /// `maps`, without `vm_flags`, protection keys and page sizes.
    pub fn maps(&self) -> Result<Vec<Mapping>> {
        let mut mappings = Vec::new();
        self.each_line("maps", |line| {
            mappings.push(maps::parse_mapping(line)?);
            Ok(())
        })?;
        Ok(mappings)
    }

    /// `smaps`: mappings with all there is to know. The kernel writes 700 bytes and visits every page table
    /// entry for it: ten times slower than [`ProcDir::maps`] for many small mappings, more for large ones.
    pub fn smaps(&self) -> Result<Vec<Mapping>> {
        let mut mappings = Vec::new();
        self.each_line("smaps", |line| maps::add_smaps_line(&mut mappings, line))?;
        Ok(mappings)
    }

    /// Numbers of the open descriptors, ascending.
    pub fn fds(&self) -> Result<Vec<i32>> {
        self.numbered("fd")
    }

    /// IDs of the threads, ascending.
    pub fn tasks(&self) -> Result<Vec<i32>> {
        self.numbered("task")
    }

    fn numbered(&self, name: &str) -> Result<Vec<i32>> {
        let failed = |operation, errno| Error::new(operation, self.named(name), errno);
        let dir = self.open_file(name, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let dir = Dir::new(dir).map_err(|errno| failed("fdopendir", errno))?;
        let mut numbers = Vec::new();
        for entry in dir {
            let entry = entry.map_err(|errno| failed("getdents64", errno))?;
            let entry_name = entry.file_name().to_bytes();
            if entry_name != b"." && entry_name != b".." {
                numbers.push(
                    text::decimal(entry_name, "number")
                        .map_err(|error| Error::malformed("parse", self.named(name), error.to_string()))?,
                );
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// What descriptor `fd` is: a path, `socket:[INODE]`, `anon_inode:[eventpoll]`…
    pub fn fd_link(&self, fd: i32) -> Result<Vec<u8>> {
        self.link(&format!("fd/{fd}"))
    }

    /// `fdinfo/FD`
    pub fn fdinfo(&self, fd: i32) -> Result<FdInfo> {
        self.parsed(&format!("fdinfo/{fd}"), FdInfo::parse)
    }

    /// Where a symbolic link of the directory points.
    pub fn link(&self, name: &str) -> Result<Vec<u8>> {
        fault::point();
        rustix::fs::readlinkat(&self.dir, name, Vec::with_capacity(256))
            .map(std::ffi::CString::into_bytes)
            .map_err(|errno| Error::new("readlinkat", self.named(name), errno))
    }

    /// Path of the working directory, seen from the reader's root.
    pub fn cwd(&self) -> Result<Vec<u8>> {
        self.link("cwd")
    }

    /// Path of the root directory, seen from the reader's root.
    pub fn root(&self) -> Result<Vec<u8>> {
        self.link("root")
    }

    /// Path of the program, ` (deleted)` appended when it was.
    pub fn exe(&self) -> Result<Vec<u8>> {
        self.link("exe")
    }

    /// Which namespace of a kind it is in.
    pub fn ns_id(&self, kind: NsKind) -> Result<FileId> {
        self.file_id(&format!("ns/{}", kind.name()))
    }

    /// Device and inode of what a name in the directory leads to, through links: `ns/net`, `exe`, `fd/7`.
    pub fn file_id(&self, name: &str) -> Result<FileId> {
        fault::point();
        let stat = rustix::fs::statat(&self.dir, name, AtFlags::empty())
            .map_err(|errno| Error::new("fstatat", self.named(name), errno))?;
        Ok(FileId { dev: stat.st_dev, ino: stat.st_ino })
    }

    /// `limits`
    pub fn limits(&self) -> Result<Limits> {
        self.parsed("limits", Limits::parse)
    }

    /// `mountinfo`
    pub fn mountinfo(&self) -> Result<Vec<Mount>> {
        self.parsed("mountinfo", mountinfo::parse_mountinfo)
    }

    /// `cgroup`
    pub fn cgroup(&self) -> Result<Vec<CgroupLine>> {
        self.parsed("cgroup", misc::parse_cgroup)
    }

    /// `timers`: the POSIX timers. Not in the directory of a thread.
    pub fn timers(&self) -> Result<Vec<PosixTimer>> {
        self.parsed("timers", misc::parse_timers)
    }

    /// `timens_offsets`: of the time namespace its children will be in. Not in the directory of a thread.
    pub fn timens_offsets(&self) -> Result<TimensOffsets> {
        self.parsed("timens_offsets", TimensOffsets::parse)
    }

    /// `auxv`, without the final `AT_NULL`.
    pub fn auxv(&self) -> Result<Vec<(u64, u64)>> {
        self.parsed("auxv", misc::parse_auxv)
    }

    /// `cmdline`: the bytes between `arg_start` and `arg_end`, arguments ended by NUL.
    pub fn cmdline(&self) -> Result<Vec<u8>> {
        self.read("cmdline")
    }

    /// `comm`: the name, without the newline that the kernel appends.
    pub fn comm(&self) -> Result<Vec<u8>> {
        let mut name = self.read("comm")?;
        name.pop();
        Ok(name)
    }

    /// Children of all threads, as the reader's PID namespace sees them: `task/TID/children`.
    ///
    /// Exact only while the threads and the children are stopped (`proc_tid_children(5)`).
    pub fn children(&self) -> Result<Vec<i32>> {
        let mut children = Vec::new();
        for tid in self.tasks()? {
            let name = format!("task/{tid}/children");
            match self.parsed(&name, |content| text::decimals(content.trim_ascii(), "children")) {
                Ok(more) => children.extend::<Vec<i32>>(more),
                // A thread may end meanwhile; but without CONFIG_PROC_CHILDREN the file is never there.
                Err(error) if error.is_gone() && self.task(tid).is_err() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(children)
    }

    /// `oom_score_adj`, -1000…1000
    pub fn oom_score_adj(&self) -> Result<i32> {
        self.number("oom_score_adj")
    }

    /// Has the kernel end this process before any other where memory is short. Cannot be undone without
    /// `CAP_SYS_RESOURCE`.
    pub fn end_first_when_memory_is_short(&self) -> Result<()> {
        let file = self.open_file("oom_score_adj", OFlags::WRONLY)?;
        rustix::io::write(&file, b"1000")
            .map(drop)
            .map_err(|errno| Error::new("write", self.named("oom_score_adj"), errno))
    }

    /// `loginuid`: the audit user; `u32::MAX` when it was never set.
    pub fn loginuid(&self) -> Result<u32> {
        self.number("loginuid")
    }

    /// `timerslack_ns` of the first thread; that of others is asked inside (`PR_GET_TIMERSLACK`). Needs
    /// `CAP_SYS_NICE` for any thread but the calling one.
    pub fn timerslack_ns(&self) -> Result<u64> {
        self.number("timerslack_ns")
    }

    /// `coredump_filter`: which mappings a core dump contains (core(5)). None for a process without memory.
    pub fn coredump_filter(&self) -> Result<Option<u32>> {
        self.parsed("coredump_filter", |content| match content.trim_ascii() {
            b"" => Ok(None),
            digits => text::hex32(digits, "coredump_filter").map(Some),
        })
    }

    /// `personality`: the execution domain and its flags (personality(2)).
    pub fn personality(&self) -> Result<u32> {
        self.parsed("personality", |content| text::hex32(content.trim_ascii(), "personality"))
    }
}

impl AsFd for ProcDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}
