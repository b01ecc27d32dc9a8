//! The source's side: each phase is a type that consumes the former.
//!
//! ```text
//! Negotiating ──negotiate──> Sending ──finish──> Ready ──hand_over──> Outcome
//! ```
//!
//! Until [`Outgoing::hand_over`] the source owns the container: dropping an `Outgoing`, or any error, leaves it so, and
//! the source may run again at once. Of `hand_over` only the [`Outcome`] says who owns.

use std::io::Read;

use limosa_image::{Sink, SpaceId, Stage, WriteError};

use crate::frame::{Kind, MAX_DATA};
use crate::limits::Limits;
use crate::link::{Link, LinkError};
use crate::message::{self, Accept, Blob, BlobEnd, Offer, Reason, Refusal, Refuse, StartReport, State};
use crate::outcome::{Connect, Outcome, ask_until_known, remember};
use crate::progress::{Counters, Phase, Progress, Watch};
use crate::record::{Departure, DepartureRecord, RecordError, Store};
use crate::session::{self, PeerError};
use crate::totals::{Totals, gone, pages_head};
use crate::transport::Transport;
use crate::version::SENDS_AGAIN;

/// Progress is told about every so many bytes.
const TELL_EVERY: u64 = 1 << 20;

/// A migration from here, in a phase.
pub struct Outgoing<'w, P> {
    link: Link,
    watch: Watch<'w>,
    told: u64,
    /// The round of pre-copy.
    round: Option<(u32, Option<u64>)>,
    phase: P,
}

/// A version is agreed on; nothing is offered yet.
pub struct Negotiating(());

/// The destination takes the checkpoint: this is a [`Sink`].
pub struct Sending {
    offer: Offer,
    accept: Accept,
    totals: Totals,
}

/// Everything is built at the destination and nothing runs there.
pub struct Ready {
    offer: Offer,
    instance: String,
    report: message::Ready,
}

/// The offer was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum NegotiateError {
    /// The destination refused.
    #[error("the destination cannot take it: {}", join(.reasons))]
    Refused {
        /// Why.
        reasons: Vec<Refusal>,
    },
    /// The conversation broke off.
    #[error("offering the container to the destination")]
    Peer(#[from] PeerError),
}

/// The destination did not become ready. The source owns.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// The conversation broke off, or the destination gave up.
    #[error("waiting until the destination has built the container")]
    Peer(#[from] PeerError),
}

/// Ownership was not handed over. The source owns.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The conversation broke off, or the destination gave up, before.
    #[error("before ownership was handed over")]
    Peer(#[from] PeerError),
    /// The intention could not be recorded.
    #[error("recording that ownership is about to be handed over")]
    Record(#[from] RecordError),
    /// The source could not be frozen in the way that outlives this process.
    #[error("sealing the source before handing it over")]
    Seal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn join(reasons: &[Refusal]) -> String {
    reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl<'w, P> Outgoing<'w, P> {
    /// What the connection has carried so far.
    pub fn counters(&self) -> Counters {
        self.link.counters()
    }

    /// Gives up, and tells the destination why. The source owns.
    pub fn abort(self, reason: impl Into<String>) {
        if session::send(&self.link, Kind::Abort, &Reason { reason: reason.into() }).is_ok() {
            self.link.farewell();
        }
    }

    fn tell(&mut self, phase: Phase) {
        let counters = self.link.counters();
        self.told = counters.bytes_sent;
        (self.watch)(&Progress { phase, counters, round: self.round.filter(|_| phase == Phase::Copying) });
    }

    fn next_phase<Q>(self, phase: Q, name: Phase) -> Outgoing<'w, Q> {
        let mut next = Outgoing { link: self.link, watch: self.watch, told: self.told, round: None, phase };
        next.tell(name);
        next
    }
}

impl<'w> Outgoing<'w, Negotiating> {
    /// Agrees on a version with whoever is at the other end.
    pub fn connect(transport: Transport, limits: &Limits, watch: Watch<'w>) -> Result<Self, PeerError> {
        let link = session::greet(transport, limits)?;
        let mut outgoing = Self { link, watch, told: 0, round: None, phase: Negotiating(()) };
        outgoing.tell(Phase::Negotiating);
        Ok(outgoing)
    }

    /// Offers the container. Nothing need be frozen before the destination accepts.
    pub fn negotiate(self, offer: &Offer) -> Result<Outgoing<'w, Sending>, NegotiateError> {
        session::send(&self.link, Kind::Offer, offer)?;
        let frame =
            self.link.next("answer to the offer", self.link.limits().answer).map_err(PeerError::from)?;
        if frame.kind == Kind::Refuse {
            let Refuse { reasons } = message::decode(frame.kind, &frame.payload).map_err(PeerError::from)?;
            return Err(NegotiateError::Refused { reasons });
        }
        let accept: Accept = session::expect(&frame, Kind::Accept, "the answer to the offer")?;
        let phase = Sending { offer: offer.clone(), accept, totals: Totals::default() };
        // What it sends first, the engine will say ([`Sink::stage`]).
        Ok(self.next_phase(phase, Phase::Negotiating))
    }
}

impl<'w> Outgoing<'w, Sending> {
    /// Whether the destination takes memory that is sent again, and may be gone again ([`Sink::forget`]).
    pub fn sends_again(&self) -> bool {
        self.link.version >= SENDS_AGAIN
    }

    /// Says that everything was sent, and waits until the destination has built it.
    pub fn finish(mut self) -> Result<Outgoing<'w, Ready>, FinishError> {
        self.heard()?;
        let end = self.phase.totals.end();
        if let Err(error) =
            self.link.send_now(Kind::End, &[&message::encode(Kind::End, &end).map_err(PeerError::from)?])
        {
            return Err(session::last_words(&self.link, error).into());
        }
        self.tell(Phase::Preparing);
        let frame = self.link.next("`Ready`", self.link.limits().ready).map_err(PeerError::from)?;
        let ready = session::expect(&frame, Kind::Ready, "`Ready`")?;
        let phase = Ready { offer: self.phase.offer.clone(), instance: String::new(), report: ready };
        Ok(self.next_phase(phase, Phase::HandingOver))
    }

    /// Whether the destination has given up meanwhile.
    fn heard(&self) -> Result<(), PeerError> {
        match self.link.poll()? {
            None => Ok(()),
            Some(frame) if frame.kind == Kind::Failed => Err(session::gave_up(&frame)),
            Some(frame) => {
                Err(PeerError::Unexpected { expected: "silence while content is sent", got: frame.kind })
            }
        }
    }

    fn content(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), PeerError> {
        self.heard()?;
        let header = self.link.send(kind, parts).map_err(|error| session::last_words(&self.link, error))?;
        self.phase.totals.note(&header);
        if self.link.counters().bytes_sent - self.told >= TELL_EVERY {
            self.tell(if self.round.is_some() { Phase::Copying } else { Phase::Sending });
        }
        Ok(())
    }

    fn send_state(&mut self, name: &str, cbor: &[u8]) -> Result<(), PeerError> {
        let begin = State { name: name.to_owned(), length: cbor.len() as u64 };
        self.content(Kind::State, &[&message::encode(Kind::State, &begin)?])?;
        for part in cbor.chunks(MAX_DATA) {
            self.content(Kind::StateData, &[part])?;
        }
        self.phase.totals.states += 1;
        Ok(())
    }

    fn send_pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), PeerError> {
        let mut at = start;
        for part in data.chunks(MAX_DATA) {
            self.content(Kind::Pages, &[&pages_head(space.0, at), part])?;
            at += part.len() as u64;
        }
        self.phase.totals.memory_bytes += data.len() as u64;
        Ok(())
    }
}

fn lost(what: String) -> impl FnOnce(PeerError) -> WriteError {
    move |error| WriteError::Peer { what, source: Box::new(error) }
}

impl Sink for Outgoing<'_, Sending> {
    fn state(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        let (length, limit) = (cbor.len() as u64, self.phase.accept.max_state);
        if length > limit {
            return Err(WriteError::TooLarge { what: "a section of the state", length, limit });
        }
        self.send_state(name, cbor).map_err(lost(format!("the section {name}")))
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        let length = data.len() as u64;
        let page = limosa_image::PAGE;
        if !start.is_multiple_of(page) || !length.is_multiple_of(page) || start.checked_add(length).is_none()
        {
            return Err(WriteError::NotPages { space, start, length });
        }
        let what = || format!("{length} bytes of memory at {start:#x}");
        self.send_pages(space, start, data).map_err(|error| lost(what())(error))
    }

    fn stage(&mut self, stage: Stage) {
        self.round = match stage {
            Stage::Round { number, left } => Some((number, left)),
            Stage::Frozen => None,
        };
        self.tell(if self.round.is_some() { Phase::Copying } else { Phase::Sending });
    }

    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        self.content(Kind::Gone, &[&gone(space.0, start, length)])
            .map_err(lost(format!("that {length} bytes of memory at {start:#x} are gone")))
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        let what = || format!("the blob {name}");
        let begin = Blob { name: name.to_owned() };
        let begin = message::encode(Kind::Blob, &begin).map_err(|error| lost(what())(error.into()))?;
        self.content(Kind::Blob, &[&begin]).map_err(lost(what()))?;
        let mut buffer = vec![0; MAX_DATA];
        let mut length = 0;
        loop {
            let part = fill(content, &mut buffer)
                .map_err(|source| WriteError::Content { name: name.to_owned(), source })?;
            if part == 0 {
                break;
            }
            self.content(Kind::BlobData, &[&buffer[..part]]).map_err(lost(what()))?;
            length += part as u64;
        }
        let end = message::encode(Kind::BlobEnd, &BlobEnd { length })
            .map_err(|error| lost(what())(error.into()))?;
        self.content(Kind::BlobEnd, &[&end]).map_err(lost(what()))?;
        self.phase.totals.blobs += 1;
        self.phase.totals.blob_bytes += length;
        Ok(length)
    }
}

/// Reads until the buffer is full or the content ends.
fn fill(content: &mut dyn Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match content.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

impl Outgoing<'_, Ready> {
    /// What the destination says about building.
    pub fn report(&self) -> &message::Ready {
        &self.phase.report
    }

    /// Says, for the record, which container it is: there may be another of the same name later.
    #[must_use]
    pub fn of_instance(mut self, instance: impl Into<String>) -> Self {
        self.phase.instance = instance.into();
        self
    }

    /// Hands ownership over and returns who has it. Once the caller has acted on that, it tells [`Store::close`].
    ///
    /// In this order: the intention is recorded in `store`; `seal` freezes the source in a way that outlives this
    /// process (a tracer's death lets its tracees run, and after `HandOver` they must not); `HandOver` is sent. If the
    /// answer does not come, the outcome is asked for through `connect` until it is known or `limits.outcome` has
    /// passed.
    ///
    /// # Errors
    /// Only before `HandOver` was sent: the source owns, and is to be unsealed and run on.
    pub fn hand_over<C: Connect, E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        mut self,
        store: &Store,
        connect: &mut C,
        seal: impl FnOnce() -> Result<(), E>,
    ) -> Result<Outcome, HandOverError> {
        match self.link.poll().map_err(PeerError::from)? {
            Some(frame) if matches!(frame.kind, Kind::Failed | Kind::NotStarted) => {
                return Err(session::gave_up(&frame).into());
            }
            Some(frame) => {
                return Err(
                    PeerError::Unexpected { expected: "silence after `Ready`", got: frame.kind }.into()
                );
            }
            None => {}
        }
        let record = DepartureRecord {
            id: self.phase.offer.id,
            container: self.phase.offer.container.clone(),
            destination: connect.address(),
            departure: Departure::HandingOver,
            instance: self.phase.instance.clone(),
            closed: false,
        };
        if let Err(error) = store.put_departure(&record) {
            self.abort("the source could not record the hand-over");
            return Err(error.into());
        }
        if let Err(error) = seal() {
            remember(store, &record, &Outcome::Kept { reason: "the source could not be sealed".to_owned() });
            self.abort("the source could not be sealed");
            return Err(HandOverError::Seal(error.into()));
        }
        // From the first byte on it may have arrived, whatever the result says.
        let answer = session::send(&self.link, Kind::HandOver, &()).and_then(|()| self.started());
        let outcome = match answer {
            Ok(outcome) => {
                if remember(store, &record, &outcome) && session::send(&self.link, Kind::Done, &()).is_ok() {
                    self.tell(Phase::Over);
                    self.link.farewell();
                }
                outcome
            }
            Err(error) => {
                tracing::warn!(id = %record.id, error = message::chain(&error), "the hand-over was not answered");
                self.tell(Phase::Settling);
                let limits = self.link.limits().clone();
                // The old connection must be gone before the question: then nothing can follow on it.
                drop(self.link);
                ask_until_known(store, &record, connect, &limits)
            }
        };
        Ok(outcome)
    }

    /// The destination's answer to `HandOver`.
    fn started(&self) -> Result<Outcome, PeerError> {
        let frame = self.link.next("`Started`", self.link.limits().started)?;
        if frame.kind == Kind::NotStarted {
            let Reason { reason } = message::decode(frame.kind, &frame.payload)?;
            return Ok(Outcome::Kept { reason: message::printable(&reason) });
        }
        // `Failed` may have crossed `HandOver`; the destination records before it speaks, so asking tells the same.
        let report: StartReport = session::expect(&frame, Kind::Started, "`Started`")?;
        Ok(Outcome::Moved(report))
    }
}

impl From<LinkError> for FinishError {
    fn from(error: LinkError) -> Self {
        Self::Peer(error.into())
    }
}
