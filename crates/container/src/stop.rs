//! Ending a container, and removing what is left of it.

use std::time::Duration;

use limosa_kernel::spawn::wait_for_end;
use limosa_kernel::task::pidfd_open;
use rustix::process::{Signal, pidfd_send_signal};

use crate::cgroup::CgroupError;
use crate::config::Name;
use crate::link;
use crate::registry::{Record, Registry, RegistryError};

/// How long a killed container may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Ends the container `name`: asks its first process with `SIGTERM`, kills it after `timeout`, and takes
/// away its interface and control groups. Its files stay. A container that does not run is only tidied up.
///
/// PID 1 of a PID namespace ignores signals that it has no handler for: a command without one, such as
/// `sleep`, takes the whole timeout.
pub fn stop(registry: &Registry, name: &Name, timeout: Duration) -> Result<(), StopError> {
    let record = registry.load(name)?;
    end(&record, timeout)?;
    tidy(&record)
}

/// Removes the container `name` with its writable layer and log. It must not run, unless `force` is given:
/// then it is killed first, and a damaged record is no obstacle. One that a killed Limosa never finished is swept.
pub fn remove(registry: &Registry, name: &Name, force: bool) -> Result<(), StopError> {
    match registry.load(name) {
        Err(RegistryError::Unknown { .. }) if registry.paths(name).directory().exists() => {
            registry.sweep()?;
            // What is still there is being made just now, by somebody else.
            return match registry.load(name) {
                Err(RegistryError::Unknown { .. }) if !registry.paths(name).directory().exists() => Ok(()),
                Err(error) => Err(error.into()),
                Ok(_) => remove(registry, name, force),
            };
        }
        Ok(record) => {
            if force {
                end(&record, Duration::ZERO)?;
            } else if let Some(pid) = record.running() {
                return Err(StopError::Running { name: name.clone(), pid });
            }
            tidy(&record)?;
        }
        Err(RegistryError::Malformed { .. } | RegistryError::Version { .. } | RegistryError::Io { .. })
            if force => {}
        Err(error) => return Err(error.into()),
    }
    Ok(registry.remove(name)?)
}

fn end(record: &Record, timeout: Duration) -> Result<(), StopError> {
    let Some(pid) = record.running() else { return Ok(()) };
    let error = |source| StopError::Signal { name: record.config.name.clone(), pid, source };
    let pidfd = match pidfd_open(pid) {
        Err(source) if source.is_gone() => return Ok(()),
        result => result.map_err(error)?,
    };
    // Between reading the record and opening the descriptor the PID may have become another process's.
    if record.running().is_none() {
        return Ok(());
    }
    let send = |signal| match pidfd_send_signal(&pidfd, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(error(limosa_kernel::Error::new("pidfd_send_signal", pid, errno))),
    };
    if !timeout.is_zero() {
        send(Signal::TERM)?;
        if wait_for_end(&pidfd, timeout).map_err(error)? {
            return Ok(());
        }
    }
    send(Signal::KILL)?;
    if wait_for_end(&pidfd, KILL_TIMEOUT).map_err(error)? {
        Ok(())
    } else {
        Err(StopError::Unkillable { name: record.config.name.clone(), pid })
    }
}

/// Takes away what outlives a container's processes.
fn tidy(record: &Record) -> Result<(), StopError> {
    if let Some(host_link) = &record.host_link {
        link::delete(host_link);
    }
    record.cgroup.remove().map_err(|source| StopError::Cgroup { name: record.config.name.clone(), source })
}

/// A container could not be ended or removed.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Its name or files.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It runs.
    #[error(
        "container {name} runs as process {pid}: stop it first with `limosa stop {name}`, or use --force"
    )]
    Running {
        /// Its name.
        name: Name,
        /// Its first process.
        pid: i32,
    },
    /// Its first process could not be signalled.
    #[error("cannot end container {name}, whose first process is {pid}")]
    Signal {
        /// Its name.
        name: Name,
        /// Its first process.
        pid: i32,
        /// Why.
        #[source]
        source: limosa_kernel::Error,
    },
    /// Its first process does not end although it was killed.
    #[error(
        "container {name} does not end: process {pid} was killed but is held in the kernel, perhaps by a hanging disk, or by a tracer"
    )]
    Unkillable {
        /// Its name.
        name: Name,
        /// Its first process.
        pid: i32,
    },
    /// Its control groups could not be removed.
    #[error("cannot remove the control groups of container {name}")]
    Cgroup {
        /// Its name.
        name: Name,
        /// Why.
        #[source]
        source: CgroupError,
    },
}
