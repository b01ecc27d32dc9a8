//! A network in the middle that can go wrong at a given message.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use limosa_migrate::Transport;
use limosa_migrate::frame::{HEADER_BYTES, Kind, PREAMBLE};

/// Which way a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToDestination,
    ToSource,
}

/// What the network does at the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// Closes both connections.
    Close,
    /// From here on takes everything and delivers nothing, in both directions.
    Silence,
    /// From here on takes nothing any more, in both directions.
    Stall,
    /// Turns one bit over, and goes on.
    Flip,
    /// Loses this message, and goes on.
    Lose,
    /// Holds this message, and all that follow, for 300 ms.
    Hold,
}

/// How much of the message is delivered before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Before,
    Inside,
    After,
}

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy)]
pub struct Mishap {
    pub way: Way,
    /// Counts messages that are no heartbeats, from 0.
    pub message: usize,
    pub place: Place,
    pub harm: Harm,
}

/// Two transports with a network between them.
pub struct Network {
    pumps: Vec<JoinHandle<()>>,
    pub kinds: [Arc<Mutex<Vec<Kind>>>; 2],
    pub happened: Arc<AtomicUsize>,
}

struct Pump {
    way: Way,
    from: UnixStream,
    to: UnixStream,
    mishap: Option<Mishap>,
    delay: Duration,
    silent: Arc<AtomicBool>,
    stalled: Arc<AtomicBool>,
    kinds: Arc<Mutex<Vec<Kind>>>,
    happened: Arc<AtomicUsize>,
}

impl Network {
    /// The source's and the destination's ends; each message takes `delay` more.
    pub fn new(mishap: Option<Mishap>, delay: Duration) -> (Transport, Transport, Self) {
        let (source, near) = UnixStream::pair().expect("socketpair");
        let (far, destination) = UnixStream::pair().expect("socketpair");
        let kinds = [Arc::default(), Arc::default()];
        let (silent, stalled, happened) = (Arc::default(), Arc::default(), Arc::default());
        let pump = |way: Way, from: &UnixStream, to: &UnixStream| Pump {
            way,
            from: from.try_clone().expect("dup"),
            to: to.try_clone().expect("dup"),
            mishap,
            delay,
            silent: Arc::clone(&silent),
            stalled: Arc::clone(&stalled),
            kinds: Arc::clone(&kinds[way as usize]),
            happened: Arc::clone(&happened),
        };
        let pumps = [pump(Way::ToDestination, &near, &far), pump(Way::ToSource, &far, &near)];
        let pumps = pumps.into_iter().map(|pump| std::thread::spawn(move || pump.run())).collect();
        let ours = Transport::from_unix(source, "source").expect("transport");
        let theirs = Transport::from_unix(destination, "destination").expect("transport");
        (ours, theirs, Self { pumps, kinds, happened })
    }

    /// Waits until both ends are closed.
    pub fn join(self) -> [Vec<Kind>; 2] {
        self.pumps.into_iter().for_each(|pump| pump.join().expect("a pump"));
        self.kinds.map(|kinds| kinds.lock().expect("kinds").clone())
    }
}

impl Pump {
    fn run(mut self) {
        // The stream ends, or is cut, by an error of one of its ends.
        let _ = self.pump();
        let _ = self.to.shutdown(Shutdown::Write);
        // What comes too late must not block its sender.
        if !self.stalled.load(Ordering::SeqCst) {
            let _ = io::copy(&mut self.from, &mut io::sink());
        }
    }

    fn pump(&mut self) -> io::Result<()> {
        let mut preamble = [0; PREAMBLE.len()];
        self.from.read_exact(&mut preamble)?;
        self.to.write_all(&preamble)?;
        let mut number = 0;
        loop {
            let mut message = vec![0; HEADER_BYTES];
            self.from.read_exact(&mut message)?;
            let length = u32::from_le_bytes([message[0], message[1], message[2], message[3]]);
            let kind = Kind::from_wire(message[4]).expect("a kind");
            message.resize(HEADER_BYTES + length as usize, 0);
            self.from.read_exact(&mut message[HEADER_BYTES..])?;
            std::thread::sleep(self.delay);
            let counted = !matches!(kind, Kind::Beat | Kind::Echo);
            let here =
                self.mishap.filter(|mishap| counted && mishap.way == self.way && mishap.message == number);
            if counted {
                self.kinds.lock().expect("kinds").push(kind);
                number += 1;
            }
            match here {
                Some(mishap) => self.harm(mishap, message)?,
                None => self.deliver(&message)?,
            }
        }
    }

    fn deliver(&mut self, bytes: &[u8]) -> io::Result<()> {
        while self.stalled.load(Ordering::SeqCst) {
            // Until the other end gives up: then this write fails.
            std::thread::sleep(Duration::from_millis(20));
            if self.to.write(&[]).is_err() || self.gone() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
        if self.silent.load(Ordering::SeqCst) { Ok(()) } else { self.to.write_all(bytes) }
    }

    /// Whether the sender has closed its end.
    fn gone(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.from, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    fn harm(&mut self, mishap: Mishap, mut message: Vec<u8>) -> io::Result<()> {
        self.happened.fetch_add(1, Ordering::SeqCst);
        let part = match mishap.place {
            Place::Before => 0,
            Place::Inside => message.len() / 2 + 1,
            Place::After => message.len(),
        };
        match mishap.harm {
            Harm::Close => {
                self.deliver(&message[..part])?;
                self.from.shutdown(Shutdown::Both)?;
                self.to.shutdown(Shutdown::Both)?;
                Err(io::ErrorKind::ConnectionReset.into())
            }
            Harm::Silence => {
                self.deliver(&message[..part])?;
                self.silent.store(true, Ordering::SeqCst);
                Ok(())
            }
            Harm::Stall => {
                self.deliver(&message[..part])?;
                self.stalled.store(true, Ordering::SeqCst);
                self.deliver(&[])
            }
            Harm::Flip => {
                let at = part.min(message.len() - 1);
                message[at] ^= 0x10;
                self.deliver(&message)
            }
            Harm::Lose => Ok(()),
            Harm::Hold => {
                std::thread::sleep(Duration::from_millis(300));
                self.deliver(&message)
            }
        }
    }
}
