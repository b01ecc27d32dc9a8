//! A peer that is not what it should be: a clear error, no panic, no more memory than what it really sent.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Host, World, short_limits};
use limosa_image::{Sink, SpaceId};
use limosa_migrate::frame::{FrameError, Header, Kind, MAX_CONTROL, MAX_DATA, PREAMBLE, read_frame};
use limosa_migrate::message::{Accept, Blob, BlobEnd, End, Hello, Offer, Reason, State, encode};
use limosa_migrate::version::VersionRange;
use limosa_migrate::{
    ContentError, LinkError, MigrationId, Outgoing, PeerError, ReceiveError, Received, Store, Transport,
    receive, unwatched,
};
use proptest::prelude::*;
use serde::Serialize;

/// One message.
fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Header::new(kind, &[payload]).0.to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

fn message<T: Serialize>(kind: Kind, message: &T) -> Vec<u8> {
    frame(kind, &encode(kind, message).expect("encode"))
}

fn hello(lowest: u32, highest: u32) -> Vec<u8> {
    let hello = Hello { versions: VersionRange { lowest, highest }, software: "a \u{1b}[31mtest".to_owned() };
    let mut bytes = PREAMBLE.to_vec();
    bytes.extend(message(Kind::Hello, &hello));
    bytes
}

fn offer() -> Vec<u8> {
    message(Kind::Offer, &Offer::new(MigrationId::random().expect("id"), "redis"))
}

/// The beginning of a migration, and then this.
fn after_offer(more: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = hello(1, 1);
    bytes.extend(offer());
    for part in more {
        bytes.extend_from_slice(part);
    }
    bytes
}

/// What a destination makes of these bytes.
fn destination_reads(bytes: &[u8]) -> Result<Received, ReceiveError> {
    let (mut peer, socket) = UnixStream::pair().expect("socketpair");
    let dir = tempfile::tempdir().expect("directory");
    let store = Store::open(dir.path()).expect("store");
    let world = Arc::new(World::default());
    let mut drain = peer.try_clone().expect("dup");
    let draining = std::thread::spawn(move || std::io::copy(&mut drain, &mut std::io::sink()));
    let bytes = bytes.to_vec();
    let writing = std::thread::spawn(move || {
        // The destination may hang up before it has read everything.
        let _ = peer.write_all(&bytes);
        let _ = peer.shutdown(Shutdown::Write);
    });
    let transport = Transport::from_unix(socket, "test").expect("transport");
    let result = receive(transport, &mut Host::new(&world), &store, &short_limits(), unwatched());
    writing.join().expect("writer");
    let _ = draining.join().expect("drain");
    assert_eq!(world.running(), u32::from(matches!(result, Ok(Received::Started { .. }))));
    result
}

fn peer_error(result: Result<Received, ReceiveError>) -> PeerError {
    match result {
        Err(ReceiveError::Peer(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn frame_error(result: Result<Received, ReceiveError>) -> FrameError {
    match peer_error(result) {
        PeerError::Link(LinkError::Frame(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn something_that_is_not_limosa_is_quoted() {
    let error = frame_error(destination_reads(b"Welcome to host b!\x1b[2J\r\nLast login: yesterday\r\n"));
    let FrameError::NotLimosa { said } = &error else { panic!("{error:?}") };
    assert!(said.contains("Welcome to host b!") && !said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn a_stream_whose_line_ends_were_translated_is_refused() {
    let mut bytes = hello(1, 1);
    bytes.remove(6);
    assert!(matches!(frame_error(destination_reads(&bytes)), FrameError::NotLimosa { .. }));
}

#[test]
fn no_common_version_names_both_ranges() {
    let error = peer_error(destination_reads(&hello(7, 9)));
    let text = error.to_string();
    assert!(matches!(error, PeerError::NoCommonVersion { .. }), "{error:?}");
    assert!(text.contains("7 to 9") && text.contains("speaks 1") && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn a_length_above_the_limit_is_refused_before_anything_is_allocated() {
    for (kind, length) in [
        (Kind::Offer, u32::MAX),
        (Kind::Offer, MAX_CONTROL as u32 + 1),
        (Kind::Beat, 9),
        (Kind::Pages, 1 << 30),
    ] {
        let mut header = Header::new(kind, &[]).0;
        header[..4].copy_from_slice(&length.to_le_bytes());
        let mut bytes = hello(1, 1);
        bytes.extend_from_slice(&header);
        let error = frame_error(destination_reads(&bytes));
        assert!(matches!(error, FrameError::TooLong { .. }), "{error:?}");
    }
}

#[test]
fn each_malformed_frame_is_told_apart() {
    let mut unknown = Header::new(Kind::Offer, &[]).0;
    unknown[4] = 99;
    let mut reserved = Header::new(Kind::Offer, &[]).0;
    reserved[6] = 1;
    let mut damaged = offer();
    damaged[20] ^= 1;
    let truncated = offer()[..30].to_vec();
    let with = |bytes: &[u8]| frame_error(destination_reads(&[hello(1, 1), bytes.to_vec()].concat()));
    assert!(matches!(with(&unknown), FrameError::UnknownKind { number: 99 }));
    assert!(matches!(with(&reserved), FrameError::Reserved { .. }));
    assert!(matches!(with(&damaged), FrameError::Damaged { kind: Kind::Offer, .. }));
    assert!(matches!(with(&truncated), FrameError::Truncated));
    assert!(matches!(with(&[]), FrameError::Closed));
}

#[test]
fn every_message_in_the_wrong_place_is_an_error() {
    let state = message(Kind::State, &State { name: "tasks".to_owned(), length: 10 });
    for number in 1..=23 {
        let kind = Kind::from_wire(number).expect("a kind");
        if matches!(kind, Kind::Beat | Kind::Echo) {
            continue;
        }
        let junk = frame(kind, b"\xa0");
        let mut first = PREAMBLE.to_vec();
        first.extend_from_slice(&junk);
        assert!(destination_reads(&first).is_err(), "{kind:?} first");
        assert!(destination_reads(&[hello(1, 1), junk.clone()].concat()).is_err(), "{kind:?} as an offer");
        assert!(destination_reads(&after_offer(std::slice::from_ref(&junk))).is_err(), "{kind:?} as content");
        assert!(destination_reads(&after_offer(&[state.clone(), junk])).is_err(), "{kind:?} in a state");
    }
}

/// Content, and the error that it must meet.
type Case = (Vec<Vec<u8>>, fn(&ContentError) -> bool);

#[test]
fn content_that_contradicts_itself_is_refused() {
    let blob = message(Kind::Blob, &Blob { name: "layer".to_owned() });
    let pages = |start: u64, length: usize| {
        let mut payload = [1u32.to_le_bytes(), [0; 4]].concat();
        payload.extend_from_slice(&start.to_le_bytes());
        payload.resize(16 + length, 7);
        frame(Kind::Pages, &payload)
    };
    let end = End { states: 0, memory_bytes: 0, blobs: 0, blob_bytes: 0, messages: 0, digest: vec![0; 32] };
    let cases: [Case; 8] = [
        (vec![message(Kind::State, &State { name: "a".to_owned(), length: u64::MAX })], |error| {
            matches!(error, ContentError::StateLength { .. })
        }),
        (
            vec![
                message(Kind::State, &State { name: "a".to_owned(), length: 3 }),
                frame(Kind::StateData, b"four"),
            ],
            |error| matches!(error, ContentError::StateLength { length: 4, limit: 3, .. }),
        ),
        (vec![pages(0x1001, 4096)], |error| matches!(error, ContentError::Pages { .. })),
        (vec![pages(0x1000, 4095)], |error| matches!(error, ContentError::Pages { .. })),
        (vec![pages(0x1000, 0)], |error| matches!(error, ContentError::Pages { .. })),
        (vec![pages(u64::MAX - 4095, 8192)], |error| matches!(error, ContentError::Pages { .. })),
        (
            vec![blob, frame(Kind::BlobData, b"four"), message(Kind::BlobEnd, &BlobEnd { length: 5 })],
            |error| matches!(error, ContentError::BlobLength { received: 4, claimed: 5, .. }),
        ),
        (vec![message(Kind::End, &end)], |error| matches!(error, ContentError::Totals { .. })),
    ];
    for (number, (content, expected)) in cases.into_iter().enumerate() {
        let result = destination_reads(&after_offer(&content));
        assert!(
            matches!(result, Err(ReceiveError::Content(ref error)) if expected(error)),
            "{number}: {result:?}"
        );
    }
}

#[test]
fn a_source_that_only_breathes_is_given_up() {
    let (mut peer, socket) = UnixStream::pair().expect("socketpair");
    let dir = tempfile::tempdir().expect("directory");
    let store = Store::open(dir.path()).expect("store");
    let mut limits = short_limits();
    limits.content = Duration::from_millis(700);
    peer.write_all(&after_offer(&[])).expect("write");
    let mut reader = peer.try_clone().expect("dup");
    let drain = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    let breathing = std::thread::spawn(move || {
        while peer.write_all(&frame(Kind::Beat, &[0; 8])).is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let began = Instant::now();
    let transport = Transport::from_unix(socket, "test").expect("transport");
    let result = receive(transport, &mut Host::new(&Arc::default()), &store, &limits, unwatched());
    assert!(matches!(peer_error(result), PeerError::Link(LinkError::Late { awaited: "content", .. })));
    assert!(began.elapsed() < Duration::from_secs(6));
    breathing.join().expect("breathing");
    let _ = drain.join().expect("drain");
}

#[test]
fn a_destination_that_gives_up_in_mid_content_is_heard_by_the_source() {
    let (mut peer, socket) = UnixStream::pair().expect("socketpair");
    let mut bytes = hello(1, 1);
    bytes.extend(message(Kind::Accept, &Accept { hand_over_ms: 1000, max_state: 1 << 20 }));
    bytes.extend(message(Kind::Failed, &Reason { reason: "no space left on \u{7}device".to_owned() }));
    peer.write_all(&bytes).expect("write");
    peer.shutdown(Shutdown::Write).expect("shutdown");
    let transport = Transport::from_unix(socket, "test").expect("transport");
    let outgoing = Outgoing::connect(transport, &short_limits(), unwatched()).expect("greet");
    let offer = Offer::new(MigrationId::random().expect("id"), "redis");
    let mut sending = outgoing.negotiate(&offer).expect("accepted");
    let data = common::noise(MAX_DATA, 1);
    let error = (0..100).find_map(|_| sending.pages(SpaceId(1), 0, &data).err()).expect("it is heard");
    let text = format!("{error}: {:?}", std::error::Error::source(&error));
    assert!(text.contains("no space left on") && !text.contains('\u{7}'), "{text}");
    let mut rest = Vec::new();
    drop(sending);
    peer.read_to_end(&mut rest).expect("the source has hung up");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_frame_comes_back(number in 1u8..=22, payload in proptest::collection::vec(any::<u8>(), 0..3000), cut in 0usize..3000) {
        let kind = Kind::from_wire(number).expect("a kind");
        let payload = &payload[..payload.len().min(kind.max_payload())];
        let bytes = frame(kind, payload);
        let split = cut.min(payload.len());
        let (front, back) = payload.split_at(split);
        let header = Header::new(kind, &[front, back]);
        prop_assert_eq!(&header.0, &bytes[..12], "parts do not matter");
        let read = read_frame(&mut bytes.as_slice(), vec![9; 100]).expect("a frame");
        prop_assert_eq!((read.kind, read.payload.as_slice()), (kind, payload));
        for length in [0, cut.min(bytes.len() - 1)] {
            let error = read_frame(&mut &bytes[..length], Vec::new()).expect_err("not all of it");
            prop_assert!(matches!(error, FrameError::Closed | FrameError::Truncated));
        }
    }

    #[test]
    fn any_single_bit_error_is_found(payload in proptest::collection::vec(any::<u8>(), 0..300), bit in any::<prop::sample::Index>()) {
        let mut bytes = frame(Kind::Pages, &payload);
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(read_frame(&mut bytes.as_slice(), Vec::new()).is_err());
    }

    #[test]
    fn any_offer_comes_back(container in ".*", features in proptest::collection::vec(".{0,20}", 0..5), extra in proptest::collection::vec(any::<u8>(), 0..500), memory_bytes: u64) {
        let mut offer = Offer::new(MigrationId::from_bytes([7; 16]), container);
        offer.cpu_features = features;
        offer.extra = extra;
        offer.memory_bytes = memory_bytes;
        offer.layer = Some(limosa_migrate::Layer { digest: vec![1; 32], name: "/".to_owned() });
        let bytes = encode(Kind::Offer, &offer).expect("encode");
        let read: Offer = limosa_migrate::message::decode(Kind::Offer, &bytes).expect("decode");
        prop_assert_eq!(read, offer);
    }

    #[test]
    fn random_bytes_start_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..400), stage in 0usize..4) {
        let mut stream = match stage {
            0 => Vec::new(),
            1 => PREAMBLE.to_vec(),
            2 => hello(1, 1),
            _ => after_offer(&[]),
        };
        stream.extend_from_slice(&bytes);
        let started = matches!(destination_reads(&stream), Ok(Received::Started { .. }));
        prop_assert!(!started);
    }

    #[test]
    fn random_cbor_starts_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..100), number in 1u8..=22, stage in 0usize..2) {
        let kind = Kind::from_wire(number).expect("a kind");
        let bytes = &bytes[..bytes.len().min(kind.max_payload())];
        let stream = match stage {
            0 => [hello(1, 1), frame(kind, bytes)].concat(),
            _ => after_offer(&[frame(kind, bytes)]),
        };
        let started = matches!(destination_reads(&stream), Ok(Received::Started { .. }));
        prop_assert!(!started);
    }
}
