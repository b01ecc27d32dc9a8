//! What is told while a migration goes on.

use std::time::Duration;

/// Where a migration is, on either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Agreeing on a version and on the offer.
    Negotiating,
    /// Memory is on its way while the source runs.
    Copying,
    /// The source is frozen, and the rest of the checkpoint is on its way.
    Sending,
    /// The destination's side of both.
    Receiving,
    /// The destination builds.
    Preparing,
    /// Ownership is handed over.
    HandingOver,
    /// The connection is gone; the outcome is asked for.
    Settling,
    /// Over.
    Over,
}

/// What a connection has carried so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Bytes sent, before encryption, with frame headers.
    pub bytes_sent: u64,
    /// Messages sent, heartbeats included.
    pub messages_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Messages received.
    pub messages_received: u64,
    /// The shortest round trip of a heartbeat so far.
    pub round_trip: Option<Duration>,
}

/// One report to a [`Watch`].
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// The connection's counters.
    pub counters: Counters,
    /// In [`Phase::Copying`]: how many times now, from 1; and how many bytes had been written again when it began.
    pub round: Option<(u32, Option<u64>)>,
}

/// Who wants to know: called when the phase changes and about every mebibyte; it should return quickly.
pub type Watch<'a> = Box<dyn FnMut(&Progress) + Send + 'a>;

/// A watch that does nothing.
pub fn unwatched() -> Watch<'static> {
    Box::new(|_| {})
}
