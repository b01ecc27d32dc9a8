//! Migration of a container: what the protocol's two sides do with it.

use std::error::Error;
use std::time::{Duration, Instant};

use limosa_engine::Report;
use limosa_engine::resources::processor;
use limosa_image::{Checkpoint, Meta, Sink, Staging, WriteError, cbor};
use limosa_kernel::proc::ProcDir;
use limosa_migrate::record::DepartureRecord;
use limosa_migrate::{
    Address, Connect, Destination, FinishError, HandOverError, Limits, MigrationId, NegotiateError, Offer,
    Outcome, Outgoing, PeerError, Purpose, Refusal, Remains, StartReport, Store, Watch,
};
use rustix::process::Signal;

use crate::capture::{ContainerCaptureError, ContainerState, Source};
use crate::config::Name;
use crate::fate::Fate;
use crate::rebuild::{self, Changes, CheckedRoot, Prepared, RebuildError, Restored};
use crate::registry::{Record, Registry};
use crate::stop;
use crate::terminal::Keep;

/// How long a container must have looked alive, untraced and not killed, to have survived whoever was starting it.
const QUIET: Duration = Duration::from_millis(300);
/// How long its maker's death may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a migration went, for the source.
#[derive(Debug)]
pub struct Migrated {
    /// Its ID, for later questions.
    pub id: MigrationId,
    /// Who owns the container now.
    pub outcome: Outcome,
    /// Microseconds from the freeze to the destination's start, as the source saw it.
    pub frozen_us: u64,
}

/// Moves the container `source` to whatever `connect` reaches, where the processor must have what `processor` says. On an
/// error it runs on here.
pub fn migrate<C: Connect>(
    registry: &Registry,
    source: Source,
    connect: &mut C,
    store: &Store,
    watch: Watch<'_>,
    processor: processor::Rule,
    report: &mut Report,
) -> Result<Migrated, MigrateError> {
    let limits = Limits::default();
    source.refuse_unsealable()?;
    report.phase("pre-flight", |_| source.refuse_early(registry))?;
    let id = MigrationId::random().map_err(MigrateError::Id)?;
    let mut offer = Offer::new(id, source.state().config.name.as_str());
    if processor == processor::Rule::Features {
        offer.cpu_features = processor::features().map_err(MigrateError::Processor)?;
    }
    offer.memory_bytes = resident_bytes(source.pid());
    offer.extra = cbor::encode(source.state()).map_err(|error| MigrateError::Encode(Box::new(error)))?;
    if let Some(network) = &source.state().config.network {
        offer.addresses = network.addresses.iter().map(ToString::to_string).collect();
    }
    let mut outgoing = report.phase("negotiate", |_| -> Result<_, MigrateError> {
        let transport = connect
            .connect(Purpose::Migrate, &limits)
            .map_err(|error| MigrateError::Connect(Box::new(error)))?;
        Ok(Outgoing::connect(transport, &limits, watch)?.negotiate(&offer)?)
    })?;
    let destination = connect.address().parse::<Address>().map(|address| address.redacted());
    let fate = gone_to(destination.as_deref().unwrap_or("another host"));
    let source = if outgoing.sends_again() {
        source
    } else {
        source.stored_at_once("the destination, an older Limosa, takes memory only once")
    };
    let sent_at = report.elapsed_us();
    let mut captured = source.capture(registry, &mut outgoing, report).map_err(MigrateError::BrokenOff)?;
    let ready = match report.phase("destination builds", |_| outgoing.finish()) {
        Ok(ready) => ready.of_instance(captured.instance()),
        Err(error) => {
            drop(captured);
            let FinishError::Peer(peer) = &error;
            excuse(id, peer, connect, &limits);
            return Err(error.into());
        }
    };
    let outcome = report.phase("hand over", |_| {
        ready.hand_over(store, connect, || {
            captured.disconnect()?;
            captured.seal()
        })
    });
    let frozen_us = report.elapsed_us() - report.start_us("freeze").unwrap_or(sent_at);
    match outcome {
        Ok(outcome) => {
            match &outcome {
                Outcome::Moved(_) => report.phase("end", |_| captured.end(registry, &fate))?,
                Outcome::Kept { .. } => drop(captured.release()?),
                // Sealed, it stays frozen without us, until somebody finds out.
                Outcome::Unknown { .. } => drop(captured),
            }
            if !matches!(outcome, Outcome::Unknown { .. }) {
                close(store, id);
            }
            Ok(Migrated { id, outcome, frozen_us })
        }
        Err(error) => {
            captured.release()?;
            close(store, id);
            if let HandOverError::Peer(peer) = &error {
                excuse(id, peer, connect, &limits);
            }
            Err(error.into())
        }
    }
}

/// Where a killed receiver may have left somebody to be asked: says that nobody will. The container runs on here already.
fn excuse<C: Connect>(id: MigrationId, error: &PeerError, connect: &mut C, limits: &Limits) {
    if error.is_hang_up() && connect.has_heirs() {
        limosa_migrate::excuse(id, connect, limits);
    }
}

/// Notes that the outcome was acted on. Without the note [`settle`] finds that there is nothing to be done.
fn close(store: &Store, id: MigrationId) {
    if let Err(error) = store.close(id) {
        tracing::warn!(%id, %error, "it could not be recorded that the migration is settled");
    }
}

/// Finds out what became of a migration that was handed over from here and is not settled, and acts on it: the container
/// that is frozen here is ended, or runs on.
pub fn settle(registry: &Registry, store: &Store, record: &DepartureRecord) -> Result<Outcome, SettleError> {
    let mut address: Address = record.destination.parse()?;
    let outcome = limosa_migrate::settle(store, record.id, &mut address, &Limits::default())?;
    let name: Name = record.container.parse()?;
    let here = match registry.load(&name) {
        Ok(here) if record.instance.is_empty() || here.instance() == record.instance => Some(here),
        // That one is gone already; another of its name has come.
        Ok(_) | Err(crate::RegistryError::Unknown { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    match (&outcome, here) {
        (Outcome::Moved(_), Some(_)) => {
            Fate::tell(&registry.paths(&name), &gone_to(&address.redacted()));
            stop::remove(registry, &name, true)?;
        }
        (Outcome::Kept { .. }, Some(here)) => {
            here.connect()?;
            here.cgroup.freeze(false)?;
        }
        (Outcome::Moved(_) | Outcome::Kept { .. }, None) => {}
        (Outcome::Unknown { .. }, _) => return Ok(outcome),
    }
    close(store, record.id);
    Ok(outcome)
}

/// What is said of a container that has moved.
fn gone_to(destination: &str) -> String {
    format!("it moved to {destination}")
}

/// A migration could not be settled.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// Its record.
    #[error(transparent)]
    Record(#[from] limosa_migrate::SettleError),
    /// The destination in its record.
    #[error("the record of the migration is damaged")]
    Address(#[from] limosa_migrate::AddressError),
    /// The name in its record.
    #[error("the record of the migration is damaged")]
    Name(#[from] crate::ParseError),
    /// The container here.
    #[error(transparent)]
    Registry(#[from] crate::RegistryError),
    /// The container here could not be removed.
    #[error(transparent)]
    Stop(#[from] crate::StopError),
    /// The container here could not be connected again.
    #[error(transparent)]
    Link(#[from] crate::LinkError),
    /// The container here could not be thawed.
    #[error(transparent)]
    Cgroup(#[from] crate::CgroupError),
}

/// Resident memory of a process, bytes: an estimate for the destination.
fn resident_bytes(pid: i32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).map_or(0, |pages| pages * 4096)
}

/// A container did not move.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// It could not be captured.
    #[error(transparent)]
    Capture(#[from] ContainerCaptureError),
    /// It could not be captured, or not be sent.
    #[error("the migration was broken off; the container runs on here")]
    BrokenOff(#[source] ContainerCaptureError),
    /// The features of the processor could not be read.
    #[error(transparent)]
    Processor(limosa_kernel::Error),
    /// No random numbers.
    #[error("cannot choose an ID for the migration")]
    Id(#[source] std::io::Error),
    /// The description could not be encoded.
    #[error("cannot describe the container")]
    Encode(#[source] Box<dyn Error + Send + Sync>),
    /// The destination could not be reached.
    #[error("cannot reach the destination")]
    Connect(#[source] Box<dyn Error + Send + Sync>),
    /// The conversation failed.
    #[error("the migration was broken off; the container runs on here")]
    Peer(#[from] PeerError),
    /// The destination does not take it.
    #[error("the destination did not take the container; it runs on here")]
    Negotiate(#[from] NegotiateError),
    /// The destination could not build it.
    #[error("the destination could not build the container; it runs on here")]
    Finish(#[from] FinishError),
    /// The hand-over failed.
    #[error("the container could not be handed over; it runs on here")]
    HandOver(#[from] HandOverError),
}

/// The destination's side: containers that arrive are built in `registry`.
pub struct Arrivals<'a> {
    registry: &'a Registry,
    staging: Staging,
    checked_root: Option<CheckedRoot>,
    keep: Keep<'a>,
    /// What was built and when.
    pub report: Report,
    /// The container that was started, if one was.
    pub restored: Option<Restored>,
}

impl<'a> Arrivals<'a> {
    /// A destination for one migration; `keep` keeps the terminal of a container that has one.
    pub fn new(registry: &'a Registry, keep: Keep<'a>) -> Result<Self, WriteError> {
        let (staging, report) = (Staging::new()?, Report::default());
        Ok(Self { registry, staging, checked_root: None, keep, report, restored: None })
    }

    /// All reasons against taking the container.
    fn objections(&mut self, state: &ContainerState) -> Vec<Refusal> {
        let refusal = |what: &str, why: String, remedy: Option<&str>| Refusal {
            what: what.into(),
            why,
            remedy: remedy.map(Into::into),
        };
        let mut objections = Vec::new();
        let name = &state.config.name;
        if self.registry.paths(name).directory().exists() {
            let why = format!("there is a container {name} here already");
            objections.push(refusal("name", why, Some("remove or rename one of them")));
        }
        match rebuild::check_root(state) {
            Ok(checked) => self.checked_root = Some(checked),
            Err(error) => objections.push(refusal("read-only layer", chain(&error), None)),
        }
        if let Some(network) = &state.config.network
            && !crate::link::exists(&network.bridge)
        {
            let why = format!("there is no bridge {} here", network.bridge);
            objections.push(refusal("network", why, Some("make it with `ip link add NAME type bridge`")));
        }
        objections
    }
}

/// What this processor lacks of `features`.
fn lacking(features: &[String]) -> Option<Refusal> {
    let why = match processor::missing(features) {
        Ok(missing) if missing.is_empty() => return None,
        Ok(missing) => format!(
            "this processor does not have {}: programs choose their code by it when they start, and would die of SIGILL",
            processor::names(&missing)
        ),
        Err(error) => error.to_string(),
    };
    let remedy =
        "migrate to a processor that has all of it, or, if the programs do not choose, with --cpu registers";
    Some(Refusal { what: "processor".into(), why, remedy: Some(remedy.into()) })
}

/// An error with all its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl Destination for Arrivals<'_> {
    type Prepared = Box<Prepared>;
    type Error = ArrivalError;

    fn preflight(&mut self, offer: &Offer) -> Result<(), Vec<Refusal>> {
        let mut objections = match cbor::decode::<ContainerState>(&offer.extra) {
            Ok(state) => self.objections(&state),
            Err(error) => vec![Refusal {
                what: "description".into(),
                why: format!("the container's description cannot be understood: {error}"),
                remedy: Some("use the same version of Limosa on both hosts".into()),
            }],
        };
        objections.extend(lacking(&offer.cpu_features));
        if objections.is_empty() { Ok(()) } else { Err(objections) }
    }

    fn sink(&mut self) -> &mut dyn Sink {
        &mut self.staging
    }

    fn prepare(&mut self, offer: &Offer) -> Result<Self::Prepared, ArrivalError> {
        let staging = std::mem::replace(&mut self.staging, Staging::new()?);
        let checkpoint: Checkpoint = staging.into_checkpoint(Meta::new("", offer.cpu_features.clone()))?;
        let mut prepared = rebuild::prepare_on(
            self.registry,
            &checkpoint,
            Changes::default(),
            self.checked_root.as_ref(),
            &mut self.report,
        )?;
        if prepared.name().as_str() != offer.container {
            return Err(ArrivalError::OtherName);
        }
        prepared.have_terminal_kept(self.keep)?;
        Ok(Box::new(prepared))
    }

    fn start(&mut self, prepared: Self::Prepared) -> Result<StartReport, ArrivalError> {
        let restored = prepared.start(self.registry, &mut self.report)?;
        self.restored = Some(restored);
        Ok(StartReport { start_us: self.report.duration_us("start").unwrap_or(0), ..StartReport::default() })
    }

    fn discard(&mut self, prepared: Option<Self::Prepared>) {
        drop(prepared);
        if let Ok(empty) = Staging::new() {
            self.staging = empty;
        }
    }

    fn remains(&mut self, offer: &Offer) -> Result<Remains, ArrivalError> {
        remains(self.registry, offer)
    }
}

/// Whether the container of an offer runs here, whose receiver died while it was starting it. If not, nothing of it is left
/// afterwards.
pub fn remains(registry: &Registry, offer: &Offer) -> Result<Remains, ArrivalError> {
    let Ok(name) = offer.container.parse::<Name>() else { return Ok(Remains::Nothing) };
    remains_of(registry, &name)
}

/// The same of a container by its name, which whoever was starting it had reserved.
pub fn remains_of(registry: &Registry, name: &Name) -> Result<Remains, ArrivalError> {
    match registry.load(name) {
        Ok(record) if outlived_its_maker(&record) => {
            // Perhaps that is all that was left to be done.
            record.connect()?;
            if let Err(error) = record.announce() {
                tracing::warn!(%error, %name, "the container's addresses could not be announced");
            }
            Ok(Remains::Running(StartReport::default()))
        }
        Ok(_) => {
            stop::remove(registry, name, true)?;
            Ok(Remains::Nothing)
        }
        Err(crate::RegistryError::Unknown { .. }) => Ok(Remains::Nothing),
        Err(error) => Err(error.into()),
    }
}

/// Whether a container runs and will go on running, although whoever was starting it has just died.
///
/// The kernel gives back a dying process's locks and connections before it kills what is to die with it: for a moment a
/// container that was not committed looks alive. It is traced by the dying process, then it has SIGKILL pending, then it
/// is gone; only what has been neither for a while has been let go.
fn outlived_its_maker(record: &Record) -> bool {
    let kill = 1_u64 << (Signal::KILL.as_raw() - 1);
    let begun = Instant::now();
    let mut quiet_since = begun;
    while let Some(pid) = record.running() {
        let Ok(status) = ProcDir::open(pid).and_then(|proc| proc.status()) else { return false };
        let killed = (status.signals.pending | status.signals.shared_pending) & kill != 0;
        if killed || status.tracer_pid != 0 {
            quiet_since = Instant::now();
        }
        // Something else may be tracing it, for as long as it likes.
        if quiet_since.elapsed() > QUIET || begun.elapsed() > PATIENCE {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// A container that arrived could not be built or started.
#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    /// It could not be built.
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    /// It could not be staged.
    #[error(transparent)]
    Stage(#[from] WriteError),
    /// It is not the container that was offered.
    #[error("the checkpoint is not of the container that was offered")]
    OtherName,
    /// What is known here could not be read.
    #[error(transparent)]
    Registry(#[from] crate::RegistryError),
    /// What runs could not be connected.
    #[error(transparent)]
    Link(#[from] crate::LinkError),
    /// Remains could not be removed.
    #[error(transparent)]
    Stop(#[from] crate::StopError),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Before anything is frozen, and each by its name.
    #[test]
    fn a_destination_without_the_features_objects() {
        let state = std::env::temp_dir().join("limosa-migration-test");
        let registry = Registry::new(&state);
        let mut arrivals = Arrivals::new(&registry, &|_, _, _| unreachable!("nothing arrives")).unwrap();
        let mut offer = Offer::new(MigrationId::from_bytes([7; 16]), "web");
        let objections = |arrivals: &mut Arrivals, offer: &Offer| {
            let mut objections = arrivals.preflight(offer).unwrap_err();
            // There is no description of a container in this offer.
            objections.retain(|objection| objection.what != "description");
            objections.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        offer.cpu_features = processor::features().unwrap();
        assert_eq!(objections(&mut arrivals, &offer), [""; 0]);
        offer.cpu_features.extend(["no_such_feature".to_owned(), "no\x1bfeature".to_owned()]);
        let [objection] = objections(&mut arrivals, &offer).try_into().unwrap();
        assert!(objection.contains("does not have no_such_feature, no\u{fffd}feature:"), "{objection}");
    }
}
