//! A world of two hosts and one container: counts who runs it.
#![allow(dead_code, reason = "each test uses a part")]

pub mod proxy;

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use limosa_image::{PAGE, Sink, SpaceId, WriteError};
use limosa_migrate::{
    Connect, Destination, Limits, MigrationId, Offer, Outcome, Outgoing, Purpose, ReceiveError, Received,
    Refusal, Remains, StartReport, Store, Transport, receive, unwatched,
};

/// A container that runs in at most one place: whoever starts it checks that.
#[derive(Default)]
pub struct World {
    running: AtomicU32,
    starts: AtomicU32,
}

impl World {
    pub fn start(&self) {
        assert_eq!(self.running.fetch_add(1, Ordering::SeqCst), 0, "the container runs in two places");
        self.starts.fetch_add(1, Ordering::SeqCst);
    }

    pub fn freeze(&self) {
        assert_eq!(self.running.fetch_sub(1, Ordering::SeqCst), 1, "what is frozen was running");
    }

    pub fn running(&self) -> u32 {
        self.running.load(Ordering::SeqCst)
    }
}

/// Everything a sink was given.
#[derive(Default, Debug, Clone, PartialEq, Eq)]
pub struct Content {
    pub states: BTreeMap<String, Vec<u8>>,
    pub pages: BTreeMap<(u32, u64), Vec<u8>>,
    pub blobs: BTreeMap<String, Vec<u8>>,
}

impl Sink for Content {
    fn state(&mut self, name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        self.states.insert(name.to_owned(), cbor.to_vec());
        Ok(())
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        for (number, page) in data.chunks(PAGE as usize).enumerate() {
            self.pages.insert((space.0, start + number as u64 * PAGE), page.to_vec());
        }
        Ok(())
    }

    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        self.pages.retain(|(owner, at), _| *owner != space.0 || *at < start || *at - start >= length);
        Ok(())
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        let mut bytes = Vec::new();
        content
            .read_to_end(&mut bytes)
            .map_err(|source| WriteError::Content { name: name.to_owned(), source })?;
        let length = bytes.len() as u64;
        self.blobs.insert(name.to_owned(), bytes);
        Ok(length)
    }
}

/// Bytes that differ from place to place.
pub fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A checkpoint small enough to cut at each of its messages: one of every kind.
pub fn small_checkpoint(sink: &mut dyn Sink) -> Result<(), WriteError> {
    sink.state("tasks", b"\x83\x01\x02\x03")?;
    sink.pages(SpaceId(1), 0x7000_0000, &noise(2 * PAGE as usize, 1))?;
    sink.pages(SpaceId(2), 0x1000, &noise(PAGE as usize, 2))?;
    sink.blob("layer.tar", &mut Cursor::new(noise(5000, 3)))?;
    Ok(())
}

/// A checkpoint whose parts do not fit one message each.
pub fn large_checkpoint(sink: &mut dyn Sink) -> Result<(), WriteError> {
    sink.state("empty", b"")?;
    sink.state("large", &noise((5 << 20) / 2, 4))?;
    for number in 0..20 {
        sink.pages(
            SpaceId(7),
            number << 32,
            &noise(PAGE as usize * (1 + number as usize * 30), number as u32),
        )?;
    }
    sink.blob("empty", &mut Cursor::new(Vec::new()))?;
    sink.blob("large", &mut Cursor::new(noise((3 << 20) + 17, 5)))?;
    Ok(())
}

/// Where a [`Host`] fails, if anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    Preflight,
    Prepare,
    Start,
}

/// A host that takes containers.
pub struct Host {
    pub world: Arc<World>,
    pub content: Content,
    pub fault: Fault,
    pub discarded: u32,
    /// A file that is there while the container runs: it outlives the process that started it.
    pub marker: Option<PathBuf>,
}

impl Host {
    pub fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            content: Content::default(),
            fault: Fault::None,
            discarded: 0,
            marker: None,
        }
    }
}

impl Destination for Host {
    type Prepared = Content;
    type Error = io::Error;

    fn preflight(&mut self, _offer: &Offer) -> Result<(), Vec<Refusal>> {
        if self.fault == Fault::Preflight {
            let refusal =
                |what: &str| Refusal { what: what.to_owned(), why: "not here".to_owned(), remedy: None };
            return Err(vec![refusal("amx"), refusal("the address 192.0.2.1")]);
        }
        Ok(())
    }

    fn sink(&mut self) -> &mut dyn Sink {
        &mut self.content
    }

    fn prepare(&mut self, _offer: &Offer) -> io::Result<Content> {
        match self.fault {
            Fault::Prepare => Err(io::Error::other("no memory left")),
            _ => Ok(std::mem::take(&mut self.content)),
        }
    }

    fn start(&mut self, prepared: Content) -> io::Result<StartReport> {
        if self.fault == Fault::Start {
            return Err(io::Error::other("the first process died"));
        }
        self.world.start();
        if let Some(marker) = &self.marker {
            std::fs::File::create_new(marker)?;
        }
        self.content = prepared;
        Ok(StartReport { start_us: 1, extra: b"report".to_vec() })
    }

    fn discard(&mut self, prepared: Option<Content>) {
        drop(prepared);
        self.content = Content::default();
        self.discarded += 1;
    }

    fn remains(&mut self, _offer: &Offer) -> io::Result<Remains> {
        let running = self.world.running() > 0 || self.marker.as_ref().is_some_and(|marker| marker.exists());
        Ok(if running { Remains::Running(StartReport::default()) } else { Remains::Nothing })
    }
}

/// Bounds that make a test of stalls short.
pub fn short_limits() -> Limits {
    Limits {
        connect: Duration::from_secs(5),
        hello: Duration::from_secs(5),
        heartbeat: Duration::from_millis(50),
        silence: Duration::from_millis(400),
        stall: Duration::from_millis(400),
        answer: Duration::from_secs(5),
        content: Duration::from_secs(5),
        ready: Duration::from_secs(5),
        hand_over: Duration::from_secs(2),
        started: Duration::from_secs(2),
        outcome: Duration::from_secs(20),
        max_state: 1 << 24,
    }
}

/// Two connected transports.
pub fn wire() -> (Transport, Transport) {
    let (a, b) = UnixStream::pair().expect("socketpair");
    (Transport::from_unix(a, "test").expect("transport"), Transport::from_unix(b, "test").expect("transport"))
}

/// A way to a host for questions: each runs a new receiver over the host's records.
pub struct Ways {
    pub world: Arc<World>,
    pub store: Store,
    pub limits: Limits,
    pub asked: u32,
}

impl Connect for Ways {
    type Error = io::Error;

    fn connect(&mut self, purpose: Purpose, _limits: &Limits) -> io::Result<Transport> {
        assert_eq!(purpose, Purpose::Ask);
        self.asked += 1;
        let (ours, theirs) = wire();
        let (world, store, limits) = (Arc::clone(&self.world), self.store.clone(), self.limits.clone());
        std::thread::spawn(move || {
            let answered = receive(theirs, &mut Host::new(&world), &store, &limits, unwatched());
            assert!(matches!(answered, Ok(Received::Answered { .. })), "{answered:?}");
        });
        Ok(ours)
    }

    fn address(&self) -> String {
        "test:".to_owned()
    }
}

/// How the source's side of one migration ended.
#[derive(Debug)]
pub enum Source {
    /// An error before the hand-over, so the source went on.
    Stayed(String),
    /// What the hand-over said.
    Ended(Outcome),
}

/// The source's whole side; afterwards the container runs here if the protocol says that it is ours.
pub fn migrate(
    transport: Transport,
    world: &World,
    store: &Store,
    ways: &mut Ways,
    offer: &Offer,
    checkpoint: fn(&mut dyn Sink) -> Result<(), WriteError>,
) -> Source {
    let mut frozen = false;
    let result = (|| -> Result<Outcome, String> {
        let text = |error: &dyn std::error::Error| format!("{error}: {:?}", error.source());
        let negotiating =
            Outgoing::connect(transport, &ways.limits.clone(), unwatched()).map_err(|error| text(&error))?;
        let mut sending = negotiating.negotiate(offer).map_err(|error| text(&error))?;
        world.freeze();
        frozen = true;
        checkpoint(&mut sending).map_err(|error| text(&error))?;
        let ready = sending.finish().map_err(|error| text(&error))?;
        ready.hand_over(store, ways, || Ok::<_, io::Error>(())).map_err(|error| text(&error))
    })();
    let ours = matches!(result, Err(_) | Ok(Outcome::Kept { .. }));
    if ours && frozen {
        world.start();
    }
    match result {
        Ok(outcome) => Source::Ended(outcome),
        Err(error) => Source::Stayed(error),
    }
}

/// Two hosts with their records, for one migration.
pub struct Scene {
    pub world: Arc<World>,
    pub offer: Offer,
    pub source: Store,
    pub destination: Store,
    pub limits: Limits,
    _dirs: [tempfile::TempDir; 2],
}

impl Scene {
    pub fn new(limits: Limits) -> Self {
        let dirs = [tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory")];
        let world = Arc::new(World::default());
        world.start();
        Self {
            world,
            offer: Offer::new(MigrationId::random().expect("id"), "redis"),
            source: Store::open(dirs[0].path()).expect("store"),
            destination: Store::open(dirs[1].path()).expect("store"),
            limits,
            _dirs: dirs,
        }
    }

    pub fn ways(&self) -> Ways {
        Ways {
            world: Arc::clone(&self.world),
            store: self.destination.clone(),
            limits: self.limits.clone(),
            asked: 0,
        }
    }

    /// Runs both sides, the destination on a thread of its own, over these transports.
    pub fn run(
        &self,
        ours: Transport,
        theirs: Transport,
        fault: Fault,
        checkpoint: fn(&mut dyn Sink) -> Result<(), WriteError>,
    ) -> (Source, Host, Result<Received, ReceiveError>) {
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut host = Host { fault, ..Host::new(&self.world) };
                let received = receive(theirs, &mut host, &self.destination, &self.limits, unwatched());
                (host, received)
            });
            let source = migrate(ours, &self.world, &self.source, &mut self.ways(), &self.offer, checkpoint);
            let (host, received) = receiver.join().expect("the receiver");
            (source, host, received)
        })
    }
}
