//! POSIX message queues (mq_overview(7)): descriptors of them, and what a queue is.
//!
//! The queues of a container's IPC namespace come back with it ([`namespaces::ipc`](super::namespaces::ipc)), with
//! attributes, owner and messages. A tree in the host's finds its queues by name, as it finds files: they stayed there, with
//! what is in them. A queue whose name is gone belongs to those who have it open: it travels with its first descriptor.
//!
//! Who has registered for the next message (mq_notify(3)) is refused: the kernel does not tell what value would be sent to
//! it.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use limosa_kernel::mqueue::{self, Message};
use limosa_kernel::namespace::{self, Kind};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

const DELETED: &[u8] = b" (deleted)";
const KIND: &str = "message queue";

/// An open queue.
#[derive(Debug, Serialize, Deserialize)]
pub struct MessageQueue {
    /// Its name, without a slash.
    pub name: serde_bytes::ByteBuf,
    /// The path by which it was opened, if that was not mq_open(3).
    pub path: Option<serde_bytes::ByteBuf>,
    /// The inode of a queue whose name is gone.
    pub removed: Option<u64>,
    /// With the first description of such a queue: what it is.
    pub queue: Option<Queue>,
}

/// What a queue is.
#[derive(Debug, Serialize, Deserialize)]
pub struct Queue {
    /// How many messages it can hold.
    pub most: u64,
    /// How long one can be, bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Priority and content of each message, the next to be received first.
    pub messages: Vec<(u32, serde_bytes::ByteBuf)>,
}

impl Queue {
    /// What is behind a descriptor that reads and writes and does not block. Everything stays in it.
    pub(crate) fn capture(queue: &OwnedFd) -> limosa_kernel::Result<Self> {
        let stat = rustix::fs::fstat(queue)
            .map_err(|errno| limosa_kernel::Error::new("fstat", "a message queue", errno))?;
        let attributes = mqueue::attributes(queue)?;
        let messages = mqueue::copy_messages(queue)?;
        Ok(Self {
            most: attributes.messages,
            size: attributes.size,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            messages: messages.into_iter().map(|message| (message.priority, message.content.into())).collect(),
        })
    }

    /// Makes it, in the IPC namespace of the calling thread.
    pub(crate) fn make(&self, name: &CStr) -> limosa_kernel::Result<OwnedFd> {
        let queue = mqueue::create(name, self.mode, self.most, self.size)?;
        self.fill(&queue)?;
        Ok(queue)
    }

    fn fill(&self, queue: &OwnedFd) -> limosa_kernel::Result<()> {
        let fail = |call| move |errno| limosa_kernel::Error::new(call, "a message queue", errno);
        let (owner, group) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::fs::fchown(queue, Some(owner), Some(group)).map_err(fail("fchown"))?;
        rustix::fs::fchmod(queue, Mode::from_raw_mode(self.mode)).map_err(fail("fchmod"))?;
        for (priority, content) in &self.messages {
            mqueue::send(queue, &Message { priority: *priority, content: content.to_vec() })?;
        }
        Ok(())
    }

    /// Makes one that has no name. For a moment it has, in an IPC namespace that nobody else is in.
    fn make_nameless(&self, name: &CStr) -> limosa_kernel::Result<OwnedFd> {
        let make = || {
            namespace::unshare(&[Kind::Ipc])?;
            mqueue::allow(self.most, self.size)?;
            let queue = mqueue::create(name, self.mode, self.most, self.size)?;
            mqueue::unlink(name)?;
            self.fill(&queue)?;
            Ok(queue)
        };
        std::thread::scope(|scope| match scope.spawn(make).join() {
            Ok(made) => made,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }
}

/// The name of a queue in a checkpoint, as the kernel wants it.
pub(crate) fn checked_name(name: &[u8]) -> Result<CString, RestoreError> {
    let wrong = || RestoreError::inconsistent("the name of a message queue is none");
    if name.is_empty() || name.contains(&b'/') {
        return Err(wrong());
    }
    CString::new(name).map_err(|_| wrong())
}

/// Why a queue for whose next message somebody has registered is not carried, and what to do.
pub(crate) fn registration(name: &CStr, registrant: Option<i32>) -> (String, &'static str) {
    let who = registrant.map_or_else(|| "somebody".to_owned(), |pid| format!("process {pid}"));
    let reason = format!(
        "{who} has registered for the next message in the POSIX message queue /{} (mq_notify), and the kernel does not tell \
         with which value",
        name.to_string_lossy()
    );
    (reason, "give the registration up (mq_notify without sigevent), and register again afterwards")
}

impl DescriptorKind for MessageQueue {
    fn recognise(view: &DescriptionView) -> bool {
        FileType::from_raw_mode(view.stat.st_mode) == FileType::RegularFile
            && !view.is_path()
            && is_queue(&view.descriptor)
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let (mut captured, queue) = look(view, context)?;
        if let Some(inode) = captured.removed
            && context.first(KIND, inode)
        {
            captured.queue = Some(Queue::capture(&queue)?);
        }
        Ok(captured)
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        look(view, context).map(drop)
    }

    fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let name = checked_name(&self.name)?;
        let flags = OFlags::from_bits_retain(flags) & (OFlags::ACCMODE | OFlags::NONBLOCK);
        let queue = match (self.removed, &self.path) {
            (Some(inode), _) => {
                let made = context.shared(KIND, inode, |_| {
                    let missing = || RestoreError::inconsistent("a removed message queue is not in it");
                    Ok(self.queue.as_ref().ok_or_else(missing)?.make_nameless(&name)?)
                })?;
                reopen(made, flags).map_err(RestoreError::rebuild("a message queue", "open"))?
            }
            (None, Some(path)) => context.open(path, flags | OFlags::NOCTTY, Mode::empty())?,
            (None, None) => {
                let open = || mqueue::open(&name, flags);
                namespace::inside(context.ipc, Kind::Ipc, open).map_err(|error| {
                    let path = format!("the message queue /{}", name.to_string_lossy());
                    if error.is_gone() {
                        return RestoreError::File { path, reason: "it is not there any more".into() };
                    }
                    error.into()
                })?
            }
        };
        if !is_queue(&queue) {
            let path = String::from_utf8_lossy(&self.name).into_owned();
            return Err(RestoreError::File { path, reason: "it is no message queue now".into() });
        }
        Ok(queue)
    }
}

fn is_queue(descriptor: &OwnedFd) -> bool {
    rustix::fs::fstatfs(descriptor).is_ok_and(|filesystem| filesystem.f_type == mqueue::MAGIC)
}

/// Another description of a queue.
fn reopen(queue: impl AsFd, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let itself = format!("/proc/self/fd/{}", queue.as_fd().as_raw_fd());
    rustix::fs::open(itself, flags | OFlags::CLOEXEC, Mode::empty())
}

/// What a descriptor is of, and a description of our own that reads and writes and does not block.
fn look(view: &DescriptionView, context: &CaptureContext) -> Result<(MessageQueue, OwnedFd), CaptureError> {
    let queue = reopen(&view.descriptor, OFlags::RDWR | OFlags::NONBLOCK)
        .map_err(view.error("opening a message queue"))?;
    let removed = (view.stat.st_nlink == 0).then_some(view.stat.st_ino);
    let link = if removed.is_some() { view.link.strip_suffix(DELETED) } else { None };
    let link = link.unwrap_or(&view.link);
    let last = link.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let name = CString::new(last).unwrap_or_default();
    let status = mqueue::status(&queue)?;
    let by_tree = status.registrant.is_some_and(|pid| context.own_pids.contains_key(&pid));
    if by_tree || (removed.is_some() && status.registered) {
        let (reason, remedy) = registration(&name, status.registrant);
        return Err(view.refuse(reason, remedy).into());
    }
    if removed.is_none() && !is_at_home(view, &name)? {
        let reason = "it is a message queue of another IPC namespace";
        return Err(view.refuse(reason, "close it before the checkpoint").into());
    }
    let by_path = removed.is_none() && view.is_reachable()?;
    let path = by_path.then(|| link.to_vec().into());
    Ok((MessageQueue { name: last.to_vec().into(), path, removed, queue: None }, queue))
}

/// Whether the queue is the one of its name in the process's own IPC namespace.
fn is_at_home(view: &DescriptionView, name: &CStr) -> Result<bool, CaptureError> {
    let ipc = namespace::of_process(view.process.pid, Kind::Ipc)?;
    let found = namespace::inside(&ipc, Kind::Ipc, || mqueue::open(name, OFlags::RDONLY));
    Ok(found.is_ok_and(|found| {
        rustix::fs::fstat(&found)
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (view.stat.st_dev, view.stat.st_ino))
    }))
}
