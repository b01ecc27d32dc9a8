//! redis-server with three clients on connections that stay open: one increments counters, one waits in `BLPOP`, one
//! has a transaction half queued.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Pid;

use super::{Program, connect};
use crate::ground::Ground;

/// Where it listens.
pub const PORT: u16 = 6390;
const PATIENCE: Duration = Duration::from_secs(30);
const COUNTERS: u64 = 16;

/// A redis with `keys` keys of about 1 KiB.
pub struct Redis<'g> {
    ground: &'g dyn Ground,
    root: Pid,
    keys: u64,
    counting: Client,
    blocked: Client,
    queueing: Client,
    counted: [u64; COUNTERS as usize],
    largest_gap: Duration,
}

impl<'g> Redis<'g> {
    /// Starts the server and fills it.
    pub fn start(ground: &'g dyn Ground, keys: u64) -> Result<Self> {
        let (port, address, directory) = (PORT.to_string(), ground.address().to_string(), ground.directory());
        let listen = ["redis-server", "--port", &port, "--bind", &address, "--protected-mode", "no"];
        let rest = ["--save".as_ref(), "".as_ref(), "--dir".as_ref(), directory.as_os_str()];
        let command: Vec<&OsStr> = listen.iter().map(OsStr::new).chain(rest).collect();
        let root = ground.start("redis", &command)?;
        let client = || Ok::<_, anyhow::Error>(Client::new(connect(ground, "redis", root, PORT)?));
        let (counting, blocked, queueing) = (client()?, client()?, client()?);
        let counted = [0; COUNTERS as usize];
        let mut redis =
            Self { ground, root, keys, counting, blocked, queueing, counted, largest_gap: Duration::ZERO };
        redis.load()?;
        redis.open_requests()?;
        Ok(redis)
    }

    /// One client waits, another has a transaction half queued.
    fn open_requests(&mut self) -> Result<()> {
        self.blocked.send(&["BLPOP", "queue", "0"])?;
        ensure!(self.queueing.call(&["MULTI"])? == "OK");
        ensure!(self.queueing.call(&["SET", "queued", "1"])? == "QUEUED");
        Ok(())
    }

    /// Makes sure that all connections are closed, and connects all clients anew.
    pub fn reconnect(&mut self) -> Result<()> {
        for client in [&mut self.counting, &mut self.blocked, &mut self.queueing] {
            let (asked, closed) = (Instant::now(), client.call(&["PING"]));
            ensure!(closed.is_err(), "a connection that was to be closed answers {closed:?}");
            ensure!(asked.elapsed() < PATIENCE / 2, "a connection that was to be closed is silent");
            *client = Client::new(connect(self.ground, "redis", self.root, PORT)?);
        }
        self.open_requests()
    }

    /// The longest time that a reply took since this was last asked.
    pub fn take_largest_gap(&mut self) -> Duration {
        std::mem::take(&mut self.largest_gap)
    }

    fn load(&mut self) -> Result<()> {
        for first in (0..self.keys).step_by(1000) {
            let batch = first..(first + 1000).min(self.keys);
            for key in batch.clone() {
                self.counting.send(&["SET", &format!("key:{key}"), &value(key)])?;
            }
            for _ in batch {
                ensure!(self.counting.receive()? == "OK");
            }
        }
        Ok(())
    }

    fn count(&mut self) -> Result<()> {
        for round in 0..20 * COUNTERS {
            let which = round % COUNTERS;
            let before = Instant::now();
            let reply = self.counting.call(&["INCR", &format!("counter:{which}")])?;
            self.largest_gap = self.largest_gap.max(before.elapsed());
            let counted = &mut self.counted[which as usize];
            *counted += 1;
            ensure!(reply == counted.to_string(), "counter {which} is {reply} instead of {counted}");
        }
        Ok(())
    }
}

impl Program for Redis<'_> {
    fn root(&self) -> Pid {
        self.ground.root(self.root)
    }

    fn verify(&mut self) -> Result<String> {
        self.count()?;
        for step in 0..200.min(self.keys) {
            let key = step * self.keys / 200.min(self.keys);
            let found = self.counting.call(&["GET", &format!("key:{key}")])?;
            ensure!(found == value(key), "key {key} has another value");
        }
        let size = self.counting.call(&["DBSIZE"])?.parse::<u64>()?;
        ensure!((self.keys + COUNTERS..=self.keys + COUNTERS + 1).contains(&size), "{size} keys");

        // The blocked client gets what is pushed, and waits again.
        self.counting.call(&["RPUSH", "queue", "work"])?;
        let popped = self.blocked.receive()?;
        ensure!(popped == "queue work", "the blocked client got {popped:?}");
        self.blocked.send(&["BLPOP", "queue", "0"])?;

        let done = self.queueing.call(&["EXEC"])?;
        ensure!(done == "OK", "the half-queued transaction gave {done:?}");
        ensure!(self.queueing.call(&["MULTI"])? == "OK");
        ensure!(self.queueing.call(&["SET", "queued", "1"])? == "QUEUED");
        Ok(format!("{} increments, largest gap {:?}", self.counted.iter().sum::<u64>(), self.largest_gap))
    }
}

fn value(key: u64) -> String {
    format!("{key:016x}").repeat(64)
}

/// One connection, in redis's own protocol (RESP2).
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    /// A client on this connection.
    pub fn new(stream: TcpStream) -> Self {
        let _ = stream.set_read_timeout(Some(PATIENCE));
        let _ = stream.set_nodelay(true);
        Self { reader: BufReader::new(stream) }
    }

    /// Sends a command and waits for its reply, as text.
    pub fn call(&mut self, command: &[&str]) -> Result<String> {
        self.send(command)?;
        self.receive()
    }

    fn send(&mut self, command: &[&str]) -> Result<()> {
        let mut request = format!("*{}\r\n", command.len());
        for word in command {
            request.push_str(&format_bulk(word));
        }
        self.reader.get_mut().write_all(request.as_bytes()).context("sending to redis")
    }

    /// The next reply as text; the elements of an array with spaces between them.
    fn receive(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line).context("waiting for redis")?;
        ensure!(read > 0, "redis closed the connection");
        let (kind, rest) = line.trim_end().split_at(1);
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.reader.read_exact(&mut bytes).context("waiting for the rest of redis's reply")?;
                bytes.truncate(bytes.len() - 2);
                Ok(String::from_utf8(bytes)?)
            }
            "*" => {
                let elements: Result<Vec<_>> = (0..rest.parse::<usize>()?).map(|_| self.receive()).collect();
                Ok(elements?.join(" "))
            }
            _ => bail!("redis replied {line:?}"),
        }
    }
}

fn format_bulk(word: &str) -> String {
    format!("${}\r\n{word}\r\n", word.len())
}
