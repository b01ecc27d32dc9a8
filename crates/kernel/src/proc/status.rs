//! `/proc/PID/status`: credentials, signals, capabilities (`proc_pid_status(5)`).

use super::stat::TaskState;
use super::text::{self, ParseError, Parsed};

/// Real, effective, saved and filesystem ID, in that order, as the reader's user namespace maps them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ids {
    /// Real ID.
    pub real: u32,
    /// Effective ID.
    pub effective: u32,
    /// Saved set-ID.
    pub saved: u32,
    /// ID for filesystem checks.
    pub fs: u32,
}

/// Capability sets, one bit per `CAP_*`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Inheritable.
    pub inheritable: u64,
    /// Permitted.
    pub permitted: u64,
    /// Effective.
    pub effective: u64,
    /// Bounding.
    pub bounding: u64,
    /// Ambient.
    pub ambient: u64,
}

/// Signal sets, bit N-1 for signal N.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SignalSets {
    /// Pending for this thread.
    pub pending: u64,
    /// Pending for the process.
    pub shared_pending: u64,
    /// Blocked by this thread.
    pub blocked: u64,
    /// Ignored by the process.
    pub ignored: u64,
    /// Caught by the process.
    pub caught: u64,
}

/// What `/proc/PID/status` says, as far as a checkpoint needs it.
///
/// The lists of PIDs go from the reader's PID namespace inwards to the process's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// File-creation mask; none for a process without a filesystem context (a zombie).
    pub umask: Option<u32>,
    /// The state.
    pub state: TaskState,
    /// Thread group (process) ID.
    pub tgid: i32,
    /// Thread ID.
    pub pid: i32,
    /// Parent, 0 when it is outside the reader's PID namespace.
    pub ppid: i32,
    /// Tracer, 0 when there is none.
    pub tracer_pid: i32,
    /// User IDs.
    pub uid: Ids,
    /// Group IDs.
    pub gid: Ids,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Thread group ID in each namespace.
    pub ns_tgid: Vec<i32>,
    /// Thread ID in each namespace.
    pub ns_pid: Vec<i32>,
    /// Process group in each namespace, 0 where it is not visible.
    pub ns_pgid: Vec<i32>,
    /// Session in each namespace, 0 where it is not visible.
    pub ns_sid: Vec<i32>,
    /// Threads in the process.
    pub threads: u32,
    /// Queued signals of the user, and the limit on them.
    pub signal_queue: (u64, u64),
    /// Signal sets.
    pub signals: SignalSets,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Seccomp mode (0 none, 1 strict, 2 filter); none when the kernel has no seccomp.
    pub seccomp: Option<u32>,
    /// How many seccomp filters are attached (5.9).
    pub seccomp_filters: Option<u32>,
    /// Whether transparent huge pages are not disabled by `PR_SET_THP_DISABLE` (5.0); none for zombies.
    pub thp_enabled: Option<bool>,
}

impl Status {
    /// The thread's ID as it knows it itself: in its own PID namespace.
    pub fn own_pid(&self) -> i32 {
        self.ns_pid.last().copied().unwrap_or(self.pid)
    }

    /// Parses the file. Lines this version does not know are skipped.
    pub fn parse(file: &[u8]) -> Parsed<Self> {
        let lines = Lines::of(file);
        Ok(Self {
            umask: lines.find(b"Umask").map(|value| text::octal32(value, "Umask")).transpose()?,
            state: lines
                .need(b"State", "State")?
                .first()
                .map(|&letter| TaskState::from_letter(letter))
                .ok_or_else(|| ParseError::new("State", file))?,
            tgid: text::decimal(lines.need(b"Tgid", "Tgid")?, "Tgid")?,
            pid: text::decimal(lines.need(b"Pid", "Pid")?, "Pid")?,
            ppid: text::decimal(lines.need(b"PPid", "PPid")?, "PPid")?,
            tracer_pid: text::decimal(lines.need(b"TracerPid", "TracerPid")?, "TracerPid")?,
            uid: ids(lines.need(b"Uid", "Uid")?, "Uid")?,
            gid: ids(lines.need(b"Gid", "Gid")?, "Gid")?,
            groups: text::decimals(lines.need(b"Groups", "Groups")?, "Groups")?,
            ns_tgid: lines.list(b"NStgid", "NStgid")?,
            ns_pid: lines.list(b"NSpid", "NSpid")?,
            ns_pgid: lines.list(b"NSpgid", "NSpgid")?,
            ns_sid: lines.list(b"NSsid", "NSsid")?,
            threads: text::decimal(lines.need(b"Threads", "Threads")?, "Threads")?,
            signal_queue: signal_queue(lines.need(b"SigQ", "SigQ")?)?,
            signals: lines.signals()?,
            capabilities: lines.capabilities()?,
            no_new_privs: flag(lines.need(b"NoNewPrivs", "NoNewPrivs")?, "NoNewPrivs")?,
            seccomp: lines.find(b"Seccomp").map(|value| text::decimal(value, "Seccomp")).transpose()?,
            seccomp_filters: lines
                .find(b"Seccomp_filters")
                .map(|value| text::decimal(value, "Seccomp_filters"))
                .transpose()?,
            thp_enabled: lines.find(b"THP_enabled").map(|value| flag(value, "THP_enabled")).transpose()?,
        })
    }
}

/// The `Key: value` lines of the file.
struct Lines<'a>(Vec<(&'a [u8], &'a [u8])>);

impl<'a> Lines<'a> {
    fn of(file: &'a [u8]) -> Self {
        Self(text::lines(file).filter_map(text::key_value).collect())
    }

    fn find(&self, key: &[u8]) -> Option<&'a [u8]> {
        self.0.iter().find(|(name, _)| *name == key).map(|(_, value)| *value)
    }

    fn need(&self, key: &[u8], what: &'static str) -> Parsed<&'a [u8]> {
        self.find(key).ok_or_else(|| ParseError::new(what, b"the whole file"))
    }

    fn list(&self, key: &[u8], what: &'static str) -> Parsed<Vec<i32>> {
        self.find(key).map_or(Ok(Vec::new()), |value| text::decimals(value, what))
    }

    fn set(&self, key: &[u8], what: &'static str) -> Parsed<u64> {
        text::hex(self.need(key, what)?, what)
    }

    fn signals(&self) -> Parsed<SignalSets> {
        Ok(SignalSets {
            pending: self.set(b"SigPnd", "SigPnd")?,
            shared_pending: self.set(b"ShdPnd", "ShdPnd")?,
            blocked: self.set(b"SigBlk", "SigBlk")?,
            ignored: self.set(b"SigIgn", "SigIgn")?,
            caught: self.set(b"SigCgt", "SigCgt")?,
        })
    }

    fn capabilities(&self) -> Parsed<Capabilities> {
        Ok(Capabilities {
            inheritable: self.set(b"CapInh", "CapInh")?,
            permitted: self.set(b"CapPrm", "CapPrm")?,
            effective: self.set(b"CapEff", "CapEff")?,
            bounding: self.set(b"CapBnd", "CapBnd")?,
            ambient: self.set(b"CapAmb", "CapAmb")?,
        })
    }
}

fn ids(value: &[u8], what: &'static str) -> Parsed<Ids> {
    match text::decimals(value, what)?[..] {
        [real, effective, saved, fs] => Ok(Ids { real, effective, saved, fs }),
        _ => Err(ParseError::new(what, value)),
    }
}

fn flag(value: &[u8], what: &'static str) -> Parsed<bool> {
    match value {
        b"0" => Ok(false),
        b"1" => Ok(true),
        _ => Err(ParseError::new(what, value)),
    }
}

fn signal_queue(value: &[u8]) -> Parsed<(u64, u64)> {
    let (queued, limit) = text::split_once(value, b'/').ok_or_else(|| ParseError::new("SigQ", value))?;
    Ok((text::decimal(queued, "SigQ")?, text::decimal(limit, "SigQ")?))
}
