//! TLS with one-time tickets: the right one works once, and nothing else gets an answer.

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use common::{Content, Host, Scene, large_checkpoint, short_limits, small_checkpoint};
use limosa_migrate::message::Answer;
use limosa_migrate::{
    Address, Connect, ConnectError, Limits, ListenError, ListenOptions, Listener, MigrationId, Offer,
    Outcome, Outgoing, Purpose, Received, Ticket, settle, unwatched,
};

fn local() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn listener(options: ListenOptions, limits: &Limits) -> (Listener, Address) {
    let listener = Listener::bind(local(), options, limits.clone()).expect("listen");
    let address = listener.destination("127.0.0.1");
    (listener, address)
}

/// The ticket with some bytes changed and its checksum made right again.
fn forged(ticket: &Ticket, change: impl Fn(&mut [u8])) -> Ticket {
    let mut bytes = URL_SAFE_NO_PAD.decode(ticket.to_string()).expect("base64");
    bytes.truncate(53);
    change(&mut bytes);
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    URL_SAFE_NO_PAD.encode(bytes).parse().expect("a well-formed ticket")
}

fn with_ticket(address: &Address, ticket: Ticket) -> Address {
    match address {
        Address::Listening { host, port, .. } => {
            Address::Listening { host: host.clone(), port: *port, ticket }
        }
        Address::Ssh { .. } => panic!("not listening"),
    }
}

fn ticket_of(address: &Address) -> &Ticket {
    match address {
        Address::Listening { ticket, .. } => ticket,
        Address::Ssh { .. } => panic!("not listening"),
    }
}

/// The source's side over a ticket. `Err` is an error before the hand-over.
fn migrate(address: &mut Address, scene: &Scene) -> Result<Outcome, String> {
    let transport = address.connect(Purpose::Migrate, &scene.limits).map_err(|error| error.to_string())?;
    let text = |error: &dyn std::error::Error| format!("{error}: {:?}", error.source());
    let outgoing = Outgoing::connect(transport, &scene.limits, unwatched()).map_err(|error| text(&error))?;
    let mut sending = outgoing.negotiate(&scene.offer).map_err(|error| text(&error))?;
    large_checkpoint(&mut sending).map_err(|error| text(&error))?;
    let ready = sending.finish().map_err(|error| text(&error))?;
    scene.world.freeze();
    ready.hand_over(&scene.source, address, || Ok::<_, std::io::Error>(())).map_err(|error| text(&error))
}

#[test]
fn a_container_moves_through_tls_and_the_ticket_is_used() {
    let scene = Scene::new(Limits::default());
    let (listener, mut address) = listener(ListenOptions::default(), &scene.limits);
    let mut host = Host::new(&scene.world);
    let received = std::thread::scope(|scope| {
        let serving = scope.spawn(|| listener.serve(&mut host, &scene.destination, unwatched()));
        let outcome = migrate(&mut address, &scene).expect("migrate");
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        serving.join().expect("listener")
    });
    assert!(matches!(received, Ok(Received::Started { acknowledged: true, .. })), "{received:?}");
    let mut expected = Content::default();
    large_checkpoint(&mut expected).expect("checkpoint");
    assert_eq!(host.content, expected);
    let again = address.connect(Purpose::Migrate, &scene.limits);
    assert!(matches!(again, Err(ConnectError::Tcp { .. })), "nobody listens any more: {again:?}");
}

#[test]
fn a_used_ticket_gets_nothing_while_the_first_use_goes_on() {
    let scene = Scene::new(short_limits());
    let (listener, mut address) = listener(ListenOptions::default(), &scene.limits);
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        let transport = address.connect(Purpose::Migrate, &scene.limits).expect("the first use");
        let mut other = address.clone();
        let second = other.connect(Purpose::Migrate, &scene.limits);
        assert!(matches!(second, Err(ConnectError::TicketRefused { .. })), "{second:?}");
        let outgoing =
            Outgoing::connect(transport, &scene.limits, unwatched()).expect("the first use goes on");
        outgoing.abort("enough");
        assert!(matches!(serving.join().expect("listener"), Err(ListenError::Receive(_))));
    });
}

#[test]
fn a_wrong_secret_gets_nothing_and_does_not_use_the_ticket_up() {
    let scene = Scene::new(Limits::default());
    let (listener, mut address) = listener(ListenOptions::default(), &scene.limits);
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        for bit in [0, 80, 159] {
            let wrong = forged(ticket_of(&address), |bytes| bytes[1 + bit / 8] ^= 1 << (bit % 8));
            for purpose in [Purpose::Migrate, Purpose::Ask] {
                let refused = with_ticket(&address, wrong.clone()).connect(purpose, &scene.limits);
                assert!(matches!(refused, Err(ConnectError::TicketRefused { .. })), "{refused:?}");
            }
        }
        let early = address.connect(Purpose::Ask, &scene.limits);
        assert!(matches!(early, Err(ConnectError::TicketRefused { .. })), "nothing to ask yet: {early:?}");
        assert!(matches!(migrate(&mut address, &scene), Ok(Outcome::Moved(_))));
        assert!(serving.join().expect("listener").is_ok());
    });
}

#[test]
fn guessing_voids_the_ticket() {
    let scene = Scene::new(short_limits());
    let options = ListenOptions { attempts: 3, ..ListenOptions::default() };
    let (listener, address) = listener(options, &scene.limits);
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        for guess in 0..3 {
            let wrong = forged(ticket_of(&address), |bytes| bytes[5] ^= 1 + guess);
            assert!(with_ticket(&address, wrong).connect(Purpose::Migrate, &scene.limits).is_err());
        }
        let ended = serving.join().expect("listener");
        assert!(matches!(ended, Err(ListenError::TooManyAttempts { attempts: 3 })), "{ended:?}");
    });
    assert_eq!(scene.world.running(), 1);
}

#[test]
fn another_key_than_the_pinned_one_is_not_spoken_to() {
    let scene = Scene::new(short_limits());
    let (listener, address) = listener(ListenOptions::default(), &scene.limits);
    let options = ListenOptions { expiry: Duration::from_millis(700), ..ListenOptions::default() };
    let impostor = Listener::bind(local(), options, scene.limits.clone()).expect("listen");
    let Address::Listening { port, .. } = impostor.destination("127.0.0.1") else { panic!("listening") };
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| impostor.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        let mut diverted =
            Address::Listening { host: "127.0.0.1".to_owned(), port, ticket: listener.ticket().clone() };
        let refused = diverted.connect(Purpose::Migrate, &scene.limits);
        assert!(matches!(refused, Err(ConnectError::WrongKey { .. })), "{refused:?}");
        let ended = serving.join().expect("listener");
        assert!(matches!(ended, Err(ListenError::Expired { .. })), "it never saw a proof: {ended:?}");
    });
    let pin = forged(listener.ticket(), |bytes| bytes[40] ^= 4);
    std::thread::scope(|scope| {
        let limits = Limits { outcome: Duration::ZERO, ..scene.limits.clone() };
        let serving =
            scope.spawn(|| listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        let refused = with_ticket(&address, pin).connect(Purpose::Migrate, &limits);
        assert!(matches!(refused, Err(ConnectError::WrongKey { .. })), "{refused:?}");
        drop(address.clone().connect(Purpose::Migrate, &limits).expect("the right one"));
        assert!(serving.join().expect("listener").is_err());
    });
}

#[test]
fn an_expired_ticket_gets_nothing() {
    let scene = Scene::new(short_limits());
    let options = ListenOptions { expiry: Duration::from_millis(300), ..ListenOptions::default() };
    let (listener, mut address) = listener(options, &scene.limits);
    // Not served in time: the connection waits in the backlog until after the expiry.
    std::thread::sleep(Duration::from_millis(400));
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| address.connect(Purpose::Migrate, &scene.limits));
        std::thread::sleep(Duration::from_millis(50));
        let ended = listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched());
        assert!(matches!(ended, Err(ListenError::Expired { .. })), "{ended:?}");
        assert!(caller.join().expect("caller").is_err());
    });
}

#[test]
fn connections_that_say_nothing_or_nonsense_hold_up_nobody() {
    let scene = Scene::new(Limits::default());
    let (listener, mut address) = listener(ListenOptions::default(), &scene.limits);
    let place = listener.local_address();
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        let silent: Vec<_> = (0..5).map(|_| TcpStream::connect(place).expect("connect")).collect();
        let mut nonsense = TcpStream::connect(place).expect("connect");
        nonsense.write_all(b"GET / HTTP/1.1\r\nHost: limosa\r\n\r\n").expect("write");
        let began = Instant::now();
        assert!(matches!(migrate(&mut address, &scene), Ok(Outcome::Moved(_))));
        assert!(began.elapsed() < Duration::from_secs(8), "nobody was waited for");
        drop(silent);
        assert!(serving.join().expect("listener").is_ok());
        let mut answer = Vec::new();
        // An alert of TLS or a reset; not a byte of ours.
        let _ = nonsense.read_to_end(&mut answer);
        assert!(answer.len() < 16, "{answer:?}");
    });
}

#[test]
fn the_outcome_can_be_asked_for_with_the_used_ticket() {
    let scene = Scene::new(short_limits());
    let (listener, mut address) = listener(ListenOptions::default(), &scene.limits);
    let forward = Cutter::new(listener.local_address());
    let mut through = match &address {
        Address::Listening { ticket, .. } => {
            Address::Listening { host: "127.0.0.1".to_owned(), port: forward.port, ticket: ticket.clone() }
        }
        Address::Ssh { .. } => panic!("listening"),
    };
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        let transport = through.connect(Purpose::Migrate, &scene.limits).expect("connect");
        let outgoing = Outgoing::connect(transport, &scene.limits, unwatched()).expect("greet");
        let mut sending = outgoing.negotiate(&scene.offer).expect("offer");
        small_checkpoint(&mut sending).expect("send");
        let ready = sending.finish().expect("ready");
        scene.world.freeze();
        // The network is cut while the source seals, just before `HandOver` is sent.
        let seal = || {
            forward.cut();
            Ok::<_, std::io::Error>(())
        };
        let outcome = ready.hand_over(&scene.source, &mut address, seal).expect("an outcome");
        assert!(matches!(outcome, Outcome::Kept { .. }), "{outcome:?}");
        scene.world.start();
        let again = settle(&scene.source, scene.offer.id, &mut address, &scene.limits).expect("settle");
        assert_eq!(again, outcome);
        assert!(serving.join().expect("listener").is_err());
    });
    let answer = scene.destination.answer(scene.offer.id, |_| panic!("it was not being started"));
    assert!(matches!(answer, Ok(Answer::NeverStarted(_))), "{answer:?}");
    assert_eq!(scene.world.running(), 1);
}

/// Forwards one connection until it is cut.
struct Cutter {
    port: u16,
    ends: Arc<std::sync::Mutex<Vec<TcpStream>>>,
}

impl Cutter {
    fn new(to: SocketAddr) -> Self {
        let listener = TcpListener::bind(local()).expect("listen");
        let port = listener.local_addr().expect("address").port();
        let ends: Arc<std::sync::Mutex<Vec<TcpStream>>> = Arc::default();
        let kept = Arc::clone(&ends);
        std::thread::spawn(move || {
            let (near, _) = listener.accept().expect("accept");
            let far = TcpStream::connect(to).expect("connect");
            let copy = |stream: &TcpStream| stream.try_clone().expect("dup");
            kept.lock().expect("ends").extend([copy(&near), copy(&far)]);
            for (mut from, mut to) in [(copy(&near), copy(&far)), (far, near)] {
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            }
        });
        Self { port, ends }
    }

    fn cut(&self) {
        for end in self.ends.lock().expect("ends").iter() {
            end.shutdown(std::net::Shutdown::Both).expect("shutdown");
        }
    }
}

#[test]
fn a_question_cannot_smuggle_in_a_migration() {
    let scene = Scene::new(short_limits());
    let (listener, mut address) = listener(ListenOptions::default(), &scene.limits);
    std::thread::scope(|scope| {
        let serving =
            scope.spawn(|| listener.serve(&mut Host::new(&scene.world), &scene.destination, unwatched()));
        let first = address.connect(Purpose::Migrate, &scene.limits).expect("the first use");
        let asking = address.connect(Purpose::Ask, &scene.limits).expect("to ask");
        let outgoing = Outgoing::connect(asking, &scene.limits, unwatched()).expect("greet");
        let offered = outgoing.negotiate(&Offer::new(MigrationId::random().expect("id"), "another"));
        assert!(offered.is_err());
        drop(first);
        assert!(serving.join().expect("listener").is_err());
    });
}
