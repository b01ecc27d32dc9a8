//! Births: the whole tree makes itself, by the first programs of its puppets.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd};

use limosa_image::Checkpoint;
use limosa_kernel::proc::ProcDir;
use limosa_puppet::{Arena, Birth, CallId, Program, Resident, Running};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::heritage::Heritage;
use super::{ARENA_SIZE, Nursery, Place, load};
use crate::error::RestoreError;
use crate::guardian;
use crate::plan::{NodeId, Plan, Role, Step};
use crate::resources::terminal::Rebuilt;
use crate::resources::{keyrings, segments, signal_handlers};
use crate::state::{Life, Tree};

const CLONE_ARGS_SIZE: usize = 88;
const CLONE_PARENT: u64 = 0x8000;

/// `struct clone_args` (clone3(2)) with a chosen PID.
pub(crate) fn clone_arguments(
    program: &mut Program,
    flags: u64,
    exit_signal: i32,
    pid: i32,
) -> limosa_puppet::Data {
    let set_tid = program.words(&[pid as u64]);
    let arguments = program.words(&[flags, 0, 0, 0, exit_signal as u64, 0, 0, 0, 0, 1, 0]);
    program.point(arguments, 64, set_tid);
    arguments
}

/// Where a child finds its mailbox and its first program: addresses in the arena.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cradle {
    mailbox: u64,
    program: u64,
}

impl From<&Birth> for Cradle {
    fn from(birth: &Birth) -> Self {
        Self { mailbox: birth.mailbox(), program: birth.program() }
    }
}

/// Adds the birth of the child in `cradle` to `program`.
pub(crate) fn add_clone(program: &mut Program, cradle: Cradle, flags: u64, exit_signal: i32, pid: i32) {
    let arguments = clone_arguments(program, flags, exit_signal, pid);
    program.clone3("make a process or thread", arguments, CLONE_ARGS_SIZE, cradle.mailbox, cradle.program);
}

/// Makes all processes of the plan as puppets: seized or not, they die with their parents until they are started.
///
/// Every puppet has the slaves of all terminals, so that leaders of sessions can take theirs. Pages that processes share
/// come from `checkpoint` before the births; `loaded` grows by their bytes.
pub(crate) fn give_birth(
    tree: &Tree,
    plan: &Plan,
    place: Option<&Place>,
    terminals: &[Rebuilt],
    checkpoint: &Checkpoint,
    loaded: &mut u64,
) -> Result<Nursery, RestoreError> {
    let was_subreaper = rustix::process::child_subreaper().is_ok_and(|pid| pid.is_some());
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(RestoreError::rebuild("the tree", "prctl(PR_SET_CHILD_SUBREAPER)"))?;
    let mut arena = Arena::new(ARENA_SIZE, |start, end| is_free(tree, start, end))?;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(RestoreError::rebuild("the tree", "socketpair"))?;
    let socket_number = socket_number(tree)?;
    let mut births: HashMap<NodeId, Birth> = HashMap::new();
    let heritage = Heritage::new(tree, plan);
    let joining = keyrings::joining(tree, plan, limosa_kernel::keyring::has_session());
    let family = Family { tree, plan, heritage: &heritage, checkpoint, joining: &joining };
    let order = plan.makers_last();
    // What those that wait for pages do once they have them.
    let mut later: HashMap<NodeId, Program> = HashMap::new();
    for node in &order {
        let cradle = |child| Cradle::from(&births[&child]);
        let program = family.first_program(*node, cradle, socket_number);
        if heritage.of(*node).waits() {
            let mut program = Program::new();
            family.add_steps(*node, cradle, socket_number, &mut program);
            later.insert(*node, program);
        }
        births.insert(*node, Birth::new(&mut arena, program)?);
    }
    let mut midwife = midwife(tree, plan, &mut arena)?;
    let bed = Bed { place, socket: &theirs, socket_number, terminals };
    let delivered = deliver_root(&mut midwife, &mut arena, &births[&0], tree.processes[0].pid, &bed);
    let mut nursery = Nursery {
        arena,
        puppets: Vec::new(),
        socket: ours,
        socket_number,
        roles: plan.nodes.iter().map(|node| (node.role, node.parent)).collect(),
        own_pids: plan.nodes.iter().map(|node| node.pid).collect(),
        born: Vec::new(),
        ended: Vec::new(),
        released: false,
        was_subreaper,
        guardian: Some(midwife.into()),
        heritage,
        joining,
    };
    // The midwife has done its work, whether or not the root could be born. Of a container's tree, all ends with the
    // root; any other tree may need a guardian.
    if place.is_some() || tree.living().nth(1).is_none() {
        nursery.guardian = None;
    }
    let mut running = adopt(plan, births, delivered?, place.is_some(), &mut nursery);
    for node in order.iter().rev() {
        let Some(first) = running.remove(node) else { continue };
        let outcome = nursery.puppets[*node].finish(&nursery.arena, first);
        let failed_in_a_call = matches!(outcome, Err(limosa_puppet::ResidentError::Program { .. }));
        if outcome.is_ok() || failed_in_a_call {
            nursery.born.push(*node);
        }
        outcome.map_err(|error| explain(error, plan))?;
        if let Some(program) = later.remove(node) {
            if place.is_some() {
                identify(&mut nursery, &[*node])?;
            }
            let parts = load::stored(checkpoint, &nursery.heritage.of(*node).loads);
            *loaded += load::load(&mut nursery, *node, checkpoint, &parts)?;
            let (puppet, arena) = nursery.puppet(*node);
            puppet.run(arena, program).map_err(|error| explain(error, plan))?;
        }
    }
    if place.is_some() {
        identify(&mut nursery, &order)?;
    }
    Ok(nursery)
}

/// A bare child whose own PID the tree does not need.
fn midwife(tree: &Tree, plan: &Plan, arena: &mut Arena) -> Result<Resident, RestoreError> {
    let processes = plan.nodes.iter().map(|node| node.pid);
    let threads = tree.living().flat_map(|(_, body)| body.threads.iter().map(|thread| thread.tid));
    let needed: HashSet<i32> = processes.chain(threads).collect();
    loop {
        let midwife = Resident::bare_child(arena)?;
        if !needed.contains(&midwife.pid()) {
            return Ok(midwife);
        }
        // The kernel gives PIDs in turn: the next one is another.
        drop(guardian::Idle::from(midwife));
    }
}

/// Finds out which PIDs the puppets of `nodes` have here, by their PIDs in the tree's own namespace.
fn identify(nursery: &mut Nursery, nodes: &[NodeId]) -> Result<(), RestoreError> {
    let mut found = HashMap::new();
    let mut unvisited = vec![nursery.puppets[0].pid()];
    while let Some(pid) = unvisited.pop() {
        let proc = ProcDir::open(pid)?;
        if let Some(own) = proc.status()?.ns_pid.last() {
            found.insert(*own, pid);
        }
        unvisited.extend(proc.children()?);
    }
    for node in nodes {
        let own = nursery.own_pids[*node];
        let pid = found.get(&own).ok_or_else(|| {
            RestoreError::inconsistent(format!("process {own} was not born below the root"))
        })?;
        nursery.puppets[*node].identify(*pid);
    }
    Ok(())
}

/// In the host's PID namespace every process has the PID that it is to have; in one of the tree's own it is not
/// known yet, and the root's stands for it: with the root, all end.
fn adopt(
    plan: &Plan,
    mut births: HashMap<NodeId, Birth>,
    root: i32,
    nested: bool,
    nursery: &mut Nursery,
) -> HashMap<NodeId, Running> {
    let mut running = HashMap::with_capacity(plan.nodes.len());
    for (node, planned) in plan.nodes.iter().enumerate() {
        if let Some(birth) = births.remove(&node) {
            let (resident, program) = birth.born(if node == 0 || nested { root } else { planned.pid });
            nursery.puppets.push(resident);
            running.insert(node, program);
        }
    }
    running
}

/// A taken PID is the one failure that a user can do something about.
fn explain(error: limosa_puppet::ResidentError, plan: &Plan) -> RestoreError {
    use limosa_puppet::{ProgramError, ResidentError};
    if let ResidentError::Program { pid, source: ProgramError::Call { source, .. } } = &error
        && source.raw_os_error() == Some(libc::EEXIST)
    {
        let maker = plan.nodes.iter().find(|node| node.pid == *pid);
        let made = maker.map(|maker| maker.steps.as_slice()).unwrap_or_default().iter();
        let made = made.filter_map(|step| match step {
            Step::Child(made) | Step::Sibling(made) => Some(plan.nodes[*made].pid),
            Step::OwnSession | Step::OwnGroup => None,
        });
        // Those before it have been born; those behind it are most likely nobody's.
        let exists = |pid: &i32| {
            let pid = rustix::process::Pid::from_raw(*pid);
            pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
        };
        let taken = made.rev().find(exists);
        return RestoreError::PidTaken { pid: taken.unwrap_or(0) };
    }
    error.into()
}

/// Whether no process of the tree has anything at these addresses.
fn is_free(tree: &Tree, start: u64, end: u64) -> bool {
    tree.living()
        .flat_map(|(_, body)| &body.mappings)
        .all(|mapping| mapping.end() <= start || mapping.start >= end)
        // Nor will have for a moment.
        && tree.living().all(|(_, body)| {
            let attachments = segments::attachments(&body.mappings).unwrap_or_default();
            !attachments.iter().any(|attachment| attachment.meets(start, end))
        })
}

/// The highest number of the tree's descriptors and of all temporary ones.
fn highest_number(tree: &Tree) -> i32 {
    tree.living()
        .flat_map(|(_, body)| {
            let last = body.descriptors.last().map_or(0, |descriptor| descriptor.number);
            [last, (body.descriptors.len() + body.mappings.len()) as i32]
        })
        .max()
        .unwrap_or(0)
}

/// A number for the socket above [`highest_number`].
pub(crate) fn planned_socket_number(tree: &Tree) -> i32 {
    highest_number(tree).saturating_add(16)
}

/// [`planned_socket_number`], once the limit of descriptors allows it.
fn socket_number(tree: &Tree) -> Result<i32, RestoreError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let highest = highest_number(tree);
    let socket = planned_socket_number(tree);
    // Terminals follow it.
    let wanted = i64::from(socket) + tree.terminals.len() as i64;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| (current as i64) <= wanted) {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        setrlimit(Resource::Nofile, raised)
            .map_err(RestoreError::rebuild("the tree", "setrlimit(RLIMIT_NOFILE)"))?;
    }
    match getrlimit(Resource::Nofile).current {
        Some(current) if (current as i64) <= wanted => Err(RestoreError::Unsupported {
            what: format!("descriptor {highest}"),
            why: format!("only {current} descriptors are allowed here; raise the limit (ulimit -n)"),
        }),
        _ => Ok(wanted as i32 - tree.terminals.len() as i32),
    }
}

/// Has the kernel end the process with its parent, also one that died already, of which no signal comes any more.
pub(super) fn end_with_the_parent(program: &mut Program, socket_number: i32) {
    program.call(
        "end with the parent",
        libc::SYS_prctl,
        [libc::PR_SET_PDEATHSIG.into(), libc::SIGKILL.into()],
    );
    // A program has no conditions. While the controller lives, looking into its socket gives EAGAIN (or a message of at
    // least 1), with which seccomp fails. Once it is dead the socket is at its end: 0 is SECCOMP_SET_MODE_STRICT, and
    // the next call ends the process.
    let byte = program.space(1);
    let look = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let arguments = [socket_number.into(), byte.into(), 1.into(), look.into(), 0.into(), 0.into()];
    let seen = program.try_call("look whether the controller lives", libc::SYS_recvfrom, arguments);
    program.try_call("end if it does not", libc::SYS_seccomp, [seen.into(), 0.into(), 0.into()]);
}

/// Who is born, how, and with what.
#[derive(Clone, Copy)]
pub(crate) struct Family<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) plan: &'a Plan,
    pub(crate) heritage: &'a Heritage,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) joining: &'a [bool],
}

impl Family<'_> {
    /// The program a node runs first. One that has to wait for pages maps what they lie in, and does the rest later.
    pub(crate) fn first_program(
        &self,
        node: NodeId,
        cradle: impl Fn(NodeId) -> Cradle,
        socket_number: i32,
    ) -> Program {
        let mut program = Program::new();
        end_with_the_parent(&mut program, socket_number);
        if self.joining[node]
            && let Role::Process(index) = self.plan.nodes[node].role
        {
            keyrings::join(self.tree, index, &mut program);
        }
        let trust = self.heritage.of(node);
        if trust.waits() {
            trust.map_new(self.checkpoint, &mut program);
        } else {
            self.add_steps(node, cradle, socket_number, &mut program);
        }
        if let Role::Process(index) = self.plan.nodes[node].role
            && let Life::Zombie { name, .. } = &self.tree.processes[index].life
        {
            crate::resources::name::set(name, &mut program);
        }
        program
    }

    /// Adds what the plan has a node do.
    pub(crate) fn add_steps(
        &self,
        node: NodeId,
        cradle: impl Fn(NodeId) -> Cradle,
        socket_number: i32,
        program: &mut Program,
    ) {
        let (tree, plan) = (self.tree, self.plan);
        let trust = self.heritage.of(node);
        let mut passed_on = Vec::new();
        for step in &plan.nodes[node].steps {
            match step {
                Step::OwnSession => {
                    program.call("lead a session", libc::SYS_setsid, []);
                    let session = Some(plan.nodes[node].pid);
                    // Before any child is made, which inherits it.
                    if let Some(at) = tree.terminals.iter().position(|terminal| terminal.session == session) {
                        let slave = slave_number(socket_number, at);
                        let arguments = [slave.into(), libc::TIOCSCTTY.into(), 0.into()];
                        program.call("take the controlling terminal", libc::SYS_ioctl, arguments);
                    }
                }
                Step::OwnGroup => {
                    program.call("lead a process group", libc::SYS_setpgid, [0.into(), 0.into()]);
                }
                Step::Child(child) => {
                    let exit_signal = match plan.nodes[*child].role {
                        Role::Process(index) => tree.processes[index].exit_signal,
                        Role::Ghost => libc::SIGCHLD,
                    };
                    trust.pass_on(self.heritage.of(*child), &mut passed_on, program);
                    add_clone(program, cradle(*child), 0, exit_signal, plan.nodes[*child].pid);
                }
                Step::Sibling(sibling) => {
                    trust.pass_on(self.heritage.of(*sibling), &mut passed_on, program);
                    // The kernel takes a sibling's exit signal from its maker.
                    add_clone(program, cradle(*sibling), CLONE_PARENT, 0, plan.nodes[*sibling].pid);
                }
            }
        }
    }
}

/// Where and with what the root is born.
struct Bed<'a> {
    place: Option<&'a Place>,
    socket: &'a OwnedFd,
    socket_number: i32,
    terminals: &'a [Rebuilt],
}

/// The number that the slave of a terminal has in every puppet.
pub(crate) fn slave_number(socket_number: i32, terminal: usize) -> i32 {
    socket_number + 1 + terminal as i32
}

/// Adds the calls that put the slaves of terminals behind the socket. The numbers may be those of other descriptors
/// of Limosa's, the slaves themselves among them: so each moves far away first.
fn take_slaves(program: &mut Program, bed: &Bed) -> Vec<Option<CallId>> {
    let free = slave_number(bed.socket_number, bed.terminals.len());
    let mut away = |rebuilt: &Rebuilt| {
        let slave = rebuilt.slave.as_ref()?;
        let arguments = [slave.as_raw_fd().into(), libc::F_DUPFD.into(), free.into()];
        Some(program.call("keep a terminal", libc::SYS_fcntl, arguments))
    };
    bed.terminals.iter().map(&mut away).collect()
}

/// Has the midwife give birth to the root, as a child of ours.
fn deliver_root(
    midwife: &mut Resident,
    arena: &mut Arena,
    root: &Birth,
    pid: i32,
    bed: &Bed,
) -> Result<i32, RestoreError> {
    let mut program = Program::new();
    signal_handlers::reset_all(&mut program);
    let mut flags = CLONE_PARENT;
    if let Some(place) = bed.place {
        for procs in &place.cgroups {
            let zero = program.bytes(b"0");
            let arguments = [procs.as_raw_fd().into(), zero.into(), 1.into()];
            program.call("join a control group", libc::SYS_write, arguments);
        }
        for (kind, namespace) in &place.namespaces {
            let arguments = [namespace.as_raw_fd().into(), kind.clone_flag().into()];
            program.call("enter a namespace", libc::SYS_setns, arguments);
        }
        flags |= libc::CLONE_NEWPID as u64;
    }
    // Standard input, output and error are the controller's: nothing of it is to stay in the tree.
    let number = bed.socket_number;
    let keep = number as u64;
    let slaves = take_slaves(&mut program, bed);
    program.call("take the socket", libc::SYS_dup3, [bed.socket.as_raw_fd().into(), number.into(), 0.into()]);
    program.call(
        "close the controller's descriptors",
        libc::SYS_close_range,
        [0.into(), (keep - 1).into(), 0.into()],
    );
    for (at, slave) in slaves.into_iter().enumerate() {
        let number = slave_number(number, at);
        match slave {
            Some(slave) => {
                program.call("take a terminal", libc::SYS_dup3, [slave.into(), number.into(), 0.into()]);
            }
            None => {
                program.try_call("close the controller's descriptors", libc::SYS_close, [number.into()]);
            }
        }
    }
    let above = [slave_number(number, bed.terminals.len()).into(), u64::from(u32::MAX).into(), 0.into()];
    program.call("close the controller's descriptors", libc::SYS_close_range, above);
    let arguments = clone_arguments(&mut program, flags, 0, pid);
    let call =
        program.clone3("make the root process", arguments, CLONE_ARGS_SIZE, root.mailbox(), root.program());
    match midwife.run(arena, program) {
        Ok(outcome) => Ok(outcome.result(call).map_or(0, |pid| pid as i32)),
        Err(limosa_puppet::ResidentError::Program {
            source: limosa_puppet::ProgramError::Call { purpose: "make the root process", source, .. },
            ..
        }) if source.raw_os_error() == Some(libc::EEXIST) => Err(RestoreError::PidTaken { pid }),
        Err(error) => Err(error.into()),
    }
}
