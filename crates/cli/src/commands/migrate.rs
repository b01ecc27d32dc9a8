//! `limosa migrate` and `limosa receive`.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use limosa_container::migration::{self, Arrivals};
use limosa_container::{Name, Source};
use limosa_engine::checkpoint::TcpConnections;
use limosa_engine::{MemoryMode, Mode, Report, Times};
use limosa_migrate::{
    Address, Connect as _, Limits, ListenOptions, Listener, Outcome as MigrationOutcome, Received, Store,
    Transport,
};
use serde::Serialize;

use crate::commands::carrying::NotAccepted;
use crate::commands::posted::Posted;
use crate::commands::terminal::have_kept;
use crate::context::{Context, Outcome};
use crate::progress;
use crate::text;
use crate::trace::Trace;

/// Move a running container to another host.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa migrate web ssh://root@b.example\n  \
    limosa migrate web limosa://192.0.2.7:4000/TICKET\n  \
    limosa migrate web ssh://root@b.example --max-downtime 100ms\n  \
    limosa migrate web ssh://root@b.example --mode stop --unaccepted close\n\n\
    The first form runs `limosa receive` on the other host: LIMOSA_REMOTE names the program there if it is not in the \
    search path, LIMOSA_SSH the program to run instead of ssh. \
    The second form takes what `limosa receive --listen 192.0.2.7:4000` printed on the other host.")]
pub struct Migrate {
    /// The container.
    name: Name,

    /// ssh://[user@]host[:port], or limosa://host:port/TICKET.
    destination: String,

    /// How memory is sent: while the container runs, in rounds, and what it writes last while it is frozen (precopy), or
    /// while it is frozen (stop). What is best if it is not given; the report says what was done, and why.
    #[arg(long, value_enum, value_name = "MODE")]
    mode: Option<HowSent>,

    /// With precopy: rounds go on until what is left can be sent in that time, or comes no nearer to it. What else the freeze
    /// takes comes on top. For example 50ms, or 1s.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = humantime::parse_duration)]
    max_downtime: Duration,

    /// What the other processor must have. What registers in use need cannot be told before the freeze: where that is
    /// missing, the container runs on here after it.
    #[arg(long, value_enum, default_value_t)]
    cpu: super::Cpu,

    #[command(flatten)]
    unaccepted: NotAccepted,

    #[command(flatten)]
    trace: Trace,

    /// How progress is shown on standard error.
    #[arg(long, value_enum, default_value_t)]
    progress: progress::Form,
}

/// The values of `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HowSent {
    /// The container is frozen until everything is sent.
    Stop,
    /// The container is frozen for what it wrote last.
    Precopy,
}

impl From<HowSent> for Mode {
    fn from(how: HowSent) -> Self {
        match how {
            HowSent::Stop => Self::Stop,
            HowSent::Precopy => Self::Precopy,
        }
    }
}

/// The report of a migration.
#[derive(Debug, Serialize)]
struct Done {
    container: Name,
    destination: String,
    /// Microseconds from the freeze here until the destination said that it runs there.
    frozen_us: u64,
    #[serde(flatten)]
    times: Times,
    #[serde(flatten)]
    report: Report,
}

/// Where the records of migrations are kept.
pub fn store(context: &Context) -> anyhow::Result<Store> {
    Ok(Store::open(context.state_dir.join("migrations"))?)
}

impl Migrate {
    /// Migrates.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("migrate", 1)?;
        let mut address: Address = self.destination.parse()?;
        self.trace.prepare()?;
        let registry = context.registry();
        let store = store(context)?;
        let _guard = Posted::new(context, Some(&self.name))?;
        let mut report = Report::default();
        let watch =
            progress::watch(format!("{} → {}", self.name, address.redacted()), self.progress, context.json);
        let source = Source::find(&registry, &self.name)?
            .with_connections(TcpConnections::Established, self.unaccepted.how());
        let memory = MemoryMode::for_migration(self.mode.map(Into::into), source.pid(), self.max_downtime);
        let source = source.stored(memory);
        let migrated =
            migration::migrate(&registry, source, &mut address, &store, watch, self.cpu.into(), &mut report)?;
        match migrated.outcome {
            MigrationOutcome::Moved(_) => {}
            MigrationOutcome::Kept { reason } => {
                return Err(
                    anyhow::anyhow!("container {} stayed here and runs on: {reason}", self.name).into()
                );
            }
            MigrationOutcome::Unknown { why } => {
                let error = anyhow::anyhow!(
                    "it is not known whether container {} runs at {} now ({why}); it stays frozen here so that it \
                     never runs twice. Run `limosa settle` when the destination can be reached again",
                    self.name,
                    address.redacted()
                );
                return Err(crate::context::Failure::with_code(3, error));
            }
        }
        let destination = Address::redacted(&address);
        self.trace.write(&report);
        let times = Times {
            freeze_us: Some(migrated.frozen_us),
            // As this side hears of it. Nothing is written to a disk.
            first_instruction_us: report.end_us("hand over"),
            last_page_us: report.last_page_us(),
            whole_us: report.elapsed_us(),
            durable_us: None,
        };
        let done = Done { container: self.name, destination, frozen_us: migrated.frozen_us, times, report };
        let text = format!(
            "{} moved to {}: {} processes, {} threads, {} of memory\n{}{}",
            done.container,
            done.destination,
            done.report.processes,
            done.report.threads,
            text::size(done.report.page_bytes),
            text::memory(&done.report),
            text::times(&done.times, &done.report, context.verbose),
        );
        context.report(&done, text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Settle migrations whose connection was lost during the hand-over.
///
/// What is not settled by itself: a `limosa migrate` asks for five minutes, and one that is killed has a guard that does it.
///
/// Asks each destination whether it runs the container. Then the one that is frozen here ends, or runs on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa settle")]
pub struct Settle {}

/// The outcome of one migration.
#[derive(Debug, Serialize)]
struct Settled {
    container: String,
    migration: String,
    /// `moved`, `kept` or `unknown`.
    outcome: &'static str,
}

impl Settle {
    /// Settles all of them.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("settle", 1)?;
        let (registry, store) = (context.registry(), store(context)?);
        let mut settled = Vec::new();
        for record in store.unsettled()? {
            let outcome = match migration::settle(&registry, &store, &record)? {
                MigrationOutcome::Moved(_) => "moved",
                MigrationOutcome::Kept { .. } => "kept",
                MigrationOutcome::Unknown { .. } => "unknown",
            };
            settled.push(Settled { container: record.container, migration: record.id.to_string(), outcome });
        }
        let text = settled
            .iter()
            .fold(String::new(), |text, one| format!("{text}{}: {}\n", one.container, one.outcome));
        let unknown = settled.iter().any(|one| one.outcome == "unknown");
        context.report(&settled, text)?;
        Ok(if unknown { ExitCode::from(3) } else { ExitCode::SUCCESS })
    }
}

/// Receive a container from another host.
///
/// Without --listen it speaks on standard input and output: `limosa migrate NAME ssh://HOST` runs it so.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  limosa receive --listen 192.0.2.7:4000\n  limosa receive --listen [::]:0\n  limosa receive --listen [::]:4000 --answer-for 3600"
)]
pub struct Receive {
    /// Listen here, and print a one-time ticket for the source.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,

    /// For how long to stay if the source is lost when it may already have given up the container: until it has asked
    /// here what became of it, it keeps the container frozen.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, requires = "listen",
          value_parser = clap::value_parser!(u64).range(..=7 * 24 * 3600))]
    answer_for: u64,

    /// How progress is shown on standard error, when listening.
    #[arg(long, value_enum, default_value_t)]
    progress: progress::Form,
}

/// The report of a reception.
#[derive(Debug, Serialize)]
struct Arrived {
    container: String,
    pid: Option<i32>,
    #[serde(flatten)]
    report: Report,
}

impl Receive {
    /// Receives one container.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("receive", 1)?;
        let registry = context.registry();
        registry.sweep()?;
        let store = store(context)?;
        let guard = Posted::new(context, None)?;
        let keep = |master, pid, name: &Name| have_kept(context, master, pid, name);
        let mut arrivals = Arrivals::new(&registry, &keep)?;
        let received = match self.listen {
            None => {
                let transport = Transport::stdio().context("standard input and output")?;
                limosa_migrate::receive(
                    transport,
                    &mut arrivals,
                    &store,
                    &Limits::default(),
                    limosa_migrate::unwatched(),
                )?
            }
            Some(address) => {
                let limits = Limits { outcome: Duration::from_secs(self.answer_for), ..Limits::default() };
                let listener = Listener::bind(address, ListenOptions::default(), limits)?;
                guard.bequeath(&listener)?;
                let destination = listener.destination(address.ip().to_string());
                context.announce(&Ticket { destination: destination.address() }, destination.address())?;
                let title = format!("receiving on {}", listener.local_address());
                let watch = progress::watch(title, self.progress, context.json);
                listener.serve_noting(&mut arrivals, &store, watch, &mut |note| guard.note(note))?
            }
        };
        match received {
            Received::Started { offer, .. } => {
                if self.listen.is_some() {
                    let pid = arrivals.restored.as_ref().map(|restored| restored.pid);
                    let text = format!("container {} runs here\n", offer.container);
                    let report = arrivals.report;
                    context.report(&Arrived { container: offer.container, pid, report }, text)?;
                }
                Ok(ExitCode::SUCCESS)
            }
            Received::Refused { reasons, .. } => {
                let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
                Err(anyhow::anyhow!("refused the container: {}", reasons.join("; ")).into())
            }
            Received::Answered { .. } => Ok(ExitCode::SUCCESS),
        }
    }
}

/// What a listener prints first.
#[derive(Debug, Serialize)]
struct Ticket {
    destination: String,
}
