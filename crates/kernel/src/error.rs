//! The one error of this crate: which kernel operation failed, on what, and why.

use std::fmt::Display;
use std::io;

/// A kernel operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} on {object}: {source}")]
pub struct Error {
    /// The system call or file operation, as its manual page names it: `ptrace(PTRACE_SEIZE)`.
    pub operation: &'static str,
    /// What it was done to: `process 42`, `/proc/42/maps`, `descriptor 7`.
    pub object: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl Error {
    /// An error of `operation` on `object` with the given cause.
    pub fn new(operation: &'static str, object: impl Display, source: impl Into<io::Error>) -> Self {
        Self { operation, object: object.to_string(), source: source.into() }
    }

    /// The error that the calling thread's `errno` names.
    pub fn last(operation: &'static str, object: impl Display) -> Self {
        Self::new(operation, object, io::Error::last_os_error())
    }

    /// Input that a parser did not understand: an `InvalidData` error with the reason.
    pub fn malformed(operation: &'static str, object: impl Display, why: impl Into<String>) -> Self {
        Self::new(operation, object, io::Error::new(io::ErrorKind::InvalidData, why.into()))
    }

    /// The `errno` value, where the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// Whether the process or thread is simply no longer there (`ESRCH`, or `ENOENT` under `/proc`).
    pub fn is_gone(&self) -> bool {
        matches!(self.errno(), Some(libc::ESRCH | libc::ENOENT))
    }
}

/// The result of a kernel operation.
pub type Result<T> = std::result::Result<T, Error>;
