//! The beginning of every connection, and what can go wrong in any conversation.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::{Frame, FrameError, Kind};
use crate::limits::Limits;
use crate::link::{Link, LinkError};
use crate::message::{self, Hello, MessageError, Reason, printable};
use crate::transport::Transport;
use crate::version::{self, VersionRange};

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The program that carries the connection ended it, and said why.
    #[error("the destination was not reached: {said}")]
    Carrier {
        /// What it said, on standard error.
        said: String,
        /// How the connection ended.
        #[source]
        source: LinkError,
    },
    /// A message that cannot be read, or not be written.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// No common version.
    #[error(
        "the two sides have no version of the protocol in common: this one speaks {ours}, the other ({software}) \
         speaks {theirs}. Update the older one"
    )]
    NoCommonVersion {
        /// This side's range.
        ours: VersionRange,
        /// The other's.
        theirs: VersionRange,
        /// What the other calls itself.
        software: String,
    },
    /// A message out of order.
    #[error("a {got:?} message came instead of {expected}")]
    Unexpected {
        /// What should have come.
        expected: &'static str,
        /// What came.
        got: Kind,
    },
    /// The other side gave up and said why.
    #[error("the other side gave up: {reason}")]
    GaveUp {
        /// Its words.
        reason: String,
    },
}

impl PeerError {
    /// Whether the other side has gone without a word, as one that is killed does.
    pub fn is_hang_up(&self) -> bool {
        matches!(
            self,
            Self::Link(LinkError::Send(_) | LinkError::Frame(FrameError::Closed | FrameError::Truncated))
        )
    }
}

impl From<FrameError> for PeerError {
    fn from(error: FrameError) -> Self {
        Self::Link(error.into())
    }
}

/// Exchanges `Hello` and begins the heartbeat.
pub(crate) fn greet(transport: Transport, limits: &Limits) -> Result<Link, PeerError> {
    greet_as(transport, limits, version::SPOKEN)
}

pub(crate) fn greet_as(transport: Transport, limits: &Limits, ours: VersionRange) -> Result<Link, PeerError> {
    let mut link = Link::new(transport, limits);
    let software = format!("limosa {}", env!("CARGO_PKG_VERSION"));
    let hello = message::encode(Kind::Hello, &Hello { versions: ours, software })?;
    let sent = link.open(Kind::Hello, &hello);
    // What the other side says first tells more than a failure to send to it.
    let frame = match (link.next("greeting", limits.hello), sent) {
        (Ok(frame), Ok(())) => frame,
        (Err(error), _) | (_, Err(error)) => {
            return Err(match link.carrier_said() {
                Some(said) => PeerError::Carrier { said, source: error },
                None => error.into(),
            });
        }
    };
    let theirs: Hello = expect(&frame, Kind::Hello, "a greeting")?;
    let Some(version) = ours.common(theirs.versions) else {
        // The other side must read our greeting to say the same.
        link.farewell();
        let software = printable(&theirs.software);
        return Err(PeerError::NoCommonVersion { ours, theirs: theirs.versions, software });
    };
    tracing::debug!(connection = link.name(), version, peer = %printable(&theirs.software), "greeted");
    link.version = version;
    link.start_pulse();
    Ok(link)
}

/// Sends a control message at once.
pub(crate) fn send<T: Serialize>(link: &Link, kind: Kind, message: &T) -> Result<(), PeerError> {
    Ok(link.send_now(kind, &[&message::encode(kind, message)?])?)
}

/// The message of this kind that the frame must be; `Failed` and `Abort` are understood everywhere.
pub(crate) fn expect<T: DeserializeOwned>(
    frame: &Frame,
    kind: Kind,
    expected: &'static str,
) -> Result<T, PeerError> {
    match frame.kind {
        got if got == kind => Ok(message::decode(kind, &frame.payload)?),
        Kind::Failed | Kind::Abort => Err(gave_up(frame)),
        got => Err(PeerError::Unexpected { expected, got }),
    }
}

/// The other side's last words.
pub(crate) fn gave_up(frame: &Frame) -> PeerError {
    match message::decode::<Reason>(frame.kind, &frame.payload) {
        Ok(Reason { reason }) => PeerError::GaveUp { reason: printable(&reason) },
        Err(error) => error.into(),
    }
}

/// The reason behind a failure to send: what the other side said before it stopped listening, if it said anything.
pub(crate) fn last_words(link: &Link, error: LinkError) -> PeerError {
    const PATIENCE: std::time::Duration = std::time::Duration::from_millis(500);
    loop {
        match link.next("last words", PATIENCE) {
            Ok(frame) if matches!(frame.kind, Kind::Failed | Kind::Abort) => return gave_up(&frame),
            Ok(_) => {}
            Err(LinkError::Late { .. } | LinkError::Frame(FrameError::Closed)) => return error.into(),
            Err(reason) => return reason.into(),
        }
    }
}
