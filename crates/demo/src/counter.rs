//! The client: one TCP connection over all migrations, one `INCR` after the other.
//!
//! Every reply must be one more than the one before: less is an increment that was confirmed and lost, more one that
//! happened twice. The time between two replies is a gap.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use limosa_stage::Place;
use serde::Serialize;

use crate::figures::{ms, percentile};
use crate::resp::{Client, Reply};

/// Counters, incremented in turn.
pub const COUNTERS: usize = 16;
/// Between two requests: the client measures the server, and should not take its processor away.
const PACE: Duration = Duration::from_micros(100);

/// The counting client, in a thread of its own.
#[derive(Debug)]
pub struct Counter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    state: Mutex<State>,
    /// The connection, to wake up whoever waits for a reply on it.
    connection: Mutex<Option<TcpStream>>,
}

/// What the client knows.
#[derive(Debug)]
struct State {
    totals: Totals,
    last_reply: Instant,
    window: Window,
}

/// What the client saw from its beginning to its end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Totals {
    /// Increments that were confirmed.
    pub increments: u64,
    /// Confirmed increments that were not there any more.
    pub lost: u64,
    /// Increments that were there without having been asked for.
    pub repeated: u64,
    /// Connections that broke.
    pub resets: u64,
    /// Why they broke, the first few.
    pub errors: Vec<String>,
}

/// The gaps since the window was opened.
#[derive(Debug)]
struct Window {
    opened: Instant,
    gaps: Vec<Duration>,
}

/// What the client saw in a while.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Seen {
    /// How long it was, seconds.
    pub seconds: f64,
    /// Replies.
    pub replies: u64,
    /// The longest time between two replies, milliseconds.
    pub longest_gap_ms: f64,
    /// The time that 99 % of the gaps did not exceed, milliseconds.
    pub p99_gap_ms: f64,
}

/// What the client is doing now.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// Increments so far.
    pub increments: u64,
    /// Since the last reply.
    pub silent: Duration,
    /// The longest gap of the window, a present silence included.
    pub longest_gap: Duration,
}

impl Counter {
    /// Connects from `place` and begins to count.
    pub fn start(place: Place, address: SocketAddr) -> Result<Self> {
        let window = Window { opened: Instant::now(), gaps: Vec::new() };
        let state = State { totals: Totals::default(), last_reply: Instant::now(), window };
        let shared = Arc::new(Shared::new(state));
        let (for_thread, (report, outcome)) = (Arc::clone(&shared), std::sync::mpsc::channel());
        let work = move || {
            let connected = place.enter().and_then(|inside| Ok((inside, Client::connect(address)?)));
            match connected {
                Ok((_inside, client)) => {
                    let _ = report.send(Ok(()));
                    count(&for_thread, client, address);
                }
                Err(error) => drop(report.send(Err(error))),
            }
        };
        let thread = std::thread::Builder::new().name("client".to_owned()).spawn(work)?;
        let counter = Self { shared, thread: Some(thread) };
        outcome.recv().context("the client's thread ended")?.context("connecting the client to redis")?;
        Ok(counter)
    }

    /// Begins to gather gaps anew.
    pub fn open_window(&self) {
        let mut state = self.shared.lock();
        state.window = Window { opened: Instant::now(), gaps: Vec::new() };
    }

    /// What the client saw since [`Self::open_window`]. A silence at the end counts as a gap.
    pub fn seen(&self) -> Seen {
        let mut state = self.shared.lock();
        let silence = state.last_reply.elapsed();
        let window = &mut state.window;
        let replies = window.gaps.len() as u64;
        let mut gaps = std::mem::take(&mut window.gaps);
        gaps.push(silence);
        gaps.sort_unstable();
        Seen {
            seconds: window.opened.elapsed().as_secs_f64(),
            replies,
            longest_gap_ms: ms(gaps.last().copied().unwrap_or_default()),
            p99_gap_ms: ms(percentile(&gaps, 99.0)),
        }
    }

    /// What it is doing now.
    pub fn live(&self) -> Live {
        let state = self.shared.lock();
        let silent = state.last_reply.elapsed();
        let longest = state.window.gaps.iter().max().copied().unwrap_or_default();
        Live { increments: state.totals.increments, silent, longest_gap: longest.max(silent) }
    }

    /// Waits for a reply to a request that is made from now on.
    pub fn wait_for_replies(&self, limit: Duration, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        let before = self.live().increments;
        let begun = Instant::now();
        // The first reply from now on may be to a request that was sent before.
        while self.live().increments < before + 2 {
            ensure!(begun.elapsed() < limit, "the client has had no reply for {} s", limit.as_secs());
            check()?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The connections that broke so far and the increments that were lost or repeated.
    pub fn totals(&self) -> Totals {
        self.shared.lock().totals.clone()
    }

    /// Stops, and gives what it saw in all.
    pub fn stop(mut self) -> Result<Totals> {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow::anyhow!("the client's thread panicked"))?;
        }
        Ok(self.totals())
    }
}

impl Drop for Counter {
    /// Ends the thread, also where it waits for a reply that never comes.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(connection) = self.shared.connection().take() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn new(state: State) -> Self {
        Self { stop: AtomicBool::new(false), state: Mutex::new(state), connection: Mutex::new(None) }
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Option<TcpStream>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// The client's loop. After a broken connection it makes another and goes on, to see what was lost.
fn count(shared: &Shared, mut client: Client, address: SocketAddr) {
    let mut confirmed = [0_i64; COUNTERS];
    // The counter whose last request had no reply: whether it was done is not known.
    let mut open = None;
    shared.lock().last_reply = Instant::now();
    *shared.connection() = client.handle().ok();
    while !shared.stopped() {
        for (which, confirmed) in confirmed.iter_mut().enumerate() {
            let slack = i64::from(open == Some(which));
            match increment(&mut client, which) {
                Ok(value) => {
                    note(shared, value - (*confirmed + 1), slack);
                    *confirmed = value;
                    open = open.filter(|open| *open != which);
                }
                Err(error) => {
                    if shared.stopped() {
                        return;
                    }
                    open = Some(which);
                    broken(shared, &error);
                    let Some(new) = reconnect(shared, address) else { return };
                    client = new;
                    *shared.connection() = client.handle().ok();
                }
            }
            std::thread::sleep(PACE);
        }
    }
}

fn increment(client: &mut Client, which: usize) -> io::Result<i64> {
    match client.call(&[b"INCR", key(which).as_bytes()])? {
        Reply::Integer(value) => Ok(value),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("INCR answered {other:?}"))),
    }
}

/// The name of a counter.
pub fn key(which: usize) -> String {
    format!("counter:{which}")
}

/// Counts a reply that was `excess` more than expected; up to `slack` more is right.
fn note(shared: &Shared, excess: i64, slack: i64) {
    let mut state = shared.lock();
    let now = Instant::now();
    let gap = now - std::mem::replace(&mut state.last_reply, now);
    state.window.gaps.push(gap);
    state.totals.increments += 1;
    state.totals.lost += (-excess).max(0).unsigned_abs();
    state.totals.repeated += (excess - slack).max(0).unsigned_abs();
}

fn broken(shared: &Shared, error: &io::Error) {
    let mut state = shared.lock();
    state.totals.resets += 1;
    if state.totals.errors.len() < 10 {
        state.totals.errors.push(error.to_string());
    }
}

fn reconnect(shared: &Shared, address: SocketAddr) -> Option<Client> {
    while !shared.stopped() {
        if let Ok(client) = Client::connect(address) {
            return Some(client);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_repeated_increments_are_told_apart() {
        let window = Window { opened: Instant::now(), gaps: Vec::new() };
        let state = State { totals: Totals::default(), last_reply: Instant::now(), window };
        let shared = Shared::new(state);
        note(&shared, 0, 0);
        note(&shared, 1, 1);
        note(&shared, -3, 0);
        note(&shared, 2, 0);
        let totals = shared.lock().totals.clone();
        assert_eq!((totals.increments, totals.lost, totals.repeated), (4, 3, 2));
    }
}
