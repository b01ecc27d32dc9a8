//! What became of a container that went from here, for whoever has it in the foreground: it would only see it killed.
//!
//! A file in the container's directory. Who waits opens it, who ends the container writes into it before it does; so it
//! can be read when the directory is gone.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;

use crate::registry::Paths;

/// Longest text that is shown, in bytes.
const MOST: u64 = 4096;

/// Somebody's view of it.
#[derive(Debug)]
pub(crate) struct Fate(File);

impl Fate {
    /// Begins to watch.
    pub(crate) fn watch(paths: &Paths) -> io::Result<Self> {
        let mut options = File::options();
        Ok(Self(options.read(true).append(true).create(true).mode(0o600).open(paths.fate())?))
    }

    /// What became of it, if it is told.
    pub(crate) fn told(mut self) -> Option<String> {
        let mut text = String::new();
        self.0.seek(SeekFrom::Start(0)).ok()?;
        (&self.0).take(MOST).read_to_string(&mut text).ok()?;
        (!text.is_empty()).then_some(text)
    }

    /// Tells whoever watches.
    pub(crate) fn tell(paths: &Paths, text: &str) {
        let told = File::options()
            .append(true)
            .open(paths.fate())
            .and_then(|mut file| file.write_all(text.as_bytes()));
        match told {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "whoever has the container in the foreground is not told what became of it");
            }
            _ => {}
        }
    }
}
