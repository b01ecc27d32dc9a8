//! Whole migrations over a socket pair, nothing going wrong, and a destination that fails.

mod common;

use common::{Content, Fault, Scene, Source, large_checkpoint, short_limits, small_checkpoint, wire};
use limosa_image::{Sink, Staging, WriteError};
use limosa_migrate::message::Answer;
use limosa_migrate::record::{Arrival, Departure};
use limosa_migrate::{Limits, Outcome, Outgoing, ReceiveError, Received, receive, unwatched};

fn expected(checkpoint: fn(&mut dyn Sink) -> Result<(), WriteError>) -> Content {
    let mut content = Content::default();
    checkpoint(&mut content).expect("checkpoint");
    content
}

#[test]
fn a_container_moves_with_all_its_content() {
    for checkpoint in [small_checkpoint, large_checkpoint] {
        let scene = Scene::new(Limits::default());
        let (ours, theirs) = wire();
        let (source, host, received) = scene.run(ours, theirs, Fault::None, checkpoint);
        assert!(
            matches!(source, Source::Ended(Outcome::Moved(ref report)) if report.extra == b"report"),
            "{source:?}"
        );
        assert!(matches!(received, Ok(Received::Started { acknowledged: true, .. })), "{received:?}");
        assert_eq!(host.content, expected(checkpoint));
        assert_eq!(scene.world.running(), 1);
        let arrival = scene.destination.arrival(scene.offer.id).expect("record").expect("a record");
        assert!(arrival.acknowledged && matches!(arrival.arrival, Arrival::Started(_)));
        let departure = scene.source.departure(scene.offer.id).expect("record").expect("a record");
        assert!(matches!(departure.departure, Departure::Started(_)));
        // Open until the source has ended what it had.
        let open = scene.source.unsettled().expect("records");
        assert!(matches!(&open[..], [one] if matches!(one.departure, Departure::Started(_))), "{open:?}");
        scene.source.close(scene.offer.id).expect("close");
        assert!(scene.source.unsettled().expect("records").is_empty());
    }
}

#[test]
fn a_destination_that_fails_leaves_the_container_with_the_source() {
    for (fault, says) in [
        (Fault::Preflight, "amx: not here"),
        (Fault::Prepare, "no memory left"),
        (Fault::Start, "process died"),
    ] {
        let scene = Scene::new(short_limits());
        let (ours, theirs) = wire();
        let (source, host, received) = scene.run(ours, theirs, fault, small_checkpoint);
        assert_eq!(scene.world.running(), 1, "{fault:?}");
        let text = format!("{source:?}");
        assert!(text.contains(says), "{fault:?}: {text}");
        match fault {
            Fault::Preflight => assert!(matches!(received, Ok(Received::Refused { .. })), "{received:?}"),
            Fault::Prepare => assert!(matches!(received, Err(ReceiveError::Prepare(_))), "{received:?}"),
            _ => {
                assert!(matches!(received, Err(ReceiveError::Start(_))), "{received:?}");
                assert!(matches!(source, Source::Ended(Outcome::Kept { .. })), "{source:?}");
            }
        }
        if fault != Fault::Preflight {
            let record = scene.destination.arrival(scene.offer.id).expect("record").expect("a record");
            assert!(matches!(record.arrival, Arrival::NeverStarted(_)), "{record:?}");
            assert_eq!(
                host.discarded,
                u32::from(fault == Fault::Prepare),
                "a failed start discards by itself"
            );
        }
    }
}

#[test]
fn a_source_that_gives_up_is_understood() {
    let scene = Scene::new(short_limits());
    let (ours, theirs) = wire();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut host = common::Host::new(&scene.world);
            receive(theirs, &mut host, &scene.destination, &scene.limits, unwatched())
        });
        let outgoing = Outgoing::connect(ours, &scene.limits, unwatched()).expect("connect");
        let mut sending = outgoing.negotiate(&scene.offer).expect("negotiate");
        small_checkpoint(&mut sending).expect("send");
        sending.abort("the user pressed ^C");
        let error = receiver.join().expect("receiver").expect_err("nothing was handed over");
        let ReceiveError::Peer(error) = error else { panic!("{error:?}") };
        assert!(error.to_string().contains("the user pressed ^C"), "{error}");
    });
    let answer = scene.destination.answer(scene.offer.id, |_| panic!("nothing was being started"));
    assert!(matches!(answer, Ok(Answer::NeverStarted(_))), "{answer:?}");
}

#[test]
fn an_id_is_used_once() {
    let scene = Scene::new(short_limits());
    let (ours, theirs) = wire();
    let (first, ..) = scene.run(ours, theirs, Fault::Start, small_checkpoint);
    assert!(matches!(first, Source::Ended(Outcome::Kept { .. })), "{first:?}");
    let (ours, theirs) = wire();
    let (second, _, received) = scene.run(ours, theirs, Fault::None, small_checkpoint);
    assert!(matches!(second, Source::Stayed(ref text) if text.contains("already known here")), "{second:?}");
    assert!(matches!(received, Err(ReceiveError::Record(_))), "{received:?}");
    assert_eq!(scene.world.running(), 1);
}

#[test]
fn a_checkpoint_arrives_in_staging() {
    let mut sink = Staging::new().expect("staging");
    small_checkpoint(&mut sink).expect("content for the staging of crates/image");
}
