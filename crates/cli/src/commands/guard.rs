//! The guard of a container that is being moved, or of a tree that is being stored: a process of its own that does what a killed Limosa cannot.
//!
//! ```text
//!   limosa migrate ── starts ──► limosa guard ── reads its standard input …
//!        │ ends: a word ─────────────────────────────► ends, too
//!        └ is killed: no word, end of file ──────────► removes what was not finished; asks for the outcome of a migration
//!                                                      and acts on it; connects a container that runs; has processes
//!                                                      reap the twins of a checkpoint
//!
//!   limosa receive --listen: the same; and before that it leaves its socket and key to the guard ([`Word`]), which answers
//!                            a source that may come to ask
//! ```

use std::io;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use limosa_container::{Name, migration};
use limosa_engine::twin;
use limosa_migrate::{Heir, Limits, MigrationId, Note, Outcome as MigrationOutcome, Word};

use super::migrate::store;
use super::posted;
use crate::context::{Context, Outcome};

/// For how long a guard asks for an outcome. After that the destination's answer would have to be asked for elsewhere.
const PATIENCE: Duration = Duration::from_hours(1);

/// Clean up after the limosa that started this, should that be killed.
#[derive(Debug, Args)]
pub struct Guard {
    /// The container that is being moved or restored.
    #[arg(long)]
    container: Option<Name>,

    /// The container is being restored: one that is recorded and does not run was never started.
    #[arg(long, requires = "container")]
    restored: bool,

    /// The root of the process tree of which a checkpoint is being made.
    #[arg(long)]
    tree: Option<i32>,
}

impl Guard {
    /// Waits for the word, or for the end of whoever could say it.
    pub fn execute(self, context: &Context) -> Outcome {
        // A terminal's signals are not for this process. Leads a session already: as good.
        let _ = rustix::process::setsid();
        let (mut heir, mut asked) = (None, None);
        loop {
            match posted::hear(io::stdin())? {
                None => break,
                Some((Word::Ended, _)) => return Ok(ExitCode::SUCCESS),
                Some((Word::Legacy(legacy), socket)) => {
                    let socket = socket.context("what a receiver leaves, without its socket")?;
                    heir = Some(Heir::new(legacy, socket, Limits::default())?);
                }
                Some((Word::Note(Note::MayAsk(id)), _)) => asked = Some(id),
                Some((Word::Note(Note::Knows), _)) => asked = None,
            }
        }
        if let (Some(container), true) = (&self.container, self.restored) {
            // Before its name is free for others.
            migration::remains_of(&context.registry(), container)?;
        }
        // A failure to remove remains is no reason to leave the source without an answer.
        let reaped = self.root(context).map_or(Ok(()), twin::sweep);
        let swept = if self.tree.is_none() { context.registry().sweep_after_a_death() } else { Ok(()) };
        if let (Some(heir), Some(id)) = (heir, asked) {
            answer(context, &heir, id)?;
        }
        reaped?;
        swept?;
        if let Some(container) = &self.container {
            settle(context, container)?;
            connect(context, container)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Answers the source's questions in the place of the receiver that died.
fn answer(context: &Context, heir: &Heir, id: MigrationId) -> anyhow::Result<()> {
    let (registry, store) = (context.registry(), store(context)?);
    if !store.arrival(id)?.is_some_and(|record| record.acknowledged) {
        heir.answer(&store, |offer| migration::remains(&registry, offer).map_err(Into::into));
    }
    Ok(())
}

impl Guard {
    /// The root of the tree that is guarded, if it runs.
    fn root(&self, context: &Context) -> Option<i32> {
        let of = |name: &Name| context.registry().load(name).ok().and_then(|record| record.running());
        self.tree.or_else(|| self.container.as_ref().and_then(of))
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
