//! Namespaces of a tree that are not the host's, and what is in them (namespaces(7)).
//!
//! The namespaces themselves are prepared by whoever restores (a container's shell) or made with the root process
//! (PID). The rooms here carry what is in them: the first program of the root puppet puts it back.

pub mod clocks;
pub mod host_name;
pub mod interfaces;
pub mod ipc;
pub mod mounts;
pub mod settings;

use std::os::fd::AsFd;

use limosa_image::{Checkpoint, Sink};
use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::net::InNetns;
use limosa_kernel::proc::{CgroupLine, FileId, NsKind, ProcDir};
use limosa_puppet::Program;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Options;
use crate::error::{CaptureError, Refusal, RestoreError};
use crate::restore::Nursery;
use crate::view::ProcessView;

/// What a namespace holds.
pub trait Namespace: Sized {
    /// Its content, seen from outside through the tree's root process.
    fn capture(root: &ProcessView) -> Result<Self, CaptureError>;

    /// Adds the calls by which the root puppet, which is in the namespace with all privileges, puts it back.
    fn rebuild(&self, root: &ProcDir, program: &mut Program) -> Result<(), RestoreError>;
}

/// The namespaces that all of a tree must be in: those of its root. A process or thread elsewhere, as browsers and
/// services make for their sandboxes, would quietly come back without its walls.
#[derive(Debug)]
pub(crate) struct Home {
    namespaces: Vec<(NsKind, Option<FileId>)>,
    /// The control groups of the root, one in each hierarchy, where they can be read.
    cgroups: Option<Vec<CgroupLine>>,
    /// What the paths of a container's control groups contain.
    control_group: Option<String>,
}

impl Home {
    /// Kinds that a thread can leave by itself.
    const OF_THREADS: [NsKind; 5] = [NsKind::Cgroup, NsKind::Ipc, NsKind::Mnt, NsKind::Net, NsKind::Uts];

    /// Those of the tree's root. A kind that the kernel does not have is none.
    pub(crate) fn of(root: &ProcDir, options: &Options) -> Self {
        let of = |kind| match kind {
            // What children will be in must be what the root itself is in.
            NsKind::PidForChildren => NsKind::Pid,
            NsKind::TimeForChildren => NsKind::Time,
            kind => kind,
        };
        let namespaces = NsKind::ALL.into_iter().map(|kind| (kind, root.ns_id(of(kind)).ok())).collect();
        Self { namespaces, cgroups: root.cgroup().ok(), control_group: options.control_group.clone() }
    }

    /// All processes of a restored tree are born in the control groups of its root.
    fn refuse_stray_cgroups(&self, process: &ProcessView) -> Result<(), CaptureError> {
        let Some(home) = &self.cgroups else { return Ok(()) };
        let lines = process.proc.cgroup()?;
        let away = lines.into_iter().find(|line| !home.contains(line) && !self.is_containers(line));
        let Some(line) = away else { return Ok(()) };
        let reason = format!(
            "it is in another control group ({}) than the root of the tree",
            String::from_utf8_lossy(&line.path)
        );
        let remedy = "move it into that of the root (cgroup.procs) and try again";
        Err(Refusal::process(process.pid, reason, remedy).into())
    }

    /// Whether it is a group of the container, or in one.
    fn is_containers(&self, line: &CgroupLine) -> bool {
        let Some(mark) = self.control_group.as_ref().map(String::as_bytes) else { return false };
        let at = line.path.windows(mark.len()).position(|part| part == mark);
        let behind = at.and_then(|at| line.path.get(at + mark.len()..));
        behind.is_some_and(|behind| behind.is_empty() || behind.starts_with(b"/"))
            && !line.path.ends_with(b" (deleted)")
    }

    /// Whether a thread is in the same control groups as its process: in version 1, and in threaded groups of version 2, it need
    /// not be.
    fn refuse_apart(process: &ProcessView, tid: i32, thread: &ProcDir) -> Result<(), CaptureError> {
        let (Ok(own), Ok(all)) = (thread.cgroup(), process.proc.cgroup()) else { return Ok(()) };
        let Some(line) = own.iter().find(|line| !all.contains(line)) else { return Ok(()) };
        let group = String::from_utf8_lossy(&line.path);
        let reason = format!("its thread {tid} is in another control group ({group}) than the first");
        Err(Refusal::process(process.pid, reason, "move it into that of its process (tasks, cgroup.threads)")
            .into())
    }

    /// Refuses a process of the tree that is in other namespaces or control groups than the root.
    pub(crate) fn refuse_strays(&self, process: &ProcessView) -> Result<(), CaptureError> {
        let away = self.namespaces.iter().find(|(kind, home)| match process.proc.ns_id(*kind) {
            Ok(id) => Some(id) != *home,
            // After unshare(2) that of its children is not there before the first child is.
            Err(error) => {
                *kind == NsKind::PidForChildren && error.errno() == Some(libc::ENOENT) && home.is_some()
            }
        });
        let Some((kind, _)) = away else { return self.refuse_stray_cgroups(process) };
        let reason = format!("it has a namespace of its own within the tree ({})", kind.name());
        Err(Refusal::process(process.pid, reason, REMEDY).into())
    }

    /// Refuses threads that have left the namespaces of the tree, or the control groups of their process.
    pub(crate) fn refuse_stray_threads(&self, process: &ProcessView) -> Result<(), CaptureError> {
        for tid in process.proc.tasks()?.into_iter().filter(|tid| *tid != process.pid) {
            let Ok(thread) = process.proc.task(tid) else { continue };
            let away = self.namespaces.iter().find(|(kind, home)| {
                Self::OF_THREADS.contains(kind) && thread.ns_id(*kind).is_ok_and(|id| Some(id) != *home)
            });
            Self::refuse_apart(process, tid, &thread)?;
            if let Some((kind, _)) = away {
                let reason = format!("its thread {tid} has a namespace of its own ({})", kind.name());
                return Err(Refusal::process(process.pid, reason, REMEDY).into());
            }
        }
        Ok(())
    }
}

const REMEDY: &str = "run it without a sandbox or container of its own (unshare, setns, clone)";

/// The namespaces that a tree has of its own.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct NamespaceState {
    /// Their kinds, by the names in `/proc/PID/ns`.
    pub own: Vec<String>,
    /// Host and domain name.
    pub host_name: Option<host_name::HostName>,
    /// What the clocks showed.
    pub clocks: Option<clocks::Clocks>,
    /// Mounts.
    pub mounts: Option<mounts::Mounts>,
    /// System V semaphores and message queues.
    #[serde(default)]
    pub ipc: Option<ipc::Ipc>,
    /// What is set up in the network namespace.
    #[serde(default)]
    pub interfaces: Option<interfaces::Interfaces>,
}

impl NamespaceState {
    /// What namespaces the tree with this root has of its own: those of a container can be prepared again. The
    /// content of memory filesystems goes into the sink, and settings of the network have been read already; without
    /// them only the rest is looked at, to see what is refused.
    pub fn capture(
        root: &ProcessView,
        options: &Options,
        whole: Option<(&mut dyn Sink, Vec<settings::Setting>)>,
    ) -> Result<Self, CaptureError> {
        let (sink, settings) = whole.map_or((None, Vec::new()), |(sink, settings)| (Some(sink), settings));
        let host = ProcDir::open(std::process::id() as i32)?;
        let mut own = Vec::new();
        for kind in NsKind::ALL {
            match (root.proc.ns_id(kind), host.ns_id(kind)) {
                (Ok(theirs), Ok(ours)) if theirs != ours => own.push(kind.name().to_owned()),
                _ => {}
            }
        }
        if own.is_empty() {
            return Ok(Self::default());
        }
        if !options.container || own.iter().any(|kind| kind == "user") {
            let reason = format!("it lives in namespaces of its own ({})", own.join(", "));
            let remedy = "only containers made by `limosa run` can have them yet";
            return Err(Refusal::process(root.pid, reason, remedy).into());
        }
        let ipc = if own.iter().any(|kind| kind == "ipc") {
            Some(ipc::Ipc::capture(root.pid, sink.is_some())?)
        } else {
            None
        };
        let has_network = own.iter().any(|kind| kind == "net");
        let interfaces =
            if has_network { Some(interfaces::Interfaces::capture(root, settings)?) } else { None };
        Ok(Self {
            own,
            interfaces,
            host_name: Some(Namespace::capture(root)?),
            clocks: Some(Namespace::capture(root)?),
            mounts: Some(mounts::Mounts::capture(root, options.control_group.as_deref(), sink)?),
            ipc,
        })
    }

    /// Puts everything back, most of it by the root puppet.
    pub(crate) fn rebuild(&self, nursery: &mut Nursery, checkpoint: &Checkpoint) -> Result<(), RestoreError> {
        let root = ProcDir::open(nursery.puppets[0].pid())?;
        let mut program = Program::new();
        if let Some(host_name) = &self.host_name {
            host_name.rebuild(&root, &mut program)?;
        }
        if let Some(clocks) = &self.clocks {
            clocks.rebuild(&root, &mut program)?;
        }
        let (puppet, arena) = nursery.puppet(0);
        puppet.run(arena, program)?;
        if let Some(mounts) = &self.mounts {
            mounts.rebuild(nursery, checkpoint)?;
        }
        if let Some(ipc) = &self.ipc {
            let namespace = namespace::of_process(nursery.puppets[0].pid(), Kind::Ipc)?;
            ipc.rebuild(namespace.as_fd())?;
        }
        if let Some(interfaces) = &self.interfaces {
            let _inside = InNetns::enter(namespace::of_process(nursery.puppets[0].pid(), Kind::Network)?)?;
            interfaces.rebuild()?;
        }
        Ok(())
    }
}
