//! What an operation did and how long each phase of it took.

use std::time::{Duration, Instant};

use serde::Serialize;

/// One phase of an operation.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Its name: `freeze`, `capture`, `memory`, …
    pub name: &'static str,
    /// Microseconds from the start of the operation to the phase's start.
    pub start_us: u64,
    /// Microseconds it took.
    pub duration_us: u64,
}

/// Phases with their times, and counts of what was moved.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    #[serde(skip)]
    started: Instant,
    /// The phases in order.
    pub phases: Vec<Phase>,
    /// Processes, zombies included.
    pub processes: usize,
    /// Threads.
    pub threads: usize,
    /// Open file descriptions.
    pub descriptions: usize,
    /// Mappings.
    pub mappings: usize,
    /// Bytes of page data stored or loaded.
    pub page_bytes: u64,
    /// Microseconds the tree did not run (checkpoint), as far as known.
    pub frozen_us: Option<u64>,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            phases: Vec::new(),
            processes: 0,
            threads: 0,
            descriptions: 0,
            mappings: 0,
            page_bytes: 0,
            frozen_us: None,
        }
    }
}

fn microseconds(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

impl Report {
    /// Runs `work` as the phase `name`.
    pub fn phase<T>(&mut self, name: &'static str, work: impl FnOnce(&mut Self) -> T) -> T {
        let begun = Instant::now();
        let start_us = microseconds(begun - self.started);
        let result = work(self);
        self.phases.push(Phase { name, start_us, duration_us: microseconds(begun.elapsed()) });
        tracing::debug!(phase = name, us = microseconds(begun.elapsed()), "phase done");
        result
    }

    /// Microseconds since the operation started.
    pub fn elapsed_us(&self) -> u64 {
        microseconds(self.started.elapsed())
    }

    /// How long the phase `name` took, in microseconds.
    pub fn duration_us(&self, name: &str) -> Option<u64> {
        self.phases.iter().find(|phase| phase.name == name).map(|phase| phase.duration_us)
    }
}
