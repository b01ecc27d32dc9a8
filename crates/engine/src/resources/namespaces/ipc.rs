//! The IPC namespace of a container: semaphores and message queues (ipc_namespaces(7), sysvipc(7)).
//!
//! Objects come back with their IDs. Shared-memory segments are shared objects of the tree (`shared_memory`). What
//! semop(2) is to undo when a process ends (`SEM_UNDO`) is not carried, nor who used an object last and when. POSIX
//! message queues come back with their limits; a descriptor of one is `message_queue`'s.

use std::os::fd::BorrowedFd;

use limosa_kernel::mqueue;
use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::sysv::{self, Permissions};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Refusal, RestoreError};
use crate::resources::message_queue::{self, checked_name};

/// Everything in an IPC namespace but shared memory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ipc {
    /// Sets of semaphores.
    pub semaphores: Vec<Semaphores>,
    /// Message queues.
    pub queues: Vec<Queue>,
    /// POSIX message queues.
    #[serde(default)]
    pub posix_queues: Vec<PosixQueue>,
    /// The limits of `/proc/sys/fs/mqueue`, by name.
    #[serde(default)]
    pub posix_limits: Limits,
}

/// Limits, by name.
type Limits = Vec<(String, u64)>;

/// A POSIX message queue.
#[derive(Debug, Serialize, Deserialize)]
pub struct PosixQueue {
    /// Its name, without a slash.
    pub name: serde_bytes::ByteBuf,
    /// What it is.
    pub queue: message_queue::Queue,
}

/// Who may use an object, and how it is found.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Object {
    /// The identifier.
    pub id: i32,
    /// The key; 0 if none.
    pub key: i32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A set of semaphores.
#[derive(Debug, Serialize, Deserialize)]
pub struct Semaphores {
    /// Key, ID, owner.
    pub object: Object,
    /// Their values.
    pub values: Vec<u16>,
}

/// A message queue.
#[derive(Debug, Serialize, Deserialize)]
pub struct Queue {
    /// Key, ID, owner.
    pub object: Object,
    /// How many bytes it may hold.
    pub bytes: u64,
    /// Type and text of each message, the oldest first.
    pub messages: Vec<(i64, serde_bytes::ByteBuf)>,
}

impl From<Permissions> for Object {
    fn from(Permissions { key, id, mode, uid, gid }: Permissions) -> Self {
        Self { id, key, mode, uid, gid }
    }
}

impl From<Object> for Permissions {
    fn from(Object { id, key, mode, uid, gid }: Object) -> Self {
        Self { key, id, mode, uid, gid }
    }
}

impl Ipc {
    /// What is in the IPC namespace of process `root`; everything stays as it is. Messages of POSIX queues cannot be looked
    /// at while processes run: then, unless `whole`, only what is refused is found out.
    pub fn capture(root: i32, whole: bool) -> Result<Self, CaptureError> {
        let (posix_queues, posix_limits) = posix(root, whole)?;
        let theirs = namespace::of_process(root, Kind::Ipc)?;
        let (semaphores, queues) = namespace::inside(&theirs, Kind::Ipc, || -> limosa_kernel::Result<_> {
            Ok((sysv::semaphores()?, sysv::queues()?))
        })?;
        let queue = |(object, bytes, messages): (Permissions, u64, Vec<sysv::Message>)| Queue {
            object: object.into(),
            bytes,
            messages: messages.into_iter().map(|message| (message.kind, message.text.into())).collect(),
        };
        Ok(Self {
            semaphores: semaphores
                .into_iter()
                .map(|(object, values)| Semaphores { object: object.into(), values })
                .collect(),
            queues: queues.into_iter().map(queue).collect(),
            posix_queues,
            posix_limits,
        })
    }

    /// Makes everything again in the namespace behind `ipc`, which is new.
    pub fn rebuild(&self, ipc: BorrowedFd) -> Result<(), RestoreError> {
        namespace::inside(ipc, Kind::Ipc, || -> limosa_kernel::Result<()> {
            for set in &self.semaphores {
                sysv::make_semaphores(set.object.into(), &set.values)?;
            }
            for queue in &self.queues {
                let messages = queue.messages.iter();
                let messages: Vec<_> =
                    messages.map(|(kind, text)| sysv::Message { kind: *kind, text: text.to_vec() }).collect();
                sysv::make_queue(queue.object.into(), queue.bytes, &messages)?;
            }
            Ok(())
        })?;
        let named = self.posix_queues.iter().map(|posix| Ok((checked_name(&posix.name)?, &posix.queue)));
        let named = named.collect::<Result<Vec<_>, RestoreError>>()?;
        Ok(namespace::inside(ipc, Kind::Ipc, || -> limosa_kernel::Result<()> {
            // What this kernel does not know is left, and so are names that lead elsewhere.
            for (name, now) in mqueue::limits()? {
                match self.posix_limits.iter().find(|(limit, _)| *limit == name) {
                    Some((_, value)) if *value != now => mqueue::set_limit(&name, *value)?,
                    _ => {}
                }
            }
            named.iter().try_for_each(|(name, queue)| queue.make(name).map(drop))
        })?)
    }
}

/// The POSIX message queues of the IPC namespace of process `root`, and its limits for them.
fn posix(root: i32, whole: bool) -> Result<(Vec<PosixQueue>, Limits), CaptureError> {
    let theirs = namespace::of_process(root, Kind::Ipc)?;
    namespace::inside(&theirs, Kind::Ipc, || {
        let mut queues = Vec::new();
        for name in mqueue::names()? {
            let opened = match mqueue::open(&name, OFlags::RDWR | OFlags::NONBLOCK) {
                // Removed meanwhile.
                Err(error) if error.is_gone() && !whole => continue,
                opened => opened?,
            };
            let status = mqueue::status(&opened)?;
            if status.registered {
                let (reason, remedy) = message_queue::registration(&name, status.registrant);
                return Err(Refusal::process(status.registrant.unwrap_or(root), reason, remedy).into());
            }
            if whole {
                let queue = message_queue::Queue::capture(&opened)?;
                queues.push(PosixQueue { name: name.into_bytes().into(), queue });
            }
        }
        Ok((queues, mqueue::limits()?))
    })
}
