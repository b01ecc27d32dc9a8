//! The IPC namespace of a container: semaphores and message queues (ipc_namespaces(7), sysvipc(7)).
//!
//! Objects come back with their IDs. Shared-memory segments are shared objects of the tree (`shared_memory`). What
//! semop(2) is to undo when a process ends (`SEM_UNDO`) is not carried, nor who used an object last and when. POSIX
//! message queues are files of a mount, and that room refuses them.

use std::os::fd::BorrowedFd;

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::sysv::{self, Permissions};
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, RestoreError};

/// Everything in an IPC namespace but shared memory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ipc {
    /// Sets of semaphores.
    pub semaphores: Vec<Semaphores>,
    /// Message queues.
    pub queues: Vec<Queue>,
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
    /// What is in the IPC namespace of process `root`; everything stays as it is.
    pub fn capture(root: i32) -> Result<Self, CaptureError> {
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
        })
    }

    /// Makes everything again in the namespace behind `ipc`, which is new.
    pub fn rebuild(&self, ipc: BorrowedFd) -> Result<(), RestoreError> {
        Ok(namespace::inside(ipc, Kind::Ipc, || -> limosa_kernel::Result<()> {
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
        })?)
    }
}
