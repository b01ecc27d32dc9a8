//! Checkpoint: a running tree becomes data.
//!
//! ```text
//!   Running ── freeze ──► Frozen ── capture ──► Captured ── the caller makes it durable ──► release or end
//! ```
//!
//! Dropped at any point, or killed, the tree runs on.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use limosa_image::{Sink, SpaceId, Stage};
use limosa_kernel::memory::ForeignMemory;
use limosa_kernel::proc::{ProcDir, TaskState};
use limosa_kernel::task::{self, Comparison};
use limosa_puppet::{Program, Visit, step_out_of_stub};

use crate::error::{CaptureError, Refusal};
use crate::flight;
use crate::freeze::{Frozen, FrozenProcess};
use crate::guardian::{self, Guardian};
use crate::listeners::{self, Listeners};
use crate::memory::{self, SpaceAllocator, Way};
use crate::memory_mode::{MemoryMode, Mode};
use crate::network::{self, Network};
use crate::peers;
use crate::precopy::{Precopy, Unavailable};
use crate::report::Report;
use crate::resources::landlock::{self, Witnesses};
use crate::resources::mapping::MappingState;
use crate::resources::namespaces::{Home, settings};
use crate::resources::processor::Layout;
use crate::resources::shared_memory::SharedObjects;
use crate::resources::terminal::Terminals;
use crate::resources::{
    CaptureContext, DescriptorState, LateState, NamespaceState, ProcessState, ThreadState, registers, vdso,
};
use crate::resources::{file_locks, job_control, keyrings};
use crate::sharing;
use crate::state::{Body, Description, Descriptor, Life, Pages, Process, TREE, Thread, Tree};
use crate::twin::{self, Remainder};
use crate::view::{DescriptionView, Place, ProcessView, ThreadView};
use crate::visits::{locate_vdso, run_inside};

/// How to checkpoint.
#[derive(Debug, Default)]
pub struct Options {
    /// Whether the tree is a container of `limosa run`, whose namespaces a shell can be prepared for.
    pub container: bool,
    /// Of a container, what the paths of its control group and of those in it contain: processes may be in any of them, and the
    /// caller sees to it that they come back there.
    pub control_group: Option<String>,
    /// Files outside the tree's root that restore will be told about: keys by device and inode.
    pub externals: HashMap<(u64, u64), String>,
    /// What becomes of TCP connections.
    pub tcp: TcpConnections,
    /// What becomes of connections that wait in listening sockets.
    pub unaccepted: Unaccepted,
    /// Whether the source is to run on afterwards.
    pub leaves_running: bool,
    /// How memory is captured.
    pub memory: MemoryMode,
    /// The number in the tree's `/dev/pts` of a terminal whose master is kept outside the tree, for it.
    pub kept_terminal: Option<u32>,
}

/// What becomes of connections that wait in a listening socket and that its program does not accept in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unaccepted {
    /// There is no checkpoint.
    #[default]
    Refuse,
    /// They are not in the checkpoint. When the tree ends, peers are told.
    Close,
}

/// What becomes of TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcpConnections {
    /// They are carried: restored, they go on.
    #[default]
    Established,
    /// They are not: restored, their sockets are not connected. When the tree ends, peers are told.
    Close,
}

/// A tree that is captured, and still frozen.
#[derive(Debug)]
pub struct Captured {
    // Dropped first: packets pass again before the tree runs.
    network: Network,
    frozen: Frozen,
    /// Holds new connections back until the tree runs, or has ended.
    listeners: Option<Listeners>,
    /// Whether the kernel ends and reaps all with the root, which leads a PID namespace.
    own_pid_namespace: bool,
    root: i32,
    /// Ended when the tree runs again: that takes a moment.
    witnesses: Witnesses,
    // Dropped last: processes that run reap their twins, and are watched no longer.
    remainder: Remainder,
}

/// Freezes the tree rooted at `root` and puts everything about it into `sink`.
pub fn capture(
    root: i32,
    sink: &mut dyn Sink,
    options: &Options,
    report: &mut Report,
) -> Result<Captured, CaptureError> {
    // There are hundreds of files with settings, and hardly ever does one change: that is not worth a longer freeze.
    let settings = if options.container { settings::of_process(root)? } else { Vec::new() };
    // Asking a virtual processor takes a moment.
    let registers = Some(Layout::here());
    let (mut precopy, mode) = store_early(root, sink, options, report)?;
    let mut beside = Beside { witnesses: Witnesses::new(root), keyrings: keyrings::Found::new(root)? };
    let (frozen, listeners) = listeners::freeze(root, options, report)?;
    sink.stage(Stage::Frozen);
    let views = report.phase("look", |_| views(&frozen))?;
    twin::reap_leftovers(&frozen, &views)?;
    report.phase("sharing", |_| -> Result<(), CaptureError> {
        refuse_sharing(&frozen)?;
        let home = Home::of(views[0].proc, options);
        let mut living = views.iter().filter(|view| view.status.state != TaskState::Zombie);
        living.try_for_each(|view| home.refuse_strays(view))
    })?;
    let mut spaces = precopy.spaces();
    let mut shared = SharedObjects::default();
    let namespaces = report
        .phase("namespaces", |_| NamespaceState::capture(&views[0], options, Some((&mut *sink, settings))))?;
    let mut processes = report
        .phase("ask", |_| ask_all(&frozen, &views, (&precopy, &mut spaces), &mut shared, &mut beside))?;
    let Beside { witnesses, keyrings } = beside;
    let (descriptions, network, terminals) = report.phase("descriptors", |_| {
        let came_later = listeners.as_ref().is_some_and(|listeners| listeners.were_empty);
        capture_descriptors(&views, &mut processes, sink, &mut spaces, &mut shared, options, came_later)
    })?;
    let mut runs = report.phase("pages", |_| sharing::survey(&views, &mut processes))?;
    report.phase("changes", |_| precopy.settle(&views, &processes, &mut runs, sink))?;
    let mut remainder = Remainder::default();
    if mode.mode == Mode::Twin {
        remainder = report.phase("fork", |_| twin::fork_all(&views, &processes, &mut runs))?;
    }
    report.memory = Some(remainder.explain(&mode));
    report.phase("memory", |report| -> Result<(), CaptureError> {
        for ((view, process), runs) in views.iter().zip(&processes).zip(&runs) {
            if let Life::Alive(body) = &process.life {
                let (pid, space) = (view.pid, body.pages.own());
                report.page_bytes += memory::copy_out(pid, &body.mappings, runs, space, sink, Way::Direct)?;
            }
        }
        Ok(())
    })?;
    shared.add_segments(root, namespaces.own.iter().any(|kind| kind == "ipc"))?;
    let (shared_objects, bytes) = report.phase("shared memory", |_| shared.store(sink, &mut spaces))?;
    report.page_bytes += bytes;
    let packet_lock = Some(network::left_behind(root));
    let terminals = terminals.finish(&views);
    let vdso = vdso::own()?.map(|own| own.state.clone());
    let session_keyrings = keyrings.finish();
    let mut tree = Tree {
        processes,
        descriptions,
        shared_objects,
        terminals,
        session_keyrings,
        namespaces,
        vdso,
        registers,
        packet_lock,
    };
    report.processes = tree.processes.len();
    report.threads = tree.living().map(|(_, body)| body.threads.len()).sum();
    report.mappings = tree.living().map(|(_, body)| body.mappings.len()).sum();
    report.descriptions = tree.descriptions.len();
    report.phase("state", |_| limosa_image::put(sink, TREE, &tree))?;
    let own_pid_namespace = tree.namespaces.own.iter().any(|kind| kind == "pid");
    remainder.take_mappings(&mut tree.processes);
    remainder.keep(precopy);
    drop(views);
    Ok(Captured { network, frozen, listeners, own_pid_namespace, root, witnesses, remainder })
}

/// Stores memory while the tree runs, if that is how it is to be done, and can be; how it is done then.
fn store_early(
    root: i32,
    sink: &mut dyn Sink,
    options: &Options,
    report: &mut Report,
) -> Result<(Precopy, MemoryMode), CaptureError> {
    let plan = options.memory.clone();
    if plan.mode != Mode::Precopy {
        return Ok((Precopy::default(), plan));
    }
    let mut rounds = Vec::new();
    let stored = report.phase("pre-copy", |_| Precopy::run(root, sink, plan.goal, &mut rounds));
    report.page_bytes += rounds.iter().map(|round| round.bytes).sum::<u64>();
    report.rounds = rounds;
    match stored {
        Ok(precopy) => Ok((precopy, plan)),
        Err(Unavailable::Missing(why)) => Ok((Precopy::default(), plan.but(why))),
        Err(Unavailable::Failed(error)) => Err(error),
    }
}

impl Captured {
    /// The PID in the tree of each living process, by its PID here.
    pub fn own_pids(&self) -> HashMap<i32, i32> {
        let living = self.frozen.processes.iter().filter(|process| !process.threads.is_empty());
        let own = living.filter_map(|process| Some((process.pid, process.proc.status().ok()?.own_pid())));
        own.collect()
    }

    /// Lets the tree run on. What is still to be stored of its memory, while it does, is returned.
    pub fn release(self) -> Result<Remainder, CaptureError> {
        drop(self.network);
        drop(self.listeners);
        self.frozen.release()?;
        Ok(self.remainder)
    }

    /// Ends the tree, which lives on in the checkpoint.
    pub fn end(self) -> Result<(), CaptureError> {
        // A PID namespace ends when all in it have been reaped.
        drop(self.witnesses);
        // Limosa's duplicates keep the sockets open meanwhile, so that no FIN is sent.
        if self.own_pid_namespace {
            self.frozen.end(|_, _| {})?;
        } else {
            // If we are killed from here on, the rest ends, too.
            let _guardian = guard(&self.frozen.living()).unwrap_or_else(|error| {
                // It must end in any case: the checkpoint is complete.
                tracing::warn!(%error, "the source ends without a guardian: do not kill limosa now");
                None
            });
            self.frozen.end(reap_children)?;
        }
        self.network.abandon(&network::left_behind(self.root));
        Ok(())
    }
}

/// A guardian for processes that end one after the other; one process needs none.
fn guard(pids: &[i32]) -> Result<Option<Guardian>, CaptureError> {
    if pids.len() < 2 {
        return Ok(None);
    }
    let mut arena = guardian::arena()?;
    let mut guardian = guardian::Idle::new(&mut arena)?.post(&mut arena, pids)?;
    guardian.is_there(&arena)?;
    Ok(Some(guardian))
}

/// What processes or threads may share beyond what fork(2) and pthread_create(3) make them share.
pub(crate) const SHARING: [(Comparison, &str); 3] = [
    (Comparison::Vm, "address space"),
    (Comparison::Files, "descriptor table"),
    (Comparison::Fs, "working directory and umask"),
];

/// Processes that share what only threads share (clone(2) without `CLONE_THREAD`), and threads that do not share
/// it (unshare(2)), are refused: a restore would quietly make something else of them.
fn refuse_sharing(frozen: &Frozen) -> Result<(), CaptureError> {
    let remedy = "wait until it has called execve, or run it without clone's sharing flags";
    for process in frozen.processes.iter().filter(|process| !process.threads.is_empty()) {
        for (what, name) in SHARING {
            let same =
                |other: i32| Ok::<_, CaptureError>(task::kcmp(process.pid, other, what, 0, 0)?.is_eq());
            if process.parent != 0 && same(process.parent)? {
                let reason = format!("it shares its {name} with its parent {}", process.parent);
                return Err(Refusal::process(process.pid, reason, remedy).into());
            }
            for thread in &process.threads[1..] {
                if !same(*thread)? {
                    let reason = format!("its thread {thread} has a {name} of its own");
                    return Err(
                        Refusal::process(process.pid, reason, "checkpoint it without that thread").into()
                    );
                }
            }
        }
    }
    Ok(())
}

/// What can be seen of every process from outside.
fn views(frozen: &Frozen) -> Result<Vec<ProcessView<'_>>, CaptureError> {
    frozen.processes.iter().map(|process| Ok(ProcessView::look(process.pid, &process.proc)?)).collect()
}

/// What threads are asked for beside what the rooms of attributes do.
struct Beside {
    witnesses: Witnesses,
    keyrings: keyrings::Found,
}

fn ask_all(
    frozen: &Frozen,
    views: &[ProcessView],
    (precopy, spaces): (&Precopy, &mut SpaceAllocator),
    shared: &mut SharedObjects,
    beside: &mut Beside,
) -> Result<Vec<Process>, CaptureError> {
    let own: HashMap<i32, i32> = views.iter().map(|view| (view.pid, view.own_pid)).collect();
    let mut unreported = HashSet::new();
    let mut processes = Vec::with_capacity(views.len());
    for (process, view) in frozen.processes.iter().zip(views) {
        let life = if process.threads.is_empty() {
            Life::Zombie { wait_status: view.stat.exit_code, name: view.stat.comm.clone() }
        } else {
            let children = frozen.processes.iter().filter(|child| child.parent == process.pid);
            let stopped = children.filter(|child| child.job_stopped.is_some());
            let stopped: Vec<i32> = stopped.filter_map(|child| own.get(&child.pid).copied()).collect();
            let space = precopy.space_of(view).unwrap_or_else(|| spaces.next());
            Life::Alive(Box::new(capture_body(
                process,
                view,
                space,
                shared,
                (&stopped, &mut unreported),
                beside,
            )?))
        };
        processes.push(Process {
            pid: view.own_pid,
            parent: own.get(&process.parent).copied().unwrap_or(0),
            process_group: view.status.ns_pgid.last().copied().unwrap_or(0),
            session: view.status.ns_sid.last().copied().unwrap_or(0),
            exit_signal: view.stat.exit_signal,
            life,
        });
    }
    Ok(processes)
}

/// Asks a process and its threads what only they can tell.
fn capture_body(
    process: &FrozenProcess,
    view: &ProcessView,
    space: SpaceId,
    shared: &mut SharedObjects,
    (stopped_children, unreported): (&[i32], &mut HashSet<i32>),
    beside: &mut Beside,
) -> Result<Body, CaptureError> {
    let foreign = ForeignMemory::open(process.pid)?;
    let vdso = locate_vdso(view, &foreign)?;
    for tid in &process.threads {
        step_out_of_stub(*tid, &vdso)?;
        registers::hide_interruption(*tid)?;
    }
    let caught = view.status.signals.caught;
    let mut threads = Vec::with_capacity(process.threads.len());
    let mut state = None;
    for tid in &process.threads {
        let proc = process.proc.task(*tid)?;
        let status = proc.status()?;
        let own_tid = status.own_pid();
        let thread = ThreadView { process: view, tid: *tid, own_tid, proc, status };
        let mut program = Program::new();
        let process_questions = if *tid == process.pid {
            let stops = job_control::ask(stopped_children, &mut program);
            Some((ProcessState::ask(view, &mut program)?, LateState::ask(view, &mut program)?, stops))
        } else {
            None
        };
        let thread_questions = ThreadState::ask(&thread, &mut program)?;
        let restricted = beside.witnesses.ask(&thread, &mut program);
        let keys = beside.keyrings.ask(&thread, &mut program)?;
        let mut visit = Visit::begin(process.pid, *tid, vdso, &foreign, caught, program.size())?;
        let outcome = visit.run(program)?;
        visit.end()?;
        outcome.check().map_err(|source| CaptureError::Question { pid: process.pid, source })?;
        landlock::answer(&thread, restricted, &outcome)?;
        let session_keyring = beside.keyrings.answer(&thread, &keys, &outcome)?;
        if let Some((questions, late, stops)) = &process_questions {
            job_control::answers(stops, &outcome, unreported);
            let late = LateState::capture(view, late, &outcome)?;
            state = Some((ProcessState::capture(view, questions, &outcome)?, late));
        }
        threads.push(Thread {
            tid: own_tid,
            session_keyring,
            state: ThreadState::capture(&thread, &thread_questions, &outcome)?,
        });
    }
    keyrings::refuse_own(process.pid, &threads)?;
    let (mut state, late) = state.ok_or(CaptureError::Ended { pid: process.pid })?;
    state.address_space.capture_deleted(view, shared)?;
    Ok(Body {
        pages: Pages::Own(space),
        huge_pages: Vec::new(),
        mappings: MappingState::capture_all(view, shared)?,
        descriptors: Vec::new(),
        threads,
        stopped: process.job_stopped,
        stop_unreported: unreported.contains(&view.own_pid),
        locks: Vec::new(),
        state,
        late,
        vdso: vdso::Adaptation::default(),
    })
}

/// Finds out which descriptors share an open file description, and captures each description once.
fn capture_descriptors(
    views: &[ProcessView],
    processes: &mut [Process],
    sink: &mut dyn Sink,
    spaces: &mut SpaceAllocator,
    shared: &mut SharedObjects,
    options: &Options,
    came_later: bool,
) -> Result<(Vec<Description>, Network, Terminals), CaptureError> {
    let mut found: Vec<DescriptionView> = Vec::new();
    let mut by_inode: HashMap<(u64, u64), Vec<usize>> = HashMap::new();
    let mut by_number = HashMap::new();
    for (view, process) in views.iter().zip(processes.iter_mut()) {
        let Life::Alive(body) = &mut process.life else { continue };
        let pidfd = task::pidfd_open(view.pid)?;
        let mut unclear = Vec::new();
        for number in view.proc.fds()? {
            let descriptor = task::pidfd_getfd(&pidfd, number)?;
            let stat = rustix::fs::fstat(&descriptor)
                .map_err(CaptureError::io("fstat of a descriptor", view.pid))?;
            let info = view.proc.fdinfo(number)?;
            let close_on_exec = info.flags & libc::O_CLOEXEC as u32 != 0;
            if close_on_exec && keeps_close_on_exec(&descriptor, view)? {
                unclear.push(body.descriptors.len());
            }
            let alike = by_inode.entry((stat.st_dev, stat.st_ino)).or_default();
            let mut same = None;
            for index in alike.iter() {
                let (holder, held) = found[*index].handle();
                if task::kcmp(holder, view.pid, Comparison::File, held, number as u64)?.is_eq() {
                    same = Some(*index);
                    break;
                }
            }
            let here =
                same.is_some_and(|same| body.descriptors.iter().any(|known| known.description == same));
            body.locks.extend(file_locks::capture(view, number, &info, here, same.is_some())?);
            let description = if let Some(index) = same {
                index
            } else {
                alike.push(found.len());
                let link = view.proc.fd_link(number)?;
                let place = Place::Held(number);
                found.push(DescriptionView { process: view, place, link, info, descriptor, stat });
                found.len() - 1
            };
            by_number.insert((view.own_pid, number), description);
            body.descriptors.push(Descriptor { number, description, close_on_exec });
        }
        ask_close_on_exec(view, body, &unclear)?;
    }
    let queues = flight::gather(&mut found)?;
    let own_pids: HashMap<i32, i32> = views.iter().map(|view| (view.pid, view.own_pid)).collect();
    file_locks::refuse_outsiders(&found, &own_pids.keys().copied().collect())?;
    let mut network = Network::look(views[0].pid, &found, options)?;
    network.came_later = came_later;
    network.sees_all_in_flight = true;
    network.peers = peers::ask(&found, &own_pids)?;
    let mut context = CaptureContext::new(
        sink,
        spaces,
        &by_number,
        &found,
        &own_pids,
        shared,
        &options.externals,
        &mut network,
        queues,
    );
    context.terminals.kept = options.kept_terminal;
    let descriptions = found
        .iter()
        .map(|view| {
            refuse_owner_in_flight(view)?;
            Ok(Description {
                flags: view.info.flags & !(libc::O_CLOEXEC as u32),
                owner: owner(view, &own_pids),
                locks: if view.number().is_none() { file_locks::in_flight(view)? } else { Vec::new() },
                state: DescriptorState::capture(view, &mut context)?,
            })
        })
        .collect::<Result<_, CaptureError>>()?;
    let terminals = std::mem::take(&mut context.terminals);
    Ok((descriptions, network, terminals))
}

/// Whether the open file description itself has `O_CLOEXEC`, as the slave of a terminal has that was opened with it by
/// `TIOCGPTPEER`: /proc/PID/fdinfo then shows it for descriptors that are not closed on exec, too.
fn keeps_close_on_exec(descriptor: &OwnedFd, view: &ProcessView) -> Result<bool, CaptureError> {
    let flags = rustix::fs::fcntl_getfl(descriptor).map_err(CaptureError::io("fcntl(F_GETFL)", view.pid))?;
    Ok(flags.contains(rustix::fs::OFlags::CLOEXEC))
}

/// Asks the process itself which of the `unclear` descriptors are closed on exec.
fn ask_close_on_exec(view: &ProcessView, body: &mut Body, unclear: &[usize]) -> Result<(), CaptureError> {
    if unclear.is_empty() {
        return Ok(());
    }
    let mut program = Program::new();
    let mut calls = Vec::with_capacity(unclear.len());
    for index in unclear {
        let number = body.descriptors[*index].number;
        let arguments = [number.into(), libc::F_GETFD.into()];
        calls.push(program.call("ask for a descriptor's flags", libc::SYS_fcntl, arguments));
    }
    let question = |source| CaptureError::Question { pid: view.pid, source };
    let outcome = run_inside(view, program)?;
    for (index, call) in unclear.iter().zip(calls) {
        let flags = outcome.result(call).map_err(question)?;
        body.descriptors[*index].close_on_exec = flags & libc::FD_CLOEXEC as u64 != 0;
    }
    Ok(())
}

/// Refuses a description that is only in flight and sends signals: the process that sets whom it sends them to must
/// hold it, because the kernel notes the user of that process, who must be allowed to.
pub(crate) fn refuse_owner_in_flight(view: &DescriptionView) -> Result<(), CaptureError> {
    if view.number().is_none() && task::descriptor_owner(&view.descriptor).is_some() {
        let reason = "it sends signals (F_SETOWN), and is only in flight, so that no process could have that set again";
        return Err(view.refuse(reason, "let the process receive it, and try again").into());
    }
    Ok(())
}

/// Who gets the signals of a description (`F_SETOWN_EX`), by the ID that the processes see.
fn owner(view: &DescriptionView, own_pids: &HashMap<i32, i32>) -> Option<(i32, i32, i32)> {
    const F_OWNER_TID: i32 = 0;
    let (kind, id, signal) = task::descriptor_owner(&view.descriptor)?;
    let own = match own_pids.get(&id) {
        Some(own) => *own,
        None if kind == F_OWNER_TID => {
            // A thread's directory can be opened by its number alone.
            let status = limosa_kernel::proc::ProcDir::open(id).and_then(|proc| proc.status()).ok()?;
            *status.ns_pid.last()?
        }
        // Outside the tree; the same number only where the tree sees the numbers that Limosa sees.
        None => (view.process.pid == view.process.own_pid).then_some(id)?,
    };
    Some((kind, own, signal))
}

/// Has a frozen process reap children that have ended, by the PIDs that it knows them by.
pub(crate) fn reap_inside(parent: &ProcessView, children: &[i32]) -> Result<(), CaptureError> {
    let mut program = Program::new();
    for child in children {
        let arguments = [(*child).into(), 0.into(), (libc::__WALL | libc::WNOHANG).into(), 0.into()];
        program.try_call("reap a child", libc::SYS_wait4, arguments);
    }
    run_inside(parent, program).map(drop)
}

/// Has a frozen parent reap children that have just been ended: process 1 may be slow to do it.
fn reap_children(parent: i32, children: &[i32]) {
    let reap = || -> Result<(), CaptureError> {
        let proc = ProcDir::open(parent)?;
        let own = |child: &i32| {
            let status = ProcDir::open(*child).and_then(|proc| proc.status());
            status.map_or(*child, |status| status.own_pid())
        };
        reap_inside(&ProcessView::glance(parent, &proc)?, &children.iter().map(own).collect::<Vec<_>>())
    };
    if let Err(error) = reap() {
        tracing::debug!(parent, %error, "its children are left to process 1");
    }
}
