//! The state of a process tree as it stands in a checkpoint.
//!
//! Sections: `tree` is a [`Tree`]; page data lies in spaces: one for each address space ([`Body::pages`]),
//! one for each shared-memory object. What an object kind's state is, its room in `resources` says.
//! All PIDs and TIDs are the ones the processes themselves see.

use limosa_image::SpaceId;
use serde::{Deserialize, Serialize};

use crate::pieces::Piece;
use crate::resources::file_locks::FileLock;
use crate::resources::keyrings::SessionKeyring;
use crate::resources::mapping::MappingState;
use crate::resources::processor::Layout;
use crate::resources::shared_memory::SharedObject;
use crate::resources::terminal::Terminal;
use crate::resources::vdso::{Adaptation, VdsoState};
use crate::resources::{DescriptorState, LateState, NamespaceState, ProcessState, ThreadState};

/// Name of the section that holds the [`Tree`].
pub const TREE: &str = "tree";

/// A process tree.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tree {
    /// Parents before children; the first is the root.
    pub processes: Vec<Process>,
    /// Open file descriptions, each once.
    pub descriptions: Vec<Description>,
    /// Memory that processes share: anonymous, memfd, System V.
    pub shared_objects: Vec<SharedObject>,
    /// Pseudo-terminals.
    #[serde(default)]
    pub terminals: Vec<Terminal>,
    /// The session keyrings that processes are in.
    #[serde(default)]
    pub session_keyrings: Vec<SessionKeyring>,
    /// The namespaces that are not the host's, and what is in them.
    pub namespaces: NamespaceState,
    /// The vDSO of the kernel that the tree ran on.
    #[serde(default)]
    pub vdso: Option<VdsoState>,
    /// Where the parts of the extended registers are; the places that this processor has, if none.
    #[serde(default)]
    pub registers: Option<Layout>,
    /// Name of the packet lock that is left behind if the checkpoint ended the tree.
    #[serde(default)]
    pub packet_lock: Option<String>,
}

/// A process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Process {
    /// Its ID.
    pub pid: i32,
    /// Its parent's ID; not meaningful for the root.
    pub parent: i32,
    /// Its process group.
    pub process_group: i32,
    /// Its session.
    pub session: i32,
    /// What its parent gets when it ends.
    pub exit_signal: i32,
    /// Alive or dead.
    pub life: Life,
}

/// Whether a process runs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// Ended, not yet reaped by its parent.
    Zombie {
        /// As waitpid(2) gives it.
        wait_status: i32,
        /// Its name.
        #[serde(with = "serde_bytes")]
        name: Vec<u8>,
    },
    /// Alive.
    Alive(Box<Body>),
}

/// What a living process consists of.
#[derive(Debug, Serialize, Deserialize)]
pub struct Body {
    /// Where its private pages are.
    #[serde(rename = "space")]
    pub pages: Pages,
    /// Ranges of its private anonymous memory that were transparent huge pages: start and end, by address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub huge_pages: Vec<(u64, u64)>,
    /// Its mappings by address.
    pub mappings: Vec<MappingState>,
    /// Its descriptors by number.
    pub descriptors: Vec<Descriptor>,
    /// Its threads, the leader first.
    pub threads: Vec<Thread>,
    /// The signal that stopped it, if job control did.
    pub stopped: Option<i32>,
    /// Whether its parent has yet to be told of that stop (waitpid(2) with `WUNTRACED`).
    #[serde(default)]
    pub stop_unreported: bool,
    /// Its locks on files.
    pub locks: Vec<FileLock>,
    /// What a process has one of.
    pub state: ProcessState,
    /// What a process has one of and needs its threads.
    pub late: LateState,
    /// What this kernel's vDSO demands; no part of a checkpoint.
    #[serde(skip)]
    pub vdso: Adaptation,
}

/// Where the private pages of a process are. A page is what is stored for it in the process's own space; if nothing is,
/// and it is inherited, what is stored in the other's space at the same address; else what its mapping says it is
/// without being written: zero, or the file's content.
///
/// A process that inherits nothing writes only the number of its space. A reader that does not know inheritance
/// refuses the other form, instead of restoring pages of zeros.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Pages {
    /// All of them in a space of its own.
    Own(SpaceId),
    /// Some of them in other processes' spaces.
    Partly {
        /// Its own space.
        own: SpaceId,
        /// By address, not overlapping.
        inherited: Vec<Piece>,
    },
}

impl Pages {
    /// The process's own space.
    pub fn own(&self) -> SpaceId {
        match self {
            Self::Own(own) | Self::Partly { own, .. } => *own,
        }
    }

    /// What lies in other processes' spaces.
    pub fn inherited(&self) -> &[Piece] {
        match self {
            Self::Own(_) => &[],
            Self::Partly { inherited, .. } => inherited,
        }
    }
}

/// A descriptor.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// Index into [`Tree::descriptions`].
    pub description: usize,
    /// Whether it is closed by execve(2).
    pub close_on_exec: bool,
}

/// An open file description.
#[derive(Debug, Serialize, Deserialize)]
pub struct Description {
    /// `O_*` status flags and access mode.
    pub flags: u32,
    /// Who gets its signals (`F_SETOWN_EX`: type, ID), and which signal (`F_SETSIG`), where set.
    pub owner: Option<(i32, i32, i32)>,
    /// Its locks on files, where it is only in flight; otherwise a process that holds it has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<FileLock>,
    /// What it refers to.
    pub state: DescriptorState,
}

/// A thread.
#[derive(Debug, Serialize, Deserialize)]
pub struct Thread {
    /// Its ID.
    pub tid: i32,
    /// Its session keyring: index into [`Tree::session_keyrings`].
    #[serde(default)]
    pub session_keyring: Option<usize>,
    /// Everything about it.
    pub state: ThreadState,
}

impl Tree {
    /// Living processes with their bodies.
    pub fn living(&self) -> impl Iterator<Item = (&Process, &Body)> {
        self.processes.iter().filter_map(|process| match &process.life {
            Life::Alive(body) => Some((process, body.as_ref())),
            Life::Zombie { .. } => None,
        })
    }

    /// The bodies of living processes.
    pub fn living_mut(&mut self) -> impl Iterator<Item = &mut Body> {
        self.processes.iter_mut().filter_map(|process| match &mut process.life {
            Life::Alive(body) => Some(body.as_mut()),
            Life::Zombie { .. } => None,
        })
    }
}
