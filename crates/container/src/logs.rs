//! What a container has written.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use limosa_kernel::spawn::wait_for_end;
use limosa_kernel::task::pidfd_open;

use crate::config::Name;
use crate::registry::{Registry, RegistryError};

/// How often a growing log is looked at.
pub(crate) const INTERVAL: Duration = Duration::from_millis(50);

/// Copies the log of the container `name` to `output`; with `follow`, until the container ends. An `output`
/// that nobody reads any more (a closed pipe) ends it without an error.
pub fn copy_log(
    registry: &Registry,
    name: &Name,
    follow: bool,
    output: &mut impl Write,
) -> Result<(), LogsError> {
    let record = registry.load(name)?;
    let path = registry.paths(name).log();
    let copied: io::Result<()> = (|| {
        let mut log = File::open(&path)?;
        copy_new(&mut log, output)?;
        if let Some(pid) = record.running().filter(|_| follow)
            && let Ok(pidfd) = pidfd_open(pid)
        {
            while record.running().is_some() && !wait_for_end(&pidfd, INTERVAL).map_err(io::Error::other)? {
                copy_new(&mut log, output)?;
            }
            copy_new(&mut log, output)?;
        }
        Ok(())
    })();
    match copied {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|source| LogsError::Copy { path, source }),
    }
}

/// Copies what `log` has more than was read from it.
pub(crate) fn copy_new(log: &mut File, output: &mut impl Write) -> io::Result<()> {
    if io::copy(log, output)? > 0 { output.flush() } else { Ok(()) }
}

/// A log could not be shown.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// The container.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The file.
    #[error("cannot copy the log {}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
