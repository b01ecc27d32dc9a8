//! `limosa checkpoint`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use limosa_container::{CapturedContainer, Name};
use limosa_engine::checkpoint::Captured;
use limosa_engine::resources::processor;
use limosa_engine::twin::Remainder;
use limosa_engine::{MemoryMode, Mode, Refusals, Report, Times, checkpoint, preflight};
use limosa_image::{CheckpointWriter, Committed, Meta};
use limosa_kernel::signals::Signals;
use serde::Serialize;

use crate::commands::carrying::Carrying;
use crate::commands::posted::Posted;
use crate::context::{Context, Failure, Outcome};
use crate::text;
use crate::trace::Trace;
use crate::watched::{self, Watched};

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
    limosa checkpoint web --out /var/tmp/web.1 --leave-running\n  \
    limosa checkpoint web --out /var/tmp/web.2 --leave-running --mode precopy\n  \
    limosa checkpoint pid:1234 --out /var/tmp/ck --external tty=/dev/pts/5\n  \
    limosa checkpoint pid:1234 --out /var/tmp/ck --external log=/var/log/job.log --trace /tmp/trace.json")]
pub struct Checkpoint {
    /// NAME of a container, or pid:N for the process tree rooted at N.
    target: Target,

    /// The directory to make; it must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Let the source go on instead of ending it.
    #[arg(long)]
    leave_running: bool,

    /// How memory is stored: while the source is frozen (stop); while it runs on, from a copy that it makes of itself by
    /// fork (twin; only with --leave-running); or before it is frozen, in rounds, but for what it writes last (precopy).
    /// What is best if it is not given; the report says what was done, and why.
    #[arg(long, value_enum, value_name = "MODE")]
    mode: Option<HowStored>,

    #[command(flatten)]
    carrying: Carrying,

    #[command(flatten)]
    trace: Trace,
}

/// The values of `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HowStored {
    /// The source is frozen until everything is stored.
    Stop,
    /// The source is frozen while it forks.
    Twin,
    /// The source is frozen for what it wrote last.
    Precopy,
}

impl From<HowStored> for Mode {
    fn from(how: HowStored) -> Self {
        match how {
            HowStored::Stop => Self::Stop,
            HowStored::Twin => Self::Twin,
            HowStored::Precopy => Self::Precopy,
        }
    }
}

/// The report of a checkpoint.
#[derive(Debug, Serialize)]
struct Done {
    checkpoint: PathBuf,
    id: String,
    bytes: u64,
    #[serde(flatten)]
    times: Times,
    #[serde(flatten)]
    report: Report,
}

/// A checkpoint that is being written.
struct Writing {
    writer: CheckpointWriter,
    signals: Option<&'static Signals>,
    meta: Meta,
}

impl Writing {
    fn watched(&mut self) -> Watched<'_> {
        Watched::new(&mut self.writer, self.signals)
    }
}

impl Checkpoint {
    /// Makes the checkpoint.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("checkpoint", 1)?;
        if self.mode == Some(HowStored::Twin) && !self.leave_running {
            let why =
                "--mode twin lets the source run on while its memory is stored: use it with --leave-running";
            return Err(anyhow::anyhow!(why).into());
        }
        self.trace.prepare()?;
        let mut report = Report::default();
        let (committed, ran_on_us) = match &self.target {
            Target::Pid(pid) => self.process_tree(context, *pid, &mut report)?,
            Target::Name(name) => self.container(context, name, &mut report)?,
        };
        self.trace.write(&report);
        let frozen_at = report.start_us("freeze");
        let times = Times {
            freeze_us: frozen_at.map(|at| ran_on_us.saturating_sub(at)),
            durable_us: report.end_us("commit"),
            first_instruction_us: self.leave_running.then_some(ran_on_us),
            last_page_us: report.last_page_us(),
            whole_us: report.elapsed_us(),
        };
        let done = Done {
            checkpoint: committed.path.clone(),
            id: committed.id.to_string(),
            bytes: committed.bytes,
            times,
            report,
        };
        let text = format!(
            "{}: {} processes, {} threads, {}\n{}{}",
            done.checkpoint.display(),
            done.report.processes,
            done.report.threads,
            text::size(done.bytes),
            text::memory(&done.report),
            text::times(&done.times, &done.report, context.verbose),
        );
        context.report(&done, text)?;
        Ok(ExitCode::SUCCESS)
    }

    fn memory(&self, root: i32) -> MemoryMode {
        MemoryMode::choose(self.mode.map(Into::into), root, self.leave_running)
    }

    /// Begins to write, before anything is frozen.
    fn begin(&self) -> anyhow::Result<Writing> {
        let signals = watched::hold_back();
        let meta = Meta::new(kernel_release(), processor::features()?);
        let writer = CheckpointWriter::create(&self.out)
            .with_context(|| format!("cannot make the checkpoint {}", self.out.display()))?;
        Ok(Writing { writer, signals, meta })
    }

    fn process_tree(
        &self,
        context: &Context,
        root: i32,
        report: &mut Report,
    ) -> Result<(Committed, u64), Failure> {
        if !Path::new(&format!("/proc/{root}")).exists() {
            return Err(anyhow::anyhow!("there is no process {root}").into());
        }
        let memory = self.memory(root);
        let guarded = memory.mode == Mode::Twin;
        let leaves_running = self.leave_running;
        let options = checkpoint::Options { leaves_running, memory, ..self.carrying.of_process_tree()? };
        Refusals::check(report.phase("pre-flight", |_| preflight::look(root, &options))?)?;
        let _guard = guarded.then(|| Posted::over_tree(context, root)).transpose()?;
        let mut writing = self.begin()?;
        let mut watched = writing.watched();
        let captured = checkpoint::capture(root, &mut watched, &options, report);
        let captured = watched.conclude(captured)?;
        self.conclude(writing, captured, report, Captured::release, Captured::end)
    }

    fn container(
        &self,
        context: &Context,
        name: &Name,
        report: &mut Report,
    ) -> Result<(Committed, u64), Failure> {
        let registry = context.registry();
        let source = self.carrying.of_container(&registry, name)?.running_on(self.leave_running);
        report.phase("pre-flight", |_| source.refuse_early(&registry))?;
        let memory = self.memory(source.pid());
        let source = source.stored(memory);
        let _guard = Posted::new(context, Some(name))?;
        let mut writing = self.begin()?;
        let mut watched = writing.watched();
        let captured = source.capture(&registry, &mut watched, report);
        let captured = watched.conclude(captured)?;
        self.conclude(writing, captured, report, CapturedContainer::release, |captured| {
            let fate = format!("it was saved to {}", self.out.display());
            captured.end(&registry, &fate)
        })
    }

    /// Makes the checkpoint durable, and lets the source run on (then it need not wait for the rest of its memory, nor for
    /// the disk) or ends it.
    /// Returns what was committed, and microseconds from the start until the source ran on or had ended.
    fn conclude<C, E: std::error::Error + Send + Sync + 'static>(
        &self,
        mut writing: Writing,
        captured: C,
        report: &mut Report,
        release: impl FnOnce(C) -> Result<Remainder, E>,
        end: impl FnOnce(C) -> Result<(), E>,
    ) -> Result<(Committed, u64), Failure> {
        if self.leave_running {
            let mut remainder = release(captured)?;
            let ran_on_us = report.elapsed_us();
            let mut watched = writing.watched();
            let copied = remainder.copy_out(&mut watched, report);
            watched.conclude(copied)?;
            drop(remainder);
            return Ok((report.phase("commit", |_| writing.writer.commit(writing.meta))?, ran_on_us));
        }
        let committed = report.phase("commit", |_| writing.writer.commit(writing.meta))?;
        report.phase("end", |_| end(captured))?;
        Ok((committed, report.elapsed_us()))
    }
}

/// The running kernel's release, for the manifest.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
