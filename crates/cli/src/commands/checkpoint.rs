//! `limosa checkpoint`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use limosa_container::{CapturedContainer, Name, Source};
use limosa_engine::checkpoint::Captured;
use limosa_engine::{Report, checkpoint};
use limosa_image::{CheckpointWriter, Committed, Meta};
use serde::Serialize;

use crate::context::{Context, Outcome};

/// What to checkpoint.
#[derive(Clone, Debug)]
pub enum Target {
    /// The process tree rooted at this PID.
    Pid(i32),
    /// The container of this name.
    Name(Name),
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("pid:") {
            Some(number) => match number.parse() {
                Ok(pid) if pid > 0 => Ok(Self::Pid(pid)),
                _ => anyhow::bail!("'{number}' is not a process ID"),
            },
            None => Ok(Self::Name(text.parse()?)),
        }
    }
}

/// Save a running container or process tree to a directory.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa checkpoint pid:1234 --out /var/tmp/ck\n  \
    limosa checkpoint web --out /var/tmp/web.1 --leave-running")]
pub struct Checkpoint {
    /// NAME of a container, or pid:N for the process tree rooted at N.
    target: Target,

    /// The directory to make; it must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Let the source go on instead of ending it.
    #[arg(long)]
    leave_running: bool,
}

/// The report of a checkpoint.
#[derive(Debug, Serialize)]
struct Done {
    checkpoint: PathBuf,
    id: String,
    bytes: u64,
    /// Microseconds during which the tree did not run, until it was released or ended.
    freeze_us: u64,
    /// Microseconds from the start until the checkpoint was complete on disk.
    durable_us: u64,
    #[serde(flatten)]
    report: Report,
}

impl Checkpoint {
    /// Makes the checkpoint.
    pub fn execute(self, context: &Context) -> Outcome {
        let mut report = Report::default();
        let writer = CheckpointWriter::create(&self.out)?;
        let (committed, freeze_us) = match &self.target {
            Target::Pid(pid) => self.process_tree(*pid, writer, &mut report)?,
            Target::Name(name) => self.container(context, name, writer, &mut report)?,
        };
        let done = Done {
            checkpoint: committed.path.clone(),
            id: committed.id.to_string(),
            bytes: committed.bytes,
            freeze_us,
            durable_us: report.elapsed_us(),
            report,
        };
        let text = format!(
            "{}: {} processes, {} threads, {:.1} MiB; frozen {:.1} ms, durable after {:.1} ms\n",
            done.checkpoint.display(),
            done.report.processes,
            done.report.threads,
            done.bytes as f64 / 1_048_576.0,
            done.freeze_us as f64 / 1000.0,
            done.durable_us as f64 / 1000.0,
        );
        context.report(&done, text)?;
        Ok(ExitCode::SUCCESS)
    }

    fn process_tree(
        &self,
        root: i32,
        mut writer: CheckpointWriter,
        report: &mut Report,
    ) -> anyhow::Result<(Committed, u64)> {
        let captured = checkpoint::capture(root, &mut writer, &checkpoint::Options::default(), report)?;
        self.conclude(writer, captured, report, Captured::release, Captured::end)
    }

    fn container(
        &self,
        context: &Context,
        name: &Name,
        mut writer: CheckpointWriter,
        report: &mut Report,
    ) -> anyhow::Result<(Committed, u64)> {
        let registry = context.registry();
        let source = Source::find(&registry, name)?;
        let captured = source.capture(&registry, &mut writer, report)?;
        self.conclude(writer, captured, report, CapturedContainer::release, |captured| {
            captured.end(&registry)
        })
    }

    /// Makes the checkpoint durable, and lets the source run on (then it need not wait for the disk) or ends it.
    /// Returns what was committed, and microseconds from the start until the source ran on or had ended.
    fn conclude<C, E: std::error::Error + Send + Sync + 'static>(
        &self,
        writer: CheckpointWriter,
        captured: C,
        report: &mut Report,
        release: impl FnOnce(C) -> Result<(), E>,
        end: impl FnOnce(C) -> Result<(), E>,
    ) -> anyhow::Result<(Committed, u64)> {
        let meta = Meta::new(kernel_release(), Vec::new());
        if self.leave_running {
            release(captured)?;
            let freeze_us = report.elapsed_us();
            return Ok((report.phase("commit", |_| writer.commit(meta))?, freeze_us));
        }
        let committed = report.phase("commit", |_| writer.commit(meta))?;
        report.phase("end", |_| end(captured))?;
        Ok((committed, report.elapsed_us()))
    }
}

/// The running kernel's release, for the manifest.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
