//! Namespaces: opening, entering and making them (namespaces(7)).
//!
//! All of this acts on the calling *thread*. Threads of one process may be in different namespaces of
//! every kind except user and time; the time namespace of a process with threads can be chosen only
//! for its future children, so whoever needs to be in one enters it in a new process (see [`crate::spawn`]).

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::fault;
use crate::{Error, Result};

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Control groups (`cgroup_namespaces(7)`).
    Cgroup,
    /// System V IPC and POSIX message queues (`ipc_namespaces(7)`).
    Ipc,
    /// Mounts (`mount_namespaces(7)`).
    Mount,
    /// Network (`network_namespaces(7)`).
    Network,
    /// Process IDs (`pid_namespaces(7)`).
    Pid,
    /// Clocks (`time_namespaces(7)`).
    Time,
    /// Users (`user_namespaces(7)`).
    User,
    /// Host name (`uts_namespaces(7)`).
    Uts,
}

impl Kind {
    /// The name of its file in `/proc/PID/ns`.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Ipc => "ipc",
            Self::Mount => "mnt",
            Self::Network => "net",
            Self::Pid => "pid",
            Self::Time => "time",
            Self::User => "user",
            Self::Uts => "uts",
        }
    }

    /// Its `CLONE_NEW*` flag.
    pub fn clone_flag(self) -> u32 {
        self.unshare_flag().bits()
    }

    pub(crate) fn unshare_flag(self) -> UnshareFlags {
        match self {
            Self::Cgroup => UnshareFlags::NEWCGROUP,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Mount => UnshareFlags::NEWNS,
            Self::Network => UnshareFlags::NEWNET,
            Self::Pid => UnshareFlags::NEWPID,
            Self::Time => UnshareFlags::NEWTIME,
            Self::User => UnshareFlags::NEWUSER,
            Self::Uts => UnshareFlags::NEWUTS,
        }
    }

    pub(crate) fn link_type(self) -> LinkNameSpaceType {
        match self {
            Self::Cgroup => LinkNameSpaceType::ControlGroup,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Mount => LinkNameSpaceType::Mount,
            Self::Network => LinkNameSpaceType::Network,
            Self::Pid => LinkNameSpaceType::ProcessID,
            Self::Time => LinkNameSpaceType::Time,
            Self::User => LinkNameSpaceType::User,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.file_name())
    }
}

/// A descriptor for the namespace of `kind` that process `pid` is in.
pub fn of_process(pid: i32, kind: Kind) -> Result<OwnedFd> {
    open(&format!("/proc/{pid}/ns/{}", kind.file_name()))
}

/// A descriptor for the namespace of `kind` that the calling thread is in; of the kinds that a thread
/// changes only for its children (pid, time) the one that its children will be in.
pub fn of_thread(kind: Kind) -> Result<OwnedFd> {
    let suffix = if matches!(kind, Kind::Pid | Kind::Time) { "_for_children" } else { "" };
    open(&format!("/proc/thread-self/ns/{}{suffix}", kind.file_name()))
}

fn open(path: &str) -> Result<OwnedFd> {
    fault::point();
    Ok(File::open(path).map_err(|source| Error::new("open", path, source))?.into())
}

/// Puts the calling thread into the namespace behind `namespace` (setns(2)), which must be of `kind`.
///
/// For [`Kind::Mount`] the thread must not share its working directory and root with others
/// ([`unshare_directories`]); [`Kind::Time`] works only in a process without other threads.
pub fn enter(namespace: impl AsFd, kind: Kind) -> Result<()> {
    fault::point();
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind.link_type()))
        .map_err(|errno| Error::new("setns", format_args!("a {kind} namespace"), errno))
}

/// Makes new namespaces of `kinds` and puts the calling thread into them (unshare(2)): for pid and time
/// its children only.
pub fn unshare(kinds: &[Kind]) -> Result<()> {
    fault::point();
    let flags = kinds.iter().fold(UnshareFlags::empty(), |flags, kind| flags | kind.unshare_flag());
    unshare_flags(flags, format_args!("new namespaces {kinds:?}"))
}

/// Gives the calling thread a working directory, root and umask of its own, which [`enter`] needs for a
/// mount namespace.
pub fn unshare_directories() -> Result<()> {
    fault::point();
    unshare_flags(UnshareFlags::FS, format_args!("working directory"))
}

/// Does `work` in the namespace of `kind` (neither pid, time nor user) behind `namespace`, on a thread of its own: the
/// caller stays where it is.
pub fn inside<T: Send, E: From<Error> + Send>(
    namespace: impl AsFd,
    kind: Kind,
    work: impl FnOnce() -> std::result::Result<T, E> + Send,
) -> std::result::Result<T, E> {
    let namespace = namespace.as_fd();
    let enter_and_work = || {
        if kind == Kind::Mount {
            unshare_directories()?;
        }
        enter(namespace, kind)?;
        work()
    };
    std::thread::scope(|scope| match scope.spawn(enter_and_work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// The root directory of the mount namespace behind `namespace`, as a descriptor that only paths start from.
pub fn root_of(namespace: impl AsFd) -> Result<OwnedFd> {
    inside(namespace, Kind::Mount, || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open("/", flags, Mode::empty())
            .map_err(|errno| Error::new("open", "the root of a mount namespace", errno))
    })
}

fn unshare_flags(flags: UnshareFlags, object: fmt::Arguments<'_>) -> Result<()> {
    // SAFETY: no caller passes CLONE_FILES, the one flag that could invalidate descriptors others hold.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(|errno| Error::new("unshare", object, errno))
}

/// What the clocks of a time namespace show beyond those of the host's (`time_namespaces(7)`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeOffsets {
    /// Added to `CLOCK_MONOTONIC`: whole seconds, rounded down, and nanoseconds below 10⁹.
    pub monotonic: (i64, u32),
    /// Added to `CLOCK_BOOTTIME`, likewise.
    pub boottime: (i64, u32),
}

/// Sets the offsets of the time namespace that the calling thread has just unshared. Possible only until
/// the first process is in it.
pub fn set_time_offsets(offsets: TimeOffsets) -> Result<()> {
    fault::point();
    // /proc/thread-self has no timens_offsets, but every thread has a hidden directory of its own in /proc.
    let path = format!("/proc/{}/timens_offsets", rustix::thread::gettid());
    let text = format!(
        "monotonic {} {}\nboottime {} {}\n",
        offsets.monotonic.0, offsets.monotonic.1, offsets.boottime.0, offsets.boottime.1
    );
    std::fs::write(&path, text).map_err(|source| Error::new("write", path, source))
}

/// Sets the host name of the calling thread's UTS namespace.
pub fn set_host_name(name: &str) -> Result<()> {
    fault::point();
    rustix::system::sethostname(name.as_bytes())
        .map_err(|errno| Error::new("sethostname", format_args!("{name:?}"), errno))
}
