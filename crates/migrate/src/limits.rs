//! How long a side waits, and for what.

use std::time::Duration;

/// Bounds on waiting and on size. Both sides have their own; the destination tells the source the ones that bind it.
#[derive(Debug, Clone)]
pub struct Limits {
    /// To establish a connection (TCP, TLS, the ticket's proof).
    pub connect: Duration,
    /// For the other side's `Hello`.
    pub hello: Duration,
    /// A side that has sent nothing for this long sends a heartbeat.
    pub heartbeat: Duration,
    /// A connection on which nothing at all arrived for this long is dead. Several heartbeats.
    pub silence: Duration,
    /// A peer that is alive but takes none of what is being sent for this long is stuck.
    pub stall: Duration,
    /// For the answer to the offer: what the destination's preflight may take.
    pub answer: Duration,
    /// For the next content message, while the source lives but sends none.
    pub content: Duration,
    /// For `Ready` after everything was sent: what building may take. The source is frozen all the while.
    pub ready: Duration,
    /// For `HandOver` after `Ready`: then the destination gives up, and records that it never started.
    pub hand_over: Duration,
    /// For `Started` after `HandOver`, on the same connection; after that the source asks on a new one.
    pub started: Duration,
    /// For the outcome after a cut: then the source stays frozen and tells its user.
    pub outcome: Duration,
    /// The longest piece of state that a destination takes, in bytes.
    pub max_state: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            hello: Duration::from_secs(20),
            heartbeat: Duration::from_secs(2),
            silence: Duration::from_secs(15),
            stall: Duration::from_mins(1),
            answer: Duration::from_mins(1),
            content: Duration::from_mins(10),
            ready: Duration::from_mins(5),
            hand_over: Duration::from_secs(30),
            started: Duration::from_mins(1),
            outcome: Duration::from_mins(5),
            max_state: 1 << 30,
        }
    }
}
