//! What a destination remembers and answers, also about a receiver that died.

mod common;

use std::time::Duration;

use common::{Scene, short_limits};
use limosa_migrate::message::{Answer, Reason};
use limosa_migrate::record::{Arrival, ArrivalRecord, Departure, DepartureRecord, RecordError};
use limosa_migrate::{Address, MigrationId, Outcome, Remains, StartReport, Store, Ticket, settle};
use proptest::prelude::*;

fn departure(scene: &Scene) -> DepartureRecord {
    DepartureRecord {
        id: scene.offer.id,
        container: "redis".to_owned(),
        destination: "test:".to_owned(),
        departure: Departure::HandingOver,
        instance: "the first".to_owned(),
        closed: false,
    }
}

#[test]
fn a_question_about_an_unknown_migration_makes_its_answer_true() {
    let scene = Scene::new(short_limits());
    let answer = scene.destination.answer(scene.offer.id, |_| panic!("nothing was being started"));
    assert!(matches!(answer, Ok(Answer::NeverStarted(_))), "{answer:?}");
    let late = scene.destination.claim(&scene.offer);
    assert!(matches!(late, Err(RecordError::Known { state: "never started", .. })), "{late:?}");
}

#[test]
fn a_question_before_ownership_is_taken_fences_a_living_receiver() {
    for ready in [false, true] {
        let scene = Scene::new(short_limits());
        let claim = scene.destination.claim(&scene.offer).expect("claim");
        if ready {
            claim.advance(Arrival::Ready).expect("ready");
        }
        let answer = scene.destination.answer(scene.offer.id, |_| panic!("nothing was being started"));
        assert!(matches!(answer, Ok(Answer::NeverStarted(_))), "{answer:?}");
        let start = claim.advance(Arrival::Starting);
        assert!(matches!(start, Err(RecordError::Fenced { state: "never started", .. })), "{start:?}");
        claim.never_started("again").expect("that it never started is known already");
    }
}

#[test]
fn no_step_is_taken_out_of_order_and_none_after_the_end() {
    let scene = Scene::new(short_limits());
    let claim = scene.destination.claim(&scene.offer).expect("claim");
    assert!(claim.advance(Arrival::Starting).is_err(), "not ready yet");
    assert!(claim.advance(Arrival::Started(StartReport::default())).is_err());
    claim.advance(Arrival::Ready).expect("ready");
    claim.advance(Arrival::Starting).expect("starting");
    claim.advance(Arrival::Started(StartReport::default())).expect("started");
    assert!(claim.never_started("no").is_err(), "it did start");
    assert!(matches!(scene.destination.answer(scene.offer.id, |_| panic!("known")), Ok(Answer::Started(_))));
}

#[test]
fn a_receiver_that_is_starting_is_waited_for_while_it_lives() {
    let scene = Scene::new(short_limits());
    let claim = scene.destination.claim(&scene.offer).expect("claim");
    claim.advance(Arrival::Ready).expect("ready");
    claim.advance(Arrival::Starting).expect("starting");
    let asked = scene.destination.answer(scene.offer.id, |_| panic!("the receiver lives"));
    assert!(matches!(asked, Ok(Answer::Undecided { .. })), "{asked:?}");

    scene.source.put_departure(&departure(&scene)).expect("record");
    let outcome = std::thread::scope(|scope| {
        let asking = scope.spawn(|| settle(&scene.source, scene.offer.id, &mut scene.ways(), &scene.limits));
        std::thread::sleep(Duration::from_millis(250));
        claim.advance(Arrival::Started(StartReport { start_us: 7, extra: Vec::new() })).expect("started");
        asking.join().expect("asking")
    });
    assert!(matches!(outcome, Ok(Outcome::Moved(StartReport { start_us: 7, .. }))), "{outcome:?}");
    let record = scene.destination.arrival(scene.offer.id).expect("record").expect("a record");
    assert!(record.acknowledged);
}

#[test]
fn what_a_dead_receiver_left_is_looked_at_and_decided_once() {
    for running in [false, true] {
        let scene = Scene::new(short_limits());
        let claim = scene.destination.claim(&scene.offer).expect("claim");
        claim.advance(Arrival::Ready).expect("ready");
        claim.advance(Arrival::Starting).expect("starting");
        // As the kernel does when the process dies.
        drop(claim);
        let failed = scene.destination.answer(scene.offer.id, |_| Err("its cgroup cannot be read".into()));
        assert!(failed.is_err(), "nothing is promised that is not known");
        let found = || if running { Remains::Running(StartReport::default()) } else { Remains::Nothing };
        let answer = scene.destination.answer(scene.offer.id, |offer| {
            assert_eq!(offer, &scene.offer);
            Ok(found())
        });
        assert_eq!(matches!(answer, Ok(Answer::Started(_))), running, "{answer:?}");
        assert_eq!(matches!(answer, Ok(Answer::NeverStarted(_))), !running, "{answer:?}");
        let again = scene.destination.answer(scene.offer.id, |_| panic!("it is decided")).expect("answer");
        assert_eq!(again, answer.expect("answer"));
    }
}

#[test]
fn a_destination_that_cannot_be_reached_leaves_the_outcome_unknown_and_the_record_open() {
    struct Nowhere;
    impl limosa_migrate::Connect for Nowhere {
        type Error = std::io::Error;
        fn connect(
            &mut self,
            _: limosa_migrate::Purpose,
            _: &limosa_migrate::Limits,
        ) -> std::io::Result<limosa_migrate::Transport> {
            Err(std::io::ErrorKind::HostUnreachable.into())
        }
        fn address(&self) -> String {
            "nowhere:".to_owned()
        }
    }
    let mut scene = Scene::new(short_limits());
    scene.limits.outcome = Duration::from_millis(100);
    scene.source.put_departure(&departure(&scene)).expect("record");
    let outcome = settle(&scene.source, scene.offer.id, &mut Nowhere, &scene.limits).expect("settle");
    assert!(matches!(outcome, Outcome::Unknown { .. }), "{outcome:?}");
    assert_eq!(scene.source.unsettled().expect("records"), [departure(&scene)]);
    // Later it can be reached.
    let outcome = settle(&scene.source, scene.offer.id, &mut scene.ways(), &scene.limits).expect("settle");
    assert!(matches!(outcome, Outcome::Kept { .. }), "{outcome:?}");
    let open = scene.source.unsettled().expect("records");
    assert!(matches!(&open[..], [one] if one.instance == "the first"), "nobody has acted on it: {open:?}");
    scene.source.close(scene.offer.id).expect("close");
    assert!(scene.source.unsettled().expect("records").is_empty());
}

#[test]
fn an_outcome_is_never_replaced_by_another() {
    let scene = Scene::new(short_limits());
    let record = |departure| DepartureRecord { departure, ..self::departure(&scene) };
    scene.source.put_departure(&record(Departure::HandingOver)).expect("record");
    let kept = record(Departure::Kept(Reason { reason: "cut".to_owned() }));
    scene.source.put_departure(&kept).expect("record");
    scene.source.put_departure(&kept).expect("the same again");
    for other in [Departure::HandingOver, Departure::Started(StartReport::default())] {
        assert!(matches!(scene.source.put_departure(&record(other)), Err(RecordError::Fenced { .. })));
    }
}

#[test]
fn pruning_keeps_what_somebody_may_still_need() {
    let scene = Scene::new(short_limits());
    let claim = scene.destination.claim(&scene.offer).expect("claim");
    assert_eq!(scene.destination.prune(Duration::ZERO).expect("prune"), 0, "its receiver lives");
    claim.advance(Arrival::Ready).expect("ready");
    claim.advance(Arrival::Starting).expect("starting");
    claim.advance(Arrival::Started(StartReport::default())).expect("started");
    assert_eq!(scene.destination.prune(Duration::ZERO).expect("prune"), 0, "the source may still ask");
    claim.acknowledge().expect("acknowledge");
    assert_eq!(scene.destination.prune(Duration::from_hours(1)).expect("prune"), 0, "not old");
    assert_eq!(scene.destination.prune(Duration::ZERO).expect("prune"), 1);

    scene.source.put_departure(&departure(&scene)).expect("record");
    assert_eq!(scene.source.prune(Duration::ZERO).expect("prune"), 0, "its outcome is not known");
}

#[test]
fn a_damaged_record_is_an_error_and_not_an_answer() {
    let dir = tempfile::tempdir().expect("directory");
    let store = limosa_migrate::Store::open(dir.path()).expect("store");
    let scene = Scene::new(short_limits());
    drop(store.claim(&scene.offer).expect("claim"));
    let path = dir.path().join(format!("{}.in", scene.offer.id));
    let whole = std::fs::read(&path).expect("the record");
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).expect("damage");
        let answer = store.answer(scene.offer.id, |_| panic!("nothing was being started"));
        assert!(answer.is_err(), "{length} of {} bytes: {answer:?}", whole.len());
    }
}

/// What is in the place of a record, whatever it is: what is not one is an error, never an outcome.
fn found(bytes: &[u8], what: &str) -> Result<(), TestCaseError> {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(directory.path()).expect("a store");
    let id = MigrationId::from_bytes([7; 16]);
    std::fs::write(directory.path().join(format!("{id}.{what}")), bytes).expect("written");
    let (arrival, departure) = (store.arrival(id), store.departure(id));
    for failed in [arrival.as_ref().err(), departure.as_ref().err()].into_iter().flatten() {
        prop_assert!(matches!(failed, RecordError::Malformed { .. }), "{}", failed);
    }
    prop_assert_eq!(store.unsettled().is_err(), departure.is_err());
    prop_assert_eq!(store.prune(Duration::ZERO).is_err(), arrival.is_err() || departure.is_err());
    if arrival.is_err() {
        let answer = store.answer(id, |_| panic!("nothing was being started"));
        prop_assert!(answer.is_err(), "{:?}", answer);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_a_record_or_an_error(bytes: Vec<u8>) {
        found(&bytes, "in")?;
        found(&bytes, "out")?;
    }

    /// Real records with one byte that is another.
    #[test]
    fn a_damaged_record_is_read_or_an_error(at: prop::sample::Index, to: u8, cut: bool) {
        let scene = Scene::new(short_limits());
        let arrival = ArrivalRecord {
            offer: Some(scene.offer.clone()),
            arrival: Arrival::Started(StartReport::default()),
            acknowledged: false,
        };
        let records = [
            (limosa_image::cbor::encode(&arrival).expect("CBOR"), "in"),
            (limosa_image::cbor::encode(&departure(&scene)).expect("CBOR"), "out"),
        ];
        for (mut bytes, what) in records {
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] = to;
            }
            found(&bytes, what)?;
        }
    }

    #[test]
    fn any_text_is_an_id_a_ticket_an_address_or_an_error(text: String, near in "(ssh|limosa)://[-a-zA-Z0-9_@:/.\\[\\]]{0,90}") {
        for text in [&text, &near] {
            prop_assert!(text.parse::<MigrationId>().is_err_and(|error| text.starts_with(&error.text)) || text.len() == 32);
            if let Ok(ticket) = text.parse::<Ticket>() {
                prop_assert_eq!(ticket.to_string(), text.as_str());
            }
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse::<Address>().expect("an address"), address);
            }
        }
    }
}
