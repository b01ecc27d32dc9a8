//! What a command tells the guard that it posted: [`Word`]s on a socket of datagrams, the guard's standard input.

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;
use limosa_container::Name;
use limosa_migrate::{Listener, MAX_WORD, Note, Word};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::context::Context;

/// The next word, and the socket that came with it; none when whoever could say one is dead.
pub fn hear(socket: impl AsFd) -> anyhow::Result<Option<(Word, Option<OwnedFd>)>> {
    // A byte more than any word has, so that none is taken for its beginning.
    let mut bytes = vec![0; MAX_WORD + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            // The other end died with something unread.
            Err(Errno::CONNRESET) => return Ok(None),
            result => break result.context("listening for a word")?,
        }
    };
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    match bytes.get(..received.bytes) {
        None | Some([]) => Ok(None),
        Some(word) => Ok(Some((Word::parse(word)?, descriptor))),
    }
}

/// A guard that waits. Dropped, it is told that it is not needed.
#[derive(Debug)]
pub struct Posted {
    guard: Child,
    socket: OwnedFd,
}

impl Posted {
    /// Starts a guard over the process tree rooted at `root`, of which a checkpoint is being made.
    pub fn over_tree(context: &Context, root: i32) -> anyhow::Result<Self> {
        Self::start(context, &["--tree".into(), root.to_string().into()])
    }

    /// Starts a guard; `container` is what is about to be moved, if that is known.
    pub fn new(context: &Context, container: Option<&Name>) -> anyhow::Result<Self> {
        let named = container.map(|name| ["--container".into(), name.as_str().into()]);
        Self::start(context, named.as_ref().map_or(&[], |arguments| arguments))
    }

    /// Starts a guard over a container that is about to be recorded and started.
    pub fn over_restored(context: &Context, container: &Name) -> anyhow::Result<Self> {
        Self::start(context, &["--container".into(), container.as_str().into(), "--restored".into()])
    }

    fn start(context: &Context, arguments: &[OsString]) -> anyhow::Result<Self> {
        let (socket, input) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("making a socket for a guard")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("--state-dir").arg(&context.state_dir).arg("guard").args(arguments);
        // Whoever reads what this program writes is not to wait for the guard.
        command.stdin(Stdio::from(input)).stdout(Stdio::null()).stderr(Stdio::null());
        #[cfg(feature = "fault")]
        command.env_remove("LIMOSA_KILL_AT").env_remove("LIMOSA_PASSED_FILE");
        let guard = command.spawn().context("starting a guard")?;
        Ok(Self { guard, socket })
    }

    /// Leaves to the guard what it needs to answer in the place of `listener`, should this process die.
    pub fn bequeath(&self, listener: &Listener) -> anyhow::Result<()> {
        let (legacy, socket) = listener.legacy()?;
        self.say(&Word::Legacy(legacy), Some(&socket)).context("leaving the listening socket to a guard")
    }

    /// Tells the guard whether the source may come to ask.
    pub fn note(&self, note: Note) {
        let said = self.say(&Word::Note(note), None);
        if let Err(error) = said {
            tracing::warn!(%error, "the guard is gone: nobody answers the source if this process is killed, too");
        }
    }

    fn say(&self, word: &Word, descriptor: Option<&OwnedFd>) -> anyhow::Result<()> {
        let word = word.encode()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let rights: Vec<_> = descriptor.iter().map(|descriptor| descriptor.as_fd()).collect();
        if !rights.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&rights));
        }
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(&word)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        let _ = self.say(&Word::Ended, None);
        let _ = self.guard.wait();
    }
}
