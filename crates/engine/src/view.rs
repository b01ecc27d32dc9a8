//! What rooms get to see of frozen processes, threads and open file descriptions.

use std::cell::OnceCell;
use std::collections::HashSet;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};

use limosa_kernel::proc::{FdInfo, Mapping, ProcDir, Stat, Status, TaskState};

/// A frozen process.
#[derive(Debug)]
pub struct ProcessView<'a> {
    /// PID as Limosa sees it.
    pub pid: i32,
    /// PID as the process itself sees it.
    pub own_pid: i32,
    /// `/proc/PID`.
    pub proc: &'a ProcDir,
    /// `/proc/PID/stat`.
    pub stat: Stat,
    /// `/proc/PID/status` of the leader.
    pub status: Status,
    /// Mappings, with the kernel's flags.
    pub mappings: Vec<Mapping>,
    /// IDs of the mounts in its mount namespace, once somebody has asked.
    pub mounts: OnceCell<HashSet<i32>>,
}

impl<'a> ProcessView<'a> {
    /// What can be seen of process `pid`, whose directory is `proc`, from outside. One that has ended has no mappings.
    pub(crate) fn look(pid: i32, proc: &'a ProcDir) -> limosa_kernel::Result<Self> {
        let status = proc.status()?;
        let zombie = status.state == TaskState::Zombie;
        Ok(Self {
            pid,
            own_pid: status.own_pid(),
            proc,
            stat: proc.stat()?,
            mappings: if zombie { Vec::new() } else { proc.smaps()? },
            status,
            mounts: OnceCell::new(),
        })
    }
}

impl<'a> ProcessView<'a> {
    /// What takes less time to see: without the kernel's flags of mappings.
    pub(crate) fn glance(pid: i32, proc: &'a ProcDir) -> limosa_kernel::Result<Self> {
        let status = proc.status()?;
        let own_pid = status.own_pid();
        Ok(Self {
            pid,
            own_pid,
            proc,
            stat: proc.stat()?,
            mappings: proc.maps()?,
            status,
            mounts: OnceCell::new(),
        })
    }
}

/// A stopped thread.
#[derive(Debug)]
pub struct ThreadView<'a> {
    /// Its process.
    pub process: &'a ProcessView<'a>,
    /// TID as Limosa sees it.
    pub tid: i32,
    /// TID as the process itself sees it.
    pub own_tid: i32,
    /// `/proc/PID/task/TID`.
    pub proc: ProcDir,
    /// `/proc/PID/task/TID/status`.
    pub status: Status,
}

/// Where an open file description was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A process holds a descriptor of it, with this number.
    Held(i32),
    /// No process has it open: it lies in a message that nobody has received, in the queue of the socket that a process
    /// holds under this number, or further inside.
    InFlight(i32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held(number) => number.fmt(f),
            Self::InFlight(number) => write!(f, "in flight in {number}"),
        }
    }
}

/// An open file description, seen through one of its descriptors.
#[derive(Debug)]
pub struct DescriptionView<'a> {
    /// The process that holds the descriptor, or the socket whose queue it lies in.
    pub process: &'a ProcessView<'a>,
    /// Where it is there.
    pub place: Place,
    /// The text of `/proc/PID/fd/NUMBER`.
    pub link: Vec<u8>,
    /// `/proc/PID/fdinfo/NUMBER`.
    pub info: FdInfo,
    /// A duplicate of the descriptor.
    pub descriptor: OwnedFd,
    /// fstat(2) of it.
    pub stat: rustix::fs::Stat,
}

impl DescriptionView<'_> {
    /// The number of its descriptor, if a process holds one.
    pub fn number(&self) -> Option<i32> {
        match self.place {
            Place::Held(number) => Some(number),
            Place::InFlight(_) => None,
        }
    }

    /// A process and its number there, as kcmp(2) wants it: Limosa's own, where nobody else has one.
    pub fn handle(&self) -> (i32, u64) {
        match self.place {
            Place::Held(number) => (self.process.pid, number as u64),
            Place::InFlight(_) => (std::process::id() as i32, self.descriptor.as_raw_fd() as u64),
        }
    }

    /// What `fdinfo` says of it now.
    pub fn info_again(&self) -> limosa_kernel::Result<FdInfo> {
        match self.place {
            Place::Held(number) => self.process.proc.fdinfo(number),
            Place::InFlight(_) => {
                ProcDir::open(std::process::id() as i32)?.fdinfo(self.descriptor.as_raw_fd())
            }
        }
    }

    /// The link as text, for messages.
    pub fn link_text(&self) -> String {
        String::from_utf8_lossy(&self.link).into_owned()
    }

    /// Whether it stands for a place in a filesystem only (`O_PATH`).
    pub fn is_path(&self) -> bool {
        self.info.flags & libc::O_PATH as u32 != 0
    }

    /// Whether the file is on a mount of the process's own mount namespace.
    pub fn is_reachable(&self) -> Result<bool, crate::CaptureError> {
        let Some(mount) = self.info.mnt_id else { return Ok(true) };
        if let Some(mounts) = self.process.mounts.get() {
            return Ok(mounts.contains(&mount));
        }
        let mounts: HashSet<i32> = self.process.proc.mountinfo()?.into_iter().map(|entry| entry.id).collect();
        Ok(self.process.mounts.get_or_init(|| mounts).contains(&mount))
    }

    /// A refusal of this descriptor.
    pub fn refuse(&self, reason: impl Into<String>, remedy: impl Into<String>) -> crate::Refusal {
        crate::Refusal {
            pid: self.process.pid,
            subject: match self.place {
                Place::Held(number) => crate::Subject::Descriptor { number, link: self.link_text() },
                Place::InFlight(socket) => crate::Subject::InFlight { socket, link: self.link_text() },
            },
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }

    /// An error of an operation on this descriptor.
    pub fn error(&self, what: &'static str) -> impl FnOnce(rustix::io::Errno) -> crate::CaptureError + use<> {
        crate::CaptureError::io(what, self.process.pid)
    }
}
