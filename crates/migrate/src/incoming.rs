//! The destination's side: each phase is a type that consumes the former.
//!
//! ```text
//! Greeted ──accept──> Receiving ──build──> Built ──take over──> Received::Started
//!    └─ answer a question
//! ```
//!
//! What is decided is recorded before it is said: see [`crate::record`].

use std::time::{Duration, Instant};

use limosa_image::{Sink, WriteError};

use crate::content::{self, ContentError};
use crate::frame::{FrameError, Kind};
use crate::id::MigrationId;
use crate::limits::Limits;
use crate::link::{Link, LinkError};
use crate::message::{self, Accept, Answer, Ask, Offer, Ready, Reason, Refusal, Refuse, StartReport, chain};
use crate::progress::{Phase, Progress, Watch};
use crate::record::{AnswerError, Arrival, Claim, RecordError, Remains, Store};
use crate::session::{self, PeerError};
use crate::transport::Transport;

/// What an engine does with a container that arrives.
pub trait Destination {
    /// A container that is built and does not run.
    type Prepared;
    /// Why a step failed; its text is told to the source.
    type Error: Into<Box<dyn std::error::Error + Send + Sync>>;

    /// Checks, before the source freezes anything, whether the container could run here. All reasons, not only the
    /// first.
    fn preflight(&mut self, offer: &Offer) -> Result<(), Vec<Refusal>>;

    /// Where the checkpoint goes.
    fn sink(&mut self) -> &mut dyn Sink;

    /// Builds everything from what the sink was given, down to the last step before the processes run.
    fn prepare(&mut self, offer: &Offer) -> Result<Self::Prepared, Self::Error>;

    /// Lets it run. An error promises that nothing of it ran, and that it was discarded.
    fn start(&mut self, prepared: Self::Prepared) -> Result<StartReport, Self::Error>;

    /// Removes all that was built, and forgets what the sink was given.
    fn discard(&mut self, prepared: Option<Self::Prepared>);

    /// A former receiver took ownership of this container and died before it said how that ended. Finds out whether
    /// the container runs whole; if not, ends and removes whatever there is of it.
    fn remains(&mut self, offer: &Offer) -> Result<Remains, Self::Error>;
}

/// How a connection ended well, for the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// The container runs here.
    Started {
        /// What was offered.
        offer: Box<Offer>,
        /// What was reported to the source.
        report: StartReport,
        /// The source has said that it recorded the outcome; if not, it may still ask.
        acknowledged: bool,
    },
    /// The offer was refused.
    Refused {
        /// What was offered.
        offer: Box<Offer>,
        /// Why it was refused.
        reasons: Vec<Refusal>,
    },
    /// A question was answered.
    Answered {
        /// About which migration.
        ask: Ask,
        /// How.
        answer: Answer,
    },
}

/// Why the container does not run here. It is the source's, now and for good; nothing of it is left here.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The conversation broke off, or the source gave up, before ownership was handed over.
    #[error("the migration ended before the container was handed over; it stays with the source")]
    Peer(#[from] PeerError),
    /// What was sent is not a checkpoint, or not all of it.
    #[error("receiving the checkpoint")]
    Content(#[from] ContentError),
    /// The checkpoint could not be stored.
    #[error("storing the checkpoint that is received")]
    Store(#[from] WriteError),
    /// The container could not be built.
    #[error("building the container")]
    Prepare(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The container could not be started; ownership was given back.
    #[error("starting the container; it was given back to the source")]
    Start(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A step could not be recorded, or the source had been told meanwhile that the container never started here.
    #[error("recording the migration")]
    Record(#[from] RecordError),
    /// A question could not be answered.
    #[error("answering what became of a migration")]
    Answer(#[from] AnswerError),
}

/// Serves one connection: a migration, or a question about one.
pub fn receive<D: Destination>(
    transport: Transport,
    destination: &mut D,
    store: &Store,
    limits: &Limits,
    watch: Watch<'_>,
) -> Result<Received, ReceiveError> {
    receive_noting(transport, destination, store, limits, watch, &mut |_| ())
}

/// Whether the source may come to ask what became of its migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// It is about to be told `Ready`: from now on it may.
    MayAsk(MigrationId),
    /// It has said that it recorded the outcome.
    Knows,
}

/// As [`receive`]; gives `note` what is to be known about questions to come, before anything is done that follows from it.
pub(crate) fn receive_noting<D: Destination>(
    transport: Transport,
    destination: &mut D,
    store: &Store,
    limits: &Limits,
    watch: Watch<'_>,
    note: &mut dyn FnMut(Note),
) -> Result<Received, ReceiveError> {
    Greeted { link: session::greet(transport, limits)?, store, watch }.serve(destination, note)
}

/// Finds out what a receiver left that died while it was starting the container of an offer.
pub(crate) type LookForRemains<'a> =
    dyn Fn(&Offer) -> Result<Remains, Box<dyn std::error::Error + Send + Sync>> + Sync + 'a;

/// Answers one question; whether the source has said that it recorded the answer.
pub(crate) fn answer_only(
    transport: Transport,
    store: &Store,
    limits: &Limits,
    remains: &LookForRemains<'_>,
) -> Result<bool, ReceiveError> {
    let link = session::greet(transport, limits)?;
    let frame = link.next("question", limits.answer).map_err(PeerError::from)?;
    let ask: Ask = session::expect(&frame, Kind::Ask, "a question")?;
    match store.answer(ask.id, remains) {
        Ok(answer) => send_answer(link, store, &ask, &answer),
        Err(error) => {
            fail(link, chain(&error));
            Err(error.into())
        }
    }
}

/// A version is agreed on.
struct Greeted<'a> {
    link: Link,
    store: &'a Store,
    watch: Watch<'a>,
}

/// The offer was accepted, and is recorded.
struct Receiving<'a> {
    link: Link,
    watch: Watch<'a>,
    claim: Claim,
    offer: Offer,
}

/// Everything is built.
struct Built<'a, P> {
    link: Link,
    watch: Watch<'a>,
    claim: Claim,
    offer: Offer,
    prepared: P,
    took: Duration,
}

impl<'a> Greeted<'a> {
    fn serve<D: Destination>(
        mut self,
        destination: &mut D,
        note: &mut dyn FnMut(Note),
    ) -> Result<Received, ReceiveError> {
        tell(&mut self.watch, &self.link, Phase::Negotiating);
        let frame = self.link.next("offer", self.link.limits().answer).map_err(PeerError::from)?;
        if frame.kind == Kind::Ask {
            let ask = message::decode(frame.kind, &frame.payload).map_err(PeerError::from)?;
            return self.answer(ask, destination);
        }
        let offer: Offer = session::expect(&frame, Kind::Offer, "an offer or a question")?;
        match self.accept(offer, destination)? {
            Ok(receiving) => {
                receiving.build(destination)?.announce(destination, note)?.take_over(destination, note)
            }
            Err(refused) => Ok(refused),
        }
    }

    fn answer<D: Destination>(self, ask: Ask, destination: &mut D) -> Result<Received, ReceiveError> {
        let answer = match self.store.answer(ask.id, |offer| destination.remains(offer).map_err(Into::into)) {
            Ok(answer) => answer,
            Err(error) => {
                fail(self.link, chain(&error));
                return Err(error.into());
            }
        };
        send_answer(self.link, self.store, &ask, &answer)?;
        Ok(Received::Answered { ask, answer })
    }

    fn accept<D: Destination>(
        self,
        offer: Offer,
        destination: &mut D,
    ) -> Result<Result<Receiving<'a>, Received>, ReceiveError> {
        if let Err(reasons) = destination.preflight(&offer) {
            session::send(&self.link, Kind::Refuse, &Refuse { reasons: reasons.clone() })?;
            self.link.farewell();
            return Ok(Err(Received::Refused { offer: Box::new(offer), reasons }));
        }
        let claim = match self.store.claim(&offer) {
            Ok(claim) => claim,
            Err(error) => {
                destination.discard(None);
                fail(self.link, chain(&error));
                return Err(error.into());
            }
        };
        let receiving = Receiving { link: self.link, watch: self.watch, claim, offer };
        let limits = receiving.link.limits();
        let accept =
            Accept { hand_over_ms: limits.hand_over.as_millis() as u64, max_state: limits.max_state };
        match session::send(&receiving.link, Kind::Accept, &accept) {
            Ok(()) => Ok(Ok(receiving)),
            Err(error) => Err(receiving.give_up(destination, error.into())),
        }
    }
}

impl<'a> Receiving<'a> {
    fn build<D: Destination>(mut self, destination: &mut D) -> Result<Built<'a, D::Prepared>, ReceiveError> {
        tell(&mut self.watch, &self.link, Phase::Receiving);
        if let Err(error) = content::receive(&self.link, destination.sink(), &mut self.watch) {
            return Err(self.give_up(destination, error));
        }
        tell(&mut self.watch, &self.link, Phase::Preparing);
        let began = Instant::now();
        let prepared = match destination.prepare(&self.offer) {
            Ok(prepared) => prepared,
            Err(error) => return Err(self.give_up(destination, ReceiveError::Prepare(error.into()))),
        };
        let Self { link, watch, claim, offer } = self;
        Ok(Built { link, watch, claim, offer, prepared, took: began.elapsed() })
    }

    /// Removes everything, records that nothing started, and tells the source if it still listens.
    fn give_up<D: Destination>(self, destination: &mut D, error: ReceiveError) -> ReceiveError {
        destination.discard(None);
        conclude(self.link, &self.claim, Kind::Failed, &error);
        error
    }
}

impl<P> Built<'_, P> {
    /// Records that everything is built, and says so.
    fn announce<D: Destination<Prepared = P>>(
        self,
        destination: &mut D,
        note: &mut dyn FnMut(Note),
    ) -> Result<Self, ReceiveError> {
        if let Err(error) = self.claim.advance(Arrival::Ready) {
            return Err(self.give_up(destination, error.into()));
        }
        note(Note::MayAsk(self.offer.id));
        match session::send(&self.link, Kind::Ready, &Ready { prepare_us: self.took.as_micros() as u64 }) {
            Ok(()) => Ok(self),
            Err(error) => Err(self.give_up(destination, error.into())),
        }
    }

    fn take_over<D: Destination<Prepared = P>>(
        mut self,
        destination: &mut D,
        note: &mut dyn FnMut(Note),
    ) -> Result<Received, ReceiveError> {
        tell(&mut self.watch, &self.link, Phase::HandingOver);
        let within = self.link.limits().hand_over;
        let heard = self.link.next("`HandOver`", within).map_err(PeerError::from);
        match heard {
            Ok(frame) if frame.kind == Kind::HandOver => {}
            Ok(frame) => {
                let error = match session::expect::<Reason>(&frame, Kind::HandOver, "`HandOver`") {
                    Err(error) => error,
                    Ok(_) => PeerError::Unexpected { expected: "`HandOver`", got: frame.kind },
                };
                return Err(self.give_up(destination, error.into()));
            }
            Err(error) => return Err(self.give_up(destination, error.into())),
        }
        // Ours if this is recorded. If not, someone was told, or will be, that it never started.
        if let Err(error) = self.claim.advance(Arrival::Starting) {
            return Err(self.give_up(destination, error.into()));
        }
        let Self { link, mut watch, claim, offer, prepared, .. } = self;
        let report = match destination.start(prepared) {
            Ok(report) => report,
            Err(error) => {
                let error = ReceiveError::Start(error.into());
                conclude(link, &claim, Kind::NotStarted, &error);
                return Err(error);
            }
        };
        if let Err(error) = claim.advance(Arrival::Started(report.clone())) {
            // It runs all the same. A later question finds `Starting` and a dead receiver, and looks for itself.
            tracing::warn!(id = %offer.id, error = chain(&error), "that the container was started could not be recorded");
        }
        let acknowledged = tell_started(&link, &claim, &report, note);
        watch(&Progress { phase: Phase::Over, counters: acknowledged.1, round: None });
        Ok(Received::Started { offer: Box::new(offer), report, acknowledged: acknowledged.0 })
    }

    fn give_up<D: Destination<Prepared = P>>(self, destination: &mut D, error: ReceiveError) -> ReceiveError {
        destination.discard(Some(self.prepared));
        conclude(self.link, &self.claim, Kind::NotStarted, &error);
        error
    }
}

/// Tells the source that the container runs, and waits for its `Done`; whether that came.
fn tell_started(
    link: &Link,
    claim: &Claim,
    report: &StartReport,
    note: &mut dyn FnMut(Note),
) -> (bool, crate::progress::Counters) {
    let done = session::send(link, Kind::Started, report)
        .and_then(|()| Ok(link.next("`Done`", Duration::from_secs(10))?))
        .is_ok_and(|frame| frame.kind == Kind::Done);
    if done {
        note(Note::Knows);
    }
    let counters = link.counters();
    (done && claim.acknowledge().is_ok(), counters)
}

/// Records that the container never started, then says so.
fn conclude(link: Link, claim: &Claim, kind: Kind, error: &ReceiveError) {
    let reason = chain(error);
    if let Err(error) = claim.never_started(&reason) {
        // Unsaid, then: without the record, a question is answered the same way, because this receiver is not starting
        // and, once it is gone, no longer alive.
        tracing::warn!(error = chain(&error), "that the container was not started could not be recorded");
    }
    let gone = matches!(
        error,
        ReceiveError::Peer(PeerError::Link(LinkError::Frame(FrameError::Closed | FrameError::Truncated)))
    );
    if !gone && session::send(&link, kind, &Reason { reason }).is_ok() {
        link.farewell();
    }
}

fn fail(link: Link, reason: String) {
    if session::send(&link, Kind::Failed, &Reason { reason }).is_ok() {
        link.farewell();
    }
}

/// Sends an answer. Whether the source has said that it recorded it; then it need not be kept for ever.
fn send_answer(link: Link, store: &Store, ask: &Ask, answer: &Answer) -> Result<bool, ReceiveError> {
    session::send(&link, Kind::Answer, answer)?;
    let done = !matches!(answer, Answer::Undecided { .. })
        && link.next("`Done`", link.limits().answer).is_ok_and(|frame| frame.kind == Kind::Done);
    if done {
        store.acknowledge(ask.id)?;
    }
    link.farewell();
    Ok(done)
}

fn tell(watch: &mut Watch<'_>, link: &Link, phase: Phase) {
    watch(&Progress { phase, counters: link.counters(), round: None });
}
