//! How the source learns what became of a migration whose connection was cut.

use std::time::{Duration, Instant};

use crate::frame::Kind;
use crate::id::MigrationId;
use crate::limits::Limits;
use crate::message::{Answer, Ask, Reason, StartReport, printable};
use crate::record::{Departure, DepartureRecord, RecordError, Store};
use crate::session::{self, PeerError};
use crate::transport::Transport;

/// What a connection is for; a one-time ticket serves one migration, and then only questions about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To migrate.
    Migrate,
    /// To ask for an outcome.
    Ask,
}

impl Purpose {
    pub(crate) fn to_wire(self) -> u8 {
        match self {
            Self::Migrate => 1,
            Self::Ask => 2,
        }
    }

    pub(crate) fn from_wire(number: u8) -> Option<Self> {
        [Self::Migrate, Self::Ask].into_iter().find(|purpose| purpose.to_wire() == number)
    }
}

/// A way to the destination, that can be gone again after a cut.
pub trait Connect {
    /// What can go wrong.
    type Error: std::error::Error + Send + Sync + 'static;

    /// A new connection.
    fn connect(&mut self, purpose: Purpose, limits: &Limits) -> Result<Transport, Self::Error>;

    /// Whether somebody may answer there in a killed receiver's place.
    fn has_heirs(&self) -> bool {
        false
    }

    /// How it is written, so that another process can ask after this one died.
    fn address(&self) -> String;
}

/// How a migration ended, for the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It runs at the destination: the source's processes must end without ever running again.
    Moved(StartReport),
    /// It stays: the source may run again.
    Kept {
        /// Why.
        reason: String,
    },
    /// Not known within the bounds: the source must stay frozen. [`settle`] asks again.
    Unknown {
        /// What the last question met.
        why: String,
    },
}

/// Why an outcome cannot be settled now.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Asks what became of a migration that was handed over from here, until that is known or `limits.outcome` has passed.
pub fn settle<C: Connect>(
    store: &Store,
    id: MigrationId,
    connect: &mut C,
    limits: &Limits,
) -> Result<Outcome, SettleError> {
    let record = store.departure(id)?.ok_or_else(|| store.unknown(id))?;
    match record.departure {
        Departure::Started(report) => Ok(Outcome::Moved(report)),
        Departure::Kept(Reason { reason }) => Ok(Outcome::Kept { reason }),
        Departure::HandingOver => Ok(ask_until_known(store, &record, connect, limits)),
    }
}

/// Asks again and again, on new connections.
pub(crate) fn ask_until_known<C: Connect>(
    store: &Store,
    record: &DepartureRecord,
    connect: &mut C,
    limits: &Limits,
) -> Outcome {
    const LONGEST_PAUSE: Duration = Duration::from_secs(2);
    let until = Instant::now() + limits.outcome;
    let mut pause = Duration::from_millis(20);
    loop {
        let (why, wait) = match ask(store, record, connect, limits) {
            Ok(Asked::Known(outcome)) => return outcome,
            Ok(Asked::Again(wait)) => {
                ("the destination is still starting it".to_owned(), wait.min(LONGEST_PAUSE))
            }
            Err(why) => (why, pause),
        };
        tracing::warn!(id = %record.id, why, "the outcome of the migration is not known yet");
        if Instant::now() + wait >= until {
            return Outcome::Unknown { why };
        }
        std::thread::sleep(wait);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Tells a destination that hung up before ownership was handed over that nobody will ask for the outcome of `id`: who waits
/// in a killed receiver's place may go. Tried once; a destination that is not there need not be told.
pub fn excuse<C: Connect>(id: MigrationId, connect: &mut C, limits: &Limits) {
    let mut tell = || -> Result<(), PeerError> {
        let Ok(transport) = connect.connect(Purpose::Ask, limits) else { return Ok(()) };
        let link = session::greet(transport, limits)?;
        session::send(&link, Kind::Ask, &Ask { id })?;
        link.next("answer", limits.answer)?;
        session::send(&link, Kind::Done, &())?;
        link.farewell();
        Ok(())
    };
    if let Err(error) = tell() {
        tracing::debug!(%id, %error, "the destination was not told that nobody will ask");
    }
}

enum Asked {
    Known(Outcome),
    Again(Duration),
}

fn ask<C: Connect>(
    store: &Store,
    record: &DepartureRecord,
    connect: &mut C,
    limits: &Limits,
) -> Result<Asked, String> {
    let transport = connect.connect(Purpose::Ask, limits).map_err(|error| crate::message::chain(&error))?;
    let told = |error: PeerError| crate::message::chain(&error);
    let link = session::greet(transport, limits).map_err(told)?;
    session::send(&link, Kind::Ask, &Ask { id: record.id }).map_err(told)?;
    let frame = link.next("answer", limits.answer).map_err(|error| told(error.into()))?;
    let outcome = match session::expect(&frame, Kind::Answer, "an answer").map_err(told)? {
        Answer::Started(report) => Outcome::Moved(report),
        Answer::NeverStarted(Reason { reason }) => Outcome::Kept { reason: printable(&reason) },
        Answer::Undecided { again_ms } => return Ok(Asked::Again(Duration::from_millis(again_ms))),
    };
    if remember(store, record, &outcome) && session::send(&link, Kind::Done, &()).is_ok() {
        link.farewell();
    }
    Ok(Asked::Known(outcome))
}

/// Records an outcome that is known. `false` if that failed: then the other side is not told `Done`, so that it keeps
/// its own record.
pub(crate) fn remember(store: &Store, record: &DepartureRecord, outcome: &Outcome) -> bool {
    let departure = match outcome {
        Outcome::Moved(report) => Departure::Started(report.clone()),
        Outcome::Kept { reason } => Departure::Kept(Reason { reason: reason.clone() }),
        Outcome::Unknown { .. } => return false,
    };
    let result = store.put_departure(&DepartureRecord { departure, ..record.clone() });
    if let Err(error) = &result {
        tracing::warn!(id = %record.id, %error, "the outcome of the migration could not be recorded");
    }
    result.is_ok()
}
