//! `limosa restore`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use limosa_engine::{Report, Times, restore};
use limosa_image::Checkpoint;
use serde::Serialize;

use crate::context::{Context, Outcome};
use crate::text;
use crate::trace::Trace;

/// Start again what a checkpoint holds.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa restore /var/tmp/ck\n  \
    limosa restore /var/tmp/ck --detach --pidfile /run/ck.pid\n  \
    limosa restore /var/tmp/ck --external log=/var/log/job.log\n  \
    limosa restore /var/tmp/ck --explain | less")]
pub struct Restore {
    /// The checkpoint's directory.
    dir: PathBuf,

    /// The container's name here, if it is to be another one.
    #[arg(long)]
    name: Option<limosa_container::Name>,

    /// Return when the tree runs; otherwise wait and pass on its exit status.
    #[arg(long)]
    detach: bool,

    /// Write the root's PID to FILE.
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,

    /// The directory that becomes the tree's root.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Where the file is that the checkpoint calls KEY. May be given several times.
    #[arg(long, value_name = "KEY=PATH", value_parser = super::key_and_path)]
    external: Vec<(String, PathBuf)>,

    /// Print what would be done, down to each system call in the new processes, and do nothing.
    #[arg(long)]
    explain: bool,

    #[command(flatten)]
    trace: Trace,
}

/// The report of a restore.
#[derive(Debug, Serialize)]
struct Done {
    pid: i32,
    #[serde(flatten)]
    times: Times,
    #[serde(flatten)]
    report: Report,
}

impl Restore {
    /// Restores.
    pub fn execute(self, context: &Context) -> Outcome {
        self.trace.prepare()?;
        let mut report = Report::default();
        let checkpoint = report.phase("open", |_| Checkpoint::open(&self.dir))?;
        if self.explain {
            return explain(context, &checkpoint);
        }
        if limosa_container::holds_container(&checkpoint) {
            return self.container(context, &checkpoint, report);
        }
        let options = restore::Options {
            root: self.root.clone(),
            detached: self.detach,
            externals: self.external.iter().cloned().collect(),
            ..restore::Options::default()
        };
        let planned = report.phase("plan", |_| restore::Planned::new(&checkpoint, options))?;
        let loaded = planned.build(&mut report)?;
        if let Some(path) = &self.pidfile {
            std::fs::write(path, format!("{}\n", loaded.root()))
                .with_context(|| format!("writing {}", path.display()))?;
        }
        let started = loaded.start(&mut report)?;
        self.conclude(context, started.root, report)
    }

    fn container(self, context: &Context, checkpoint: &Checkpoint, mut report: Report) -> Outcome {
        if self.root.is_some() || !self.external.is_empty() {
            let error = anyhow::anyhow!("--root and --external are for process trees; this is a container");
            return Err(error.into());
        }
        let registry = context.registry();
        let prepared = limosa_container::prepare(&registry, checkpoint, self.name.clone(), &mut report)?;
        let restored = prepared.start(&registry, &mut report)?;
        if let Some(path) = &self.pidfile {
            std::fs::write(path, format!("{}\n", restored.pid))
                .with_context(|| format!("writing {}", path.display()))?;
        }
        self.conclude(context, restored.pid, report)
    }

    /// Reports, and waits for the root's end if that is wanted.
    fn conclude(self, context: &Context, root: i32, report: Report) -> Outcome {
        self.trace.write(&report);
        let whole_us = report.elapsed_us();
        let times = Times {
            first_instruction_us: report.end_us("start"),
            last_page_us: report.last_page_us(),
            whole_us,
            ..Times::default()
        };
        let done = Done { pid: root, times, report };
        let text = format!(
            "process {} runs: {} processes, {} threads, {} of memory\n{}",
            done.pid,
            done.report.processes,
            done.report.threads,
            text::size(done.report.page_bytes),
            text::times(&done.times, &done.report, context.verbose),
        );
        context.report(&done, text)?;
        if self.detach {
            return Ok(ExitCode::SUCCESS);
        }
        wait_for(root)
    }
}

/// Prints the plan.
fn explain(context: &Context, checkpoint: &Checkpoint) -> Outcome {
    let plan = restore::Planned::new(checkpoint, restore::Options::default())?.explain()?;
    context.report(&plan, &plan)?;
    Ok(ExitCode::SUCCESS)
}

/// Waits for the root and passes on its exit status; 128 + N if signal N ended it.
fn wait_for(pid: i32) -> Outcome {
    use limosa_kernel::ptrace::{WaitStatus, wait};
    loop {
        match wait(pid)? {
            WaitStatus::Exited(status) => return Ok(ExitCode::from(status as u8)),
            WaitStatus::Killed(signal) => return Ok(ExitCode::from(128 + signal as u8)),
            WaitStatus::Stopped { .. } => {}
        }
    }
}
