//! Building: mappings, pages, descriptors and attributes, by two programs for each process.
//!
//! The first makes the mappings, writable, so that Limosa can fill them. The second gives them their final form,
//! places the descriptors, sets everything a process has one of, makes the threads, and lets each set what is its
//! own, credentials last.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};

use limosa_image::Checkpoint;
use limosa_puppet::{Birth, Program, Running};

use super::births::{Cradle, add_clone, slave_number};
use super::descriptors::{self, Objects};
use super::heritage::{self, Settlement, Trust};
use super::{Nursery, huge_pages, is_alive, load};
use crate::error::RestoreError;
use crate::memory;
use crate::plan::Role;
use crate::report::Report;
use crate::resources::context::Holder;
use crate::resources::mapping::Backing;
use crate::resources::{keyrings, segments, vdso};
use crate::state::{Body, Life, Process, Tree};

const CLONE_THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;

/// Builds everything in all puppets.
pub(crate) fn build_all(
    tree: &Tree,
    checkpoint: &Checkpoint,
    nursery: &mut Nursery,
    mut objects: Objects,
    report: &mut Report,
) -> Result<(), RestoreError> {
    report.phase("mappings", |_| -> Result<(), RestoreError> {
        for (index, process) in tree.processes.iter().enumerate() {
            match &process.life {
                Life::Alive(body) => make_mappings(index, process, body, checkpoint, nursery, &mut objects)?,
                Life::Zombie { .. } => join_group(index, process, nursery)?,
            }
        }
        Ok(())
    })?;
    report.phase("ghosts and zombies", |_| lay_to_rest(tree, nursery))?;
    report.phase("memory", |report| -> Result<(), RestoreError> {
        for (index, process) in tree.processes.iter().enumerate() {
            if let Life::Alive(body) = &process.life {
                let parts = missing(nursery.heritage.of(index), body, checkpoint);
                report.page_bytes += load::load(nursery, index, checkpoint, &parts)?;
                let pid = nursery.puppets[index].pid();
                for (address, bytes) in &body.vdso.patches {
                    limosa_kernel::memory::write(pid, *address, bytes)?;
                }
            }
        }
        Ok(())
    })?;
    super::start::seize_leaders(tree, nursery)?;
    report.phase("attributes", |_| -> Result<(), RestoreError> {
        for (index, process) in tree.processes.iter().enumerate() {
            if let Life::Alive(body) = &process.life {
                complete(index, tree, body, checkpoint, nursery, &mut objects)?;
            }
        }
        Ok(())
    })
}

/// What a process that shares pages with others keeps of what it is born with, and gets; or one that does not need all.
pub(super) fn settlement(trust: &Trust, body: &Body, checkpoint: &Checkpoint) -> Option<Settlement> {
    let alone = trust.is_empty() && body.pages.inherited().is_empty() && body.vdso.left_out.is_none();
    (!alone).then(|| trust.settle(body, checkpoint))
}

/// The pages that a process is not born with.
pub(super) fn missing<'a>(trust: &Trust, body: &Body, checkpoint: &'a Checkpoint) -> Vec<load::Part<'a>> {
    match settlement(trust, body, checkpoint) {
        None => load::whole(checkpoint, body.pages.own()),
        Some(settlement) => load::stored(checkpoint, &settlement.missing),
    }
}

fn set_group(program: &mut Program, process: &Process) {
    // Leaders have made their groups; a group outside the tree is inherited from the controller.
    if process.process_group != process.pid && process.process_group != 0 {
        let arguments = [0.into(), process.process_group.into()];
        program.try_call("join the process group", libc::SYS_setpgid, arguments);
    }
}

fn join_group(index: usize, process: &Process, nursery: &mut Nursery) -> Result<(), RestoreError> {
    let mut program = Program::new();
    set_group(&mut program, process);
    let (puppet, arena) = nursery.puppet(index);
    puppet.run(arena, program)?;
    Ok(())
}

/// The files and objects that a process maps: each is received once, and the n-th has the number n.
struct Mapped<'a> {
    /// In the order in which they are received.
    distinct: Vec<&'a Backing>,
    /// For each mapping, the number of its own.
    numbers: Vec<Option<i32>>,
}

impl<'a> Mapped<'a> {
    fn of(body: &'a Body) -> Self {
        let mut distinct: Vec<&Backing> = Vec::new();
        let mut numbers = Vec::with_capacity(body.mappings.len());
        for mapping in &body.mappings {
            let number = match &mapping.backing {
                Backing::Anonymous | Backing::SystemV(_) | Backing::SystemVPart(_) | Backing::Vdso(_) => None,
                backing => {
                    let known = distinct.iter().rposition(|other| same_object(other, backing));
                    Some(known.unwrap_or_else(|| {
                        distinct.push(backing);
                        distinct.len() - 1
                    }) as i32)
                }
            };
            numbers.push(number);
        }
        Self { distinct, numbers }
    }
}

/// The program that makes the mappings, and the files and objects it receives, followed by the deleted executable
/// if there is one.
pub(super) fn mapping_program(
    process: &Process,
    body: &Body,
    checkpoint: &Checkpoint,
    socket_number: i32,
    trust: &Trust,
) -> (Program, usize) {
    let mapped = Mapped::of(body);
    let executable = body.state.address_space.deleted_executable;
    let received = mapped.distinct.len() + usize::from(executable.is_some());
    let mut program = Program::new();
    set_group(&mut program, process);
    descriptors::receive(&mut program, socket_number, received);
    let settlement = settlement(trust, body, checkpoint).unwrap_or_default();
    body.state.protection_keys.take(&mut program);
    trust.apply(&settlement, body, &mut program);
    // Checked when the checkpoint was read.
    for attachment in segments::attachments(&body.mappings).unwrap_or_default() {
        attachment.make(&mut program);
    }
    for (index, (mapping, number)) in body.mappings.iter().zip(mapped.numbers).enumerate() {
        if settlement.kept.get(index) == Some(&true) {
            continue;
        }
        mapping.map(&mut program, number, memory::fills(checkpoint, body, mapping));
    }
    if !body.huge_pages.is_empty() {
        let all = || memory::stored(checkpoint, &heritage::whole(body.pages.own()));
        let missing = if settlement.kept.is_empty() { all() } else { settlement.missing };
        huge_pages::make(&huge_pages::of(body, &missing, &settlement.kept), &mut program);
    }
    if executable.is_some() {
        body.state.address_space.set_executable(received as i32 - 1, &mut program);
    }
    if received > 0 {
        let arguments = [0.into(), (socket_number - 1).into(), 0.into()];
        program.call("close mapped files", libc::SYS_close_range, arguments);
    }
    (program, received)
}

fn make_mappings(
    index: usize,
    process: &Process,
    body: &Body,
    checkpoint: &Checkpoint,
    nursery: &mut Nursery,
    objects: &mut Objects,
) -> Result<(), RestoreError> {
    let trust = nursery.heritage.of(index);
    let (program, received) = mapping_program(process, body, checkpoint, nursery.socket_number, trust);
    let duplicate = |descriptor: BorrowedFd, what: &str| {
        descriptor.try_clone_to_owned().map_err(|source| RestoreError::Rebuild {
            object: format!("{what} of process {}", process.pid),
            step: "dup",
            source,
        })
    };
    let mut sent = Vec::with_capacity(received);
    for backing in Mapped::of(body).distinct {
        let descriptor = objects
            .for_mapping(backing)?
            .ok_or_else(|| RestoreError::inconsistent("a mapping of an object that does not exist"))?;
        sent.push(duplicate(descriptor, "a mapping")?);
    }
    if let Some(object) = body.state.address_space.deleted_executable {
        let descriptor = objects
            .shared
            .get(object)
            .ok_or_else(|| RestoreError::inconsistent(format!("there is no shared object {object}")))?;
        sent.push(duplicate(descriptor.as_fd(), "the executable")?);
    }
    let borrowed: Vec<BorrowedFd> = sent.iter().map(AsFd::as_fd).collect();
    descriptors::send(&nursery.socket, &borrowed)?;
    let (puppet, arena) = nursery.puppet(index);
    puppet.run(arena, program)?;
    if body.vdso.is_needed() {
        vdso::check_place(puppet.pid(), &body.mappings)?;
    }
    Ok(())
}

fn same_object(a: &Backing, b: &Backing) -> bool {
    match (a, b) {
        (
            Backing::SharedMemory(a, _) | Backing::PrivateView(a, _),
            Backing::SharedMemory(b, _) | Backing::PrivateView(b, _),
        ) => a == b,
        (Backing::File(a), Backing::File(b)) => a.path == b.path && a.writable == b.writable,
        _ => false,
    }
}

/// Ghosts and zombies end, now that all groups have their members; ghosts are reaped by their parents.
fn lay_to_rest(tree: &Tree, nursery: &mut Nursery) -> Result<(), RestoreError> {
    let mut reapers: Vec<(usize, i32)> = Vec::new();
    for node in 0..nursery.puppets.len() {
        let (status, parent) = match nursery.roles[node] {
            (Role::Process(index), _) => match &tree.processes[index].life {
                Life::Zombie { wait_status, .. } => (*wait_status, None),
                Life::Alive(_) => continue,
            },
            (Role::Ghost, parent) => (0, parent),
        };
        let mut program = Program::new();
        end_with(&mut program, status);
        let pid = nursery.puppets[node].pid();
        let (puppet, arena) = nursery.puppet(node);
        // Nobody answers: the program is the puppet's last.
        let _ = puppet.start(arena, program)?;
        wait_for_end(pid)?;
        nursery.ended.push(node);
        if let Some(parent) = parent {
            reapers.push((parent, nursery.own_pids[node]));
        }
    }
    for (parent, ghost) in reapers {
        let mut program = Program::new();
        let arguments = [ghost.into(), 0.into(), libc::__WALL.into(), 0.into()];
        program.call("reap a stand-in", libc::SYS_wait4, arguments);
        let (puppet, arena) = nursery.puppet(parent);
        puppet.run(arena, program)?;
    }
    Ok(())
}

/// Adds the calls that end the process so that its parent sees `status`.
fn end_with(program: &mut Program, status: i32) {
    let signal = status & 0x7f;
    if signal != 0 {
        let none = program.words(&[0, 0]);
        let arguments = [0.into(), libc::RLIMIT_CORE.into(), none.into(), 0.into()];
        program.try_call("leave no core file", libc::SYS_prlimit64, arguments);
        let mask = program.words(&[0]);
        let pid = program.call("ask for the process id", libc::SYS_getpid, []);
        program.call("end by a signal", libc::SYS_kill, [pid.into(), signal.into()]);
        let arguments = [libc::SIG_SETMASK.into(), mask.into(), 0.into(), 8.into()];
        program.call("let the signal through", libc::SYS_rt_sigprocmask, arguments);
    }
    program.call("end", libc::SYS_exit_group, [(status >> 8 & 0xff).into()]);
}

fn wait_for_end(pid: i32) -> Result<(), RestoreError> {
    use limosa_kernel::proc::{ProcDir, TaskState};
    let started = std::time::Instant::now();
    loop {
        match ProcDir::open(pid).and_then(|proc| proc.stat()) {
            Ok(stat) if stat.state != TaskState::Zombie => {}
            Ok(_) => return Ok(()),
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        if started.elapsed() > std::time::Duration::from_secs(10) {
            return Err(RestoreError::inconsistent(format!("stand-in {pid} does not end")));
        }
        std::thread::yield_now();
    }
}

/// What the second program of a process needs beyond the tree's state.
pub(super) struct Finishing<'a> {
    /// For each mapping, whether the process was born with it.
    pub(super) kept: Vec<bool>,
    /// Descriptions that a process has already, which did what is to be done once.
    pub(super) held: &'a mut HashSet<usize>,
    /// Whether the process has joined a session keyring: its place in the tree.
    pub(super) joined: Option<usize>,
    /// The number of the socket that descriptors come over.
    pub(super) socket_number: i32,
}

/// The second program of a living process. `deliver` gets the first program of each further thread, and says where it is.
pub(super) fn final_program(
    tree: &Tree,
    (process, body): (&Process, &Body),
    checkpoint: &Checkpoint,
    finishing: &mut Finishing,
    mut deliver: impl FnMut(i32, Program) -> Result<Cradle, RestoreError>,
) -> Result<Program, RestoreError> {
    let mut program = Program::new();
    for (at, mapping) in body.mappings.iter().enumerate() {
        let kept = finishing.kept.get(at) == Some(&true);
        mapping.finish(&mut program, kept || memory::fills(checkpoint, body, mapping));
    }
    descriptors::place(&mut program, finishing.socket_number, &body.descriptors);
    let first_held: Vec<_> =
        body.descriptors.iter().filter(|descriptor| finishing.held.insert(descriptor.description)).collect();
    for descriptor in &first_held {
        let holder = Holder { number: descriptor.number, descriptors: &body.descriptors };
        tree.descriptions[descriptor.description].state.complete(&holder, &mut program);
    }
    let socket_number = finishing.socket_number;
    if let Some((at, group)) = foreground(tree, process.pid) {
        let (slave, group) = (slave_number(socket_number, at), program.words(&[group as u64]));
        // The group may have ended with nobody left to wait for it.
        let arguments = [slave.into(), libc::TIOCSPGRP.into(), group.into()];
        program.try_call("set the terminal's foreground group", libc::SYS_ioctl, arguments);
    }
    let last = slave_number(socket_number, tree.terminals.len()) - 1;
    let arguments = [socket_number.into(), last.into(), 0.into()];
    program.call("close the socket and the terminals", libc::SYS_close_range, arguments);
    forget_children(&mut program);
    body.state.rebuild(&mut program);
    for thread in &body.threads[1..] {
        let mut own = Program::new();
        thread.state.rebuild(&mut own);
        let cradle = deliver(thread.tid, own)?;
        add_clone(&mut program, cradle, CLONE_THREAD_FLAGS, 0, thread.tid);
    }
    for descriptor in first_held {
        if let Some(owner) = tree.descriptions[descriptor.description].owner {
            descriptors::set_owner(descriptor.number, owner, &mut program);
        }
    }
    for lock in &body.locks {
        lock.rebuild(&mut program);
    }
    body.late.rebuild(&mut program);
    body.threads[0].state.rebuild(&mut program);
    if let Some(index) = finishing.joined {
        keyrings::link(tree, index, &mut program);
    }
    for mapping in &body.mappings {
        mapping.lock_up(&mut program);
        mapping.seal(&mut program);
    }
    Ok(program)
}

/// Has a living process run its second program.
fn complete(
    index: usize,
    tree: &Tree,
    body: &Body,
    checkpoint: &Checkpoint,
    nursery: &mut Nursery,
    objects: &mut Objects,
) -> Result<(), RestoreError> {
    let mut threads: Vec<Birth> = Vec::with_capacity(body.threads.len() - 1);
    let kept = settlement(nursery.heritage.of(index), body, checkpoint).unwrap_or_default().kept;
    let joined = nursery.joining[index].then_some(index);
    let socket_number = nursery.socket_number;
    let mut finishing = Finishing { kept, held: &mut objects.held, joined, socket_number };
    let arena = &mut nursery.arena;
    let program =
        final_program(tree, (&tree.processes[index], body), checkpoint, &mut finishing, |_, own| {
            let birth = Birth::new(arena, own)?;
            let cradle = Cradle::from(&birth);
            threads.push(birth);
            Ok(cradle)
        })?;
    let given: Vec<BorrowedFd> = body
        .descriptors
        .iter()
        .map(|descriptor| objects.descriptions[descriptor.description].as_fd())
        .collect();
    descriptors::send(&nursery.socket, &given)?;
    let (puppet, arena) = nursery.puppet(index);
    puppet.run(arena, program)?;
    let leader = puppet.pid();
    let running: Vec<_> = threads.into_iter().map(|birth| birth.born(leader)).collect();
    for (thread, running) in running {
        finish_thread(&thread, &nursery.arena, running)?;
    }
    debug_assert!(is_alive(tree, index));
    Ok(())
}

/// The terminal that a session's leader controls, and the group in its foreground.
fn foreground(tree: &Tree, leader: i32) -> Option<(usize, i32)> {
    let at = tree.terminals.iter().position(|terminal| terminal.session == Some(leader))?;
    Some((at, tree.terminals[at].foreground?))
}

fn finish_thread(
    thread: &limosa_puppet::Resident,
    arena: &limosa_puppet::Arena,
    running: Running,
) -> Result<(), RestoreError> {
    thread.finish(arena, running)?;
    Ok(())
}

/// Takes back the `SIGCHLD` that stand-ins and zombies caused: what was pending is queued again by its room.
fn forget_children(program: &mut Program) {
    let set = program.words(&[1 << (libc::SIGCHLD - 1)]);
    let now = program.words(&[0, 0]);
    let arguments = [set.into(), 0.into(), now.into(), 8.into()];
    program.try_call("forget the ends of stand-ins", libc::SYS_rt_sigtimedwait, arguments);
}
