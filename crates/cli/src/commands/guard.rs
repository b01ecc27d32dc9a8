//! The guard of a container that is being moved: a process of its own that does what a killed Limosa cannot.
//!
//! ```text
//!   limosa migrate ── starts ──► limosa guard ── reads its standard input …
//!        │ ends: a word ─────────────────────────────► ends, too
//!        └ is killed: no word, end of file ──────────► removes what was not finished; asks for the outcome of a migration
//!                                                      and acts on it; connects a container that runs
//! ```

use std::io::{self, Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use limosa_container::{Name, migration};
use limosa_migrate::Outcome as MigrationOutcome;

use super::migrate::store;
use crate::context::{Context, Outcome};

/// For how long a guard asks for an outcome. After that the destination's answer would have to be asked for elsewhere.
const PATIENCE: Duration = Duration::from_hours(1);

/// Clean up after the limosa that started this, should that be killed.
#[derive(Debug, Args)]
pub struct Guard {
    /// The container that is being moved or restored.
    #[arg(long)]
    container: Option<Name>,
}

impl Guard {
    /// Waits for the word, or for the end of whoever could say it.
    pub fn execute(self, context: &Context) -> Outcome {
        // A terminal's signals are not for this process. Leads a session already: as good.
        let _ = rustix::process::setsid();
        let mut word = [0];
        loop {
            match io::stdin().lock().read(&mut word) {
                Ok(0) => break,
                Ok(_) => return Ok(ExitCode::SUCCESS),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        context.registry().sweep()?;
        if let Some(container) = &self.container {
            settle(context, container)?;
            connect(context, container)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Settles what is open about the container.
fn settle(context: &Context, container: &Name) -> anyhow::Result<()> {
    let (registry, store, begun) = (context.registry(), store(context)?, Instant::now());
    loop {
        let mut unknown = false;
        for record in store.unsettled()?.iter().filter(|record| record.container == container.as_str()) {
            let outcome = migration::settle(&registry, &store, record)?;
            unknown |= matches!(outcome, MigrationOutcome::Unknown { .. });
        }
        if !unknown || begun.elapsed() > PATIENCE {
            return Ok(());
        }
    }
}

/// Connects the container again, or at last, if it runs and no outcome is open.
fn connect(context: &Context, container: &Name) -> anyhow::Result<()> {
    let open = store(context)?.unsettled()?.iter().any(|record| record.container == container.as_str());
    match context.registry().load(container) {
        Ok(record) if record.running().is_some() && !open => Ok(record.connect()?),
        _ => Ok(()),
    }
}

/// A guard that waits. Dropped, it is told that it is not needed.
#[derive(Debug)]
pub struct Posted(Child);

impl Posted {
    /// Starts a guard; `container` is what is about to be moved, if that is known.
    pub fn new(context: &Context, container: Option<&Name>) -> anyhow::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("--state-dir").arg(&context.state_dir).arg("guard");
        if let Some(container) = container {
            command.arg("--container").arg(container.as_str());
        }
        // Whoever reads what this program writes is not to wait for the guard.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        #[cfg(feature = "fault")]
        command.env_remove("LIMOSA_KILL_AT").env_remove("LIMOSA_PASSED_FILE");
        command.spawn().map(Self).context("starting a guard of the container")
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        if let Some(mut input) = self.0.stdin.take() {
            let _ = input.write_all(b".");
        }
        let _ = self.0.wait();
    }
}
