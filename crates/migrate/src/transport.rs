//! Byte streams under the protocol: two halves whose waiting is bounded and can be called off from another thread.
//!
//! Everything the protocol runs over is a pair of descriptors (a socket, or the pipes of `ssh` or of `sshd`), made
//! non-blocking; TLS wraps such a pair (`tls.rs`).

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// The receiving half.
pub trait Receive: Send {
    /// Reads what is there, at least one byte, or 0 at the end of the stream.
    ///
    /// # Errors
    /// `TimedOut` after `within` without a byte, `ConnectionAborted` once [`Stop::stop`] was called.
    fn receive(&mut self, buffer: &mut [u8], within: Duration) -> io::Result<usize>;
}

/// The sending half.
pub trait Transmit: Send {
    /// Sends some of the bytes, at least one.
    ///
    /// # Errors
    /// As for [`Receive::receive`].
    fn transmit(&mut self, parts: &[IoSlice<'_>], within: Duration) -> io::Result<usize>;

    /// Says that nothing more will come (the other side reads the end of the stream).
    ///
    /// # Errors
    /// As for [`Receive::receive`].
    fn finish(&mut self, within: Duration) -> io::Result<()>;
}

/// Calls off all waiting on a transport.
#[derive(Debug, Clone)]
pub struct Stop(Arc<OwnedFd>);

impl Stop {
    /// A new one.
    ///
    /// # Errors
    /// eventfd(2) failed: no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// From now on every wait ends with `ConnectionAborted`.
    pub fn stop(&self) {
        // Fails only when the counter is near its end, and then it is not zero, which is all that counts.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits until `fd` is ready for `what`.
    fn wait(&self, fd: BorrowedFd<'_>, what: PollFlags, within: Duration) -> io::Result<()> {
        let until = Instant::now() + within;
        loop {
            let mut fds = [PollFd::from_borrowed_fd(fd, what), PollFd::new(&*self.0, PollFlags::IN)];
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) if !fds[1].revents().is_empty() => return Err(io::ErrorKind::ConnectionAborted.into()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A connection that the protocol can run over.
pub struct Transport {
    /// The receiving half.
    pub receive: Box<dyn Receive>,
    /// The sending half.
    pub transmit: Box<dyn Transmit>,
    /// Ends all waiting on both.
    pub stop: Stop,
    /// What it is, for messages: `ssh to root@b`, `192.0.2.7:4000`.
    pub name: String,
    /// The program that carries the connection, if one does.
    pub(crate) carrier: Option<Box<dyn Carrier>>,
}

/// A program that carries a connection: it lives as long as the connection, and ends with it.
pub(crate) trait Carrier: Send {
    /// What it says about a connection that failed, if it says anything.
    fn said(&self) -> Option<String>;
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Transport {
    /// A transport over two descriptors (which may be two duplicates of one socket). Both become non-blocking.
    ///
    /// # Errors
    /// fcntl(2) or eventfd(2) failed.
    pub fn from_descriptors(read: OwnedFd, write: OwnedFd, name: impl Into<String>) -> io::Result<Self> {
        let stop = Stop::new()?;
        let receive = FdReceive::new(read, stop.clone())?;
        let transmit = FdTransmit::new(write, stop.clone())?;
        Ok(Self {
            receive: Box::new(receive),
            transmit: Box::new(transmit),
            stop,
            name: name.into(),
            carrier: None,
        })
    }

    /// A transport over a connected unix socket.
    ///
    /// # Errors
    /// As [`Transport::from_descriptors`].
    pub fn from_unix(socket: UnixStream, name: impl Into<String>) -> io::Result<Self> {
        let twin = socket.try_clone()?;
        Self::from_descriptors(socket.into(), twin.into(), name)
    }

    /// Standard input and output, as `sshd` gives them to `limosa receive`.
    ///
    /// # Errors
    /// One of them is a terminal: then nobody speaks the protocol there, and a shell may still need it blocking.
    pub fn stdio() -> io::Result<Self> {
        let (input, output) = (io::stdin(), io::stdout());
        if rustix::termios::isatty(&input) || rustix::termios::isatty(&output) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "standard input or output is a terminal; `limosa receive` without --listen is run by \
                 `limosa migrate NAME ssh://HOST` on the other machine",
            ));
        }
        let (input, output) = (input.as_fd().try_clone_to_owned()?, output.as_fd().try_clone_to_owned()?);
        Self::from_descriptors(input, output, "standard input and output")
    }

    /// The halves of a connected TCP socket, for TLS to wrap.
    pub(crate) fn tcp_halves(socket: TcpStream, stop: &Stop) -> io::Result<(FdReceive, FdTransmit)> {
        socket.set_nodelay(true)?;
        let twin = socket.try_clone()?;
        Ok((FdReceive::new(socket.into(), stop.clone())?, FdTransmit::new(twin.into(), stop.clone())?))
    }
}

/// The receiving half over a descriptor.
pub(crate) struct FdReceive {
    fd: OwnedFd,
    stop: Stop,
}

impl FdReceive {
    fn new(fd: OwnedFd, stop: Stop) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, stop })
    }
}

impl Receive for FdReceive {
    fn receive(&mut self, buffer: &mut [u8], within: Duration) -> io::Result<usize> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Err(Errno::AGAIN) => self.stop.wait(self.fd.as_fd(), PollFlags::IN, within)?,
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

/// The sending half over a descriptor. `None` once finished.
pub(crate) struct FdTransmit {
    fd: Option<OwnedFd>,
    stop: Stop,
}

impl FdTransmit {
    fn new(fd: OwnedFd, stop: Stop) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: Some(fd), stop })
    }
}

impl Transmit for FdTransmit {
    fn transmit(&mut self, parts: &[IoSlice<'_>], within: Duration) -> io::Result<usize> {
        let Some(fd) = &self.fd else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        loop {
            match rustix::io::writev(fd, parts) {
                Err(Errno::AGAIN) => self.stop.wait(fd.as_fd(), PollFlags::OUT, within)?,
                Err(Errno::INTR) => {}
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                result => return Ok(result?),
            }
        }
    }

    fn finish(&mut self, _within: Duration) -> io::Result<()> {
        let Some(fd) = self.fd.take() else { return Ok(()) };
        match rustix::net::shutdown(&fd, rustix::net::Shutdown::Write) {
            // A pipe ends by being closed.
            Ok(()) | Err(Errno::NOTSOCK | Errno::NOTCONN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
