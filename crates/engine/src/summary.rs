//! What is in a checkpoint's tree, in a form that a person or a program can read: for `limosa inspect`.
//!
//! Everything here comes from a checkpoint, so it is hostile: names and paths are made printable.

use std::collections::BTreeMap;

use limosa_image::{Checkpoint, ReadError};
use serde::Serialize;

use crate::resources::mapping::Backing;
use crate::resources::processor::{self, Need};
use crate::state::{Body, Life, Process, TREE, Tree};

/// A process tree, summarised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TreeSummary {
    /// Parents before children; the first is the root.
    pub processes: Vec<ProcessSummary>,
    /// How many open file descriptions there are, by kind.
    pub descriptions: BTreeMap<&'static str, usize>,
    /// How many memory objects processes share.
    pub shared_objects: usize,
    /// Bytes of them.
    pub shared_bytes: u64,
    /// The namespaces that are not the host's.
    pub namespaces: Vec<String>,
    /// The host name, if the tree has one of its own.
    pub host_name: Option<String>,
    /// What its registers need of a processor.
    pub registers: Vec<Need>,
}

/// A process, summarised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProcessSummary {
    /// Its ID, as it sees itself.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its process group.
    pub process_group: i32,
    /// Its session.
    pub session: i32,
    /// The name of its first thread.
    pub name: String,
    /// `running`, `stopped` or `zombie`.
    pub state: &'static str,
    /// IDs of its threads.
    pub threads: Vec<i32>,
    /// Its descriptors by number.
    pub descriptors: Vec<DescriptorSummary>,
    /// Its memory.
    pub memory: MemorySummary,
}

/// A descriptor, summarised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DescriptorSummary {
    /// Its number.
    pub number: i32,
    /// What it refers to: the name of the room in `resources`.
    pub kind: &'static str,
    /// Index of the open file description: equal numbers share one.
    pub description: usize,
}

/// A process's memory, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemorySummary {
    /// How many mappings.
    pub mappings: usize,
    /// All of them together.
    pub mapped: u64,
    /// Private anonymous mappings.
    pub anonymous: u64,
    /// Mappings of files.
    pub files: u64,
    /// Mappings of memory objects: shared memory, memfds.
    pub shared: u64,
    /// Pages of the process's own that the checkpoint holds.
    pub stored: u64,
    /// Pages that it shares with processes of which they are stored.
    pub inherited: u64,
}

impl TreeSummary {
    /// Reads and summarises the tree of `checkpoint`.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, ReadError> {
        let tree: Tree = checkpoint.state(TREE)?;
        Ok(Self::of(&tree, checkpoint))
    }

    /// Summarises `tree`, whose pages are in `checkpoint`.
    pub fn of(tree: &Tree, checkpoint: &Checkpoint) -> Self {
        let mut descriptions = BTreeMap::new();
        for description in &tree.descriptions {
            *descriptions.entry(description.state.kind()).or_default() += 1;
        }
        let host_name = tree.namespaces.host_name.as_ref();
        Self {
            processes: tree.processes.iter().map(|process| summarise(process, tree, checkpoint)).collect(),
            descriptions,
            shared_objects: tree.shared_objects.len(),
            shared_bytes: tree.shared_objects.iter().fold(0, |sum, object| object.size.saturating_add(sum)),
            namespaces: tree.namespaces.own.iter().map(|kind| printable(kind.as_bytes())).collect(),
            registers: processor::needs(tree),
            host_name: host_name.map(|name| printable(&name.host)),
        }
    }
}

/// Text without control characters, which could do anything to a terminal.
pub fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn summarise(process: &Process, tree: &Tree, checkpoint: &Checkpoint) -> ProcessSummary {
    let mut summary = ProcessSummary {
        pid: process.pid,
        parent: process.parent,
        process_group: process.process_group,
        session: process.session,
        name: String::new(),
        state: "zombie",
        threads: Vec::new(),
        descriptors: Vec::new(),
        memory: MemorySummary::default(),
    };
    match &process.life {
        Life::Zombie { name, .. } => summary.name = printable(name),
        Life::Alive(body) => {
            summary.state = if body.stopped.is_some() { "stopped" } else { "running" };
            summary.name =
                body.threads.first().map(|leader| printable(&leader.state.name.0)).unwrap_or_default();
            summary.threads = body.threads.iter().map(|thread| thread.tid).collect();
            summary.descriptors = descriptors(body, tree);
            summary.memory = memory(body, checkpoint);
        }
    }
    summary
}

fn descriptors(body: &Body, tree: &Tree) -> Vec<DescriptorSummary> {
    let summary = |descriptor: &crate::state::Descriptor| DescriptorSummary {
        number: descriptor.number,
        kind: tree.descriptions.get(descriptor.description).map_or("?", |found| found.state.kind()),
        description: descriptor.description,
    };
    body.descriptors.iter().map(summary).collect()
}

fn memory(body: &Body, checkpoint: &Checkpoint) -> MemorySummary {
    let mut memory = MemorySummary { mappings: body.mappings.len(), ..MemorySummary::default() };
    for mapping in &body.mappings {
        memory.mapped = memory.mapped.saturating_add(mapping.length);
        let part = match &mapping.backing {
            Backing::Anonymous => &mut memory.anonymous,
            Backing::File(_) => &mut memory.files,
            Backing::SharedMemory(..)
            | Backing::PrivateView(..)
            | Backing::SystemV(_)
            | Backing::SystemVPart(_) => &mut memory.shared,
            Backing::Vdso(_) => continue,
        };
        *part = part.saturating_add(mapping.length);
    }
    let extents = checkpoint.extents(body.pages.own());
    memory.stored = extents.iter().fold(0, |sum, extent| extent.length.saturating_add(sum));
    let inherited = body.pages.inherited().iter();
    memory.inherited =
        inherited.fold(0, |sum, piece| piece.end.saturating_sub(piece.start).saturating_add(sum));
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_write_to_the_terminal() {
        assert_eq!(printable(b"a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
        assert_eq!(printable("grün".as_bytes()), "grün");
    }
}
