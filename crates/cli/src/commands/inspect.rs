//! `limosa inspect` and `limosa verify`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use limosa_container::Config;
use limosa_engine::resources::processor;
use limosa_engine::summary::{ProcessSummary, TreeSummary, printable};
use limosa_image::{Checkpoint, Description, VerifyReport};
use serde::Serialize;

use crate::context::{Context, Outcome};
use crate::text;

/// Show what a checkpoint holds.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa inspect /var/tmp/ck\n  \
    limosa inspect /var/tmp/ck --json | jq '.tree.processes[].name'")]
pub struct Inspect {
    /// The checkpoint's directory.
    dir: PathBuf,
}

/// The report of `inspect`.
#[derive(Debug, Serialize)]
struct Inspected {
    checkpoint: Description,
    container: Option<Config>,
    tree: TreeSummary,
    /// Which of the features that the checkpoint needs this processor lacks.
    missing_cpu_features: Vec<String>,
}

impl Inspect {
    /// Shows it.
    pub fn execute(self, context: &Context) -> Outcome {
        let checkpoint = Checkpoint::open(&self.dir)?;
        let container = limosa_container::container_state(&checkpoint)?.map(|state| state.config);
        let tree = TreeSummary::read(&checkpoint)?;
        let missing_cpu_features = processor::missing(&checkpoint.manifest().meta.cpu_features)?;
        let inspected =
            Inspected { checkpoint: checkpoint.describe(), container, tree, missing_cpu_features };
        context.report(&inspected, inspected.text())?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Inspected {
    /// `79 features, of which this one lacks amx_tile`
    fn processor(&self) -> String {
        let count = self.checkpoint.meta.cpu_features.len();
        match self.missing_cpu_features.as_slice() {
            [] => format!("{count} features, all of which this one has"),
            missing => format!("{count} features, of which this one lacks {}", processor::names(missing)),
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<12}{value}");
        };
        let (checkpoint, tree) = (&self.checkpoint, &self.tree);
        let meta = &checkpoint.meta;
        line("checkpoint", meta.id.to_string());
        let kernel = printable(meta.kernel.as_bytes());
        let made = text::age(meta.created / 1000);
        line("made", format!("{made} ago on Linux {kernel}, format {}", checkpoint.format_version));
        if let Some(parent) = &meta.parent {
            line("parent", parent.to_string());
        }
        if let Some(config) = &self.container {
            line("container", container(config));
        }
        if !tree.namespaces.is_empty() {
            let host = tree.host_name.as_ref().map_or_else(String::new, |name| format!("; host name {name}"));
            line("namespaces", format!("{}{host}", tree.namespaces.join(", ")));
        }
        line("registers", registers(tree));
        line("processor", self.processor());
        line("size", sizes(checkpoint));
        line("files open", kinds(tree.descriptions.iter().map(|(kind, count)| (*kind, *count))));
        if tree.shared_objects > 0 {
            line("shared", format!("{} objects of {}", tree.shared_objects, text::size(tree.shared_bytes)));
        }
        text.push('\n');
        text + &processes(&tree.processes)
    }
}

/// `avx, avx512f`
fn registers(tree: &TreeSummary) -> String {
    let mut names: Vec<&str> = tree.registers.iter().map(|need| need.feature).collect();
    names.dedup();
    if names.is_empty() { "any processor's".into() } else { format!("in use of {}", names.join(", ")) }
}

fn container(config: &Config) -> String {
    let mut text = format!("{}: {}", config.name, printable(config.command.join(" ").as_bytes()));
    if let Some(network) = &config.network {
        let addresses: Vec<String> = network.addresses.iter().map(ToString::to_string).collect();
        let _ = write!(text, "; {} on {}", addresses.join(", "), printable(network.bridge.as_bytes()));
    }
    if let Some(memory) = config.memory {
        let _ = write!(text, "; at most {} of memory", text::size(memory));
    }
    text
}

fn sizes(checkpoint: &Description) -> String {
    let pages = checkpoint.spaces.iter().fold(0_u64, |sum, space| sum.saturating_add(space.bytes));
    let state = checkpoint.sections.iter().fold(0_u64, |sum, section| sum.saturating_add(section.bytes));
    let blobs = checkpoint.blobs.iter().fold(0_u64, |sum, blob| sum.saturating_add(blob.bytes));
    let [all, pages, state, blobs] = [checkpoint.bytes, pages, state, blobs].map(text::size);
    format!("{all}: {pages} of pages, {state} of state, {blobs} of files")
}

/// `2 pipe, 1 tcp`
fn kinds<'a>(counts: impl Iterator<Item = (&'a str, usize)>) -> String {
    let list: Vec<String> = counts.map(|(kind, count)| format!("{count} {kind}")).collect();
    if list.is_empty() { "none".into() } else { list.join(", ") }
}

/// A line for each process, drawn as a tree.
fn processes(processes: &[ProcessSummary]) -> String {
    let mut children: BTreeMap<i32, Vec<&ProcessSummary>> = BTreeMap::new();
    for process in processes.iter().skip(1) {
        children.entry(process.parent).or_default().push(process);
    }
    let header = ["PROCESS", "GROUP", "SESSION", "STATE", "THREADS", "MAPPED", "STORED", "DESCRIPTORS"];
    let mut rows = vec![header.map(str::to_owned)];
    // Each with what is drawn before it, and before its children.
    let mut stack: Vec<(&ProcessSummary, String, String)> =
        processes.first().map(|root| (root, String::new(), String::new())).into_iter().collect();
    while let Some((process, branch, indent)) = stack.pop() {
        rows.push(row(process, &branch));
        // Taken out: a damaged list of parents must not lead in circles.
        let below = children.remove(&process.pid).unwrap_or_default();
        let last = below.len().saturating_sub(1);
        for (index, child) in below.into_iter().enumerate().rev() {
            let (branch, further) = if index == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            stack.push((child, format!("{indent}{branch}"), format!("{indent}{further}")));
        }
    }
    text::table(&rows)
}

fn row(process: &ProcessSummary, branch: &str) -> [String; 8] {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for descriptor in &process.descriptors {
        *counts.entry(descriptor.kind).or_default() += 1;
    }
    [
        format!("{branch}{} {}", process.pid, process.name),
        process.process_group.to_string(),
        process.session.to_string(),
        process.state.to_owned(),
        process.threads.len().to_string(),
        text::size(process.memory.mapped),
        text::size(process.memory.stored),
        kinds(counts.into_iter()),
    ]
}

/// Read all of a checkpoint and compare it with its checksums.
///
/// Says which file is damaged and where; the exit status is 1 then.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa verify /var/tmp/ck\n  limosa verify /var/tmp/ck --json")]
pub struct Verify {
    /// The checkpoint's directory.
    dir: PathBuf,
}

/// The report of `verify`.
#[derive(Debug, Serialize)]
struct Verified {
    checkpoint: PathBuf,
    #[serde(flatten)]
    report: VerifyReport,
}

impl Verify {
    /// Verifies it.
    pub fn execute(self, context: &Context) -> Outcome {
        let report = limosa_image::verify(&self.dir)
            .map_err(|error| anyhow::Error::new(error).context(self.dir.display().to_string()))?;
        let (files, size) = (report.files, text::size(report.bytes));
        let text = format!("{}: whole, {files} files, {size}\n", self.dir.display());
        context.report(&Verified { checkpoint: self.dir, report }, text)?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_engine::summary::MemorySummary;

    fn process(pid: i32, parent: i32) -> ProcessSummary {
        ProcessSummary {
            pid,
            parent,
            process_group: 1,
            session: 1,
            name: "p".into(),
            state: "running",
            threads: vec![pid],
            descriptors: Vec::new(),
            memory: MemorySummary::default(),
        }
    }

    #[test]
    fn processes_are_drawn_below_their_parents() {
        let text = processes(&[process(1, 0), process(2, 1), process(3, 2), process(4, 1)]);
        let first: Vec<&str> =
            text.lines().skip(1).map(|line| line.split("  ").next().unwrap_or("")).collect();
        assert_eq!(first, ["1 p", "├─ 2 p", "│", "└─ 4 p"]);
    }

    #[test]
    fn circles_end() {
        assert_eq!(processes(&[process(1, 2), process(2, 1), process(1, 1)]).lines().count(), 4);
    }
}
