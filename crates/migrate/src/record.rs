//! What each side remembers of a migration, so that its outcome can be told after a cut or a crash.
//!
//! A directory (mode 0700) holds, for each migration, `ID.in` (the destination's record), `ID.out` (the source's) and,
//! while a receiver lives, `ID.alive`, on which it holds a lock (flock(2)) that the kernel drops with the process.
//! Records are CBOR, mode 0600, replaced by write, fsync, rename, fsync of the directory. Whoever changes one holds the
//! lock on the file `lock`, so that each change is made in view of the record as it is (compare and exchange).
//!
//! The destination's states and their only transitions:
//!
//! ```text
//! Receiving ──> Ready ──> Starting ──> Started
//!     └──────────┴───────────┴───────> NeverStarted
//! ```
//!
//! `Started` and `NeverStarted` are final. `Starting` ends in `NeverStarted` only by the receiver itself, whose start
//! failed, or, when the receiver is dead, after what it left was removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::id::MigrationId;
use crate::message::{Answer, Offer, Reason, StartReport};

/// No record is longer, in bytes.
const MAX_RECORD: u64 = 1 << 20;

/// The destination's knowledge of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arrival {
    /// The offer was accepted; content is coming, or being built.
    Receiving,
    /// Everything is built; the source has been, or is being, told.
    Ready,
    /// Ownership was taken; processes are being let go.
    Starting,
    /// It runs. Final.
    Started(StartReport),
    /// It never ran and never will. Final.
    NeverStarted(Reason),
}

impl Arrival {
    fn name(&self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Started(_) => "started",
            Self::NeverStarted(_) => "never started",
        }
    }

    fn may_become(&self, next: &Self) -> bool {
        matches!(
            (self, next),
            (Self::Receiving, Self::Ready | Self::NeverStarted(_))
                | (Self::Ready, Self::Starting | Self::NeverStarted(_))
                | (Self::Starting, Self::Started(_) | Self::NeverStarted(_))
        )
    }
}

/// The destination's record of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalRecord {
    /// What was offered; nothing if the first that was heard of the migration was a question about it.
    pub offer: Option<Offer>,
    /// How far it came.
    pub arrival: Arrival,
    /// The source has said that it recorded the outcome.
    #[serde(default)]
    pub acknowledged: bool,
}

/// The source's knowledge of one migration. There is a record only from the hand-over on: before it, the source owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Departure {
    /// `HandOver` was, or was about to be, sent; the outcome is not known yet.
    HandingOver,
    /// It runs at the destination. Final.
    Started(StartReport),
    /// It stayed. Final.
    Kept(Reason),
}

/// The source's record of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DepartureRecord {
    /// The migration.
    pub id: MigrationId,
    /// The container's name.
    pub container: String,
    /// Where the outcome can be asked for; may contain a ticket, which is a secret.
    pub destination: String,
    /// How far it came.
    pub departure: Departure,
    /// The very container, in the engine's words: a later one of the same name is not meant.
    #[serde(default)]
    pub instance: String,
    /// Whether the source has acted on the outcome: what was frozen runs on, or is gone. Records that do not say are
    /// from before this was recorded.
    #[serde(default = "acted_on")]
    pub closed: bool,
}

fn acted_on() -> bool {
    true
}

impl DepartureRecord {
    /// Whether something is left to be done: the outcome is not known, or was not acted on.
    pub fn is_open(&self) -> bool {
        !self.closed || self.departure == Departure::HandingOver
    }
}

/// Why a record could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A file operation failed.
    #[error("{operation} {}", .path.display())]
    File {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The file is not a record.
    #[error("the record {} cannot be read: {why}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// There is already a record of this migration: an id is used once.
    #[error("migration {id} is already known here as {state}")]
    Known {
        /// The migration.
        id: MigrationId,
        /// Its state.
        state: &'static str,
    },
    /// The record is not in a state from which this step can be taken: someone asked for the outcome and was told
    /// that the container never started here.
    #[error("migration {id} cannot become {wanted}: it is recorded as {state}")]
    Fenced {
        /// The migration.
        id: MigrationId,
        /// The step that was to be taken.
        wanted: &'static str,
        /// The recorded state.
        state: &'static str,
    },
    /// There is no record of this migration.
    #[error("there is no record of migration {id} in {}", .dir.display())]
    Unknown {
        /// The migration.
        id: MigrationId,
        /// The directory.
        dir: PathBuf,
    },
}

/// Why a question about a migration cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// What a dead receiver left could not be examined or removed, so nothing can be promised.
    #[error("finding out what the receiver that died while starting migration {id} left behind")]
    Remains {
        /// The migration.
        id: MigrationId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What a receiver that died between taking ownership and saying so left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remains {
    /// The container runs whole.
    Running(StartReport),
    /// Nothing of it is left, and nothing of it runs (any more).
    Nothing,
}

/// The directory of records.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens the directory, which is made if need be.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, RecordError> {
        let dir = dir.into();
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|source| RecordError::File { operation: "making", path: dir.clone(), source })?;
        Ok(Self { dir })
    }

    /// Begins a destination's record. The claim keeps it alive.
    pub fn claim(&self, offer: &Offer) -> Result<Claim, RecordError> {
        let _lock = self.lock()?;
        if let Some(record) = self.arrival(offer.id)? {
            return Err(RecordError::Known { id: offer.id, state: record.arrival.name() });
        }
        let Some(alive) = self.try_alive(offer.id)? else {
            return Err(RecordError::Known { id: offer.id, state: Arrival::Receiving.name() });
        };
        let record =
            ArrivalRecord { offer: Some(offer.clone()), arrival: Arrival::Receiving, acknowledged: false };
        self.write(&self.path(offer.id, "in"), &record)?;
        Ok(Claim { store: self.clone(), id: offer.id, _alive: alive })
    }

    /// The destination's record, if there is one.
    pub fn arrival(&self, id: MigrationId) -> Result<Option<ArrivalRecord>, RecordError> {
        read(&self.path(id, "in"))
    }

    /// The source's record, if there is one.
    pub fn departure(&self, id: MigrationId) -> Result<Option<DepartureRecord>, RecordError> {
        read(&self.path(id, "out"))
    }

    /// Writes the source's record. An outcome that is recorded is never replaced by another.
    pub fn put_departure(&self, record: &DepartureRecord) -> Result<(), RecordError> {
        let _lock = self.lock()?;
        match self.departure(record.id)?.map(|old| old.departure) {
            None | Some(Departure::HandingOver) => self.write(&self.path(record.id, "out"), record),
            Some(old) if old == record.departure => Ok(()),
            Some(old) => Err(RecordError::Fenced {
                id: record.id,
                wanted: departure_name(&record.departure),
                state: departure_name(&old),
            }),
        }
    }

    /// Notes that the source has acted on an outcome that is recorded.
    pub fn close(&self, id: MigrationId) -> Result<(), RecordError> {
        let _lock = self.lock()?;
        match self.departure(id)? {
            Some(record) if record.departure != Departure::HandingOver && !record.closed => {
                self.write(&self.path(id, "out"), &DepartureRecord { closed: true, ..record })
            }
            _ => Ok(()),
        }
    }

    /// The migrations whose hand-over was begun from here and whose outcome is not known, or was not acted on.
    pub fn unsettled(&self) -> Result<Vec<DepartureRecord>, RecordError> {
        let mut found = Vec::new();
        for id in self.ids("out")? {
            found.extend(self.departure(id)?.filter(DepartureRecord::is_open));
        }
        Ok(found)
    }

    /// Answers what became of a migration. A migration that has not taken ownership is ended by the question: it is
    /// recorded as never started before that is said. `remains` is called when the receiver died while starting.
    pub fn answer(
        &self,
        id: MigrationId,
        remains: impl FnOnce(&Offer) -> Result<Remains, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<Answer, AnswerError> {
        let lock = self.lock()?;
        let record = self.arrival(id)?.unwrap_or(ArrivalRecord {
            offer: None,
            arrival: Arrival::Receiving,
            acknowledged: false,
        });
        let dead = match &record.arrival {
            Arrival::Started(report) => return Ok(Answer::Started(report.clone())),
            Arrival::NeverStarted(reason) => return Ok(Answer::NeverStarted(reason.clone())),
            Arrival::Receiving | Arrival::Ready => {
                let reason = Reason { reason: "the source asked before ownership was taken here".to_owned() };
                let arrival = Arrival::NeverStarted(reason.clone());
                self.write(&self.path(id, "in"), &ArrivalRecord { arrival, ..record })?;
                return Ok(Answer::NeverStarted(reason));
            }
            Arrival::Starting => self.try_alive(id)?,
        };
        drop(lock);
        // Held for the examination, so that nobody else does the same meanwhile.
        let (Some(_alive), Some(offer)) = (dead, &record.offer) else {
            return Ok(Answer::Undecided { again_ms: 100 });
        };
        let remains = remains(offer).map_err(|source| AnswerError::Remains { id, source })?;
        let arrival = match remains {
            Remains::Running(report) => Arrival::Started(report),
            Remains::Nothing => Arrival::NeverStarted(Reason {
                reason: "the receiver died while it was starting the container; its remains were removed"
                    .to_owned(),
            }),
        };
        self.advance(id, arrival.clone())?;
        Ok(match arrival {
            Arrival::Started(report) => Answer::Started(report),
            Arrival::NeverStarted(reason) => Answer::NeverStarted(reason),
            _ => Answer::Undecided { again_ms: 100 },
        })
    }

    /// Notes that the source has recorded the outcome.
    pub fn acknowledge(&self, id: MigrationId) -> Result<(), RecordError> {
        let _lock = self.lock()?;
        match self.arrival(id)? {
            Some(record) if !record.acknowledged => {
                self.write(&self.path(id, "in"), &ArrivalRecord { acknowledged: true, ..record })
            }
            _ => Ok(()),
        }
    }

    /// Removes records older than `age` that nobody can still need, and returns how many. An arrival that started
    /// and was never acknowledged stays, whatever its age: without it a late question would be answered "never
    /// started". So do hand-overs whose outcome is not known.
    pub fn prune(&self, age: Duration) -> Result<usize, RecordError> {
        let _lock = self.lock()?;
        let mut removed = 0;
        for id in self.ids("in")? {
            let path = self.path(id, "in");
            let Some(record) = self.arrival(id)? else { continue };
            let needed = match record.arrival {
                Arrival::Started(_) => !record.acknowledged,
                Arrival::Starting => true,
                // Without a record the answer is "never started" as well.
                Arrival::NeverStarted(_) | Arrival::Receiving | Arrival::Ready => {
                    self.try_alive(id)?.is_none()
                }
            };
            if !needed && older(&path, age) {
                remove(&path)?;
                remove(&self.path(id, "alive"))?;
                removed += 1;
            }
        }
        for id in self.ids("out")? {
            let path = self.path(id, "out");
            let open = self.departure(id)?.is_some_and(|record| record.is_open());
            if !open && older(&path, age) {
                remove(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn advance(&self, id: MigrationId, next: Arrival) -> Result<(), RecordError> {
        let _lock = self.lock()?;
        let record = self.arrival(id)?.ok_or_else(|| self.unknown(id))?;
        if !record.arrival.may_become(&next) {
            return Err(RecordError::Fenced { id, wanted: next.name(), state: record.arrival.name() });
        }
        self.write(&self.path(id, "in"), &ArrivalRecord { arrival: next, ..record })
    }

    pub(crate) fn unknown(&self, id: MigrationId) -> RecordError {
        RecordError::Unknown { id, dir: self.dir.clone() }
    }

    fn path(&self, id: MigrationId, what: &str) -> PathBuf {
        self.dir.join(format!("{id}.{what}"))
    }

    /// The lock on all changes; held as long as the file is open.
    fn lock(&self) -> Result<File, RecordError> {
        let path = self.dir.join("lock");
        let file = open_or_make(&path)?;
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(()) => return Ok(file),
                Err(error) => {
                    return Err(RecordError::File { operation: "locking", path, source: error.into() });
                }
            }
        }
    }

    /// The lock that says that a receiver lives, unless one does.
    fn try_alive(&self, id: MigrationId) -> Result<Option<File>, RecordError> {
        let path = self.path(id, "alive");
        let file = open_or_make(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(RecordError::File { operation: "locking", path, source: error.into() }),
        }
    }

    fn ids(&self, what: &str) -> Result<Vec<MigrationId>, RecordError> {
        let failed = |source| RecordError::File { operation: "listing", path: self.dir.clone(), source };
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(what)?.strip_suffix('.'));
            ids.extend(stem.and_then(|stem| stem.parse::<MigrationId>().ok()));
        }
        Ok(ids)
    }

    fn write(&self, path: &Path, record: &impl Serialize) -> Result<(), RecordError> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| RecordError::File { operation, path, source }
        };
        let bytes = limosa_image::cbor::encode(record)
            .map_err(|error| RecordError::Malformed { path: path.to_owned(), why: error.to_string() })?;
        // Only the holder of the lock writes, so one name for the unfinished file is enough, and a leftover is reused.
        let unfinished = path.with_extension("new");
        limosa_kernel::fault::point();
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)
            .map_err(failed("making", &unfinished))?;
        file.write_all(&bytes).map_err(failed("writing", &unfinished))?;
        file.sync_all().map_err(failed("syncing", &unfinished))?;
        limosa_kernel::fault::point();
        fs::rename(&unfinished, path).map_err(failed("renaming", &unfinished))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(failed("syncing", &self.dir))
    }
}

/// A destination's record whose receiver lives: the claim's holder.
#[derive(Debug)]
pub struct Claim {
    store: Store,
    id: MigrationId,
    _alive: File,
}

impl Claim {
    /// Takes the next step, durably, unless the outcome was already decided otherwise ([`RecordError::Fenced`]).
    pub fn advance(&self, next: Arrival) -> Result<(), RecordError> {
        self.store.advance(self.id, next)
    }

    /// Records that the container never started. When that is recorded already, nothing changes.
    pub fn never_started(&self, reason: impl Into<String>) -> Result<(), RecordError> {
        match self.advance(Arrival::NeverStarted(Reason { reason: reason.into() })) {
            Err(RecordError::Fenced { state, .. })
                if state == Arrival::NeverStarted(Reason { reason: String::new() }).name() =>
            {
                Ok(())
            }
            result => result,
        }
    }

    /// Notes that the source has recorded the outcome.
    pub fn acknowledge(&self) -> Result<(), RecordError> {
        self.store.acknowledge(self.id)
    }
}

fn departure_name(departure: &Departure) -> &'static str {
    match departure {
        Departure::HandingOver => "handing over",
        Departure::Started(_) => "started",
        Departure::Kept(_) => "kept",
    }
}

fn open_or_make(path: &Path) -> Result<File, RecordError> {
    let options = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).clone();
    options.open(path).map_err(|source| RecordError::File {
        operation: "opening",
        path: path.to_owned(),
        source,
    })
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RecordError> {
    let failed = |source| RecordError::File { operation: "reading", path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(failed)?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_RECORD).read_to_end(&mut bytes).map_err(failed)?;
    limosa_image::cbor::decode(&bytes)
        .map(Some)
        .map_err(|error| RecordError::Malformed { path: path.to_owned(), why: error.to_string() })
}

fn remove(path: &Path) -> Result<(), RecordError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RecordError::File { operation: "removing", path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

fn older(path: &Path, age: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|meta| meta.modified());
    modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|passed| passed >= age))
}
