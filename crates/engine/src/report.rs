//! What an operation did and how long each phase of it took.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::memory_mode::MemoryMode;
use crate::precopy::Round;

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
    /// How memory was captured, at a checkpoint.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryMode>,
    /// The rounds in which memory was stored while the source ran.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<Round>,
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
            memory: None,
            rounds: Vec::new(),
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

    /// Gives the last phase another name, when it has turned out what it was.
    pub(crate) fn rename_last(&mut self, name: &'static str) {
        if let Some(phase) = self.phases.last_mut() {
            phase.name = name;
        }
    }

    /// Microseconds since the operation started.
    pub fn elapsed_us(&self) -> u64 {
        microseconds(self.started.elapsed())
    }

    /// Microseconds from the start of the operation to the start of the phase `name`.
    pub fn start_us(&self, name: &str) -> Option<u64> {
        self.phases.iter().find(|phase| phase.name == name).map(|phase| phase.start_us)
    }

    /// Microseconds from the start of the operation to the end of the phase `name`.
    pub fn end_us(&self, name: &str) -> Option<u64> {
        let phase = self.phases.iter().find(|phase| phase.name == name)?;
        Some(phase.start_us + phase.duration_us)
    }

    /// Microseconds from the start of the operation until the last page was stored or loaded.
    pub fn last_page_us(&self) -> Option<u64> {
        let pages =
            self.phases.iter().filter(|phase| ["memory", "shared memory", "twins"].contains(&phase.name));
        pages.map(|phase| phase.start_us + phase.duration_us).max()
    }

    /// The phases as events of a Chrome trace: a JSON array of them is what Perfetto and `chrome://tracing` read.
    pub fn trace(&self) -> Vec<TraceEvent> {
        let process = std::process::id();
        let event = |phase: &Phase| TraceEvent {
            name: phase.name,
            kind: "X",
            start: phase.start_us,
            duration: phase.duration_us,
            process,
            thread: process,
        };
        self.phases.iter().map(event).collect()
    }

    /// How long the phase `name` took, in microseconds.
    pub fn duration_us(&self, name: &str) -> Option<u64> {
        self.phases.iter().find(|phase| phase.name == name).map(|phase| phase.duration_us)
    }
}

/// The five times of every report, in microseconds; none where an operation has no such time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Times {
    /// How long the tree did not run.
    pub freeze_us: Option<u64>,
    /// From the start until the checkpoint was complete on disk.
    pub durable_us: Option<u64>,
    /// From the start until the tree's first instruction.
    pub first_instruction_us: Option<u64>,
    /// From the start until the last page was stored or loaded.
    pub last_page_us: Option<u64>,
    /// The whole operation.
    pub whole_us: u64,
}

/// A complete event of the Trace Event Format (Chromium's `trace-event` document, phase `X`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TraceEvent {
    /// The phase.
    pub name: &'static str,
    /// `X`: an event with a duration.
    #[serde(rename = "ph")]
    pub kind: &'static str,
    /// Microseconds from the start of the operation.
    #[serde(rename = "ts")]
    pub start: u64,
    /// Microseconds.
    #[serde(rename = "dur")]
    pub duration: u64,
    /// Limosa's process ID.
    #[serde(rename = "pid")]
    pub process: u32,
    /// Its thread.
    #[serde(rename = "tid")]
    pub thread: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_become_events_and_the_last_page_is_the_last_phase_that_moves_pages() {
        let mut report = Report::default();
        let phase = |name, start_us, duration_us| Phase { name, start_us, duration_us };
        report.phases = vec![phase("memory", 10, 5), phase("shared memory", 15, 7), phase("state", 22, 1)];
        assert_eq!(report.last_page_us(), Some(22));
        let events = report.trace();
        assert_eq!(
            (events.len(), events[1].name, events[1].start, events[1].duration),
            (3, "shared memory", 15, 7)
        );
    }
}
