//! `/proc/PID/fdinfo/N`: an open file's position and flags, and what its kind adds (`proc_pid_fdinfo(5)`).

use super::text::{self, Decimal, ParseError, Parsed};

/// What the kernel tells about an open file description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdInfo {
    /// File position in bytes.
    pub pos: i64,
    /// `O_*`: access mode and status flags of the description, and `O_CLOEXEC` of the descriptor.
    pub flags: u32,
    /// Mount it was opened on, an ID of mountinfo; a mount outside the reader's namespace is not listed
    /// there.
    pub mnt_id: Option<i32>,
    /// Inode number (5.14).
    pub ino: Option<u64>,
    /// Locks held through this file; POSIX locks of the process, flock and open-file-description locks of the
    /// description, leases.
    pub locks: Vec<FileLock>,
    /// What the kind of file adds.
    pub extra: FdExtra,
    /// Lines this version does not know, verbatim.
    pub unknown: Vec<Vec<u8>>,
}

/// What `fdinfo` says about a particular kind of file. It is [`FdExtra::None`] also for an epoll or inotify
/// that watches nothing: the link in `/proc/PID/fd` tells the kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FdExtra {
    /// Nothing.
    None,
    /// `anon_inode:[eventfd]`
    EventFd(EventFd),
    /// `anon_inode:[eventpoll]`: at least one watched descriptor, in the kernel's order.
    Epoll(Vec<EpollEntry>),
    /// `anon_inode:[signalfd]`: the signals it receives, bit N-1 for signal N.
    SignalFd {
        /// The set.
        mask: u64,
    },
    /// `anon_inode:[timerfd]`
    TimerFd(TimerFd),
    /// `anon_inode:inotify`: at least one watch, newest first.
    Inotify(Vec<InotifyWatch>),
    /// A pidfd.
    PidFd(PidFd),
    /// `/dev/ptmx`: the master of `/dev/pts/INDEX`.
    PtyMaster {
        /// Number of the terminal.
        index: u32,
    },
    /// A unix socket (5.10): how many descriptors are in flight to it.
    UnixSocket {
        /// Descriptors in messages not yet received.
        scm_fds: u32,
    },
}

/// An eventfd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EventFd {
    /// The counter.
    pub count: u64,
    /// The kernel's number for it: equal for two descriptors of the same eventfd (5.2).
    pub id: Option<i32>,
    /// Whether `EFD_SEMAPHORE`; not told by older kernels (6.5).
    pub semaphore: Option<bool>,
}

/// A descriptor watched by an epoll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpollEntry {
    /// Number under which it was added; it may since have been closed or reused.
    pub fd: i32,
    /// `EPOLL*`; only `EPOLLONESHOT`, `EPOLLET` and the like remain of a one-shot entry that has fired.
    pub events: u32,
    /// The user's data.
    pub data: u64,
    /// Position of the watched file.
    pub pos: i64,
    /// Inode of the watched file.
    pub ino: u64,
    /// Device of the watched file, in the kernel's own encoding (major << 20 | minor).
    pub sdev: u32,
}

/// A timerfd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TimerFd {
    /// `CLOCK_*`
    pub clock: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// Flags of the last `timerfd_settime`: `TFD_TIMER_ABSTIME`, `TFD_TIMER_CANCEL_ON_SET`.
    pub settime_flags: u32,
    /// Time left to the next expiration (relative, also for an absolute timer), as (s, ns); (0, 0) when
    /// disarmed.
    pub value: (u64, u64),
    /// Interval, as (s, ns).
    pub interval: (u64, u64),
}

/// A watch of an inotify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InotifyWatch {
    /// Watch descriptor.
    pub wd: i32,
    /// Inode watched.
    pub ino: u64,
    /// Its filesystem's device, in the kernel's own encoding (major << 20 | minor).
    pub sdev: u32,
    /// `IN_*`
    pub mask: u32,
    /// Handle of the inode for `open_by_handle_at`; none when the filesystem has none.
    pub handle: Option<FileHandle>,
}

/// What `open_by_handle_at` wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHandle {
    /// `handle_type`
    pub kind: i32,
    /// `f_handle`
    pub bytes: Vec<u8>,
}

/// A pidfd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PidFd {
    /// PID in the reader's PID namespace (that of the `/proc` mount); 0 when not visible there, -1 when
    /// reaped.
    pub pid: i32,
    /// PIDs from that namespace inwards.
    pub ns_pid: Vec<i32>,
}

/// A lock on a file (fs/locks.c, `lock_get_status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileLock {
    /// What kind of lock.
    pub kind: LockKind,
    /// For which access.
    pub access: LockAccess,
    /// Whether a lease is being broken right now.
    pub breaking: bool,
    /// Owner; -1 for open-file-description locks, 0 when not visible.
    pub pid: i32,
    /// Device of the file as (major, minor).
    pub dev: (u32, u32),
    /// Inode of the file.
    pub ino: u64,
    /// First byte.
    pub start: u64,
    /// Last byte, none for "to the end of the file".
    pub end: Option<u64>,
}

/// Kinds of file locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// `fcntl(F_SETLK)`: belongs to the process.
    Posix,
    /// `fcntl(F_OFD_SETLK)`: belongs to the open file description.
    OpenFileDescription,
    /// `flock`: belongs to the open file description.
    Flock,
    /// `fcntl(F_SETLEASE)`
    Lease,
    /// A delegation of an NFS server.
    Delegation,
}

/// What a lock protects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockAccess {
    /// Shared: `F_RDLCK`, `LOCK_SH`.
    Read,
    /// Exclusive: `F_WRLCK`, `LOCK_EX`.
    Write,
    /// A lease that is being given up: `F_UNLCK`.
    Unlock,
}

impl FdInfo {
    /// Parses the file.
    pub fn parse(file: &[u8]) -> Parsed<Self> {
        let (mut pos, mut flags) = (None, None);
        let mut info = Self {
            pos: 0,
            flags: 0,
            mnt_id: None,
            ino: None,
            locks: Vec::new(),
            extra: FdExtra::None,
            unknown: Vec::new(),
        };
        for line in text::lines(file) {
            match text::key_value(line) {
                Some((b"pos", value)) => pos = Some(text::decimal(value, "pos")?),
                Some((b"flags", value)) => flags = Some(text::octal32(value, "flags")?),
                Some((b"mnt_id", value)) => info.mnt_id = Some(text::decimal(value, "mnt_id")?),
                Some((b"ino", value)) => info.ino = Some(text::decimal(value, "ino")?),
                Some((b"lock", value)) => info.locks.push(FileLock::parse(value)?),
                _ => {
                    if !info.extra.add(line)? {
                        info.unknown.push(line.to_vec());
                    }
                }
            }
        }
        info.pos = pos.ok_or_else(|| ParseError::new("pos", file))?;
        info.flags = flags.ok_or_else(|| ParseError::new("flags", file))?;
        Ok(info)
    }
}

impl FdExtra {
    /// Takes in one line; says whether it was known.
    fn add(&mut self, line: &[u8]) -> Parsed<bool> {
        if let Some(rest) = line.strip_prefix(b"inotify ") {
            self.watches().push(InotifyWatch::parse(rest)?);
            return Ok(true);
        }
        let Some((key, value)) = text::key_value(line) else { return Ok(false) };
        match key {
            b"eventfd-count" => self.eventfd().count = text::hex(value, "eventfd-count")?,
            b"eventfd-id" => self.eventfd().id = Some(text::decimal(value, "eventfd-id")?),
            b"eventfd-semaphore" => {
                self.eventfd().semaphore = Some(text::decimal::<u32>(value, "eventfd-semaphore")? != 0);
            }
            b"tfd" => self.epoll().push(EpollEntry::parse(value)?),
            b"sigmask" => *self = Self::SignalFd { mask: text::hex(value, "sigmask")? },
            b"clockid" => self.timerfd().clock = text::decimal(value, "clockid")?,
            b"ticks" => self.timerfd().ticks = text::decimal(value, "ticks")?,
            b"settime flags" => self.timerfd().settime_flags = text::octal32(value, "settime flags")?,
            b"it_value" => self.timerfd().value = time(value, "it_value")?,
            b"it_interval" => self.timerfd().interval = time(value, "it_interval")?,
            b"Pid" => self.pidfd().pid = text::decimal(value, "Pid")?,
            b"NSpid" => self.pidfd().ns_pid = text::decimals(value, "NSpid")?,
            b"tty-index" => *self = Self::PtyMaster { index: text::decimal(value, "tty-index")? },
            b"scm_fds" => *self = Self::UnixSocket { scm_fds: text::decimal(value, "scm_fds")? },
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Access to the part of a [`FdExtra`] that a line belongs to, turning it into that kind first if need be.
macro_rules! becoming {
    ($($method:ident: $variant:ident($type:ty) = $empty:expr;)*) => {
        impl FdExtra {
            $(fn $method(&mut self) -> &mut $type {
                if !matches!(self, Self::$variant(_)) {
                    *self = Self::$variant($empty);
                }
                match self {
                    Self::$variant(inner) => inner,
                    _ => unreachable!("assigned just above"),
                }
            })*
        }
    };
}

becoming! {
    eventfd: EventFd(EventFd) = EventFd::default();
    epoll: Epoll(Vec<EpollEntry>) = Vec::new();
    timerfd: TimerFd(TimerFd) = TimerFd::default();
    watches: Inotify(Vec<InotifyWatch>) = Vec::new();
    pidfd: PidFd(PidFd) = PidFd { pid: 0, ns_pid: Vec::new() };
}

impl EpollEntry {
    /// The line after `tfd:`. The kernel pads values after `events:` and `data:` with blanks, so that
    /// a value may stand apart from its key.
    fn parse(value: &[u8]) -> Parsed<Self> {
        let field = |key, what| labelled(value, key).ok_or_else(|| ParseError::new(what, value));
        Ok(Self {
            fd: first(value, "tfd")?,
            events: text::hex32(field(b"events:", "epoll events")?, "epoll events")?,
            data: text::hex(field(b"data:", "epoll data")?, "epoll data")?,
            pos: text::decimal(field(b"pos:", "epoll pos")?, "epoll pos")?,
            ino: text::hex(field(b"ino:", "epoll ino")?, "epoll ino")?,
            sdev: text::hex32(field(b"sdev:", "epoll sdev")?, "epoll sdev")?,
        })
    }
}

impl InotifyWatch {
    /// The line after `inotify `.
    fn parse(value: &[u8]) -> Parsed<Self> {
        let field = |key, what| labelled(value, key).ok_or_else(|| ParseError::new(what, value));
        Ok(Self {
            wd: text::hex32(field(b"wd:", "inotify wd")?, "inotify wd")? as i32,
            ino: text::hex(field(b"ino:", "inotify ino")?, "inotify ino")?,
            sdev: text::hex32(field(b"sdev:", "inotify sdev")?, "inotify sdev")?,
            mask: text::hex32(field(b"mask:", "inotify mask")?, "inotify mask")?,
            handle: match labelled(value, b"f_handle:") {
                Some(digits) => Some(FileHandle {
                    kind: text::hex32(field(b"fhandle-type:", "fhandle-type")?, "fhandle-type")? as i32,
                    bytes: hex_bytes(digits)?,
                }),
                None => None,
            },
        })
    }
}

impl FileLock {
    /// The line after `lock:`, such as `1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF`.
    fn parse(value: &[u8]) -> Parsed<Self> {
        let bad = |what| ParseError::new(what, value);
        let fields: Vec<&[u8]> = text::fields(value).collect();
        let &[_number, kind, state, access, pid, inode, start, end] = fields.as_slice() else {
            return Err(bad("lock"));
        };
        let place: Vec<&[u8]> = inode.split(|&byte| byte == b':').collect();
        let &[major, minor, ino] = place.as_slice() else { return Err(bad("lock's inode")) };
        Ok(Self {
            kind: match kind {
                b"POSIX" => LockKind::Posix,
                b"OFDLCK" => LockKind::OpenFileDescription,
                b"FLOCK" => LockKind::Flock,
                b"LEASE" => LockKind::Lease,
                b"DELEG" => LockKind::Delegation,
                _ => return Err(bad("lock kind")),
            },
            access: match access {
                b"READ" => LockAccess::Read,
                b"WRITE" => LockAccess::Write,
                b"UNLCK" => LockAccess::Unlock,
                _ => return Err(bad("lock access")),
            },
            breaking: state == b"BREAKING",
            pid: text::decimal(pid, "lock owner")?,
            dev: (text::hex32(major, "lock device")?, text::hex32(minor, "lock device")?),
            ino: text::decimal(ino, "lock inode")?,
            start: text::decimal(start, "lock start")?,
            end: if end == b"EOF" { None } else { Some(text::decimal(end, "lock end")?) },
        })
    }
}

/// The field after `key`, whether blanks stand between them or not. A key is found only at a field's start.
fn labelled<'a>(line: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let mut fields = text::fields(line);
    while let Some(field) = fields.next() {
        match field.strip_prefix(key) {
            Some(b"") => return fields.next(),
            Some(value) => return Some(value),
            None => {}
        }
    }
    None
}

/// The first field of a line as a number.
fn first<T: Decimal>(line: &[u8], what: &'static str) -> Parsed<T> {
    text::decimal(text::fields(line).next().unwrap_or_default(), what)
}

/// `(3, 500000000)` as seconds and nanoseconds.
fn time(value: &[u8], what: &'static str) -> Parsed<(u64, u64)> {
    let inner = value.strip_prefix(b"(").and_then(|rest| rest.strip_suffix(b")"));
    let (seconds, nanoseconds) =
        inner.and_then(|inner| text::split_once(inner, b',')).ok_or_else(|| ParseError::new(what, value))?;
    Ok((text::decimal(seconds.trim_ascii(), what)?, text::decimal(nanoseconds.trim_ascii(), what)?))
}

/// Pairs of hexadecimal digits as bytes.
fn hex_bytes(digits: &[u8]) -> Parsed<Vec<u8>> {
    let bad = || ParseError::new("f_handle", digits);
    if !digits.len().is_multiple_of(2) {
        return Err(bad());
    }
    digits.chunks(2).map(|pair| text::unsigned(pair, 16).map(|byte| byte as u8).ok_or_else(bad)).collect()
}
