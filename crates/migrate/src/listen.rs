//! A destination that waits for one source with a ticket: `limosa receive --listen`.
//!
//! One thread accepts; each connection is greeted on a thread of its own, so that one that says nothing holds up
//! nobody. The first that proves the ticket is served by the caller's thread, and uses the ticket up. From then on
//! the ticket serves only questions about the outcome. Whoever does not prove it gets no answer at all.
//!
//! A listener that is killed after the hand-over cannot answer any more. So it can be left to another process: its socket,
//! and its key and ticket as a [`Legacy`]. That one is an [`Heir`] and answers in its place.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::address::Address;
use crate::incoming::{self, Destination, LookForRemains, Note, ReceiveError, Received};
use crate::limits::Limits;
use crate::message::Offer;
use crate::outcome::Purpose;
use crate::progress::{Phase, Progress, Watch};
use crate::record::{Remains, Store};
use crate::ticket::{Ticket, TicketError};
use crate::tls::{Caller, Identity};
use crate::transport::Transport;

/// How a listener guards its ticket.
#[derive(Debug, Clone)]
pub struct ListenOptions {
    /// The ticket is good for this long.
    pub expiry: Duration,
    /// So many connections may fail to prove the ticket; then it is void.
    pub attempts: u32,
    /// So many connections are greeted at a time; more are closed at once.
    pub greeting: u32,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self { expiry: Duration::from_mins(10), attempts: 10, greeting: 16 }
    }
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be listened on.
    #[error("listening on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The key and its certificate could not be made.
    #[error("making a key for the listener")]
    Key(#[source] io::Error),
    /// Nobody came in time.
    #[error("nobody used the ticket within {} s; it has expired", .after.as_secs())]
    Expired {
        /// How long it was good.
        after: Duration,
    },
    /// Too many came without the ticket.
    #[error(
        "{attempts} connections tried a wrong ticket; this one is void now. Run the command again for a new one"
    )]
    TooManyAttempts {
        /// How many.
        attempts: u32,
    },
    /// The source proved the ticket, which is used up by that, and was gone before the protocol began.
    #[error("the source used the ticket and hung up at once. Run the command again for a new ticket")]
    HungUp,
    /// Someone came, and it did not end well.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
}

/// A destination that waits for one source.
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    identity: Identity,
    ticket: Ticket,
    options: ListenOptions,
    limits: Limits,
    since: Instant,
}

impl Listener {
    /// Listens, with a new key and a new ticket.
    pub fn bind(address: SocketAddr, options: ListenOptions, limits: Limits) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Bind { address, source };
        let socket = TcpListener::bind(address).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        let identity = Identity::generate().map_err(ListenError::Key)?;
        let ticket = Ticket::new(identity.certificate()).map_err(ListenError::Key)?;
        Ok(Self { socket, address, identity, ticket, options, limits, since: Instant::now() })
    }

    /// Where it listens.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// The ticket.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// What to give to `limosa migrate`, with `host` as the name by which the source reaches this machine.
    pub fn destination(&self, host: impl Into<String>) -> Address {
        Address::Listening { host: host.into(), port: self.address.port(), ticket: self.ticket.clone() }
    }

    /// Waits for the source and serves it. If the source may not know the outcome afterwards, stays to answer its
    /// questions for as long as it asks (`limits.outcome`).
    pub fn serve<D: Destination>(
        self,
        destination: &mut D,
        store: &Store,
        watch: Watch<'_>,
    ) -> Result<Received, ListenError> {
        self.serve_noting(destination, store, watch, &mut |_| ())
    }

    /// As [`Self::serve`]; `note` is told whether the source may come to ask, for whoever answers if this process dies.
    pub fn serve_noting<D: Destination>(
        self,
        destination: &mut D,
        store: &Store,
        mut watch: Watch<'_>,
        note: &mut dyn FnMut(Note),
    ) -> Result<Received, ListenError> {
        let (events, happened) = channel();
        // Asked only about a receiver that is dead, and this one lives.
        let remains = |_: &_| Err("only a new receiver can find that out".into());
        let desk = Desk::new(&self, store, events, &remains);
        std::thread::scope(|scope| {
            // Ends the acceptor also when this thread panics.
            let _closing = Closing(&desk);
            scope.spawn(|| desk.accept(scope));
            let transport = self.wait_for_source(&happened)?;
            let mut may_ask = false;
            let told: Watch<'_> = Box::new(&mut watch);
            let mut noted = |news| {
                may_ask = matches!(news, Note::MayAsk(_));
                note(news);
            };
            let result =
                incoming::receive_noting(transport, destination, store, &self.limits, told, &mut noted);
            if may_ask {
                watch(&Progress {
                    phase: Phase::Settling,
                    counters: crate::Counters::default(),
                    round: None,
                });
                wait_for_questions(&happened, self.limits.outcome);
            }
            Ok(result?)
        })
    }

    fn wait_for_source(&self, happened: &Receiver<Event>) -> Result<Transport, ListenError> {
        let left = (self.since + self.options.expiry).saturating_duration_since(Instant::now());
        match happened.recv_timeout(left) {
            Ok(Event::Source(transport)) => Ok(transport),
            Ok(Event::Void) => Err(ListenError::TooManyAttempts { attempts: self.options.attempts }),
            Ok(Event::HungUp) => Err(ListenError::HungUp),
            Ok(Event::Settled) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(ListenError::Expired { after: self.options.expiry })
            }
        }
    }

    /// What another process needs to answer in this one's place, and the socket to do it on.
    pub fn legacy(&self) -> Result<(Legacy, OwnedFd), ListenError> {
        let (identity, ticket) = (&self.identity, self.ticket.to_string());
        let answering_ms = u64::try_from(self.limits.outcome.as_millis()).unwrap_or(u64::MAX);
        let (certificate, key) = (identity.certificate().to_vec(), identity.key().to_vec());
        let legacy = Legacy { certificate, key, ticket, answering_ms };
        let socket = self.socket.try_clone();
        socket
            .map(|socket| (legacy, socket.into()))
            .map_err(|source| ListenError::Bind { address: self.address, source })
    }
}

/// Until the source knows the outcome, or it has had long enough to ask.
fn wait_for_questions(happened: &Receiver<Event>, bound: Duration) {
    let until = Instant::now() + bound;
    while let Ok(event) = happened.recv_timeout(until.saturating_duration_since(Instant::now())) {
        if matches!(event, Event::Settled) {
            return;
        }
    }
}

/// A listener's key, certificate and ticket: secrets, for a process of the same user on the same host.
#[derive(Serialize, Deserialize)]
pub struct Legacy {
    /// DER.
    certificate: Vec<u8>,
    /// PKCS #8.
    key: Vec<u8>,
    ticket: String,
    /// For how long its questions are answered, in milliseconds.
    answering_ms: u64,
}

/// Answers in the place of a listener that died.
pub struct Heir(Listener);

impl Heir {
    /// The heir of the listener that had this socket. Of the limits, `outcome` is the listener's.
    pub fn new(legacy: Legacy, socket: OwnedFd, mut limits: Limits) -> Result<Self, HeirError> {
        limits.outcome = Duration::from_millis(legacy.answering_ms);
        let socket = TcpListener::from(socket);
        let address = socket.local_addr().map_err(HeirError::Socket)?;
        let identity = Identity::of(legacy.certificate, legacy.key).map_err(HeirError::Key)?;
        let (ticket, options, since) = (legacy.ticket.parse()?, ListenOptions::default(), Instant::now());
        Ok(Self(Listener { socket, address, identity, ticket, options, limits, since }))
    }

    /// Answers what became of the dead listener's migration, until the source has noted it or the time has
    /// passed that the listener would have stayed. `remains` finds out what became of a container that was being started ([`Destination::remains`]).
    pub fn answer(
        &self,
        store: &Store,
        remains: impl Fn(&Offer) -> Result<Remains, Box<dyn std::error::Error + Send + Sync>> + Sync,
    ) {
        let (events, happened) = channel();
        let desk = Desk::new(&self.0, store, events, &remains);
        desk.state().used = true;
        std::thread::scope(|scope| {
            let _closing = Closing(&desk);
            scope.spawn(|| desk.accept(scope));
            wait_for_questions(&happened, self.0.limits.outcome);
        });
    }
}

/// A process cannot answer in the place of a listener.
#[derive(Debug, thiserror::Error)]
pub enum HeirError {
    /// The descriptor is not a listening socket.
    #[error("the socket of the receiver that died")]
    Socket(#[source] io::Error),
    /// The key cannot be used.
    #[error("the key of the receiver that died")]
    Key(#[source] io::Error),
    /// The ticket cannot be read.
    #[error("the ticket of the receiver that died")]
    Ticket(#[from] TicketError),
}

/// What the acceptor's threads tell the serving one.
enum Event {
    /// The ticket was used: this is the source.
    Source(Transport),
    /// The ticket was used, by someone who is gone again.
    HungUp,
    /// The ticket is void.
    Void,
    /// The source knows the outcome.
    Settled,
}

#[derive(Default)]
struct State {
    used: bool,
    strangers: u32,
    closed: bool,
}

/// Where connections are greeted.
struct Desk<'a> {
    listener: &'a Listener,
    store: &'a Store,
    events: Sender<Event>,
    remains: &'a LookForRemains<'a>,
    state: Mutex<State>,
    greeting: AtomicU32,
}

struct Closing<'d, 'a>(&'d Desk<'a>);

impl Drop for Closing<'_, '_> {
    fn drop(&mut self) {
        self.0.state().closed = true;
    }
}

impl<'a> Desk<'a> {
    fn new(
        listener: &'a Listener,
        store: &'a Store,
        events: Sender<Event>,
        remains: &'a LookForRemains<'a>,
    ) -> Self {
        Self { listener, store, events, remains, state: Mutex::default(), greeting: AtomicU32::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        const LOOK_UP: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        while !self.state().closed {
            let mut fds = [PollFd::new(&self.listener.socket, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&LOOK_UP));
            // `WouldBlock` as a rule; or the caller is gone again, or there are no descriptors, which passes.
            let Ok((socket, from)) = self.listener.socket.accept() else { continue };
            if self.greeting.load(Ordering::SeqCst) >= self.listener.options.greeting {
                continue;
            }
            self.greeting.fetch_add(1, Ordering::SeqCst);
            scope.spawn(move || {
                let transport = self.greet(socket, from);
                self.greeting.fetch_sub(1, Ordering::SeqCst);
                match transport {
                    Ok(Some((Purpose::Migrate, transport))) => self.tell(Event::Source(transport)),
                    Ok(Some((Purpose::Ask, transport))) => self.answer(transport),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::debug!(%from, %error, "a connection did not get as far as the ticket");
                    }
                }
            });
        }
    }

    /// Who it is, and whether what it wants is still to be had.
    fn greet(&self, socket: TcpStream, from: SocketAddr) -> io::Result<Option<(Purpose, Transport)>> {
        let until = Instant::now() + self.listener.limits.connect;
        let caller = self.listener.identity.accept(socket, &self.listener.ticket, until)?;
        let admitted = self.admit(&caller, from);
        match caller {
            Caller::Proved(purpose, proved) if admitted => {
                let welcomed = proved.welcome(from.to_string(), until);
                if welcomed.is_err() && purpose == Purpose::Migrate {
                    self.tell(Event::HungUp);
                }
                Ok(Some((purpose, welcomed?)))
            }
            _ => Ok(None),
        }
    }

    fn admit(&self, caller: &Caller, from: SocketAddr) -> bool {
        let mut state = self.state();
        let void = state.strangers >= self.listener.options.attempts || state.closed;
        match caller {
            Caller::Stranger => {
                state.strangers += 1;
                tracing::warn!(%from, "a connection with a wrong ticket");
                if state.strangers == self.listener.options.attempts && !state.used {
                    self.tell(Event::Void);
                }
                false
            }
            Caller::Proved(Purpose::Migrate, _) => {
                let expired = self.listener.since.elapsed() >= self.listener.options.expiry;
                let admitted = !(state.used || expired || void);
                state.used |= admitted;
                admitted
            }
            // The source of the migration that was; strangers must not be able to keep it from its answer.
            Caller::Proved(Purpose::Ask, _) => state.used,
        }
    }

    fn answer(&self, transport: Transport) {
        match incoming::answer_only(transport, self.store, &self.listener.limits, self.remains) {
            Ok(true) => self.tell(Event::Settled),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(error = crate::message::chain(&error), "a question was not answered");
            }
        }
    }

    fn tell(&self, event: Event) {
        // Nobody listens any more once the listener closes.
        let _ = self.events.send(event);
    }
}
