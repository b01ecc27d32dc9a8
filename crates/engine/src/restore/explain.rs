//! The plan of a restore as text: `limosa restore --explain`.
//!
//! The programs are built by the functions that a restore uses. Not known before it happens are addresses in the arena,
//! which are left out.

use std::collections::HashSet;
use std::fmt::Write;

use limosa_puppet::Program;

use super::build::{Finishing, final_program, mapping_program, missing, settlement};
use super::heritage::Heritage;
use super::{Planned, births, load};
use crate::error::RestoreError;
use crate::plan::{Role, Step};
use crate::state::{Life, Tree};
use crate::summary::printable;

impl Planned<'_> {
    /// What [`Self::build`] would do, for a person: processes, objects, and each puppet's programs.
    pub fn explain(&self) -> Result<String, RestoreError> {
        let mut text = String::new();
        self.explain_processes(&mut text);
        explain_objects(&self.tree, &mut text);
        let socket_number = births::planned_socket_number(&self.tree);
        let mut held = HashSet::new();
        let heritage = Heritage::new(&self.tree, &self.plan);
        for (node, planned) in self.plan.nodes.iter().enumerate() {
            let family = births::Family {
                tree: &self.tree,
                plan: &self.plan,
                heritage: &heritage,
                checkpoint: self.checkpoint,
            };
            let cradle = |_| births::Cradle::default();
            let first = family.first_program(node, cradle, socket_number);
            section(&mut text, planned.pid, "is born", &first.to_string());
            if heritage.of(node).waits() {
                explain_reading(
                    planned.pid,
                    &load::stored(self.checkpoint, &heritage.of(node).loads),
                    socket_number,
                    &mut text,
                );
                let mut program = Program::new();
                family.add_steps(node, cradle, socket_number, &mut program);
                section(&mut text, planned.pid, "has what it shares, and makes others", &program.to_string());
            }
            let Role::Process(index) = planned.role else { continue };
            let process = &self.tree.processes[index];
            let Life::Alive(body) = &process.life else { continue };
            let trust = heritage.of(node);
            let (mappings, _) = mapping_program(process, body, self.checkpoint, socket_number, trust);
            section(&mut text, planned.pid, "makes its mappings", &mappings.to_string());
            explain_reading(planned.pid, &missing(trust, body, self.checkpoint), socket_number, &mut text);
            let mut threads = Vec::new();
            let kept = settlement(trust, body, self.checkpoint).unwrap_or_default().kept;
            let mut finishing = Finishing { kept, held: &mut held, socket_number };
            let last =
                final_program(&self.tree, (process, body), self.checkpoint, &mut finishing, |tid, own| {
                    threads.push((tid, own.to_string()));
                    Ok(births::Cradle::default())
                })?;
            section(&mut text, planned.pid, "gets its descriptors and attributes", &last.to_string());
            for (tid, own) in threads {
                let _ =
                    writeln!(text, "\nthread {tid} of process {} sets what is its own:\n{own}", planned.pid);
            }
        }
        Ok(text)
    }

    fn explain_processes(&self, text: &mut String) {
        text.push_str("processes, in the order of the checkpoint:\n");
        for node in &self.plan.nodes {
            let what = match node.role {
                Role::Ghost => "stands in for an ended leader, and ends before the tree runs".to_owned(),
                Role::Process(index) => match &self.tree.processes[index].life {
                    Life::Zombie { wait_status, .. } => format!("ends at once with status {wait_status:#x}"),
                    Life::Alive(body) => {
                        let name = body.threads.first().map(|leader| printable(&leader.state.name.0));
                        format!("{}, {} threads", name.unwrap_or_default(), body.threads.len())
                    }
                },
            };
            let pid = |node: &usize| self.plan.nodes[*node].pid;
            let steps: Vec<String> = node
                .steps
                .iter()
                .map(|step| match step {
                    Step::OwnSession => "leads a session".to_owned(),
                    Step::OwnGroup => "leads a group".to_owned(),
                    Step::Child(child) => format!("makes {}", pid(child)),
                    Step::Sibling(sibling) => format!("makes its sibling {}", pid(sibling)),
                })
                .collect();
            let _ = writeln!(text, "  {:>7}  {what}; {}", node.pid, steps.join(", "));
        }
    }
}

fn explain_objects(tree: &Tree, text: &mut String) {
    text.push_str("\nobjects, made once by Limosa and given to their holders:\n");
    for (index, object) in tree.shared_objects.iter().enumerate() {
        let _ = writeln!(text, "  shared memory {index}: {} bytes", object.size);
    }
    for (index, description) in tree.descriptions.iter().enumerate() {
        let holders = tree.living().flat_map(|(process, body)| {
            let held = body.descriptors.iter().filter(move |descriptor| descriptor.description == index);
            held.map(|descriptor| format!("{}:{}", process.pid, descriptor.number))
        });
        let holders = holders.collect::<Vec<_>>().join(" ");
        let _ = writeln!(text, "  description {index}: {}, held as {holders}", description.state.kind());
    }
}

fn explain_reading(pid: i32, parts: &[load::Part], socket_number: i32, text: &mut String) {
    for program in load::programs(parts, socket_number) {
        section(text, pid, "reads pages", &program.to_string());
    }
}

fn section(text: &mut String, pid: i32, what: &str, program: &str) {
    let _ = writeln!(text, "\nprocess {pid} {what}:\n{program}");
}
