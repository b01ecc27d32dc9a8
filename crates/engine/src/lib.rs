//! Checkpoint and restore of process trees.
//!
//! [`checkpoint`] and [`restore`] tell the story in one page each; `resources` has one room for each kind of
//! kernel object: what it is in a checkpoint, how it is captured, how it is rebuilt.

pub mod check;
pub mod checkpoint;
mod error;
mod flight;
mod freeze;
mod guardian;
mod listeners;
pub mod memory;
mod memory_mode;
mod memory_room;
pub mod network;
mod peers;
mod pieces;
mod plan;
mod precopy;
pub mod preflight;
mod report;
pub mod resources;
pub mod restore;
mod sharing;
pub mod state;
pub mod summary;
pub mod twin;
mod view;
mod visits;

pub use error::{CaptureError, Refusal, Refusals, RestoreError, Subject};
pub use freeze::Frozen;
pub use memory_mode::{MemoryMode, Mode};
pub use precopy::Round;
pub use report::{Phase, Report, Times, TraceEvent};
pub use view::{DescriptionView, Place, ProcessView, ThreadView};
