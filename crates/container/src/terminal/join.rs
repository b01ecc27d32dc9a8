//! A terminal of a container joined to ours.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_kernel::signals::Signals;
use limosa_kernel::spawn::wait_for_end;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::Signal;
use rustix::termios::{self, OptionalActions, Termios};

use super::{copy_size, drain};

/// The key that leaves an attached terminal: Ctrl-].
const LEAVE: u8 = 0x1d;
/// Signals that are for the container, or end an attachment.
const SIGNALS: [Signal; 3] = [Signal::INT, Signal::TERM, Signal::QUIT];

/// How we are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// The terminal is ours alone: it hangs up with us. Signals are passed on; the second one kills.
    Foreground,
    /// The terminal stays when we leave, by a key or a signal.
    Attached,
}

/// Why we are not joined any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// The process has ended.
    Ended,
    /// We have left.
    Left,
}

/// Our terminal in raw mode while this lives, so that every key goes to the container.
struct Raw {
    former: Option<Termios>,
}

impl Raw {
    fn enter() -> io::Result<Self> {
        let input = io::stdin();
        if !input.is_terminal() {
            return Ok(Self { former: None });
        }
        let former = termios::tcgetattr(&input)?;
        let mut raw = former.clone();
        raw.make_raw();
        termios::tcsetattr(&input, OptionalActions::Now, &raw)?;
        Ok(Self { former: Some(former) })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(former) = &self.former {
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, former);
        }
    }
}

/// Joins our standard input and output to the terminal until the process behind `pidfd` ends, or we leave; what it shows
/// also goes to `log`. Reading from the terminal must not block.
pub(crate) fn join(
    outside: &OwnedFd,
    pidfd: BorrowedFd<'_>,
    mut log: Option<&mut File>,
    manner: Manner,
) -> io::Result<Joined> {
    let numbers: Vec<i32> = SIGNALS.iter().chain(&[Signal::WINCH]).map(|signal| signal.as_raw()).collect();
    let signals = Signals::gather(&numbers).map_err(io::Error::other)?;
    let _raw = Raw::enter()?;
    let input = io::stdin();
    let mut typed = Vec::new();
    let mut input_open = true;
    let mut asked = false;
    loop {
        let wanted = if typed.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let mut polled = vec![
            PollFd::new(outside, wanted),
            PollFd::from_borrowed_fd(pidfd, PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
        ];
        if input_open && typed.is_empty() {
            polled.push(PollFd::from_borrowed_fd(input.as_fd(), PollFlags::IN));
        }
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready = |index: usize| polled.get(index).map_or(PollFlags::empty(), PollFd::revents);
        let (ended, typing) = (!ready(1).is_empty(), !ready(3).is_empty());
        let hung_up = ready(0).contains(PollFlags::HUP) && !ready(0).contains(PollFlags::IN);
        while let Some(signal) = signals.next().and_then(Signal::from_named_raw) {
            match (signal, manner) {
                (Signal::WINCH, _) => copy_size(outside),
                (_, Manner::Attached) => return Ok(Joined::Left),
                (signal, Manner::Foreground) => {
                    let signal = if asked { Signal::KILL } else { signal };
                    asked = true;
                    // It may have ended just now.
                    let _ = rustix::process::pidfd_send_signal(pidfd, signal);
                }
            }
        }
        show(outside, log.as_deref_mut(), ended)?;
        if ended {
            return Ok(Joined::Ended);
        }
        if hung_up {
            // Everyone inside has closed it; all there is left to wait for is the end.
            wait_for_end(pidfd, std::time::Duration::MAX / 4).map_err(io::Error::other)?;
            return Ok(Joined::Ended);
        }
        if typing {
            input_open = read_input(&mut typed, manner)?;
            if manner == Manner::Attached && (!input_open || typed.contains(&LEAVE)) {
                // What was typed before is for the container.
                typed.truncate(typed.iter().position(|key| *key == LEAVE).unwrap_or(typed.len()));
                let _ = rustix::io::write(outside, &typed);
                return Ok(Joined::Left);
            }
        }
        match rustix::io::write(outside, &typed) {
            Ok(length) => drop(typed.drain(..length)),
            Err(Errno::AGAIN | Errno::INTR | Errno::IO) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Reads what was typed; at the end of input types the end-of-file character instead, if the terminal is only ours.
/// Whether there is more.
fn read_input(typed: &mut Vec<u8>, manner: Manner) -> io::Result<bool> {
    const END_OF_FILE: u8 = 4;
    let mut buffer = [0_u8; 4096];
    match rustix::io::read(io::stdin(), &mut buffer) {
        Ok(0) | Err(Errno::IO) => {
            if manner == Manner::Foreground {
                typed.push(END_OF_FILE);
            }
            Ok(false)
        }
        Ok(length) => {
            typed.extend(buffer.iter().take(length));
            Ok(true)
        }
        Err(Errno::INTR | Errno::AGAIN) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Shows what the terminal has: a buffer full, or all of it if it is the last.
fn show(outside: &OwnedFd, mut log: Option<&mut File>, all: bool) -> io::Result<()> {
    drain(outside, all, |shown| {
        let mut output = io::stdout();
        output.write_all(shown).and_then(|()| output.flush())?;
        log.as_mut().map_or(Ok(()), |log| log.write_all(shown))
    })
}
