//! What rooms may use while descriptors are captured and rebuilt.

use std::any::Any;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use limosa_image::{Checkpoint, Sink};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::shared_memory::SharedObjects;
use super::terminal::{Rebuilt, Terminals};
use crate::error::{CaptureError, RestoreError};
use crate::flight::Queues;
use crate::memory::SpaceAllocator;
use crate::network::{Network, Starters};
use crate::state::Descriptor;
use crate::view::DescriptionView;

/// What is common to the captures of all descriptions of a tree.
pub struct CaptureContext<'a> {
    /// Where content goes: blobs and pages.
    pub sink: &'a mut dyn Sink,
    /// Gives out spaces for page data.
    pub spaces: &'a mut SpaceAllocator,
    /// Which description a descriptor of a process of the tree refers to, by (own PID, number): for objects that
    /// refer to others, as epoll does. Complete only when all descriptors have been enumerated, which is before
    /// the first room captures.
    pub descriptors: &'a HashMap<(i32, i32), usize>,
    /// All descriptions of the tree, by index.
    pub descriptions: &'a [DescriptionView<'a>],
    /// The PID in the tree of each process of it, by the PID that Limosa sees.
    pub own_pids: &'a HashMap<i32, i32>,
    /// The memory objects that mappings and memfds refer to.
    pub shared_objects: &'a mut SharedObjects,
    /// Keys of files outside the tree's root, by device and inode.
    pub externals: &'a HashMap<(u64, u64), String>,
    /// What was read of all sockets at once.
    pub network: &'a mut Network,
    /// What is queued in unix sockets.
    pub(crate) queues: Queues,
    /// The pseudo-terminals that descriptors are ends of.
    pub terminals: Terminals,
    /// Rooms' notes, by object: what was captured already through another description.
    notes: HashMap<(&'static str, u64), usize>,
}

impl<'a> CaptureContext<'a> {
    /// A context for one tree.
    #[expect(clippy::too_many_arguments, reason = "one for each thing that rooms share")]
    pub(crate) fn new(
        sink: &'a mut dyn Sink,
        spaces: &'a mut SpaceAllocator,
        descriptors: &'a HashMap<(i32, i32), usize>,
        descriptions: &'a [DescriptionView<'a>],
        own_pids: &'a HashMap<i32, i32>,
        shared_objects: &'a mut SharedObjects,
        externals: &'a HashMap<(u64, u64), String>,
        network: &'a mut Network,
        queues: Queues,
    ) -> Self {
        let (terminals, notes) = (Terminals::default(), HashMap::new());
        Self {
            sink,
            spaces,
            descriptors,
            descriptions,
            own_pids,
            shared_objects,
            externals,
            network,
            queues,
            terminals,
            notes,
        }
    }

    /// Whether the object `id` of `kind` is seen for the first time: the one time its content is to be stored.
    pub fn first(&mut self, kind: &'static str, id: u64) -> bool {
        let fresh = self.notes.len();
        *self.notes.entry((kind, id)).or_insert(fresh) == fresh
    }

    /// Stores a stream under a name made of `kind` and `id`; returns the name.
    pub fn blob(
        &mut self,
        kind: &'static str,
        id: u64,
        content: &mut dyn std::io::Read,
    ) -> Result<String, CaptureError> {
        let name = format!("{kind}.{id}");
        self.sink.blob(&name, content)?;
        Ok(name)
    }
}

/// The first process that holds a description, when all its descriptors are in place.
#[derive(Debug)]
pub struct Holder<'a> {
    /// The number of the first descriptor of the description there.
    pub number: i32,
    /// All descriptors of the process, by number.
    pub descriptors: &'a [Descriptor],
}

/// What is common to the rebuilding of all descriptions of a tree.
pub struct RebuildContext<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Memory objects, by index.
    pub shared_objects: &'a [OwnedFd],
    /// Files outside the tree's root, by key.
    pub externals: &'a HashMap<String, PathBuf>,
    /// The PID that Limosa sees of each process, by its PID in the tree.
    pub pids: &'a HashMap<i32, i32>,
    pub(crate) terminals: &'a [Rebuilt],
    /// The tree's IPC namespace.
    pub(crate) ipc: BorrowedFd<'a>,
    root: OwnedFd,
    shared: HashMap<(&'static str, u64), Box<dyn Any>>,
    starters: Starters,
}

impl<'a> RebuildContext<'a> {
    /// A context for one restore; paths are resolved below `root`.
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        root: OwnedFd,
        shared_objects: &'a [OwnedFd],
        terminals: &'a [Rebuilt],
        externals: &'a HashMap<String, PathBuf>,
        pids: &'a HashMap<i32, i32>,
        ipc: BorrowedFd<'a>,
    ) -> Self {
        let (shared, starters) = (HashMap::new(), Starters::default());
        Self { checkpoint, shared_objects, externals, pids, terminals, ipc, root, shared, starters }
    }

    /// The root directory of the tree's mount namespace.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens an absolute path as the tree sees it; symbolic links and `..` never lead out of its root.
    pub fn open(&self, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, RestoreError> {
        rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, mode, ResolveFlags::IN_ROOT).map_err(
            |errno| RestoreError::File {
                path: String::from_utf8_lossy(path).into_owned(),
                reason: std::io::Error::from(errno).to_string(),
            },
        )
    }

    /// The object `id` of `kind` that several descriptions share: made by the first that asks.
    pub fn shared<T: 'static>(
        &mut self,
        kind: &'static str,
        id: u64,
        make: impl FnOnce(&mut Self) -> Result<T, RestoreError>,
    ) -> Result<&mut T, RestoreError> {
        if !self.shared.contains_key(&(kind, id)) {
            let made = make(self)?;
            self.shared.insert((kind, id), Box::new(made));
        }
        self.shared
            .get_mut(&(kind, id))
            .and_then(|object| object.downcast_mut())
            .ok_or_else(|| RestoreError::inconsistent(format!("{kind} {id} is used as two kinds of object")))
    }

    /// Has `starter` run when the whole tree is about to start: what it needs to live without Limosa.
    pub fn at_start(&mut self, starter: impl FnOnce() -> Result<(), RestoreError> + 'static) {
        self.starters.at_start.push(Box::new(starter));
    }

    /// Has `starter` run when the tree is there to stay, and reachable: for what merely speeds it up.
    pub fn when_reachable(&mut self, starter: impl FnOnce() -> Result<(), RestoreError> + 'static) {
        self.starters.when_reachable.push(Box::new(starter));
    }

    /// What is to be done at the start.
    pub(crate) fn take_starters(&mut self) -> Starters {
        std::mem::take(&mut self.starters)
    }
}
