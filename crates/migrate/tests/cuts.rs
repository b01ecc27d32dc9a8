//! A network that goes wrong at each message, in each direction, in each way: afterwards the container runs in exactly
//! one place, both sides' records say so, and both say the same. (`World::start` fails the test at the instant at which
//! it would run in two.)

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::proxy::{Harm, Mishap, Network, Place, Way};
use common::{Fault, Scene, Source, large_checkpoint, short_limits, small_checkpoint};
use limosa_migrate::frame::Kind;
use limosa_migrate::record::{Arrival, Departure, RecordError};
use limosa_migrate::{Outcome, ReceiveError, Received, settle};

/// Messages of `small_checkpoint`'s migration, by direction.
const TO_DESTINATION: [Kind; 12] = [
    Kind::Hello,
    Kind::Offer,
    Kind::State,
    Kind::StateData,
    Kind::Pages,
    Kind::Pages,
    Kind::Blob,
    Kind::BlobData,
    Kind::BlobEnd,
    Kind::End,
    Kind::HandOver,
    Kind::Done,
];
const TO_SOURCE: [Kind; 4] = [Kind::Hello, Kind::Accept, Kind::Ready, Kind::Started];

fn all_places(harm: Harm, places: &[Place]) -> Vec<Mishap> {
    let mut all = Vec::new();
    for (way, count) in [(Way::ToDestination, TO_DESTINATION.len()), (Way::ToSource, TO_SOURCE.len())] {
        for message in 0..count {
            all.extend(places.iter().map(|&place| Mishap { way, message, place, harm }));
        }
    }
    all
}

/// Checks all that must hold, whatever went wrong; returns where the container runs.
fn one_owner(scene: &Scene, source: &Source, started: bool, what: &str) -> Way {
    assert_eq!(scene.world.running(), 1, "{what}: {source:?}");
    let moved = matches!(source, Source::Ended(Outcome::Moved(_)));
    let kept = matches!(source, Source::Stayed(_) | Source::Ended(Outcome::Kept { .. }));
    assert!(moved != kept, "{what}: the outcome is known: {source:?}");
    assert_eq!(moved, started, "{what}: {source:?}");
    if let Some(record) = scene.destination.arrival(scene.offer.id).expect("record") {
        let says = match record.arrival {
            Arrival::Started(_) => true,
            // A receiver that is gone without a word never started: the next question says so.
            Arrival::NeverStarted(_) | Arrival::Receiving | Arrival::Ready => false,
            Arrival::Starting => panic!("{what}: {record:?}"),
        };
        assert_eq!(says, started, "{what}: {record:?}");
    } else {
        assert!(!started, "{what}");
    }
    // A hand-over that was begun has a recorded outcome, and asking again says the same.
    if let Source::Ended(outcome) = source {
        let record = scene.source.departure(scene.offer.id).expect("record").expect("a record");
        assert_eq!(matches!(record.departure, Departure::Started(_)), started, "{what}: {record:?}");
        let again = settle(&scene.source, scene.offer.id, &mut scene.ways(), &scene.limits);
        assert_eq!(&again.expect("settle"), outcome, "{what}");
    }
    if moved { Way::ToDestination } else { Way::ToSource }
}

fn sweep(mishaps: &[Mishap], fault: Fault, threads: usize) -> Vec<(Mishap, Way)> {
    let next = AtomicUsize::new(0);
    let run = |mishap: Mishap| {
        let scene = Scene::new(short_limits());
        let (ours, theirs, network) = Network::new(Some(mishap), Duration::ZERO);
        let happened = std::sync::Arc::clone(&network.happened);
        let (source, _, received) = scene.run(ours, theirs, fault, small_checkpoint);
        network.join();
        assert_eq!(happened.load(Ordering::SeqCst), 1, "{mishap:?} happened");
        let started = matches!(received, Ok(Received::Started { .. }));
        (mishap, one_owner(&scene, &source, started, &format!("{mishap:?}, {received:?}")))
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mine = std::iter::from_fn(|| mishaps.get(next.fetch_add(1, Ordering::SeqCst)));
                    mine.map(|mishap| run(*mishap)).collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a case")).collect()
    })
}

#[test]
fn the_messages_are_the_ones_that_are_cut() {
    let scene = Scene::new(short_limits());
    let (ours, theirs, network) = Network::new(None, Duration::ZERO);
    let (source, ..) = scene.run(ours, theirs, Fault::None, small_checkpoint);
    assert!(matches!(source, Source::Ended(Outcome::Moved(_))), "{source:?}");
    let [to_destination, to_source] = network.join();
    assert_eq!(to_destination, TO_DESTINATION);
    assert_eq!(to_source, TO_SOURCE);
}

#[test]
fn a_cut_at_any_message_leaves_one_owner() {
    let ends = sweep(&all_places(Harm::Close, &[Place::Before, Place::Inside, Place::After]), Fault::None, 4);
    let (hand_over, started) = (10, 3);
    for (mishap, owner) in ends {
        let arrived = match mishap.way {
            // Once `HandOver` is read, the destination or the question is first: both are right.
            Way::ToDestination if mishap.message == hand_over && mishap.place == Place::After => continue,
            Way::ToDestination => mishap.message > hand_over,
            Way::ToSource => mishap.message == started,
        };
        assert_eq!(owner == Way::ToDestination, arrived, "{mishap:?}");
    }
}

#[test]
fn a_cut_while_a_failed_start_is_told_leaves_one_owner() {
    let ends =
        sweep(&all_places(Harm::Close, &[Place::Before, Place::Inside, Place::After]), Fault::Start, 4);
    assert!(ends.iter().all(|(_, owner)| *owner == Way::ToSource), "{ends:?}");
}

#[test]
fn silence_from_any_message_on_leaves_one_owner() {
    sweep(&all_places(Harm::Silence, &[Place::Before, Place::Inside, Place::After]), Fault::None, 12);
}

#[test]
fn a_network_that_takes_no_more_leaves_one_owner() {
    sweep(&all_places(Harm::Stall, &[Place::Inside, Place::After]), Fault::None, 12);
}

#[test]
fn a_damaged_or_lost_message_leaves_one_owner() {
    sweep(&all_places(Harm::Flip, &[Place::Before, Place::Inside, Place::After]), Fault::None, 12);
    sweep(&all_places(Harm::Lose, &[Place::Before]), Fault::None, 12);
}

/// The source hears nothing, hangs up and asks; only then does its `HandOver` arrive. It must find that the answer was
/// "never started", and that this is true.
#[test]
fn a_hand_over_that_arrives_after_the_question_starts_nothing() {
    let mut limits = short_limits();
    limits.started = Duration::from_millis(50);
    let scene = Scene::new(limits);
    let mishap = Mishap { way: Way::ToDestination, message: 10, place: Place::Before, harm: Harm::Hold };
    let (ours, theirs, network) = Network::new(Some(mishap), Duration::ZERO);
    let (source, host, received) = scene.run(ours, theirs, Fault::None, small_checkpoint);
    let [to_destination, _] = network.join();
    assert_eq!(to_destination.get(10), Some(&Kind::HandOver));
    let fenced = matches!(received, Err(ReceiveError::Record(RecordError::Fenced { .. })));
    assert!(fenced, "it read `HandOver` and was too late: {received:?}");
    assert_eq!(host.discarded, 1);
    assert_eq!(one_owner(&scene, &source, false, "late"), Way::ToSource);
}

#[test]
fn a_slow_network_only_takes_longer() {
    let scene = Scene::new(short_limits());
    let (ours, theirs, network) = Network::new(None, Duration::from_millis(30));
    let (source, ..) = scene.run(ours, theirs, Fault::None, large_checkpoint);
    network.join();
    assert!(matches!(source, Source::Ended(Outcome::Moved(_))), "{source:?}");
    assert_eq!(scene.world.running(), 1);
}
