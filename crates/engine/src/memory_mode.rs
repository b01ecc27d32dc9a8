//! How the memory of a tree is captured, and why so: decided before anything is frozen.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::preflight;

/// How memory is captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// While everything is frozen.
    #[default]
    Stop,
    /// Every process forks, and runs on while its twin is read. Only for a source that runs on.
    Twin,
    /// While everything runs, again and again what is written meanwhile; the rest while it is frozen.
    Precopy,
}

impl fmt::Display for MemoryMode {
    /// `twin: 1024 MiB are stored while the source runs on`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Stop => "stop",
            Mode::Twin => "twin",
            Mode::Precopy => "precopy",
        };
        write!(f, "{mode}: {}", self.reason)
    }
}

/// With less memory, in bytes, twins do not pay: it is stored in a few milliseconds.
const WORTH_TWINS: u64 = 16 << 20;
const PAGE: u64 = 4096;
/// With less memory, in bytes, rounds do not pay.
const WORTH_ROUNDS: u64 = 4 << 20;
/// How long the last part of a pre-copy may take, unless something else is asked for.
pub const GOAL: Duration = Duration::from_millis(10);

/// How memory is captured, and why so.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemoryMode {
    /// How.
    pub mode: Mode,
    /// Why.
    #[serde(rename = "mode_reason")]
    pub reason: String,
    /// With pre-copy: how long it may take to store what is left for the freeze.
    #[serde(skip)]
    pub goal: Duration,
}

impl MemoryMode {
    /// What was asked for, or what is best for the tree rooted at process `root`.
    pub fn choose(asked: Option<Mode>, root: i32, leaves_running: bool) -> Self {
        let chosen = |mode, reason| Self { mode, reason, goal: GOAL };
        if let Some(mode) = asked {
            return chosen(mode, "as asked".into());
        }
        if !leaves_running {
            return chosen(Mode::Stop, "the source ends and need not run on meanwhile".into());
        }
        let size = resident(root);
        if size < WORTH_TWINS {
            chosen(Mode::Stop, format!("{} MiB are stored in a moment", size >> 20))
        } else {
            chosen(Mode::Twin, format!("{} MiB are stored while the source runs on", size >> 20))
        }
    }
}

impl MemoryMode {
    /// For a migration of the tree rooted at `root`: what was asked for, or what is best for it. What is left of a pre-copy may
    /// take `goal`.
    pub fn for_migration(asked: Option<Mode>, root: i32, goal: Duration) -> Self {
        let size = resident(root);
        let (mode, reason) = match asked {
            Some(mode) => (mode, "as asked".into()),
            None if size < WORTH_ROUNDS => (Mode::Stop, format!("{} MiB are sent in a moment", size >> 20)),
            None => (Mode::Precopy, format!("{} MiB are sent while the container runs", size >> 20)),
        };
        Self { mode, reason, goal }
    }

    /// Stop, because of `why`.
    #[must_use]
    pub fn but(self, why: impl fmt::Display) -> Self {
        let reason = format!("{}; but {why}: memory is stored while everything is frozen", self.reason);
        Self { mode: Mode::Stop, reason, ..self }
    }
}

/// Bytes of memory that the tree has, about; it may change meanwhile.
fn resident(root: i32) -> u64 {
    let tree = preflight::members(root).unwrap_or_default();
    let pages = tree.iter().filter_map(|member| u64::try_from(member.proc.stat().ok()?.resident).ok());
    pages.sum::<u64>() * PAGE
}
