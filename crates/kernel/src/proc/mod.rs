//! `/proc/PID`: what the kernel tells about a process.
//!
//! [`ProcDir`] opens the directory once and reads its files. The parsers are pure functions over bytes: they
//! give a [`ParseError`] on anything the kernel would not write and never panic, whatever they are fed. The
//! sources are the manual pages `proc_pid_*(5)` and the kernel's `fs/proc`.

mod dir;
mod fdinfo;
mod maps;
mod misc;
mod mountinfo;
mod stat;
mod status;
mod text;

#[cfg(test)]
mod fdinfo_tests;
#[cfg(test)]
mod live_tests;
#[cfg(test)]
mod parser_tests;

pub use dir::{FileId, NsKind, ProcDir};
pub use fdinfo::{
    EpollEntry, EventFd, FdExtra, FdInfo, FileHandle, FileLock, InotifyWatch, LockAccess, LockKind, PidFd,
    TimerFd,
};
pub use maps::{Mapping, MappingName, Prot, VmFlags, parse_maps, parse_smaps};
pub use misc::{
    CgroupLine, Limit, Limits, PosixTimer, TimensOffsets, TimerNotify, parse_auxv, parse_cgroup, parse_timers,
};
pub use mountinfo::{Mount, parse_mountinfo};
pub use stat::{Stat, TaskState};
pub use status::{Capabilities, Ids, SignalSets, Status};
pub use text::{ParseError, Parsed};
