//! How fast memory goes through the protocol: `cargo run --release --example throughput -- [MEBIBYTES]`.
//!
//! Prints the rate over a socket pair and over TLS on the loopback interface, into a sink that drops everything; both
//! sides share the machine's cores.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use limosa_image::{Sink, SpaceId, WriteError};
use limosa_migrate::{
    Connect, Destination, Limits, ListenOptions, Listener, MigrationId, Offer, Outgoing, Purpose, Refusal,
    Remains, StartReport, Store, Transport, receive, unwatched,
};

struct Drain;

impl Sink for Drain {
    fn state(&mut self, _name: &str, _cbor: &[u8]) -> Result<(), WriteError> {
        Ok(())
    }

    fn pages(&mut self, _space: SpaceId, _start: u64, _data: &[u8]) -> Result<(), WriteError> {
        Ok(())
    }

    fn forget(&mut self, _space: SpaceId, _start: u64, _length: u64) -> Result<(), WriteError> {
        Ok(())
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        let failed = |source| WriteError::Content { name: name.to_owned(), source };
        std::io::copy(content, &mut std::io::sink()).map_err(failed)
    }
}

impl Destination for Drain {
    type Prepared = ();
    type Error = std::io::Error;

    fn preflight(&mut self, _offer: &Offer) -> Result<(), Vec<Refusal>> {
        Ok(())
    }

    fn sink(&mut self) -> &mut dyn Sink {
        self
    }

    fn prepare(&mut self, _offer: &Offer) -> Result<(), std::io::Error> {
        Ok(())
    }

    fn start(&mut self, (): ()) -> Result<StartReport, std::io::Error> {
        Ok(StartReport::default())
    }

    fn discard(&mut self, _prepared: Option<()>) {}

    fn remains(&mut self, _offer: &Offer) -> Result<Remains, std::io::Error> {
        Ok(Remains::Nothing)
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[allow(clippy::cast_precision_loss, reason = "a rate for a person to read")]
/// Sends `length` bytes in calls of `piece` bytes and prints the rate.
fn send(transport: Transport, name: &str, length: u64, piece: usize) -> Result<(), Failure> {
    let offer = Offer::new(MigrationId::random()?, "throughput");
    let mut sending = Outgoing::connect(transport, &Limits::default(), unwatched())?.negotiate(&offer)?;
    let data = vec![0x5a; piece];
    let began = Instant::now();
    for number in 0..length / piece as u64 {
        // Every other piece, as dirty pages lie.
        sending.pages(SpaceId(1), 2 * number * piece as u64, &data)?;
    }
    let ready = sending.finish()?;
    let seconds = began.elapsed().as_secs_f64();
    let rate = length as f64 / seconds / 1e6;
    println!("{name}, {:>4} KiB a piece: {rate:.0} MB/s; {:?}", piece >> 10, ready.counters());
    ready.abort("measured");
    Ok(())
}

fn main() -> Result<(), Failure> {
    let mebibytes: u64 = std::env::args().nth(1).map_or(Ok(512), |text| text.parse())?;
    let dir = tempfile::tempdir()?;
    let store = Store::open(dir.path())?;
    let limits = Limits::default();
    for piece in [256 << 10, 4 << 10] {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = Transport::from_unix(theirs, "destination")?;
        std::thread::scope(|scope| {
            // It ends with the source's `Abort`.
            scope.spawn(|| receive(theirs, &mut Drain, &store, &limits, unwatched()).map(drop));
            send(Transport::from_unix(ours, "source")?, "socket pair", mebibytes << 20, piece)
        })?;
        let listen = ListenOptions::default();
        let brief = Limits { outcome: std::time::Duration::ZERO, ..limits.clone() };
        let listener = Listener::bind("127.0.0.1:0".parse()?, listen, brief)?;
        let mut address = listener.destination("127.0.0.1");
        std::thread::scope(|scope| {
            let store = &store;
            scope.spawn(move || listener.serve(&mut Drain, store, unwatched()).map(drop));
            let transport = address.connect(Purpose::Migrate, &limits)?;
            send(transport, "TLS 1.3", mebibytes << 20, piece)
        })?;
    }
    Ok(())
}
