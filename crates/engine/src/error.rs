//! The errors of the two operations, and refusals: what a checkpoint cannot carry.

use std::fmt;

use limosa_archive::LayerError;
use limosa_image::{OpenError, ReadError, WriteError};
use limosa_puppet::{ArenaError, ProgramError, ResidentError, VisitError};
use serde::Serialize;

/// What a refusal is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The process or thread as a whole.
    Process,
    /// A descriptor: its number and what `/proc/PID/fd` says of it.
    Descriptor {
        /// Number in the process.
        number: i32,
        /// The link's text.
        link: String,
    },
    /// A descriptor that is only in flight.
    InFlight {
        /// The number of the socket that holds the message, or a message with a socket that does, and so on.
        socket: i32,
        /// What `/proc/PID/fd` would say of it.
        link: String,
    },
    /// A mapping: its first address and name.
    Mapping {
        /// First address.
        start: u64,
        /// Path or name.
        name: String,
    },
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process => Ok(()),
            Self::Descriptor { number, link } => write!(f, ", descriptor {number} ({link})"),
            Self::InFlight { socket, link } => write!(f, ", in flight in descriptor {socket} ({link})"),
            Self::Mapping { start, name } => write!(f, ", mapping at {start:#x} ({name})"),
        }
    }
}

/// Something that Limosa cannot carry, found before anything was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("process {pid}{subject}: {reason}; {remedy}")]
pub struct Refusal {
    /// The process, as seen from Limosa.
    pub pid: i32,
    /// What in it.
    pub subject: Subject,
    /// Why it cannot be carried.
    pub reason: String,
    /// What can be done about it.
    pub remedy: String,
}

impl Refusal {
    /// A refusal that concerns a whole process.
    pub fn process(pid: i32, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { pid, subject: Subject::Process, reason: reason.into(), remedy: remedy.into() }
    }

    /// A refusal that concerns a mapping.
    pub fn mapping(pid: i32, start: u64, name: String, reason: &str, remedy: &str) -> Self {
        Self { pid, subject: Subject::Mapping { start, name }, reason: reason.into(), remedy: remedy.into() }
    }
}

/// Everything that the pre-flight found; nothing was frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusals(pub Vec<Refusal>);

impl Refusals {
    /// An error if there is any.
    pub fn check(refusals: Vec<Refusal>) -> Result<(), Self> {
        if refusals.is_empty() { Ok(()) } else { Err(Self(refusals)) }
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = self.0.as_slice() {
            return only.fmt(f);
        }
        write!(f, "{} things cannot be carried:", self.0.len())?;
        self.0.iter().try_for_each(|refusal| write!(f, "\n  {refusal}"))
    }
}

impl std::error::Error for Refusals {}

/// Why a checkpoint failed. The processes go on in every case.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A kernel operation failed.
    #[error(transparent)]
    Kernel(#[from] limosa_kernel::Error),
    /// Asking a thread failed.
    #[error(transparent)]
    Visit(#[from] VisitError),
    /// The guardian over the end of several processes could not be made.
    #[error("preparing to end the source")]
    Guardian(#[from] ResidentError),
    /// A question to a process was answered with an error.
    #[error("asking process {pid}: {source}")]
    Question {
        /// The process.
        pid: i32,
        /// Which question.
        #[source]
        source: ProgramError,
    },
    /// A file or descriptor operation of Limosa's own failed.
    #[error("{what} of process {pid}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The checkpoint could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The content of a memory filesystem could not be read.
    #[error("storing what is in {path}")]
    Archive {
        /// Where it is mounted.
        path: String,
        /// Which file, and why.
        #[source]
        source: LayerError,
    },
    /// Something cannot be carried.
    #[error(transparent)]
    Refused(#[from] Box<Refusal>),
    /// The tree did not come to rest.
    #[error(
        "process tree {root} keeps making processes or threads faster than they can be stopped; try again"
    )]
    Unstable {
        /// Root of the tree.
        root: i32,
    },
    /// The memory of a process could not be read from its twin.
    #[error(
        "storing the memory of process {pid} from its twin, which is the first to lose its memory where that is short, as in a \
         full control group: give it more, or store its memory while it is frozen (--mode stop)"
    )]
    Twin {
        /// The process.
        pid: i32,
        /// What was tried, and the kernel's answer.
        #[source]
        source: Box<CaptureError>,
    },
    /// A process ended while it was being frozen.
    #[error("process {pid} ended while it was being frozen; try again")]
    Ended {
        /// The process.
        pid: i32,
    },
}

impl From<Refusal> for CaptureError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl CaptureError {
    /// An error of an operation of Limosa's own on behalf of `pid`.
    pub fn io(what: &'static str, pid: i32) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Io { what, pid, source: errno.into() }
    }
}

/// Why a restore failed. Everything that it made is gone in every case.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A kernel operation failed.
    #[error(transparent)]
    Kernel(#[from] limosa_kernel::Error),
    /// A puppet could not be made or did not do what it was told.
    #[error(transparent)]
    Puppet(#[from] ResidentError),
    /// The shared memory could not be had.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The checkpoint could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The checkpoint could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The checkpoint says something impossible.
    #[error("the checkpoint is inconsistent: {what}; it was damaged, or written by a program with a fault")]
    Inconsistent {
        /// What does not fit.
        what: String,
    },
    /// A file that the tree needs is missing or another one here.
    #[error("{path}: {reason}; give restore the filesystem that was checkpointed")]
    File {
        /// Its path, as the processes see it.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// An object could not be rebuilt.
    #[error("rebuilding {object}: {step}: {source}")]
    Rebuild {
        /// The object, for a person.
        object: String,
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The content of a memory filesystem could not be put back.
    #[error("filling {path}")]
    Archive {
        /// Where it is mounted.
        path: String,
        /// Which file, and why.
        #[source]
        source: LayerError,
    },
    /// A process ID that the tree needs is taken.
    #[error("process ID {pid} is taken here; end that process, or restore into a PID namespace of its own")]
    PidTaken {
        /// The ID.
        pid: i32,
    },
    /// The processor lacks what the tree needs.
    #[error("this processor does not have {missing}: {why}; {remedy}")]
    Processor {
        /// The features, in the spelling of `/proc/cpuinfo`.
        missing: String,
        /// What needs them.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Something in the checkpoint is not supported.
    #[error("{what} cannot be restored here: {why}")]
    Unsupported {
        /// What.
        what: String,
        /// Why, and what to do.
        why: String,
    },
}

impl RestoreError {
    /// A contradiction in the checkpoint.
    pub fn inconsistent(what: impl Into<String>) -> Self {
        Self::Inconsistent { what: what.into() }
    }

    /// An operation on behalf of an object failed.
    pub fn rebuild(object: impl Into<String>, step: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        let object = object.into();
        move |errno| Self::Rebuild { object, step, source: errno.into() }
    }
}
