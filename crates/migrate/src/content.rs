//! The destination's receiving of the checkpoint: content messages into a [`Sink`], and the final count.

use std::io::{self, Read};

use limosa_image::{Sink, SpaceId};

use crate::frame::{Frame, Kind};
use crate::incoming::ReceiveError;
use crate::link::Link;
use crate::message::{self, Blob, BlobEnd, End, State, printable};
use crate::progress::{Phase, Progress, Watch};
use crate::session::{self, PeerError};
use crate::totals::{Totals, split_gone, split_pages};

/// Progress is told about every so many bytes.
const TELL_EVERY: u64 = 1 << 20;

/// What was sent is not a checkpoint, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// A piece of state longer than this side takes, or than it said.
    #[error("the section {name} of the state has {length} bytes; at most {limit} were expected")]
    StateLength {
        /// Its name.
        name: String,
        /// Its length, in bytes.
        length: u64,
        /// The most that was expected.
        limit: u64,
    },
    /// Memory that is not whole pages below the end of an address space.
    #[error("a message of memory with {length} bytes does not hold whole pages at a page's address")]
    Pages {
        /// The payload's length, in bytes.
        length: usize,
    },
    /// A blob whose end says another length.
    #[error("the blob {name} has {received} bytes; the source says {claimed}")]
    BlobLength {
        /// Its name.
        name: String,
        /// What arrived, in bytes.
        received: u64,
        /// What the source says.
        claimed: u64,
    },
    /// The totals differ.
    #[error("what arrived is not what was sent: {received:?} instead of {claimed:?}")]
    Totals {
        /// What arrived.
        received: Box<End>,
        /// What the source says.
        claimed: Box<End>,
    },
}

/// Receives everything up to `End` into the sink.
pub(crate) fn receive(link: &Link, sink: &mut dyn Sink, watch: &mut Watch<'_>) -> Result<(), ReceiveError> {
    let mut intake = Intake { link, watch, totals: Totals::default(), told: 0 };
    loop {
        let frame = intake.next()?;
        match frame.kind {
            Kind::State => intake.state(&frame, sink)?,
            Kind::Pages => intake.pages(frame, sink)?,
            Kind::Gone => intake.gone(&frame, sink)?,
            Kind::Blob => intake.blob(&frame, sink)?,
            _ => return intake.end(&frame),
        }
    }
}

struct Intake<'a, 'w> {
    link: &'a Link,
    watch: &'a mut Watch<'w>,
    totals: Totals,
    told: u64,
}

impl Intake<'_, '_> {
    fn next(&mut self) -> Result<Frame, PeerError> {
        let frame = self.link.next("content", self.link.limits().content)?;
        if frame.kind.is_content() {
            self.totals.note(&frame.header);
        }
        let counters = self.link.counters();
        if counters.bytes_received - self.told >= TELL_EVERY {
            self.told = counters.bytes_received;
            (self.watch)(&Progress { phase: Phase::Receiving, counters, round: None });
        }
        Ok(frame)
    }

    fn state(&mut self, frame: &Frame, sink: &mut dyn Sink) -> Result<(), ReceiveError> {
        let State { name, length } = message::decode(frame.kind, &frame.payload).map_err(PeerError::from)?;
        let limit = self.link.limits().max_state;
        let too_long = |length, limit| ContentError::StateLength { name: printable(&name), length, limit };
        if length > limit {
            return Err(too_long(length, limit).into());
        }
        // Grows with what arrives, not with what is claimed.
        let mut cbor = Vec::new();
        while (cbor.len() as u64) < length {
            let part = self.next()?;
            if part.kind != Kind::StateData {
                return Err(unexpected(&part, "more of the state").into());
            }
            cbor.extend_from_slice(&part.payload);
            self.link.recycle(part.payload);
        }
        if cbor.len() as u64 != length {
            return Err(too_long(cbor.len() as u64, length).into());
        }
        sink.state(&name, &cbor)?;
        self.totals.states += 1;
        Ok(())
    }

    fn pages(&mut self, frame: Frame, sink: &mut dyn Sink) -> Result<(), ReceiveError> {
        let (space, start, data) =
            split_pages(&frame.payload).ok_or(ContentError::Pages { length: frame.payload.len() })?;
        sink.pages(SpaceId(space), start, data)?;
        self.totals.memory_bytes += data.len() as u64;
        self.link.recycle(frame.payload);
        Ok(())
    }

    fn gone(&mut self, frame: &Frame, sink: &mut dyn Sink) -> Result<(), ReceiveError> {
        let (space, start, length) =
            split_gone(&frame.payload).ok_or(ContentError::Pages { length: frame.payload.len() })?;
        Ok(sink.forget(SpaceId(space), start, length)?)
    }

    fn blob(&mut self, frame: &Frame, sink: &mut dyn Sink) -> Result<(), ReceiveError> {
        let Blob { name } = message::decode(frame.kind, &frame.payload).map_err(PeerError::from)?;
        let mut stream =
            BlobStream { intake: self, part: Vec::new(), at: 0, received: 0, end: None, error: None };
        let stored = sink.blob(&name, &mut stream);
        // The stream's own error is the cause of what the sink says about it.
        if let Some(error) = stream.error {
            return Err(error.into());
        }
        let stored = stored?;
        // A sink reads to the end; the length that it reports says so too.
        let claimed = match stream.end {
            Some(end) if end == stored && stream.received == stored => end,
            end => {
                let claimed = end.unwrap_or_default();
                return Err(
                    ContentError::BlobLength { name: printable(&name), received: stored, claimed }.into()
                );
            }
        };
        self.totals.blobs += 1;
        self.totals.blob_bytes += claimed;
        Ok(())
    }

    fn end(&self, frame: &Frame) -> Result<(), ReceiveError> {
        let claimed: End = session::expect(frame, Kind::End, "content or its end")?;
        let received = self.totals.end();
        if received != claimed {
            return Err(
                ContentError::Totals { received: Box::new(received), claimed: Box::new(claimed) }.into()
            );
        }
        Ok(())
    }
}

fn unexpected(frame: &Frame, expected: &'static str) -> PeerError {
    match frame.kind {
        Kind::Abort => session::gave_up(frame),
        got => PeerError::Unexpected { expected, got },
    }
}

/// The content of a blob as it arrives.
struct BlobStream<'i, 'a, 'w> {
    intake: &'i mut Intake<'a, 'w>,
    part: Vec<u8>,
    at: usize,
    received: u64,
    end: Option<u64>,
    error: Option<PeerError>,
}

impl BlobStream<'_, '_, '_> {
    /// Fetches the next part, or the end.
    fn fetch(&mut self) -> Result<(), PeerError> {
        let frame = self.intake.next()?;
        match frame.kind {
            Kind::BlobData => {
                self.intake.link.recycle(std::mem::replace(&mut self.part, frame.payload));
                self.at = 0;
                self.received += self.part.len() as u64;
                Ok(())
            }
            Kind::BlobEnd => {
                let BlobEnd { length } = message::decode(frame.kind, &frame.payload)?;
                self.end = Some(length);
                Ok(())
            }
            _ => Err(unexpected(&frame, "more of the blob")),
        }
    }
}

impl Read for BlobStream<'_, '_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.part.len() {
            if self.error.is_some() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if self.end.is_some() {
                return Ok(0);
            }
            match self.fetch() {
                Ok(()) => {}
                Err(error) => {
                    let told = io::Error::other(error.to_string());
                    self.error = Some(error);
                    return Err(told);
                }
            }
        }
        let rest = self.part.get(self.at..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.at += length;
        Ok(length)
    }
}
