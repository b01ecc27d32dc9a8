//! The plan of a restore as data and as text: `limosa restore --explain` (`docs/explain.md`).
//!
//! The programs are built by the functions that a restore uses. Not known before it happens are addresses in the arena,
//! which are left out.

use std::collections::{BTreeSet, HashSet};
use std::fmt;

use limosa_puppet::{Program, ShownCall};
use serde::Serialize;

use super::build::{Finishing, final_program, mapping_program, missing, settlement};
use super::heritage::Heritage;
use super::{Planned, births, load};
use crate::error::RestoreError;
use crate::plan::{Node, Role, Step};
use crate::resources::keyrings;
use crate::state::{Life, Tree};
use crate::summary::printable;

/// What a restore would do.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The processes, in the order of the checkpoint.
    pub processes: Vec<Newborn>,
    /// Memory objects, made once by Limosa and given to their holders.
    pub shared_memory: Vec<SharedMemory>,
    /// Open file descriptions, likewise.
    pub descriptions: Vec<Description>,
    /// What runs in the new processes, process by process.
    pub programs: Vec<Section>,
}

/// A process that is made.
#[derive(Debug, Serialize)]
pub struct Newborn {
    /// Its PID, as the tree sees it.
    pub pid: i32,
    /// What becomes of it.
    #[serde(flatten)]
    pub fate: Fate,
    /// What it does before anything else, in this order.
    pub steps: Vec<Birth>,
}

/// What becomes of a process that is made.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fate {
    /// It runs.
    Process {
        /// The name of its first thread.
        name: String,
        /// How many threads it has.
        threads: usize,
    },
    /// It ends at once, and is not reaped.
    Zombie {
        /// As wait(2) will give it.
        wait_status: i32,
    },
    /// It stands in for an ended leader, and ends before the tree runs.
    Ghost,
}

/// A step of a process towards its family.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Birth {
    /// It leads a session.
    OwnSession,
    /// It leads a process group.
    OwnGroup,
    /// It makes the process with this PID as its child.
    Child(i32),
    /// It makes the process with this PID as a child of its parent.
    Sibling(i32),
}

/// A memory object.
#[derive(Debug, Serialize)]
pub struct SharedMemory {
    /// Its size.
    pub bytes: u64,
}

/// An open file description.
#[derive(Debug, Serialize)]
pub struct Description {
    /// The kind of object that it refers to.
    pub kind: &'static str,
    /// The descriptors of it.
    pub holders: Vec<Holder>,
    /// The descriptions of the unix sockets in whose queues it is in flight, by index.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub in_flight_in: Vec<usize>,
}

/// A descriptor.
#[derive(Debug, Serialize)]
pub struct Holder {
    /// The process that has it.
    pub pid: i32,
    /// Its number there.
    pub descriptor: i32,
}

/// A program, and whose it is.
#[derive(Debug, Serialize)]
pub struct Section {
    /// The process.
    pub pid: i32,
    /// The thread, if it is not the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread: Option<i32>,
    /// What happens in it.
    pub what: &'static str,
    /// Its system calls, in this order.
    pub calls: Vec<ShownCall>,
}

impl Section {
    fn new(pid: i32, what: &'static str, program: &Program) -> Self {
        Self { pid, thread: None, what, calls: program.shown().collect() }
    }
}

impl Planned<'_> {
    /// What [`Self::build`] would do: processes, objects, and each puppet's programs.
    pub fn explain(&self) -> Result<Explanation, RestoreError> {
        let mut programs = Vec::new();
        let socket_number = births::planned_socket_number(&self.tree);
        let mut held = HashSet::new();
        let heritage = Heritage::new(&self.tree, &self.plan);
        let joining = keyrings::joining(&self.tree, &self.plan, limosa_kernel::keyring::has_session());
        for (node, planned) in self.plan.nodes.iter().enumerate() {
            let family = births::Family {
                tree: &self.tree,
                plan: &self.plan,
                heritage: &heritage,
                checkpoint: self.checkpoint,
                joining: &joining,
            };
            let cradle = |_| births::Cradle::default();
            let first = family.first_program(node, cradle, socket_number);
            programs.push(Section::new(planned.pid, "is born", &first));
            if heritage.of(node).waits() {
                let parts = load::stored(self.checkpoint, &heritage.of(node).loads);
                programs.extend(reading(planned.pid, &parts, socket_number));
                let mut program = Program::new();
                family.add_steps(node, cradle, socket_number, &mut program);
                programs.push(Section::new(planned.pid, "has what it shares, and makes others", &program));
            }
            let Role::Process(index) = planned.role else { continue };
            let process = &self.tree.processes[index];
            let Life::Alive(body) = &process.life else { continue };
            let trust = heritage.of(node);
            let (mappings, _) = mapping_program(process, body, self.checkpoint, socket_number, trust);
            programs.push(Section::new(planned.pid, "makes its mappings", &mappings));
            programs.extend(reading(planned.pid, &missing(trust, body, self.checkpoint), socket_number));
            let mut threads = Vec::new();
            let kept = settlement(trust, body, self.checkpoint).unwrap_or_default().kept;
            let joined = joining[node].then_some(index);
            let mut finishing = Finishing { kept, held: &mut held, joined, socket_number };
            let last =
                final_program(&self.tree, (process, body), self.checkpoint, &mut finishing, |tid, own| {
                    let section = Section::new(planned.pid, "sets what is its own", &own);
                    threads.push(Section { thread: Some(tid), ..section });
                    Ok(births::Cradle::default())
                })?;
            programs.push(Section::new(planned.pid, "gets its descriptors and attributes", &last));
            programs.append(&mut threads);
        }
        let processes = self.plan.nodes.iter().map(|node| self.newborn(node)).collect();
        let shared = self.tree.shared_objects.iter();
        let shared_memory = shared.map(|object| SharedMemory { bytes: object.size }).collect();
        Ok(Explanation { processes, shared_memory, descriptions: descriptions(&self.tree), programs })
    }

    fn newborn(&self, node: &Node) -> Newborn {
        let fate = match node.role {
            Role::Ghost => Fate::Ghost,
            Role::Process(index) => match &self.tree.processes[index].life {
                Life::Zombie { wait_status, .. } => Fate::Zombie { wait_status: *wait_status },
                Life::Alive(body) => {
                    let name = body.threads.first().map(|leader| printable(&leader.state.name.0));
                    Fate::Process { name: name.unwrap_or_default(), threads: body.threads.len() }
                }
            },
        };
        let pid = |node: &usize| self.plan.nodes[*node].pid;
        let step = |step: &Step| match step {
            Step::OwnSession => Birth::OwnSession,
            Step::OwnGroup => Birth::OwnGroup,
            Step::Child(child) => Birth::Child(pid(child)),
            Step::Sibling(sibling) => Birth::Sibling(pid(sibling)),
        };
        Newborn { pid: node.pid, fate, steps: node.steps.iter().map(step).collect() }
    }
}

fn descriptions(tree: &Tree) -> Vec<Description> {
    let holders = |index| {
        let all = tree.living().flat_map(move |(process, body)| {
            let held = body.descriptors.iter().filter(move |descriptor| descriptor.description == index);
            held.map(|descriptor| Holder { pid: process.pid, descriptor: descriptor.number })
        });
        all.collect()
    };
    let mut carriers = vec![BTreeSet::new(); tree.descriptions.len()];
    for (carrier, description) in tree.descriptions.iter().enumerate() {
        for right in description.state.in_flight() {
            // It exists: the checkpoint has been checked.
            carriers[right].insert(carrier);
        }
    }
    let all = tree.descriptions.iter().enumerate().zip(carriers);
    all.map(|((index, description), carriers)| Description {
        kind: description.state.kind(),
        holders: holders(index),
        in_flight_in: carriers.into_iter().collect(),
    })
    .collect()
}

fn reading(pid: i32, parts: &[load::Part], socket_number: i32) -> Vec<Section> {
    let programs = load::programs(parts, socket_number);
    programs.map(|program| Section::new(pid, "reads pages", &program)).collect()
}

impl fmt::Display for Explanation {
    /// For a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "processes, in the order of the checkpoint:")?;
        for Newborn { pid, fate, steps } in &self.processes {
            let steps: Vec<String> = steps.iter().map(ToString::to_string).collect();
            writeln!(f, "  {pid:>7}  {fate}; {}", steps.join(", "))?;
        }
        writeln!(f, "\nobjects, made once by Limosa and given to their holders:")?;
        for (index, SharedMemory { bytes }) in self.shared_memory.iter().enumerate() {
            writeln!(f, "  shared memory {index}: {bytes} bytes")?;
        }
        for (index, Description { kind, holders, in_flight_in }) in self.descriptions.iter().enumerate() {
            let holders: Vec<String> =
                holders.iter().map(|Holder { pid, descriptor }| format!("{pid}:{descriptor}")).collect();
            let carriers: Vec<String> =
                in_flight_in.iter().map(|carrier| format!(" in flight in {carrier}")).collect();
            let held =
                if holders.is_empty() { String::new() } else { format!(" held as {}", holders.join(" ")) };
            writeln!(f, "  description {index}: {kind},{held}{}", carriers.concat())?;
        }
        for Section { pid, thread, what, calls } in &self.programs {
            match thread {
                None => writeln!(f, "\nprocess {pid} {what}:")?,
                Some(tid) => writeln!(f, "\nthread {tid} of process {pid} {what}:")?,
            }
            for (index, call) in calls.iter().enumerate() {
                writeln!(f, "{index:5}  {call}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { name, threads } => write!(f, "{name}, {threads} threads"),
            Self::Zombie { wait_status } => write!(f, "ends at once with status {wait_status:#x}"),
            Self::Ghost => write!(f, "stands in for an ended leader, and ends before the tree runs"),
        }
    }
}

impl fmt::Display for Birth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnSession => write!(f, "leads a session"),
            Self::OwnGroup => write!(f, "leads a group"),
            Self::Child(pid) => write!(f, "makes {pid}"),
            Self::Sibling(pid) => write!(f, "makes its sibling {pid}"),
        }
    }
}
