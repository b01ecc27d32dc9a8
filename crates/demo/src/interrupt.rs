//! Ctrl-C and the like.

use std::cell::Cell;

use anyhow::Result;
use limosa_kernel::signals::Signals;
use rustix::process::Signal;

/// Somebody wants the demo to end.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Ctrl-C and the like, seen only where they are looked for.
#[derive(Debug)]
pub struct Interrupt {
    signals: Signals,
    came: Cell<bool>,
}

impl Interrupt {
    /// From now on; before any thread is started.
    pub fn new() -> Result<Self> {
        let wanted = [Signal::INT, Signal::TERM, Signal::HUP].map(Signal::as_raw);
        Ok(Self { signals: Signals::gather(&wanted)?, came: Cell::new(false) })
    }

    /// Fails, as [`Interrupted`], once a signal has come.
    pub fn check(&self) -> Result<()> {
        if self.signals.next().is_some() {
            self.came.set(true);
        }
        if self.came.get() { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// What has come so far is forgotten: the cleaning up is not interrupted.
    pub fn forget(&self) {
        while self.signals.next().is_some() {}
        self.came.set(false);
    }
}
