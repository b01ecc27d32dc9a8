//! A whole destination against a source that sends anything. The first byte says how far the two agree before.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use limosa_image::{Sink, SpaceId, WriteError};
use limosa_migrate::frame::{Header, Kind, PREAMBLE};
use limosa_migrate::message::{Hello, encode};
use limosa_migrate::version::SPOKEN;
use limosa_migrate::{
    Destination, Limits, MigrationId, Offer, Received, Refusal, Remains, StartReport, Store, Transport,
    receive, unwatched,
};

/// Takes everything and keeps only how much it was.
#[derive(Default)]
struct Scale {
    bytes: u64,
}

impl Sink for Scale {
    fn state(&mut self, _name: &str, cbor: &[u8]) -> Result<(), WriteError> {
        self.bytes += cbor.len() as u64;
        Ok(())
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        assert!(start.is_multiple_of(4096) && data.len().is_multiple_of(4096), "space {space}");
        assert!(start.checked_add(data.len() as u64).is_some());
        self.bytes += data.len() as u64;
        Ok(())
    }

    fn blob(&mut self, name: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        let failed = |source| WriteError::Content { name: name.to_owned(), source };
        std::io::copy(content, &mut std::io::sink()).map_err(failed)
    }
}

impl Destination for Scale {
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

    fn start(&mut self, _prepared: ()) -> Result<StartReport, std::io::Error> {
        Ok(StartReport::default())
    }

    fn discard(&mut self, _prepared: Option<()>) {}

    fn remains(&mut self, _offer: &Offer) -> Result<Remains, std::io::Error> {
        Ok(Remains::Nothing)
    }
}

fn append(stream: &mut Vec<u8>, kind: Kind, payload: &[u8]) {
    stream.extend_from_slice(&Header::new(kind, &[payload]).0);
    stream.extend_from_slice(payload);
}

/// Turns `[kind, length, payload...]*` into frames with right checksums, so that the fuzzer gets past them.
fn framed(stream: &mut Vec<u8>, mut bytes: &[u8]) {
    while let [number, length, rest @ ..] = bytes {
        let Some(kind) = Kind::from_wire(number % 22 + 1) else { return };
        let length = usize::from(*length).min(rest.len()).min(kind.max_payload());
        let (payload, rest) = rest.split_at(length);
        append(stream, kind, payload);
        bytes = rest;
    }
}

fn store() -> &'static Store {
    static STORE: OnceLock<Store> = OnceLock::new();
    STORE.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("limosa-fuzz-{}", std::process::id()));
        Store::open(dir).expect("a directory for records")
    })
}

fuzz_target!(|input: (u8, Vec<u8>)| {
    let (stage, bytes) = input;
    let mut stream = Vec::new();
    if stage & 3 > 0 {
        stream.extend_from_slice(&PREAMBLE);
    }
    if stage & 3 > 1 {
        let hello = Hello { versions: SPOKEN, software: String::new() };
        append(&mut stream, Kind::Hello, &encode(Kind::Hello, &hello).expect("encode"));
    }
    if stage & 3 > 2 {
        let offer = Offer::new(MigrationId::random().expect("random"), "fuzz");
        append(&mut stream, Kind::Offer, &encode(Kind::Offer, &offer).expect("encode"));
    }
    if stage & 4 > 0 {
        stream.extend_from_slice(&bytes)
    } else {
        framed(&mut stream, &bytes)
    }

    let limits = Limits { answer: Duration::from_millis(50), ..Limits::default() };
    let (mut peer, socket) = UnixStream::pair().expect("socketpair");
    let writing = std::thread::spawn(move || {
        let _ = peer.write_all(&stream);
        let _ = peer.shutdown(Shutdown::Write);
        let _ = std::io::copy(&mut peer, &mut std::io::sink());
    });
    let transport = Transport::from_unix(socket, "fuzz").expect("transport");
    let received = receive(transport, &mut Scale::default(), store(), &limits, unwatched());
    // A start needs a whole migration: an offer, an end whose digest is right, and a hand-over.
    if let Ok(Received::Started { .. }) = received {
        assert_eq!(stage & 3, 3, "a start without an offer");
    }
    writing.join().expect("writer");
    let _ = store().prune(Duration::ZERO);
});
