//! A connection that carries frames: one thread reads, one keeps the heartbeat, the owner sends.
//!
//! The reading thread answers nothing itself and takes frames off the wire ahead of the owner, at most
//! [`AHEAD`] of them; so a source learns of a `Failed` while it is still sending, and a destination receives
//! the next megabyte while it stores the last. The pulse thread sends `Beat` when this side has been quiet, and
//! `Echo` for each `Beat` of the other side.

use std::io::{self, BufReader, IoSlice, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::frame::{self, Frame, FrameError, Header, Kind};
use crate::limits::Limits;
use crate::progress::Counters;
use crate::transport::{Carrier, Receive, Stop, Transmit, Transport};

/// Frames read ahead of the owner; each may hold a mebibyte.
const AHEAD: usize = 16;
/// Small frames are gathered up to this many bytes before they are written.
const GATHER: usize = 256 << 10;
/// After saying the last word, a side waits this long for the other to hang up.
const FAREWELL: Duration = Duration::from_secs(3);

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// What was read is not a frame, or the connection ended.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Nothing at all arrived for too long.
    #[error("nothing was heard from the other side for {} s: the connection is dead", .after.as_secs_f32())]
    Silent {
        /// How long.
        after: Duration,
    },
    /// The other side takes nothing of what is sent.
    #[error("the other side has taken no data for {} s", .after.as_secs_f32())]
    Stalled {
        /// How long.
        after: Duration,
    },
    /// The other side lives, but the awaited message did not come in time.
    #[error("no {awaited} came from the other side within {} s", .within.as_secs_f32())]
    Late {
        /// What was awaited.
        awaited: &'static str,
        /// The bound.
        within: Duration,
    },
    /// Sending failed.
    #[error("sending to the other side")]
    Send(#[source] io::Error),
}

/// Counters that all threads of a link update.
#[derive(Default)]
struct Counts {
    bytes_sent: AtomicU64,
    messages_sent: AtomicU64,
    bytes_received: AtomicU64,
    messages_received: AtomicU64,
    /// Shortest round trip in microseconds plus one; 0 is none yet.
    round_trip: AtomicU64,
}

/// The sending end, shared by the owner and the pulse thread.
struct Outbox {
    transmit: Box<dyn Transmit>,
    gathered: Vec<u8>,
    stall: Duration,
    last: Instant,
    counts: Arc<Counts>,
}

/// What the reading thread asks of the pulse thread.
#[derive(Default)]
struct Pulse {
    echo: Option<[u8; 8]>,
    over: bool,
}

type Shared<T> = Arc<(Mutex<T>, Condvar)>;

/// Locks; a thread that panicked leaves nothing here in a state that would be wrong to read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection that carries frames.
pub(crate) struct Link {
    outbox: Arc<Mutex<Outbox>>,
    inbox: Option<Receiver<Result<Frame, LinkError>>>,
    spare: Sender<Vec<u8>>,
    pulse: Shared<Pulse>,
    stop: Stop,
    threads: Vec<JoinHandle<()>>,
    counts: Arc<Counts>,
    limits: Limits,
    began: Instant,
    name: String,
    /// The version of the protocol that is spoken; 0 before the greeting.
    pub(crate) version: u32,
    /// Dropped after both halves are closed, which is how it knows that it is over.
    carrier: Option<Box<dyn Carrier>>,
}

impl Link {
    /// Begins to read. Nothing is sent before [`Link::send`], no heartbeat before [`Link::start_pulse`].
    pub(crate) fn new(transport: Transport, limits: &Limits) -> Self {
        let Transport { receive, transmit, stop, name, carrier } = transport;
        let counts = Arc::new(Counts::default());
        let began = Instant::now();
        let pulse: Shared<Pulse> = Arc::default();
        let (to_owner, inbox) = sync_channel(AHEAD);
        let (spare, spares) = channel();
        let reader = ReadingThread {
            stream: BufReader::with_capacity(
                64 << 10,
                Bounded { receive, silence: limits.silence, counts: Arc::clone(&counts) },
            ),
            silence: limits.silence,
            began,
            pulse: Arc::clone(&pulse),
            counts: Arc::clone(&counts),
            stop: stop.clone(),
        };
        let threads = vec![std::thread::spawn(move || reader.run(&to_owner, &spares))];
        let outbox = Outbox {
            transmit,
            gathered: Vec::with_capacity(GATHER),
            stall: limits.stall,
            last: Instant::now(),
            counts: Arc::clone(&counts),
        };
        Self {
            outbox: Arc::new(Mutex::new(outbox)),
            inbox: Some(inbox),
            spare,
            pulse,
            stop,
            threads,
            counts,
            limits: limits.clone(),
            began,
            name,
            version: 0,
            carrier,
        }
    }

    /// What the connection is, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What the program that carries the connection says about its failure.
    pub(crate) fn carrier_said(&self) -> Option<String> {
        self.carrier.as_ref()?.said()
    }

    /// The bounds it was made with.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The counters as they are now.
    pub(crate) fn counters(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            bytes_sent: get(&self.counts.bytes_sent),
            messages_sent: get(&self.counts.messages_sent),
            bytes_received: get(&self.counts.bytes_received),
            messages_received: get(&self.counts.messages_received),
            round_trip: get(&self.counts.round_trip).checked_sub(1).map(Duration::from_micros),
        }
    }

    /// Sends the preamble and a first frame.
    pub(crate) fn open(&self, kind: Kind, payload: &[u8]) -> Result<(), LinkError> {
        lock(&self.outbox).gathered.extend_from_slice(&frame::PREAMBLE);
        self.send_now(kind, &[payload])
    }

    /// Begins the heartbeat; the first beat goes out at once and measures the round trip.
    pub(crate) fn start_pulse(&mut self) {
        let (outbox, pulse) = (Arc::clone(&self.outbox), Arc::clone(&self.pulse));
        let (interval, began) = (self.limits.heartbeat, self.began);
        self.threads.push(std::thread::spawn(move || keep_pulse(&outbox, &pulse, interval, began)));
    }

    /// Sends a frame; it may be gathered with later ones.
    pub(crate) fn send(&self, kind: Kind, parts: &[&[u8]]) -> Result<Header, LinkError> {
        limosa_kernel::fault::point();
        lock(&self.outbox).put(kind, parts).map_err(|error| self.sending(error))
    }

    /// Sends a frame and everything gathered before it.
    pub(crate) fn send_now(&self, kind: Kind, parts: &[&[u8]]) -> Result<(), LinkError> {
        self.send(kind, parts)?;
        lock(&self.outbox).flush().map_err(|error| self.sending(error))
    }

    /// The next frame, at the latest `within` from now.
    pub(crate) fn next(&self, awaited: &'static str, within: Duration) -> Result<Frame, LinkError> {
        let Some(inbox) = &self.inbox else { return Err(FrameError::Closed.into()) };
        match inbox.recv_timeout(within) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(LinkError::Late { awaited, within }),
            Err(RecvTimeoutError::Disconnected) => Err(FrameError::Closed.into()),
        }
    }

    /// A frame that is already there.
    pub(crate) fn poll(&self) -> Result<Option<Frame>, LinkError> {
        let Some(inbox) = &self.inbox else { return Err(FrameError::Closed.into()) };
        match inbox.try_recv() {
            Ok(result) => result.map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(FrameError::Closed.into()),
        }
    }

    /// Gives a payload's buffer back to the reading thread.
    pub(crate) fn recycle(&self, buffer: Vec<u8>) {
        // Fails only once that thread has ended and needs none.
        let _ = self.spare.send(buffer);
    }

    /// After the last word was sent: lets it arrive. Closing at once could destroy it on its way (a TCP socket that is
    /// closed with unread data, such as a heartbeat, resets the connection).
    pub(crate) fn farewell(self) {
        if lock(&self.outbox).transmit.finish(FAREWELL).is_err() {
            return;
        }
        let until = Instant::now() + FAREWELL;
        while let Ok(frame) = self.next("end", until.saturating_duration_since(Instant::now())) {
            self.recycle(frame.payload);
        }
    }

    fn sending(&self, error: io::Error) -> LinkError {
        match error.kind() {
            io::ErrorKind::TimedOut => LinkError::Stalled { after: self.limits.stall },
            // The reading thread has found the connection dead; its reason follows in the inbox.
            io::ErrorKind::ConnectionAborted => FrameError::Closed.into(),
            _ => LinkError::Send(error),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.inbox = None;
        self.stop.stop();
        lock(&self.pulse.0).over = true;
        self.pulse.1.notify_all();
        for thread in self.threads.drain(..) {
            // A panic there was reported when it happened, and the link is going away.
            let _ = thread.join();
        }
    }
}

impl Outbox {
    fn put(&mut self, kind: Kind, parts: &[&[u8]]) -> io::Result<Header> {
        let header = Header::new(kind, parts);
        let length: usize = header.0.len() + parts.iter().map(|part| part.len()).sum::<usize>();
        self.counts.bytes_sent.fetch_add(length as u64, Ordering::Relaxed);
        self.counts.messages_sent.fetch_add(1, Ordering::Relaxed);
        if self.gathered.len() + length <= GATHER {
            self.gathered.extend_from_slice(&header.0);
            for part in parts {
                self.gathered.extend_from_slice(part);
            }
        } else {
            let gathered = std::mem::take(&mut self.gathered);
            let mut all = vec![gathered.as_slice(), &header.0];
            all.extend_from_slice(parts);
            let result = self.write_all(&all);
            self.gathered = gathered;
            self.gathered.clear();
            result?;
        }
        self.last = Instant::now();
        Ok(header)
    }

    fn flush(&mut self) -> io::Result<()> {
        let gathered = std::mem::take(&mut self.gathered);
        let result = self.write_all(&[&gathered]);
        self.gathered = gathered;
        self.gathered.clear();
        result
    }

    fn write_all(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> =
            parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)).collect();
        let mut rest = slices.as_mut_slice();
        while !rest.is_empty() {
            let sent = self.transmit.transmit(rest, self.stall)?;
            IoSlice::advance_slices(&mut rest, sent);
        }
        Ok(())
    }
}

fn keep_pulse(outbox: &Mutex<Outbox>, pulse: &(Mutex<Pulse>, Condvar), interval: Duration, began: Instant) {
    let mut beat_due = true;
    loop {
        let echo = {
            let mut state = lock(&pulse.0);
            if state.echo.is_none() && !state.over && !beat_due {
                state = pulse
                    .1
                    .wait_timeout(state, interval)
                    .map_or_else(|error| error.into_inner().0, |(state, _)| state);
            }
            if state.over {
                return;
            }
            state.echo.take()
        };
        let mut outbox = lock(outbox);
        beat_due |= outbox.last.elapsed() >= interval;
        let stamp = (began.elapsed().as_micros() as u64).to_le_bytes();
        let sent = echo
            .map_or(Ok(()), |stamp| outbox.put(Kind::Echo, &[&stamp]).map(drop))
            .and_then(|()| if beat_due { outbox.put(Kind::Beat, &[&stamp]).map(drop) } else { Ok(()) })
            .and_then(|()| outbox.flush());
        if sent.is_err() {
            // The owner meets the same error, or the reading thread has.
            return;
        }
        beat_due = false;
    }
}

/// A receiving half as a `Read` with the bound on silence.
struct Bounded {
    receive: Box<dyn Receive>,
    silence: Duration,
    counts: Arc<Counts>,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.receive.receive(buffer, self.silence)?;
        self.counts.bytes_received.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

struct ReadingThread {
    stream: BufReader<Bounded>,
    silence: Duration,
    began: Instant,
    pulse: Shared<Pulse>,
    counts: Arc<Counts>,
    stop: Stop,
}

impl ReadingThread {
    fn run(mut self, to_owner: &SyncSender<Result<Frame, LinkError>>, spares: &Receiver<Vec<u8>>) {
        let mut result = frame::read_preamble(&mut self.stream);
        while result.is_ok() {
            result = match frame::read_frame(&mut self.stream, spares.try_recv().unwrap_or_default()) {
                Ok(frame) => {
                    self.counts.messages_received.fetch_add(1, Ordering::Relaxed);
                    if !self.heartbeat(&frame) && to_owner.send(Ok(frame)).is_err() {
                        return;
                    }
                    Ok(())
                }
                Err(error) => Err(error),
            };
        }
        let Err(error) = result else { return };
        let error = match error {
            FrameError::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
                LinkError::Silent { after: self.silence }
            }
            // A reset is one way for a connection to end.
            FrameError::Io(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                FrameError::Closed.into()
            }
            other => other.into(),
        };
        // Whoever waits to send must not wait any longer; the reason is in the inbox.
        self.stop.stop();
        let _ = to_owner.send(Err(error));
    }

    /// Whether the frame was a heartbeat, which is dealt with here.
    fn heartbeat(&self, frame: &Frame) -> bool {
        let stamp = || <[u8; 8]>::try_from(frame.payload.as_slice()).ok();
        match (frame.kind, stamp()) {
            (Kind::Beat, Some(stamp)) => {
                lock(&self.pulse.0).echo = Some(stamp);
                self.pulse.1.notify_all();
            }
            (Kind::Echo, Some(stamp)) => {
                let now = self.began.elapsed().as_micros() as u64;
                if let Some(micros) = now.checked_sub(u64::from_le_bytes(stamp)) {
                    let shortest = |old: u64| (old == 0 || micros + 1 < old).then_some(micros + 1);
                    let _ =
                        self.counts.round_trip.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shortest);
                }
            }
            (Kind::Beat | Kind::Echo, None) => {}
            _ => return false,
        }
        true
    }
}
