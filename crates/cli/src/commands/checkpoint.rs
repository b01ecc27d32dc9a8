//! `limosa checkpoint`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context as _;
use clap::Args;
use limosa_engine::{Report, checkpoint};
use limosa_image::{CheckpointWriter, Meta};
use serde::Serialize;

use crate::context::{Context, Outcome};

/// What to checkpoint.
#[derive(Clone, Debug)]
pub enum Target {
    /// The process tree rooted at this PID.
    Pid(i32),
    /// The container of this name.
    Name(limosa_container::Name),
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

impl Target {
    /// The root of the tree, as a PID here.
    pub fn root(&self, context: &Context) -> anyhow::Result<i32> {
        match self {
            Self::Pid(pid) => Ok(*pid),
            Self::Name(name) => {
                let record = context.registry().load(name)?;
                record.running().with_context(|| format!("container {name} does not run"))
            }
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
        let root = self.target.root(context)?;
        let mut report = Report::default();
        let mut writer = CheckpointWriter::create(&self.out)?;
        let captured = checkpoint::capture(root, &mut writer, &checkpoint::Options::default(), &mut report)?;
        let meta = Meta::new(kernel_release(), Vec::new());
        // A source that goes on need not wait for the disk.
        let (committed, freeze_us) = if self.leave_running {
            captured.release()?;
            let freeze_us = report.elapsed_us();
            (report.phase("commit", |_| writer.commit(meta))?, freeze_us)
        } else {
            let committed = report.phase("commit", |_| writer.commit(meta))?;
            report.phase("end", |_| captured.end())?;
            (committed, report.elapsed_us())
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
}

/// The running kernel's release, for the manifest.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
