//! The small files of `/proc/PID`: limits, cgroup, timers, auxv, time-namespace offsets.

use super::text::{self, ParseError, Parsed};

/// Soft and hard limit of one resource; [`Limit::INFINITY`] for unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Soft limit, in the resource's unit (bytes, seconds, microseconds, a count).
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

impl Limit {
    /// `RLIM_INFINITY`
    pub const INFINITY: u64 = u64::MAX;
}

/// All resource limits, indexed by `RLIMIT_*` (`/proc/PID/limits`, getrlimit(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits(pub [Limit; Limits::NAMES.len()]);

impl Limits {
    /// What the kernel calls each resource, by `RLIMIT_*` number (lnames in fs/proc/base.c).
    pub const NAMES: [&'static str; 16] = [
        "Max cpu time",
        "Max file size",
        "Max data size",
        "Max stack size",
        "Max core file size",
        "Max resident set",
        "Max processes",
        "Max open files",
        "Max locked memory",
        "Max address space",
        "Max file locks",
        "Max pending signals",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
        "Max realtime timeout",
    ];

    /// Parses the file; every resource must be there.
    pub fn parse(file: &[u8]) -> Parsed<Self> {
        let mut limits = [Limit { soft: 0, hard: 0 }; Self::NAMES.len()];
        for (limit, name) in limits.iter_mut().zip(Self::NAMES) {
            let values = text::lines(file)
                .find_map(|line| line.strip_prefix(name.as_bytes()).filter(|rest| rest.starts_with(b" ")))
                .ok_or_else(|| ParseError::new(name, b"the whole file"))?;
            let mut fields = text::fields(values);
            let mut value = || limit_value(fields.next().unwrap_or_default(), name);
            *limit = Limit { soft: value()?, hard: value()? };
        }
        Ok(Self(limits))
    }
}

fn limit_value(field: &[u8], name: &'static str) -> Parsed<u64> {
    if field == b"unlimited" { Ok(Limit::INFINITY) } else { text::decimal(field, name) }
}

/// A line of `/proc/PID/cgroup` (cgroups(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupLine {
    /// Number of the hierarchy; 0 is version 2.
    pub hierarchy: u32,
    /// Version 1: its controllers or `name=NAME`, separated by commas. Version 2: empty.
    pub controllers: Vec<u8>,
    /// The cgroup, as seen from the reader's cgroup namespace; ends in ` (deleted)` when it was removed.
    pub path: Vec<u8>,
}

/// Parses `/proc/PID/cgroup`.
pub fn parse_cgroup(file: &[u8]) -> Parsed<Vec<CgroupLine>> {
    text::lines(file)
        .map(|line| {
            let (hierarchy, rest) =
                text::split_once(line, b':').ok_or_else(|| ParseError::new("cgroup", line))?;
            // A v1 name may hold a colon, a path too: the path starts at the first `:/`.
            let at = rest
                .windows(2)
                .position(|pair| pair == b":/")
                .ok_or_else(|| ParseError::new("cgroup", line))?;
            Ok(CgroupLine {
                hierarchy: text::decimal(hierarchy, "cgroup hierarchy")?,
                controllers: rest.get(..at).unwrap_or_default().to_vec(),
                path: rest.get(at + 1..).unwrap_or_default().to_vec(),
            })
        })
        .collect()
}

/// How a POSIX timer tells that it expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerNotify {
    /// `SIGEV_SIGNAL`
    Signal,
    /// `SIGEV_NONE`
    None,
    /// `SIGEV_THREAD`: a signal to the kernel; glibc turns it into a thread.
    Thread,
}

/// A POSIX timer (`/proc/PID/timers`, `timer_create(2)`). When it is armed is not told: `timer_gettime` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PosixTimer {
    /// The kernel's ID.
    pub id: i32,
    /// Signal it sends.
    pub signal: i32,
    /// `sigev_value`
    pub value: u64,
    /// How it tells.
    pub notify: TimerNotify,
    /// Whether the signal goes to one thread (`SIGEV_THREAD_ID`).
    pub to_thread: bool,
    /// That thread or the process, as the reader's PID namespace sees it; 0 when it is gone.
    pub target: i32,
    /// `CLOCK_*`; a negative number is the clock of a process or thread.
    pub clock: i32,
}

/// Parses `/proc/PID/timers`: four lines for each timer, the first of them `ID:`.
pub fn parse_timers(file: &[u8]) -> Parsed<Vec<PosixTimer>> {
    let mut timers = Vec::new();
    let mut lines = text::lines(file);
    while let Some(line) = lines.next() {
        let id = text::decimal(after(Some(line), b"ID", "timer ID")?, "timer ID")?;
        let (signal, value) = slashed(after(lines.next(), b"signal", "timer signal")?, "timer signal")?;
        let (notify, target) = slashed(after(lines.next(), b"notify", "timer notify")?, "timer notify")?;
        let (kind, target_id) =
            text::split_once(target, b'.').ok_or_else(|| ParseError::new("timer notify", target))?;
        let clock = after(lines.next(), b"ClockID", "timer clock")?;
        timers.push(PosixTimer {
            id,
            signal: text::decimal(signal, "timer signal")?,
            value: text::hex(value.strip_prefix(b"0x").unwrap_or(value), "timer value")?,
            notify: match notify {
                b"signal" => TimerNotify::Signal,
                b"none" => TimerNotify::None,
                b"thread" => TimerNotify::Thread,
                _ => return Err(ParseError::new("timer notify", notify)),
            },
            to_thread: kind == b"tid",
            target: text::decimal(target_id, "timer target")?,
            clock: text::decimal(clock, "timer clock")?,
        });
    }
    Ok(timers)
}

/// The value of a line that must have the given key.
fn after<'a>(line: Option<&'a [u8]>, key: &[u8], what: &'static str) -> Parsed<&'a [u8]> {
    let line = line.unwrap_or_default();
    match text::key_value(line) {
        Some((name, value)) if name == key => Ok(value),
        _ => Err(ParseError::new(what, line)),
    }
}

fn slashed<'a>(value: &'a [u8], what: &'static str) -> Parsed<(&'a [u8], &'a [u8])> {
    text::split_once(value, b'/').ok_or_else(|| ParseError::new(what, value))
}

/// Parses `/proc/PID/auxv`: the pairs before `AT_NULL`, which must be there.
pub fn parse_auxv(file: &[u8]) -> Parsed<Vec<(u64, u64)>> {
    let mut pairs = Vec::new();
    let (words, _) = file.as_chunks::<8>();
    let (words, _) = words.as_chunks::<2>();
    for &[key, value] in words {
        let key = u64::from_ne_bytes(key);
        if key == 0 {
            return Ok(pairs);
        }
        pairs.push((key, u64::from_ne_bytes(value)));
    }
    // A process without memory (a zombie, a kernel thread) has an empty file.
    if file.is_empty() { Ok(pairs) } else { Err(ParseError::new("AT_NULL", b"the auxiliary vector")) }
}

/// Offsets of a time namespace to the initial one, each as (s, ns) with 0 ≤ ns < 10⁹ (`time_namespaces(7)`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TimensOffsets {
    /// `CLOCK_MONOTONIC`
    pub monotonic: (i64, i64),
    /// `CLOCK_BOOTTIME`
    pub boottime: (i64, i64),
}

impl TimensOffsets {
    /// Parses `/proc/PID/timens_offsets`.
    pub fn parse(file: &[u8]) -> Parsed<Self> {
        let offset = |name: &[u8]| {
            text::lines(file)
                .find_map(|line| match text::fields(line).collect::<Vec<_>>()[..] {
                    [clock, seconds, nanoseconds] if clock == name => {
                        Some((text::signed(seconds)?, text::signed(nanoseconds)?))
                    }
                    _ => None,
                })
                .ok_or_else(|| ParseError::new("time-namespace offset", file))
        };
        Ok(Self { monotonic: offset(b"monotonic")?, boottime: offset(b"boottime")? })
    }
}
