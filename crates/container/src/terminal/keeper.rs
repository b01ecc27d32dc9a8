//! Who keeps the terminal of a container that nobody runs in the foreground: a process of its own, so that the terminal
//! does not hang up. It writes what the terminal shows into the log, and lends the master to whoever attaches.
//!
//! ```text
//!   limosa attach ── connects to STATE/containers/NAME/terminal ──► keeper
//!        ◄── a byte, and the master (SCM_RIGHTS) ────────────────── reads it no more …
//!        joins it to its own terminal
//!        └ ends: end of file ─────────────────────────────────────► … until now
//! ```

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use limosa_kernel::task::pidfd_open;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::{Joined, Manner, drain, join, open_log, show_anew};
use crate::config::Name;
use crate::fate::Fate;
use crate::registry::{Paths, Registry, RegistryError};

/// What a keeper says beside the master that it lends, and when it has lent it already.
const LENT: u8 = b'L';
const BUSY: u8 = b'B';

/// Has a keeper keep the master of the terminal of the container of this name, whose first process has this PID.
pub type Keep<'a> = &'a dyn Fn(OwnedFd, i32, &Name) -> io::Result<()>;

/// The keeper of a terminal, in its own process.
#[derive(Debug)]
pub struct Keeper {
    master: OwnedFd,
    listener: OwnedFd,
    init: OwnedFd,
    log: File,
}

impl Keeper {
    /// Gets ready to keep `master` for the container `name`, whose first process is `init`.
    pub fn new(registry: &Registry, name: &Name, init: i32, master: OwnedFd) -> io::Result<Self> {
        let paths = registry.paths(name);
        let init = pidfd_open(init).map_err(io::Error::other)?;
        let log = open_log(&paths.log())?;
        let flags = rustix::fs::fcntl_getfl(&master)?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)?;
        let listener = socket()?;
        let (_directory, address) = address(&paths)?;
        rustix::net::bind(&listener, &address)?;
        rustix::net::listen(&listener, 8)?;
        Ok(Self { master, listener, init, log })
    }

    /// Keeps it until the container's first process has ended.
    pub fn keep(mut self) -> io::Result<()> {
        /// How often a terminal that nobody inside has open is looked at.
        const INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
        let (mut borrower, mut hung_up) = (None::<OwnedFd>, false);
        loop {
            let mut polled =
                vec![PollFd::new(&self.init, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
            match &borrower {
                Some(borrower) => polled.push(PollFd::new(borrower, PollFlags::IN)),
                None if hung_up => {}
                None => polled.push(PollFd::new(&self.master, PollFlags::IN)),
            }
            match rustix::event::poll(&mut polled, hung_up.then_some(&INTERVAL)) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let [ended, asked, third] =
                [0, 1, 2].map(|index| polled.get(index).map_or(PollFlags::empty(), PollFd::revents));
            hung_up = false;
            if !ended.is_empty() {
                return if borrower.is_none() { self.write_log(true) } else { Ok(()) };
            }
            if !third.is_empty() {
                if borrower.take().is_none() {
                    self.write_log(false)?;
                    // Nobody inside has it open now; somebody may open it again.
                    hung_up = third.contains(PollFlags::HUP) && !third.contains(PollFlags::IN);
                }
            } else if !asked.is_empty() {
                self.lend(&mut borrower);
            }
        }
    }

    fn write_log(&mut self, all: bool) -> io::Result<()> {
        drain(&self.master, all, |shown| self.log.write_all(shown))
    }

    /// Lends the master to whoever has connected, unless somebody has it.
    fn lend(&self, borrower: &mut Option<OwnedFd>) {
        let Ok(connection) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) else { return };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let master = [self.master.as_fd()];
        let word = if borrower.is_some() {
            [BUSY]
        } else {
            control.push(SendAncillaryMessage::ScmRights(&master));
            [LENT]
        };
        let sent =
            rustix::net::sendmsg(&connection, &[IoSlice::new(&word)], &mut control, SendFlags::NOSIGNAL);
        if sent.is_ok() && borrower.is_none() {
            *borrower = Some(connection);
        }
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// The address of a keeper's socket, which holds while the directory is open: a path could be too long for one.
fn address(paths: &Paths) -> io::Result<(OwnedFd, SocketAddrUnix)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(paths.directory(), flags, Mode::empty())?;
    let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join("terminal");
    let address = SocketAddrUnix::new(path)?;
    Ok((directory, address))
}

/// How an attachment ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attached {
    /// We have left; the container runs on.
    Left,
    /// The container has ended here; with what became of it, if it was not its own end.
    Ended(Option<String>),
}

/// Joins the terminal of the running container `name` to ours until it ends, or we leave.
pub fn attach(registry: &Registry, name: &Name) -> Result<Attached, AttachError> {
    let record = registry.load(name)?;
    let paths = registry.paths(name);
    let pid = record.running().ok_or_else(|| AttachError::NotRunning { name: name.clone() })?;
    if !record.config.terminal {
        return Err(AttachError::NoTerminal { name: name.clone() });
    }
    let failed = |source| AttachError::Join { name: name.clone(), source };
    let init = pidfd_open(pid).map_err(|error| failed(io::Error::other(error)))?;
    let (connection, master) = borrow(&paths).map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => AttachError::Busy { name: name.clone() },
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            AttachError::NoKeeper { name: name.clone() }
        }
        _ => failed(error),
    })?;
    let fate = Fate::watch(&paths).map_err(failed)?;
    let mut log = open_log(&paths.log()).map_err(|source| AttachError::Log { path: paths.log(), source })?;
    show_anew(&master);
    let joined = join(&master, init.as_fd(), Some(&mut log), Manner::Attached).map_err(failed)?;
    drop(connection);
    Ok(match joined {
        Joined::Left => Attached::Left,
        Joined::Ended => Attached::Ended(fate.told()),
    })
}

/// Borrows the master from its keeper: until the connection is closed.
fn borrow(paths: &Paths) -> io::Result<(OwnedFd, OwnedFd)> {
    let connection = socket()?;
    let (_directory, address) = address(paths)?;
    rustix::net::connect(&connection, &address)?;
    let mut word = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut word)];
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&connection, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let master = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    match (received.bytes, word, master) {
        (1, [LENT], Some(master)) => Ok((connection, master)),
        (1, [BUSY], None) => Err(io::ErrorKind::ResourceBusy.into()),
        _ => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}

/// A container's terminal could not be joined to ours.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The container.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It does not run.
    #[error("container {name} does not run: `limosa ps` shows which do")]
    NotRunning {
        /// Its name.
        name: Name,
    },
    /// It was started without one.
    #[error(
        "container {name} has no terminal of its own: use `limosa exec --tty {name} -- bash`, or `limosa logs`"
    )]
    NoTerminal {
        /// Its name.
        name: Name,
    },
    /// Somebody has it.
    #[error("somebody else is attached to the terminal of container {name}")]
    Busy {
        /// Its name.
        name: Name,
    },
    /// It is joined to the terminal where the container was started.
    #[error(
        "the terminal of container {name} is the one where `limosa run` or `limosa restore` runs it in the foreground, or \
         its keeper was killed"
    )]
    NoKeeper {
        /// Its name.
        name: Name,
    },
    /// Its log.
    #[error("cannot write the container's log {}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something failed.
    #[error("cannot join the terminal of container {name} to this one")]
    Join {
        /// Its name.
        name: Name,
        /// Why.
        #[source]
        source: io::Error,
    },
}
