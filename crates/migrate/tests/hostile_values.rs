//! A peer that speaks the protocol, and of whose messages one value is what it should never be: every value of every
//! message, in both directions. Each ends in a migration or in an error in time: no panic, no memory for what is only
//! claimed, nothing kept of what was refused, and never an outcome that nobody has said.

mod common;

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cbor4ii::core::Value;
use common::{Content, Host, World, short_limits, small_checkpoint};
use limosa_e2e::hostile::{each, replace};
use limosa_image::cbor;
use limosa_migrate::frame::{Header, Kind, PREAMBLE, read_frame, read_preamble};
use limosa_migrate::message::{Accept, Answer, End, Hello, Layer, Ready, Reason, Refusal, Refuse, encode};
use limosa_migrate::version::SPOKEN;
use limosa_migrate::{
    Connect, Limits, MigrationId, Offer, Outcome, Outgoing, Purpose, Received, StartReport, Store, Transport,
    receive, unwatched,
};
use serde::Serialize;

/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(8);
/// More than the largest state, twice.
const MEMORY_KIB: u64 = 96 << 10;

type Message = (Kind, Vec<u8>);

/// A busy machine is not taken for a dead peer.
fn patient() -> Limits {
    Limits { silence: Duration::from_secs(5), stall: Duration::from_secs(5), ..short_limits() }
}

/// What a value should never be.
fn replacements(value: &Value) -> Vec<Value> {
    let texts =
        || ["", "\0", "../../..", "\u{1b}[2J"].map(str::to_owned).into_iter().chain(["x".repeat(100_000)]);
    let mut all = match value {
        Value::Integer(number) => {
            let fixed = [0, 1, -1, 1 << 31, i128::from(i64::MAX), i128::from(u64::MAX), i128::from(i64::MIN)];
            fixed.into_iter().chain([number + 1, number ^ (1 << 12)]).map(Value::Integer).collect()
        }
        Value::Array(items) => {
            let many = items.first().map(|first| vec![first.clone(); 1000]).unwrap_or_default();
            vec![Value::Array(Vec::new()), Value::Array(many)]
        }
        Value::Map(entries) => {
            let twice = entries.iter().chain(entries).cloned().collect();
            let mut without: Vec<Value> = (0..entries.len())
                .map(|gone| {
                    let rest = entries.iter().enumerate().filter(|(index, _)| *index != gone);
                    Value::Map(rest.map(|(_, entry)| entry.clone()).collect())
                })
                .collect();
            without.extend([Value::Map(Vec::new()), Value::Map(twice)]);
            without
        }
        Value::Text(_) => texts().map(Value::Text).collect(),
        Value::Bytes(_) => texts().map(|text| Value::Bytes(text.into_bytes())).collect(),
        _ => Vec::new(),
    };
    all.extend([Value::Null, Value::Bool(true), Value::Integer(7)]);
    all
}

/// All that a message could be instead.
fn variants((kind, payload): &Message) -> Vec<Vec<u8>> {
    let raw = [Vec::new(), payload[..payload.len() / 2].to_vec(), [payload.as_slice(), &[0]].concat()];
    let mut all: Vec<Vec<u8>> =
        raw.into_iter().filter(|variant| variant.len() <= kind.max_payload()).collect();
    if matches!(kind, Kind::StateData | Kind::BlobData) {
        return all;
    }
    if matches!(kind, Kind::Pages | Kind::Gone) {
        for at in (0..payload.len().min(24)).step_by(4) {
            for word in [0, 1, 4096, u32::MAX] {
                let mut variant = payload.clone();
                variant[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
                all.push(variant);
            }
        }
        return all;
    }
    let value: Value = cbor::decode(payload).expect("a message of ours");
    let mut values = Vec::new();
    each(&value, &mut |value| values.push(value.clone()));
    for (number, value) in values.iter().enumerate() {
        for replacement in replacements(value) {
            let (mut whole, mut left) = (cbor::decode::<Value>(payload).expect("a message"), number);
            replace(&mut whole, &mut left, &replacement);
            // What CBOR cannot say, nobody can.
            all.extend(cbor::encode(&whole).ok().filter(|bytes| bytes.len() <= kind.max_payload()));
        }
    }
    all
}

fn message<T: Serialize>(kind: Kind, message: &T) -> Message {
    (kind, encode(kind, message).expect("encode"))
}

fn bytes((kind, payload): &Message) -> Vec<u8> {
    [Header::new(*kind, &[payload]).0.as_slice(), payload].concat()
}

fn hello() -> Message {
    message(Kind::Hello, &Hello { versions: SPOKEN, software: "test".to_owned() })
}

fn offer() -> Offer {
    let mut offer = Offer::new(MigrationId::from_bytes([7; 16]), "redis");
    offer.kernel_features = vec!["a".to_owned()];
    offer.cpu_features = vec!["b".to_owned()];
    offer.layer = Some(Layer { digest: vec![1; 32], name: "/".to_owned() });
    offer.addresses = vec!["192.0.2.1".to_owned()];
    offer.extra = vec![0xa0];
    offer
}

/// What one side says, each after it was told something; first what it says by itself.
type Script = Vec<(Option<Kind>, Message)>;

/// Speaks as the destination. Gives what it was told.
fn speak(mut stream: UnixStream, script: &[(Option<Kind>, Message)]) -> Vec<Message> {
    let mut told = Vec::new();
    let Ok(mut reading) = stream.try_clone() else { return told };
    let _ = stream.write_all(&PREAMBLE);
    for (_, message) in script.iter().filter(|(trigger, _)| trigger.is_none()) {
        let _ = stream.write_all(&bytes(message));
    }
    if read_preamble(&mut reading).is_err() {
        return told;
    }
    while let Ok(frame) = read_frame(&mut reading, Vec::new()) {
        let kind = frame.kind;
        if kind == Kind::Beat {
            let _ = stream.write_all(&bytes(&(Kind::Echo, frame.payload)));
            continue;
        }
        told.push((kind, frame.payload));
        let answers: Vec<_> = script.iter().filter(|(trigger, _)| *trigger == Some(kind)).collect();
        for (_, message) in &answers {
            let _ = stream.write_all(&bytes(message));
        }
        let over = matches!(kind, Kind::Done | Kind::Abort);
        if over || (answers.is_empty() && matches!(kind, Kind::HandOver | Kind::Ask)) {
            break;
        }
    }
    told
}

/// Whoever asks for the outcome gets this.
struct Asked<'s>(&'s Script);

impl Connect for Asked<'_> {
    type Error = io::Error;

    fn connect(&mut self, _: Purpose, _: &Limits) -> io::Result<Transport> {
        if self.0.is_empty() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        let script = self.0.clone();
        std::thread::spawn(move || speak(theirs, &script));
        Transport::from_unix(ours, "test")
    }

    fn address(&self) -> String {
        "test:".to_owned()
    }
}

/// The source's whole side against these words. `Err` is an error before the hand-over.
fn source_hears(script: &Script, asked: &Script) -> (Result<Outcome, String>, Vec<Message>) {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let dir = tempfile::tempdir().expect("directory");
    let store = Store::open(dir.path()).expect("store");
    let limits = Limits {
        started: Duration::from_millis(300),
        outcome: Duration::from_millis(60),
        answer: Duration::from_secs(1),
        ..patient()
    };
    let words = script.clone();
    let peer = std::thread::spawn(move || speak(theirs, &words));
    let result = (|| {
        let text = |error: &dyn std::error::Error| error.to_string();
        let transport = Transport::from_unix(ours, "test").expect("transport");
        let outgoing = Outgoing::connect(transport, &limits, unwatched()).map_err(|error| text(&error))?;
        let mut sending = outgoing.negotiate(&offer()).map_err(|error| text(&error))?;
        small_checkpoint(&mut sending).map_err(|error| text(&error))?;
        let ready = sending.finish().map_err(|error| text(&error))?;
        ready.hand_over(&store, &mut Asked(asked), || Ok::<_, io::Error>(())).map_err(|error| text(&error))
    })();
    (result, peer.join().expect("the peer"))
}

/// The most memory that this process has had, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Runs `case` with each message of `script` replaced by each of its variants.
fn each_variant(script: &Script, mut case: impl FnMut(&Script, &str)) {
    for (place, (_, original)) in script.iter().enumerate() {
        for (number, payload) in variants(original).into_iter().enumerate() {
            let mut forged = script.clone();
            let what = format!("{:?} replaced by variant {number}: {payload:.60?}", original.0);
            forged[place].1.1 = payload;
            let begun = Instant::now();
            case(&forged, &what);
            assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", begun.elapsed());
        }
    }
}

fn reason() -> Reason {
    Reason { reason: "no space left".to_owned() }
}

/// The destination's words until it is ready, and what it answers to the hand-over, if anything.
fn until_ready(answer: Option<Message>) -> Script {
    let mut script = vec![
        (None, hello()),
        (Some(Kind::Offer), message(Kind::Accept, &Accept { hand_over_ms: 1000, max_state: 1 << 20 })),
        (Some(Kind::End), message(Kind::Ready, &Ready { prepare_us: 5 })),
    ];
    script.extend(answer.map(|answer| (Some(Kind::HandOver), answer)));
    script
}

fn started() -> StartReport {
    StartReport { start_us: 1, extra: b"report".to_vec() }
}

#[test]
fn an_answer_to_the_hand_over() {
    let before = peak();
    let moved = until_ready(Some(message(Kind::Started, &started())));
    assert_eq!(source_hears(&moved, &Script::new()).0, Ok(Outcome::Moved(started())));
    each_variant(&moved, |script, what| {
        let (result, _) = source_hears(script, &Script::new());
        assert!(!matches!(result, Ok(Outcome::Kept { .. })), "{what}: {result:?}");
    });
    let kept = until_ready(Some(message(Kind::NotStarted, &reason())));
    assert!(matches!(source_hears(&kept, &Script::new()).0, Ok(Outcome::Kept { .. })));
    each_variant(&kept, |script, what| {
        let (result, _) = source_hears(script, &Script::new());
        assert!(!matches!(result, Ok(Outcome::Moved(_))), "{what}: {result:?}");
    });
    assert!(peak() - before < MEMORY_KIB, "{} KiB more", peak() - before);
}

#[test]
fn a_refusal_or_a_failure() {
    let before = peak();
    let refusal = Refusal { what: "a".to_owned(), why: "b".to_owned(), remedy: Some("c".to_owned()) };
    let refused = message(Kind::Refuse, &Refuse { reasons: vec![refusal] });
    let mut failed = until_ready(None);
    failed[2].1 = message(Kind::Failed, &reason());
    for script in [vec![(None, hello()), (Some(Kind::Offer), refused)], failed] {
        assert!(source_hears(&script, &Script::new()).0.is_err());
        each_variant(&script, |script, what| {
            let (result, _) = source_hears(script, &Script::new());
            assert!(result.is_err(), "{what}: {result:?}");
        });
    }
    assert!(peak() - before < MEMORY_KIB, "{} KiB more", peak() - before);
}

#[test]
fn an_answer_to_a_question() {
    let before = peak();
    let answers =
        [Answer::Started(started()), Answer::NeverStarted(reason()), Answer::Undecided { again_ms: 1 }];
    for (number, answer) in answers.iter().enumerate() {
        let asked = vec![(None, hello()), (Some(Kind::Ask), message(Kind::Answer, answer))];
        let says_what_was_said = |result: &Result<Outcome, String>| match result {
            Ok(Outcome::Moved(_)) => number == 0,
            Ok(Outcome::Kept { .. }) => number == 1,
            // An error is one before the hand-over: the source goes on.
            Ok(Outcome::Unknown { .. }) | Err(_) => true,
        };
        let honest = source_hears(&until_ready(None), &asked).0;
        assert!(honest.is_ok() && says_what_was_said(&honest), "{answer:?}: {honest:?}");
        assert_eq!(matches!(honest, Ok(Outcome::Unknown { .. })), number == 2, "{honest:?}");
        each_variant(&asked, |asked, what| {
            let (result, _) = source_hears(&until_ready(None), asked);
            assert!(says_what_was_said(&result), "{what}: {result:?}");
        });
    }
    assert!(peak() - before < MEMORY_KIB, "{} KiB more", peak() - before);
}

/// What a destination makes of a source's words; whether it started the container.
fn destination_hears(words: &[Message], what: &str) -> bool {
    let (mut peer, socket) = UnixStream::pair().expect("socketpair");
    let dir = tempfile::tempdir().expect("directory");
    let store = Store::open(dir.path()).expect("store");
    let world = Arc::new(World::default());
    let mut drain = peer.try_clone().expect("dup");
    let draining = std::thread::spawn(move || io::copy(&mut drain, &mut io::sink()));
    let stream = PREAMBLE.into_iter().chain(words.iter().flat_map(bytes)).collect::<Vec<u8>>();
    let writing = std::thread::spawn(move || {
        // The destination may hang up before it has read everything.
        let _ = peer.write_all(&stream);
        let _ = peer.shutdown(Shutdown::Write);
    });
    let transport = Transport::from_unix(socket, "test").expect("transport");
    let mut host = Host::new(&world);
    let result = receive(transport, &mut host, &store, &patient(), unwatched());
    writing.join().expect("writer");
    let _ = draining.join().expect("drain");
    let starts = matches!(result, Ok(Received::Started { .. }));
    assert_eq!(world.running(), u32::from(starts), "{what}: {result:?}");
    assert!(starts || host.content == Content::default(), "{what}: something is kept: {result:?}");
    starts
}

/// The digest of a changed content is made right again: so what is refused is refused for itself.
fn with_right_digest(words: &mut [Message]) {
    let mut digest = blake3::Hasher::new();
    for (kind, payload) in words.iter().filter(|(kind, _)| kind.is_content()) {
        digest.update(&Header::new(*kind, &[payload]).0);
    }
    if let Some((kind, payload)) = words.iter_mut().find(|(kind, _)| *kind == Kind::End) {
        let mut end: End = cbor::decode(payload).expect("an end");
        end.digest = digest.finalize().as_bytes().to_vec();
        *payload = encode(*kind, &end).expect("encode");
    }
}

#[test]
fn a_source() {
    let before = peak();
    let script = until_ready(Some(message(Kind::Started, &started())));
    let (_, words) = source_hears(&script, &Script::new());
    assert_eq!(words.last().map(|(kind, _)| *kind), Some(Kind::Done), "{words:?}");
    assert!(destination_hears(&words, "as it was"));
    let (mut cases, mut starts) = (0, 0);
    for (place, original) in words.iter().enumerate() {
        for (number, payload) in variants(original).into_iter().enumerate() {
            let what = format!("{:?} replaced by variant {number}: {payload:.60?}", original.0);
            let mut forged = words.clone();
            forged[place].1 = payload;
            if original.0.is_content() {
                with_right_digest(&mut forged);
            }
            let begun = Instant::now();
            starts += u32::from(destination_hears(&forged, &what));
            cases += 1;
            assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", begun.elapsed());
        }
    }
    println!("{cases} cases, {starts} started all the same");
    assert!(cases > 200 && starts < cases / 2, "{starts} of {cases} started");
    assert!(peak() - before < MEMORY_KIB, "{} KiB more", peak() - before);
}
