//! A terminal of a container, joined to ours: pseudo-terminals (pty(7)).

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::signals::Signals;
use limosa_kernel::spawn::Process;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Signal;
use rustix::termios::{self, OptionalActions, Termios};

/// The two ends of a pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Pair {
    /// The end of whoever sits before it.
    pub outside: OwnedFd,
    /// The end of the programs that use it, one of the container's `/dev/pts`.
    pub inside: OwnedFd,
}

/// Opens a terminal of the mount namespace behind `mount`, of the size of ours.
pub(crate) fn open(mount: BorrowedFd<'_>) -> io::Result<Pair> {
    std::thread::scope(|scope| {
        // A thread of its own: it does not come back from the namespace.
        let thread = scope.spawn(|| -> io::Result<Pair> {
            namespace::unshare_directories().map_err(io::Error::other)?;
            namespace::enter(mount, Kind::Mount).map_err(io::Error::other)?;
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let outside = rustix::fs::open("/dev/ptmx", flags, Mode::empty())?;
            rustix::pty::unlockpt(&outside)?;
            let flags = (OFlags::RDWR | OFlags::NOCTTY).bits() as i32;
            let inside = limosa_kernel::terminal::open_slave(&outside, flags).map_err(io::Error::other)?;
            Ok(Pair { outside, inside })
        });
        let pair = thread.join().map_err(|_| io::Error::other("the thread that opens it panicked"))??;
        copy_size(&pair.outside);
        Ok(pair)
    })
}

/// Gives the terminal the size of ours, if we have one.
fn copy_size(outside: &OwnedFd) {
    if let Ok(size) = termios::tcgetwinsize(io::stdin()) {
        let _ = termios::tcsetwinsize(outside, size);
    }
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

/// Joins our standard input and output to the terminal until `process` ends; what it shows also goes to `log`.
pub(crate) fn join(outside: &OwnedFd, process: &Process, mut log: Option<&mut File>) -> io::Result<()> {
    let signals = Signals::gather(&[Signal::WINCH.as_raw()]).map_err(io::Error::other)?;
    let _raw = Raw::enter()?;
    let input = io::stdin();
    let mut typed = Vec::new();
    let mut input_open = true;
    loop {
        let wanted = if typed.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let mut polled = vec![
            PollFd::new(outside, wanted),
            PollFd::new(process, PollFlags::IN),
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
        while signals.next().is_some() {
            copy_size(outside);
        }
        show(outside, log.as_deref_mut(), ended)?;
        if ended {
            return Ok(());
        }
        if hung_up {
            // Everyone inside has closed it; all there is left to wait for is the end.
            process.wait_timeout(std::time::Duration::MAX / 4).map_err(io::Error::other)?;
            return Ok(());
        }
        if typing {
            input_open = read_input(&mut typed)?;
        }
        match rustix::io::write(outside, &typed) {
            Ok(length) => drop(typed.drain(..length)),
            Err(Errno::AGAIN | Errno::INTR | Errno::IO) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Reads what was typed; at the end of input types the end-of-file character instead. Whether there is more.
fn read_input(typed: &mut Vec<u8>) -> io::Result<bool> {
    const END_OF_FILE: u8 = 4;
    let mut buffer = [0_u8; 4096];
    match rustix::io::read(io::stdin(), &mut buffer) {
        Ok(0) | Err(Errno::IO) => {
            typed.push(END_OF_FILE);
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
    let mut buffer = [0_u8; 4096];
    loop {
        match rustix::io::read(outside, &mut buffer) {
            Ok(length @ 1..) => {
                let shown = buffer.get(..length).unwrap_or_default();
                let mut output = io::stdout();
                output.write_all(shown).and_then(|()| output.flush())?;
                if let Some(log) = log.as_mut() {
                    log.write_all(shown)?;
                }
            }
            // EIO: everyone inside has closed it.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::IO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        if !all {
            return Ok(());
        }
    }
}
