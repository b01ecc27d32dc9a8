//! The protocol between two engines: a checkpoint is moved, and with it the ownership of a running container.
//!
//! This crate knows no process: the source feeds an [`Outgoing`], which is a `limosa_image::Sink`, and the destination
//! is whatever implements [`Destination`]. `docs/protocol.md` gives the protocol byte by byte, its state machine, and
//! who runs after a cut at any message.
//!
//! ```text
//!  source                                   destination
//!    │ <───────────── Hello ─────────────────> │
//!    │ Offer ────────────────────────────────> │ preflight
//!    │ <──────────────────── Accept or Refuse │
//!    │ freezes                                 │
//!    │ State*, Pages*, Blob*, End ───────────> │ stages, then builds
//!    │ <───────────────────── Ready or Failed │
//!    │ records, seals                          │
//!    │ HandOver ─────────────────────────────> │ records, starts, records
//!    │ <──────────────── Started or NotStarted │
//!    │ records                                 │
//!    │ Done ─────────────────────────────────> │
//! ```
//!
//! | module | what |
//! | --- | --- |
//! | [`frame`], [`message`], [`version`] | what is on the wire |
//! | [`transport`] | byte streams: ssh, TLS with a ticket, descriptors |
//! | [`outgoing`], [`incoming`] | the two sides, their phases as types |
//! | [`outcome`], [`record`] | what is remembered, and asked for after a cut |

mod address;
mod content;
pub mod frame;
mod id;
pub mod incoming;
mod limits;
mod link;
mod listen;
pub mod message;
pub mod outcome;
pub mod outgoing;
mod progress;
pub mod record;
mod session;
mod ssh;
mod ticket;
mod tls;
mod totals;
pub mod transport;
pub mod version;
mod word;

pub use address::{Address, AddressError, ConnectError};
pub use content::ContentError;
pub use id::{IdError, MigrationId};
pub use incoming::{Destination, Note, ReceiveError, Received, receive};
pub use limits::Limits;
pub use link::LinkError;
pub use listen::{Heir, HeirError, Legacy, ListenError, ListenOptions, Listener};
pub use message::{Layer, Offer, Refusal, StartReport};
pub use outcome::{Connect, Outcome, Purpose, SettleError, excuse, settle};
pub use outgoing::{FinishError, HandOverError, NegotiateError, Outgoing};
pub use progress::{Counters, Phase, Progress, Watch, unwatched};
pub use record::{Remains, Store};
pub use session::PeerError;
pub use ssh::{REMOTE_VARIABLE, SSH_VARIABLE};
pub use ticket::{Ticket, TicketError};
pub use transport::Transport;
pub use word::{MAX_WORD, Word, WordError};
