//! How the memory of a tree is captured, and why so: decided before anything is frozen.

use std::fmt;

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
}

impl fmt::Display for MemoryMode {
    /// `twin: 1024 MiB are stored while the source runs on`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Stop => "stop",
            Mode::Twin => "twin",
        };
        write!(f, "{mode}: {}", self.reason)
    }
}

/// With less memory, in bytes, twins do not pay: it is stored in a few milliseconds.
const WORTH_TWINS: u64 = 16 << 20;
const PAGE: u64 = 4096;

/// How memory is captured, and why so.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemoryMode {
    /// How.
    pub mode: Mode,
    /// Why.
    #[serde(rename = "mode_reason")]
    pub reason: String,
}

impl MemoryMode {
    /// What was asked for, or what is best for the tree rooted at process `root`.
    pub fn choose(asked: Option<Mode>, root: i32, leaves_running: bool) -> Self {
        let chosen = |mode, reason| Self { mode, reason };
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

/// Bytes of memory that the tree has, about; it may change meanwhile.
fn resident(root: i32) -> u64 {
    let tree = preflight::members(root).unwrap_or_default();
    let pages = tree.iter().filter_map(|member| u64::try_from(member.proc.stat().ok()?.resident).ok());
    pages.sum::<u64>() * PAGE
}
