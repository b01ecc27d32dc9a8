//! Restore: data becomes a running tree.
//!
//! ```text
//!   Planned ── births ──► Built ── mappings, pages, descriptors, attributes ──► Loaded ── registers ──► Started
//! ```
//!
//! Until it is started, nothing but our stub runs in the tree; it dies with the controller, and dropping any phase
//! ends and reaps all of it. A [`Loaded`] tree can wait as long as it takes: that is what a migration needs.

mod births;
mod build;
mod descriptors;
pub mod explain;
mod heritage;
mod huge_pages;
mod inside;
mod load;
mod makers;
mod start;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use limosa_image::Checkpoint;
use limosa_kernel::namespace::Kind;
use limosa_kernel::net::InNetns;
use limosa_kernel::ptrace;
use limosa_puppet::{Arena, Resident};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use crate::error::RestoreError;
use crate::guardian;
use crate::network::Restored;
use crate::plan::{Kin, NodeId, Plan, Role};
use crate::report::Report;
use crate::resources::DescriptorState;
use crate::resources::mapping::{self, Backing};
use crate::resources::{keyrings, processor, shared_memory, terminal, vdso};
use crate::state::{Body, Life, Pages, Process, TREE, Tree};

pub(crate) use inside::Inside;
pub(crate) use makers::{Goal, Makers};
pub(crate) use start::await_stop;

/// Sparse; what is used of it is a few hundred bytes for each object.
const ARENA_SIZE: u64 = 8 << 30;

/// Longest wait for killed processes to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// How to restore.
#[derive(Debug, Default)]
pub struct Options {
    /// The directory that becomes the tree's root; the host's root if none.
    pub root: Option<PathBuf>,
    /// The prepared namespaces of a tree that has its own; without, it comes back in the host's.
    pub place: Option<Place>,
    /// Files outside the tree's root, by the keys they have in the checkpoint.
    pub externals: HashMap<String, PathBuf>,
    /// Whether the tree is to outlive the caller. Its root then comes back without a parent-death signal: the kernel
    /// would send it when the caller, which is its parent, ends.
    pub detached: bool,
    /// Which features of the processor must be there.
    pub processor: processor::Rule,
}

/// Namespaces and control groups that a tree is born into. The PID namespace is made with its root.
#[derive(Debug, Default)]
pub struct Place {
    /// Namespaces, in the order in which they can be entered.
    pub namespaces: Vec<(Kind, OwnedFd)>,
    /// `cgroup.procs` of each control group, open for writing.
    pub cgroups: Vec<OwnedFd>,
}

/// A checkpoint that has been read and checked, and how its tree will be born.
pub struct Planned<'a> {
    checkpoint: &'a Checkpoint,
    tree: Tree,
    plan: Plan,
    options: Options,
}

impl<'a> Planned<'a> {
    /// Reads and checks the tree's state.
    pub fn new(checkpoint: &'a Checkpoint, options: Options) -> Result<Self, RestoreError> {
        let mut tree: Tree = checkpoint.state(TREE)?;
        check(&tree)?;
        check_pages(&tree, checkpoint)?;
        processor::check(&tree, &checkpoint.manifest().meta.cpu_features, options.processor)?;
        processor::adapt(&mut tree);
        vdso::adapt(&mut tree, checkpoint)?;
        let plan = Plan::new(&Kin::of(&tree))?;
        Ok(Self { checkpoint, tree, plan, options })
    }

    /// The same with other options: what a place needs may stand in the tree's state.
    #[must_use]
    pub fn with(self, options: Options) -> Self {
        Self { options, ..self }
    }

    /// What will be restored.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Makes all processes, as puppets, and builds everything in them.
    pub fn build(mut self, report: &mut Report) -> Result<Loaded, RestoreError> {
        if self.options.detached
            && let Some(Life::Alive(root)) = self.tree.processes.first_mut().map(|root| &mut root.life)
        {
            for thread in &mut root.threads {
                thread.state.credentials.parent_death_signal = 0;
            }
        }
        let place = self.options.place.as_ref();
        if place.is_none() && !self.tree.namespaces.own.is_empty() {
            return Err(RestoreError::Unsupported {
                what: format!("a tree with namespaces of its own ({})", self.tree.namespaces.own.join(", ")),
                why: "only containers made by `limosa run` can have them yet".into(),
            });
        }
        let terminals = report.phase("terminals", |_| self.make_terminals())?;
        let mut nursery = report.phase("births", |report| {
            let loaded = &mut report.page_bytes;
            births::give_birth(&self.tree, &self.plan, place, &terminals, self.checkpoint, loaded)
        })?;
        report.processes = self.tree.processes.len();
        report.descriptions = self.tree.descriptions.len();
        report.threads = self.tree.living().map(|(_, body)| body.threads.len()).sum();
        report.mappings = self.tree.living().map(|(_, body)| body.mappings.len()).sum();
        let (mut objects, mut network) = report.phase("objects", |_| -> Result<_, RestoreError> {
            if place.is_some() {
                self.tree.namespaces.rebuild(&mut nursery, self.checkpoint)?;
            }
            let root = self.open_root(&nursery)?;
            // Sockets belong to the network namespace of the thread that makes them.
            let network =
                place.and_then(|place| place.namespaces.iter().find(|(kind, _)| *kind == Kind::Network));
            let _inside = network.map(|(_, namespace)| InNetns::enter(namespace)).transpose()?;
            let network = lock_connections(&self.tree)?;
            let ipc = limosa_kernel::namespace::of_process(nursery.puppets[0].pid(), Kind::Ipc)?;
            let objects = descriptors::rebuild_all(
                &self.tree,
                self.checkpoint,
                root,
                &self.options.externals,
                &terminals,
                ipc.as_fd(),
                &mut Makers::new(&mut nursery),
            )?;
            Ok((objects, network))
        })?;
        network.starters = std::mem::take(&mut objects.starters);
        build::build_all(&self.tree, self.checkpoint, &mut nursery, objects, report)?;
        let ipc = limosa_kernel::namespace::of_process(nursery.puppets[0].pid(), Kind::Ipc)?;
        shared_memory::remove_segments(&self.tree.shared_objects, ipc.as_fd())?;
        let kept_terminal = terminal::kept(&self.tree.terminals, terminals);
        Ok(Loaded { tree: self.tree, nursery, network, kept_terminal })
    }

    /// Makes the terminals, which must be there before the sessions that they control.
    fn make_terminals(&self) -> Result<Vec<terminal::Rebuilt>, RestoreError> {
        if self.tree.terminals.is_empty() {
            return Ok(Vec::new());
        }
        let namespaces = self.options.place.iter().flat_map(|place| &place.namespaces);
        let mount = namespaces.into_iter().find(|(kind, _)| *kind == Kind::Mount);
        let root = match (&self.options.root, mount) {
            (None, Some((_, mount))) => limosa_kernel::namespace::root_of(mount)?,
            (path, _) => {
                let path = path.clone().unwrap_or_else(|| PathBuf::from("/"));
                rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(RestoreError::rebuild(path.display().to_string(), "open"))?
            }
        };
        terminal::rebuild_all(&self.tree.terminals, &root)
    }

    fn open_root(&self, nursery: &Nursery) -> Result<OwnedFd, RestoreError> {
        let path = match (&self.options.root, &self.options.place) {
            (Some(path), _) => path.clone(),
            (None, Some(_)) => PathBuf::from(format!("/proc/{}/root", nursery.puppets[0].pid())),
            (None, None) => PathBuf::from("/"),
        };
        rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(RestoreError::rebuild(path.display().to_string(), "open"))
    }
}

/// Drops the packets of the tree's connections until it starts.
fn lock_connections(tree: &Tree) -> Result<Restored, RestoreError> {
    let connections: Vec<_> = tree
        .descriptions
        .iter()
        .filter_map(|description| match &description.state {
            DescriptorState::Tcp(tcp) => tcp.ends(),
            _ => None,
        })
        .collect();
    Restored::lock(&connections, tree.packet_lock.as_deref())
}

/// Numbers of descriptors can be higher only where somebody set `fs.nr_open` a thousand times as high as it comes.
const HIGHEST_DESCRIPTOR: i32 = 1 << 30;

/// Checks what the type system does not: numbers that refer to something.
fn check(tree: &Tree) -> Result<(), RestoreError> {
    keyrings::check(tree)?;
    for (process, body) in tree.living() {
        body.state.protection_keys.check()?;
        mapping::check(&body.mappings, body.state.protection_keys)?;
        for mapping in &body.mappings {
            if let Backing::SharedMemory(object, _) | Backing::PrivateView(object, _) = mapping.backing
                && object >= tree.shared_objects.len()
            {
                return Err(RestoreError::inconsistent(format!("there is no shared object {object}")));
            }
        }
        check_inherited(process, &body.pages, tree)?;
        let mut last = -1;
        for descriptor in &body.descriptors {
            let number = descriptor.number;
            if descriptor.description >= tree.descriptions.len()
                || number <= last
                || number > HIGHEST_DESCRIPTOR
            {
                let what = format!("descriptor {} of process {}", descriptor.number, process.pid);
                return Err(RestoreError::inconsistent(what));
            }
            last = descriptor.number;
        }
        if body.threads.first().is_none_or(|leader| leader.tid != process.pid) {
            return Err(RestoreError::inconsistent(format!("process {} has no leading thread", process.pid)));
        }
    }
    check_in_flight(tree)
}

/// Checks that each description is held or in flight. One that is only in flight has nothing that a holder must do.
fn check_in_flight(tree: &Tree) -> Result<(), RestoreError> {
    let mut held = vec![false; tree.descriptions.len()];
    for descriptor in tree.living().flat_map(|(_, body)| &body.descriptors) {
        held[descriptor.description] = true;
    }
    let mut in_flight = vec![false; tree.descriptions.len()];
    for right in tree.descriptions.iter().flat_map(|description| description.state.in_flight()) {
        let known = in_flight.get_mut(right);
        *known.ok_or_else(|| RestoreError::inconsistent(format!("there is no description {right}")))? = true;
    }
    for (index, description) in tree.descriptions.iter().enumerate().filter(|(index, _)| !held[*index]) {
        let watches =
            matches!(&description.state, DescriptorState::Epoll(epoll) if !epoll.entries.is_empty());
        if !in_flight[index] {
            return Err(RestoreError::inconsistent(format!("nobody has description {index}")));
        } else if watches || description.owner.is_some() {
            let what = format!("description {index} needs a process that holds it, and is only in flight");
            return Err(RestoreError::inconsistent(what));
        }
    }
    Ok(())
}

/// Checks that pages that are stored or inherited lie in their process's private mappings: anywhere else they would be
/// written into what Limosa itself keeps in a puppet.
fn check_pages(tree: &Tree, checkpoint: &Checkpoint) -> Result<(), RestoreError> {
    for (process, body) in tree.living() {
        let stored = checkpoint.extents(body.pages.own()).iter();
        check_covered(process, body, stored.map(|extent| (extent.start, extent.end())))?;
        let inherited = body.pages.inherited().iter();
        check_covered(process, body, inherited.map(|piece| (piece.start, piece.end)))?;
    }
    Ok(())
}

/// Checks that `ranges`, which are sorted, lie in private mappings.
fn check_covered(
    process: &Process,
    body: &Body,
    ranges: impl Iterator<Item = (u64, u64)>,
) -> Result<(), RestoreError> {
    let mut mappings = body.mappings.iter().filter(|mapping| mapping.is_private()).peekable();
    for (start, end) in ranges {
        let mut covered = start;
        while covered < end {
            while mappings.next_if(|mapping| mapping.end() <= covered).is_some() {}
            match mappings.peek() {
                Some(mapping) if mapping.start <= covered => covered = mapping.end(),
                _ => {
                    let what = format!("a page at {covered:#x} of process {} is in no mapping", process.pid);
                    return Err(RestoreError::inconsistent(what));
                }
            }
        }
    }
    Ok(())
}

/// Checks that what a process inherits is whole pages, in order, of other living processes. Whether they have such pages
/// makes no difference: what is not stored is zero.
fn check_inherited(process: &Process, pages: &Pages, tree: &Tree) -> Result<(), RestoreError> {
    if pages.inherited().is_empty() {
        return Ok(());
    }
    let lenders: HashSet<_> = tree.living().map(|(_, body)| body.pages.own()).collect();
    let mut free_from = 0;
    for piece in pages.inherited() {
        let aligned = piece.start % 4096 == 0 && piece.end % 4096 == 0 && piece.start < piece.end;
        let known = piece.space != pages.own() && lenders.contains(&piece.space);
        if !aligned || piece.start < free_from || !known {
            let (start, end, space, pid) = (piece.start, piece.end, piece.space, process.pid);
            let what = format!("process {pid} inherits {start:#x} to {end:#x} of space {space}");
            return Err(RestoreError::inconsistent(what));
        }
        free_from = piece.end;
    }
    Ok(())
}

/// The processes of a tree while they are puppets. Dropped, it ends and reaps them.
pub(crate) struct Nursery {
    pub(crate) arena: Arena,
    /// By node of the plan; ghosts and zombies included until they end.
    pub(crate) puppets: Vec<Resident>,
    /// Our end of the socket that descriptors are sent over.
    pub(crate) socket: OwnedFd,
    /// The puppets' end: its number in each of them.
    pub(crate) socket_number: i32,
    /// Who each node is, and its parent's node.
    pub(crate) roles: Vec<(Role, Option<NodeId>)>,
    /// The ID each node has in the tree's own PID namespace.
    pub(crate) own_pids: Vec<i32>,
    /// Nodes that are known to exist, in the order in which they were born.
    pub(crate) born: Vec<NodeId>,
    /// Nodes that have ended as planned.
    pub(crate) ended: Vec<NodeId>,
    /// Whether the tree is on its own now.
    pub(crate) released: bool,
    /// In the host's PID namespace, of a tree with several processes: what can end all of them.
    pub(crate) guardian: Option<guardian::Idle>,
    was_subreaper: bool,
    /// What each is born with.
    heritage: heritage::Heritage,
    /// Which nodes join a session keyring.
    joining: Vec<bool>,
}

impl Nursery {
    /// The resident of `node`, and the arena it needs.
    pub(crate) fn puppet(&mut self, node: NodeId) -> (&mut Resident, &mut Arena) {
        (&mut self.puppets[node], &mut self.arena)
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        if !self.released {
            // Orphans come to us (we are a subreaper), so each can be reaped.
            for node in self.born.iter().rev() {
                let _ = limosa_kernel::task::signal_process(self.puppets[*node].pid(), libc::SIGKILL);
            }
            reap_all(self.born.iter().map(|node| self.puppets[*node].pid()).collect());
            // Of the others, each whose parent had made it already is our child now. A PID that is not our child's is
            // that of somebody else, who may be why this restore failed.
            for puppet in self.puppets.iter().filter(|puppet| puppet.pid() > 0) {
                if ptrace::try_wait(puppet.pid()).is_ok() {
                    let _ = limosa_kernel::task::signal_process(puppet.pid(), libc::SIGKILL);
                    let _ = ptrace::wait(puppet.pid());
                }
            }
        }
        if !self.was_subreaper {
            let _ = rustix::process::set_child_subreaper(None);
        }
    }
}

/// Takes note of the end of killed processes, which are our children, our tracees, or will be our children once their
/// parents have ended. In any order: the first process of a PID namespace ends when all others in it have been noted.
fn reap_all(mut left: Vec<i32>) {
    let exists =
        |pid: i32| Pid::from_raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok());
    let started = Instant::now();
    while !left.is_empty() && started.elapsed() < PATIENCE {
        left.retain(|pid| match ptrace::try_wait(*pid) {
            Ok(None | Some(ptrace::WaitStatus::Stopped { .. })) => true,
            // Of a tracee that is no child of ours the end is noted here, and its parent reaps it or we do later.
            Ok(Some(_)) | Err(_) => exists(*pid),
        });
        if !left.is_empty() {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// A tree that is complete but for its registers. It does not run yet.
pub struct Loaded {
    tree: Tree,
    nursery: Nursery,
    network: Restored,
    kept_terminal: Option<OwnedFd>,
}

/// A tree that runs.
#[derive(Debug)]
pub struct Started {
    /// PID of its root in the controller's PID namespace. It is a child of the controller.
    pub root: i32,
}

impl Loaded {
    /// The PID here of each living process, by its PID in the tree.
    pub fn pids(&self) -> HashMap<i32, i32> {
        let living = self.tree.processes.iter().enumerate().filter(|(index, _)| is_alive(&self.tree, *index));
        living.map(|(index, process)| (process.pid, self.nursery.puppets[index].pid())).collect()
    }

    /// Gives every thread its registers and lets the tree run.
    pub fn start(self, report: &mut Report) -> Result<Started, RestoreError> {
        self.start_with(report, || Ok(()))
    }

    /// Likewise; does `committed` at the moment from which on the tree outlives us, before anything of it runs.
    pub fn start_with<E: From<RestoreError>>(
        mut self,
        report: &mut Report,
        committed: impl FnOnce() -> Result<(), E>,
    ) -> Result<Started, E> {
        let still = report.phase("threads", |_| start::make_ready(&self.tree, &mut self.nursery))?;
        report.phase("network", |_| self.network.start())?;
        report.phase("start", |_| {
            let still = still.commit(&mut self.nursery)?;
            if let Err(error) = committed() {
                // Nothing has run: it can still be taken back.
                self.nursery.released = false;
                return Err(error);
            }
            self.network.open();
            still.let_go();
            Ok(())
        })?;
        Ok(Started { root: self.nursery.puppets[0].pid() })
    }

    /// The master of the terminal that is kept outside the tree, for it. Without it the terminal hangs up.
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.kept_terminal.take()
    }

    /// PID of the root in the controller's PID namespace.
    pub fn root(&self) -> i32 {
        self.nursery.puppets[0].pid()
    }
}

/// Whether the process is alive in the tree.
pub(crate) fn is_alive(tree: &Tree, index: usize) -> bool {
    matches!(tree.processes[index].life, Life::Alive(_))
}
