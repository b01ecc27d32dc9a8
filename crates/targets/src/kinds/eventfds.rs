//! Event counters: empty, at one, at some and full; counters and semaphores, blocking and not.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Setting, Verify};

/// The last is the most that one can hold.
const COUNTS: [u64; 5] = [0, 1, 2, 41, u64::MAX - 1];
const KINDS: [EventfdFlags; 3] =
    [EventfdFlags::NONBLOCK, EventfdFlags::SEMAPHORE.union(EventfdFlags::NONBLOCK), EventfdFlags::SEMAPHORE];

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let mut counters = Vec::new();
    for kind in KINDS {
        for count in COUNTS {
            let counter = eventfd(0, kind)?;
            write(&counter, count)?;
            counters.push((kind, count, counter));
        }
    }
    Ok(Box::new(move || {
        for (kind, count, counter) in &counters {
            check(*kind, *count, counter).with_context(|| format!("an eventfd ({kind:?}) at {count}"))?;
        }
        Ok(String::new())
    }))
}

/// Looks at it by reading, and puts back what was read.
fn check(kind: EventfdFlags, count: u64, counter: &OwnedFd) -> Result<()> {
    ensure!(is(counter, PollFlags::IN)? == (count > 0), "readable: {}", count == 0);
    ensure!(is(counter, PollFlags::OUT)? == (count < u64::MAX - 1), "writable: {}", count == u64::MAX - 1);
    if count == 0 {
        // Two more tell whether one read takes both.
        write(counter, 2)?;
        let read = read(counter)?;
        ensure!(read == if kind.contains(EventfdFlags::SEMAPHORE) { 1 } else { 2 }, "a read gave {read}");
        return if read == 1 { self::read(counter).map(drop) } else { Ok(()) };
    }
    let expected = if kind.contains(EventfdFlags::SEMAPHORE) { 1 } else { count };
    let read = read(counter)?;
    ensure!(read == expected, "a read gave {read}");
    if count == 1 {
        ensure!(!is(counter, PollFlags::IN)?, "it had more");
    }
    write(counter, read)
}

fn is(counter: &OwnedFd, what: PollFlags) -> Result<bool> {
    let mut polled = [PollFd::new(counter, what)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(polled[0].revents().contains(what))
}

fn read(counter: &OwnedFd) -> Result<u64> {
    let mut bytes = [0; 8];
    ensure!(rustix::io::read(counter, &mut bytes[..])? == 8, "a short read");
    Ok(u64::from_ne_bytes(bytes))
}

fn write(counter: &OwnedFd, count: u64) -> Result<()> {
    ensure!(rustix::io::write(counter, &count.to_ne_bytes())? == 8, "a short write");
    Ok(())
}
