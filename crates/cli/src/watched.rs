//! A checkpoint while it is written: its progress on a terminal, and Ctrl-C.
//!
//! SIGINT and SIGTERM are held back and looked at between writes. The write that follows one fails, and so everything
//! is undone in good order: the unfinished directory is removed, the source runs on. Once the checkpoint is being
//! committed it is too late; SIGQUIT and SIGKILL always work, and what they leave the next checkpoint of the same
//! name removes.

use std::io::{self, IsTerminal, Read};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_image::{Sink, SpaceId, WriteError};
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
        Self { sink, signals, interrupted: None, bytes: 0, begun: Instant::now(), bar: None }
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
            self.bar = Some(bar());
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.bytes);
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bytes} written, {bytes_per_sec} ({elapsed})")
    {
        bar.set_style(style);
    }
    bar
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
