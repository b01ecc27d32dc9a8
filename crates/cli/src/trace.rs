//! `--trace FILE`: the phases of an operation for Perfetto and `chrome://tracing`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use limosa_engine::Report;

/// The option.
#[derive(Debug, Args)]
pub struct Trace {
    /// Write the phases to FILE as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.
    #[arg(long = "trace", value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Trace {
    /// Finds out, before anything is done, whether the file can be written.
    pub fn prepare(&self) -> anyhow::Result<()> {
        if let Some(path) = &self.file {
            File::create(path).with_context(|| format!("writing the trace {}", path.display()))?;
        }
        Ok(())
    }

    /// Writes the trace. The operation is done: that its trace cannot be written is no reason to fail.
    pub fn write(&self, report: &Report) {
        let Some(path) = &self.file else { return };
        let written = File::create(path).and_then(|file| {
            let mut file = BufWriter::new(file);
            serde_json::to_writer(&mut file, &report.trace())?;
            file.flush()
        });
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "the trace could not be written");
        }
    }
}
