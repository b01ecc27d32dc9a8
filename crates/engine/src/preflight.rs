//! The pre-flight: everything in a running tree that a checkpoint would refuse, found without stopping it.
//!
//! What it sees may have changed a moment later, so it errs towards silence: only what stays the same while it is
//! looked at twice is reported, and a process or descriptor that is gone meanwhile is none of its business. The
//! checkpoint itself looks again, with the tree frozen.
//!
//! Rooms say what they would refuse as far as that shows without reading a queue or stopping a packet
//! ([`DescriptorKind::examine`](crate::resources::DescriptorKind::examine)). Connections that nobody has accepted are
//! watched for the second that the checkpoint would give the program. What is left to the checkpoint: descriptors in
//! flight in unix sockets behind the first message with any, and what only the threads themselves can tell.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::time::Duration;

use limosa_image::{Sink, SpaceId, WriteError};
use limosa_kernel::proc::{ProcDir, TaskState};
use limosa_kernel::task::{self, Comparison};

use crate::checkpoint::{Options, SHARING, refuse_owner_in_flight};
use crate::error::{CaptureError, Refusal};
use crate::flight;
use crate::listeners;
use crate::memory::SpaceAllocator;
use crate::network::Network;
use crate::resources::mapping::MappingState;
use crate::resources::namespaces::Home;
use crate::resources::shared_memory::SharedObjects;
use crate::resources::{CaptureContext, DescriptorState, NamespaceState, file_locks, filesystem};
use crate::view::{DescriptionView, Place, ProcessView};

/// How long something must be there before it is not taken for a child on its way to execve(2), a connection that is just
/// being made, or the like.
const MOMENT: Duration = Duration::from_millis(20);

/// A process of the tree.
pub(crate) struct Member {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    pub(crate) proc: ProcDir,
}

/// Looks at the tree rooted at `root`, which goes on running, and lists what a checkpoint with `options` refuses.
///
/// Errors: only what keeps it from looking at all, such as a root that does not exist.
pub fn look(root: i32, options: &Options) -> Result<Vec<Refusal>, CaptureError> {
    let stuck = listeners::stuck(root, options).unwrap_or_else(|error| {
        tracing::debug!(%error, "listening sockets are not looked at");
        HashMap::new()
    });
    let mut found = look_once(root, options, &stuck)?;
    if !found.is_empty() {
        std::thread::sleep(MOMENT);
        let still = look_once(root, options, &stuck)?;
        found.retain(|refusal| still.contains(refusal));
    }
    Ok(found)
}

fn look_once(
    root: i32,
    options: &Options,
    stuck: &HashMap<u64, usize>,
) -> Result<Vec<Refusal>, CaptureError> {
    let members = members(root)?;
    let mut refusals = sharing(&members);
    let mut shared = SharedObjects::default();
    let mut views = Vec::with_capacity(members.len());
    for member in &members {
        match ProcessView::look(member.pid, &member.proc) {
            Ok(view) => views.push(view),
            Err(error) if member.pid == root => return Err(error.into()),
            Err(error) => tracing::debug!(pid = member.pid, %error, "not looked at"),
        }
    }
    let home = members.first().map(|root| Home::of(&root.proc, options));
    for view in views.iter().filter(|view| view.status.state != TaskState::Zombie) {
        let mut own = Vec::from_iter(traced(view));
        note(&mut own, filesystem::root(view));
        if let Some(home) = &home {
            note(&mut own, home.refuse_strays(view));
            note(&mut own, home.refuse_stray_threads(view));
        }
        own.extend(MappingState::refusals(view, &mut shared));
        if !own.is_empty() && !has_ended(view) {
            refusals.extend(own);
        }
    }
    if let Some(root) = views.first() {
        note(&mut refusals, NamespaceState::capture(root, options, None));
    }
    refusals.extend(descriptors(&views, &mut shared, options, Network::running(options, stuck.clone())));
    Ok(refusals)
}

/// Whether the process is gone, or on its way out: then it has no memory and no namespaces any more, though it may be no
/// zombie yet.
fn has_ended(view: &ProcessView) -> bool {
    view.proc.maps().map_or(true, |mappings| mappings.is_empty())
}

/// Keeps a refusal; anything else is left to the checkpoint, which will meet it again.
fn note<T>(refusals: &mut Vec<Refusal>, outcome: Result<T, CaptureError>) {
    match outcome {
        Ok(_) => {}
        Err(CaptureError::Refused(refusal)) => refusals.push(*refusal),
        Err(error) => tracing::debug!(%error, "not looked at"),
    }
}

/// The processes of the tree, parents first.
pub(crate) fn members(root: i32) -> Result<Vec<Member>, CaptureError> {
    let mut members = vec![Member { pid: root, parent: 0, proc: ProcDir::open(root)? }];
    let mut known = HashSet::from([root]);
    let mut index = 0;
    while index < members.len() {
        let parent = members[index].pid;
        let children = match members[index].proc.children() {
            Ok(children) => children,
            Err(error) if error.is_gone() && index > 0 => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        for pid in children.into_iter().filter(|child| known.insert(*child)) {
            if let Ok(proc) = ProcDir::open(pid) {
                members.push(Member { pid, parent, proc });
            }
        }
        index += 1;
    }
    Ok(members)
}

/// A process can have one tracer only.
fn traced(view: &ProcessView) -> Option<Refusal> {
    let tracer = view.status.tracer_pid;
    let reason = format!("it is traced by process {tracer}");
    (tracer != 0).then(|| Refusal::process(view.pid, reason, "end that debugger or tracer first"))
}

/// Processes that share with their parents what only threads share.
fn sharing(members: &[Member]) -> Vec<Refusal> {
    let children = members.iter().filter(|member| member.parent != 0);
    let pairs = children.flat_map(|child| SHARING.map(|(what, name)| (child, what, name)));
    pairs
        .filter(|(child, what, _)| {
            task::kcmp(child.pid, child.parent, *what, 0, 0).is_ok_and(std::cmp::Ordering::is_eq)
        })
        .map(|(child, _, name)| {
            let reason = format!("it shares its {name} with its parent {}", child.parent);
            let remedy = "wait until it has called execve, or run it without clone's sharing flags";
            Refusal::process(child.pid, reason, remedy)
        })
        .collect()
}

/// What is refused of the tree's descriptors.
fn descriptors(
    views: &[ProcessView],
    shared: &mut SharedObjects,
    options: &Options,
    mut network: Network,
) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut found = Vec::new();
    let mut by_number = HashMap::new();
    for view in views.iter().filter(|view| view.status.state != TaskState::Zombie) {
        match open_all(view, &mut found, &mut by_number) {
            Ok(()) => {}
            Err(error) if [Some(libc::EPERM), Some(libc::EACCES)].contains(&error.errno()) => {
                let reason = format!("Limosa may not look at its descriptors ({error})");
                refusals.push(Refusal::process(view.pid, reason, "run Limosa as root, with CAP_SYS_PTRACE"));
            }
            Err(error) => tracing::debug!(pid = view.pid, %error, "descriptors not looked at"),
        }
    }
    network.sees_all_in_flight = flight::glance(&mut found);
    let own_pids: HashMap<i32, i32> = views.iter().map(|view| (view.pid, view.own_pid)).collect();
    note(&mut refusals, file_locks::refuse_outsiders(&found, &own_pids.keys().copied().collect()));
    let (mut sink, mut spaces) = (Nowhere, SpaceAllocator::default());
    let mut context = CaptureContext::new(
        &mut sink,
        &mut spaces,
        &by_number,
        &found,
        &own_pids,
        shared,
        &options.externals,
        &mut network,
        HashMap::new(),
    );
    context.terminals.kept = options.kept_terminal;
    // What many descriptors refer to, by dup(2) or fork(2), is refused once.
    let mut told = HashSet::new();
    for view in &found {
        let mut one = Vec::new();
        note(&mut one, DescriptorState::examine(view, &mut context));
        note(&mut one, refuse_owner_in_flight(view));
        note(
            &mut one,
            match view.number() {
                Some(number) => file_locks::capture(view.process, number, &view.info, false, false),
                None => file_locks::in_flight(view),
            },
        );
        if !one.is_empty()
            && is_still_there(view)
            && told.insert((view.stat.st_dev, view.stat.st_ino, view.link.clone()))
        {
            refusals.append(&mut one);
        }
    }
    refusals
}

/// Duplicates every descriptor of a process. Descriptors of one description are each looked at: which they are is
/// not worth the comparisons here.
fn open_all<'a>(
    view: &'a ProcessView<'a>,
    found: &mut Vec<DescriptionView<'a>>,
    by_number: &mut HashMap<(i32, i32), usize>,
) -> limosa_kernel::Result<()> {
    let pidfd = task::pidfd_open(view.pid)?;
    for number in view.proc.fds()? {
        let open = || -> limosa_kernel::Result<DescriptionView<'a>> {
            let descriptor = task::pidfd_getfd(&pidfd, number)?;
            let (link, info) = (view.proc.fd_link(number)?, view.proc.fdinfo(number)?);
            let stat = rustix::fs::fstat(&descriptor).map_err(|errno| {
                limosa_kernel::Error::new("fstat", format_args!("descriptor {number}"), errno)
            })?;
            Ok(DescriptionView { process: view, place: Place::Held(number), link, info, descriptor, stat })
        };
        match open() {
            Ok(view) => {
                by_number.insert((view.process.own_pid, number), found.len());
                found.push(view);
            }
            // Closed meanwhile.
            Err(error) if error.is_gone() || error.errno() == Some(libc::EBADF) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether the number still stands for the description that was looked at, so that all that was read of it belongs
/// together. What is in flight was looked at by a number of our own.
fn is_still_there(view: &DescriptionView) -> bool {
    use std::os::fd::AsRawFd;
    let Some(number) = view.number() else { return true };
    let own = std::process::id() as i32;
    let duplicate = view.descriptor.as_raw_fd() as u64;
    task::kcmp(own, view.process.pid, Comparison::File, duplicate, number as u64)
        .is_ok_and(std::cmp::Ordering::is_eq)
        && view.process.proc.fd_link(number).is_ok_and(|link| link == view.link)
}

/// Where what rooms capture goes: nothing of it is kept, nor even read.
struct Nowhere;

impl Sink for Nowhere {
    fn state(&mut self, _: &str, _: &[u8]) -> Result<(), WriteError> {
        Ok(())
    }

    fn pages(&mut self, _: SpaceId, _: u64, _: &[u8]) -> Result<(), WriteError> {
        Ok(())
    }

    fn forget(&mut self, _: SpaceId, _: u64, _: u64) -> Result<(), WriteError> {
        Ok(())
    }

    fn blob(&mut self, _: &str, _: &mut dyn Read) -> Result<u64, WriteError> {
        Ok(0)
    }
}
