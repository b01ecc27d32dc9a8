//! A client that keeps one connection to a redis, and counts in it all the time.
//!
//! Every reply must be one more than the one before. The client never connects again: a connection that breaks is what
//! it is there to notice. How long a reply takes does not matter.

use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use limosa_e2e::programs::RedisClient;
use limosa_e2e::wait_for;

/// What the client counts in.
const KEY: &str = "counter";
/// Longer than any silence of a connection that goes on.
const PATIENCE: Duration = Duration::from_mins(2);
/// Between two increments: the machines need the processor.
const PACE: Duration = Duration::from_millis(2);

/// The client, in a thread of its own.
pub struct Counter {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Shared {
    stop: bool,
    count: u64,
    last_reply: Option<Instant>,
    longest_gap: Duration,
}

impl Counter {
    /// Waits until a redis listens at `address`, connects, and counts.
    pub fn start(address: SocketAddr) -> Result<Self> {
        let stream = wait_for(&format!("a redis at {address}"), Duration::from_mins(1), || {
            Ok(TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok())
        })?;
        let timeout = stream.try_clone()?;
        let client = RedisClient::new(stream);
        timeout.set_read_timeout(Some(PATIENCE))?;
        let shared = Arc::new(Mutex::new(Shared::default()));
        let for_thread = Arc::clone(&shared);
        let thread = Some(std::thread::spawn(move || count(client, &for_thread)));
        Ok(Self { shared, thread })
    }

    /// Waits for increments that are asked for and answered from now on; how many there have been.
    pub fn goes_on(&self, patience: Duration) -> Result<u64> {
        let before = self.lock().count;
        wait_for("the client's next replies", patience, || {
            ensure!(
                self.thread.as_ref().is_some_and(|thread| !thread.is_finished()),
                "the client has failed"
            );
            // The first may answer what was asked before.
            let count = self.lock().count;
            Ok((count >= before + 3).then_some(count))
        })
    }

    /// Whether there was no reply for this long.
    pub fn is_silent(&self, how_long: Duration) -> bool {
        self.lock().last_reply.is_none_or(|last| last.elapsed() >= how_long)
    }

    /// Stops; how far it got, and the longest time between two replies. Fails where a reply was wrong or the connection
    /// broke.
    pub fn stop(mut self) -> Result<(u64, Duration)> {
        self.lock().stop = true;
        let thread = self.thread.take().context("the client has been stopped")?;
        thread.join().map_err(|_| anyhow!("the client's thread panicked"))??;
        let shared = self.lock();
        Ok((shared.count, shared.longest_gap))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(mut client: RedisClient, shared: &Mutex<Shared>) -> Result<()> {
    loop {
        let expected = {
            let shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            if shared.stop {
                return Ok(());
            }
            shared.count + 1
        };
        let reply = client.call(&["INCR", KEY]).with_context(|| format!("increment {expected}"))?;
        ensure!(reply == expected.to_string(), "the counter is {reply} instead of {expected}");
        {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.count = expected;
            let now = Instant::now();
            let gap = shared.last_reply.replace(now).map_or(Duration::ZERO, |last| now - last);
            shared.longest_gap = shared.longest_gap.max(gap);
        }
        std::thread::sleep(PACE);
    }
}
