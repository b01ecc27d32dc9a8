//! A checkpoint while it is written or read: its progress on a terminal, and Ctrl-C.
//!
//! SIGINT and SIGTERM are held back and looked at between writes. The write that follows one fails, and so everything
//! is undone in good order: the unfinished directory is removed, the source runs on. Once the checkpoint is being
//! committed it is too late; SIGQUIT and SIGKILL always work, and what they leave the next checkpoint of the same
//! name removes. A restore looks for them likewise between reads, and ends what it had built.

use std::io::{self, IsTerminal, Read};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_image::{Checkpoint, Sink, SpaceId, Stage, WriteError};
use limosa_kernel::signals::Signals;

use crate::context::Failure;

const SIGINT: i32 = rustix::process::Signal::INT.as_raw();
const SIGTERM: i32 = rustix::process::Signal::TERM.as_raw();
/// What takes less time needs no progress.
const PATIENCE: Duration = Duration::from_secs(1);

/// Writes into another sink, and watches.
pub struct Watched<'a> {
    sink: &'a mut dyn Sink,
    signals: Option<&'static Signals>,
    interrupted: Option<i32>,
    bytes: u64,
    stage: Option<Stage>,
    begun: Instant,
    bar: Option<ProgressBar>,
}

/// Holds back the signals that interrupt until the program ends; to be called before there is anything to remove.
/// Without the descriptor they end the program as they always do.
pub fn hold_back() -> Option<&'static Signals> {
    // Given back, the signals would end the program between the commit and its report.
    Signals::gather(&[SIGINT, SIGTERM]).ok().map(|signals| &*Box::leak(Box::new(signals)))
}

impl<'a> Watched<'a> {
    /// Watches what is written into `sink`, until one of `signals` comes.
    pub fn new(sink: &'a mut dyn Sink, signals: Option<&'static Signals>) -> Self {
        Self { sink, signals, interrupted: None, bytes: 0, stage: None, begun: Instant::now(), bar: None }
    }

    /// What came of the writing, unless a signal has come: then everything is undone.
    pub fn conclude<T, E: Into<anyhow::Error>>(mut self, outcome: Result<T, E>) -> Result<T, Failure> {
        match self.interrupted() {
            Some(signal) => {
                let error = anyhow::anyhow!("interrupted: nothing was written, and the source runs on");
                Err(Failure::with_code(128 + signal as u8, error))
            }
            None => Ok(outcome?),
        }
    }

    /// The signal that has come, if one has.
    fn interrupted(&mut self) -> Option<i32> {
        self.interrupted = self.interrupted.or_else(|| self.signals.and_then(Signals::next));
        self.interrupted
    }

    fn check(&mut self) -> Result<(), WriteError> {
        self.interrupted().map_or(Ok(()), |signal| Err(WriteError::Interrupted { signal }))
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bar.is_none() && self.begun.elapsed() > PATIENCE && io::stderr().is_terminal() {
            self.bar = Some(bar(None));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.bytes);
            bar.set_message(match self.stage {
                Some(Stage::Round { number, .. }) => format!(", running, round {number}"),
                Some(Stage::Frozen) => ", frozen".into(),
                None => String::new(),
            });
        }
    }
}

/// A live line: of so many bytes, or of who knows how many.
fn bar(total: Option<u64>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    let template = match total {
        Some(_) => "{spinner} {bytes} of {total_bytes} read, {bytes_per_sec} ({elapsed})",
        None => "{spinner} {bytes} written, {bytes_per_sec} ({elapsed}{msg})",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// A checkpoint while it is read.
pub struct Reading {
    signals: Option<&'static Signals>,
    /// The signal that has come; 0 before.
    interrupted: AtomicI32,
    bytes: AtomicU64,
    total: u64,
    begun: Instant,
    bar: OnceLock<ProgressBar>,
}

impl Reading {
    /// Watches the reading of `checkpoint` until one of `signals` comes.
    pub fn watch(checkpoint: Checkpoint, signals: Option<&'static Signals>) -> (Checkpoint, Arc<Self>) {
        let reading = Arc::new(Self {
            signals,
            interrupted: AtomicI32::new(0),
            bytes: AtomicU64::new(0),
            total: checkpoint.content_bytes(),
            begun: Instant::now(),
            bar: OnceLock::new(),
        });
        let told = Arc::clone(&reading);
        (checkpoint.watched(Arc::new(move |bytes| told.add(bytes))), reading)
    }

    fn add(&self, bytes: u64) -> Option<i32> {
        let bytes = bytes + self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if self.begun.elapsed() > PATIENCE && io::stderr().is_terminal() {
            self.bar.get_or_init(|| bar(Some(self.total))).set_position(bytes);
        }
        self.interrupted()
    }

    /// The signal that has come, if one has.
    fn interrupted(&self) -> Option<i32> {
        if let Some(signal) = self.signals.and_then(Signals::next) {
            self.interrupted.store(signal, Ordering::Relaxed);
        }
        Some(self.interrupted.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
    }

    /// What came of the restore, which does not run yet, unless a signal has come: then all of it ends.
    pub fn conclude<T, E: Into<anyhow::Error>>(&self, outcome: Result<T, E>) -> Result<T, Failure> {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
        match self.interrupted() {
            Some(signal) => {
                drop(outcome);
                let error = anyhow::anyhow!("interrupted: nothing was restored");
                Err(Failure::with_code(128 + signal as u8, error))
            }
            None => Ok(outcome.map_err(Into::into)?),
        }
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Sink for Watched<'_> {
    fn state(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        self.check()?;
        self.sink.state(name, cbor)
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        self.check()?;
        self.add(data.len() as u64);
        self.sink.pages(space, start, data)
    }

    fn stage(&mut self, stage: Stage) {
        self.stage = Some(stage);
        self.sink.stage(stage);
    }

    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        self.check()?;
        self.sink.forget(space, start, length)
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        self.check()?;
        let mut content = Interruptible { content, signals: self.signals, interrupted: None };
        let stored = self.sink.blob(name, &mut content);
        if let Some(signal) = content.interrupted {
            self.interrupted = Some(signal);
            return Err(WriteError::Interrupted { signal });
        }
        self.add(*stored.as_ref().unwrap_or(&0));
        stored
    }
}

/// A stream that fails once a signal has come.
struct Interruptible<'a> {
    content: &'a mut dyn Read,
    signals: Option<&'a Signals>,
    interrupted: Option<i32>,
}

impl Read for Interruptible<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.interrupted = self.interrupted.or_else(|| self.signals.and_then(Signals::next));
        match self.interrupted {
            // Not `ErrorKind::Interrupted`, which readers take as a request to try again.
            Some(_) => Err(io::Error::other("interrupted by a signal")),
            None => self.content.read(buffer),
        }
    }
}
