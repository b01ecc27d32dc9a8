//! `limosa ps`, `stop` and `rm`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use limosa_container::{Name, Record};
use limosa_migrate::record::{Departure, DepartureRecord};
use limosa_migrate::{Address, MigrationId};
use serde::Serialize;

use super::migrate::store;
use crate::context::{Context, Outcome};
use crate::text::{age, table};

/// List containers.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa ps\n  limosa ps --json")]
pub struct Ps {}

/// A line of `ps`, and its JSON form.
#[derive(Debug, Serialize)]
struct Line {
    name: Name,
    /// `running`, `frozen`, `stopped` or `damaged`.
    state: &'static str,
    /// The migration that it is frozen for, while it is not known here whether it runs at the destination, or not acted on.
    migration: Option<Open>,
    pid: Option<i32>,
    /// Seconds since 1970.
    created: Option<u64>,
    addresses: Vec<String>,
    command: Vec<String>,
    /// Why a damaged one cannot be read.
    error: Option<String>,
}

/// A migration that is not settled.
#[derive(Debug, Serialize)]
struct Open {
    id: MigrationId,
    /// Without the ticket.
    destination: String,
    /// `undecided`, or, to be acted on yet, `moved` or `kept`.
    outcome: &'static str,
}

impl Open {
    fn new(record: &DepartureRecord) -> Self {
        let outcome = match record.departure {
            Departure::HandingOver => "undecided",
            Departure::Started(_) => "moved",
            Departure::Kept(_) => "kept",
        };
        let address = record.destination.parse::<Address>();
        let destination = address.map_or_else(|_| "?".to_owned(), |address| address.redacted());
        Self { id: record.id, destination, outcome }
    }

    /// What a person is told below the table.
    fn note(&self, name: &Name) -> String {
        let Self { destination, outcome, .. } = self;
        let what = match *outcome {
            "moved" => format!("it runs at {destination}"),
            "kept" => format!("it was not taken at {destination}, and is to run on here"),
            _ => format!("whether it runs at {destination} is not known yet"),
        };
        format!("{name} was handed over, and is frozen: {what}. `limosa settle` finds out and acts on it.\n")
    }
}

impl Line {
    fn new(name: Name, record: &Record, open: &[DepartureRecord]) -> Self {
        let pid = record.running();
        let state = match pid {
            Some(_) if record.cgroup.is_frozen() => "frozen",
            Some(_) => "running",
            None => "stopped",
        };
        let this = |open: &&DepartureRecord| {
            open.container == name.as_str() && [String::new(), record.instance()].contains(&open.instance)
        };
        let migration = open.iter().find(this).filter(|_| pid.is_some()).map(Open::new);
        let addresses = record.config.network.iter().flat_map(|network| &network.addresses);
        Self {
            name,
            state,
            migration,
            pid,
            created: Some(record.created),
            addresses: addresses.map(ToString::to_string).collect(),
            command: record.config.command.clone(),
            error: None,
        }
    }

    fn damaged(name: Name, error: String) -> Self {
        let (addresses, command) = (Vec::new(), Vec::new());
        let (state, error) = ("damaged", Some(error));
        Self { name, state, migration: None, pid: None, created: None, addresses, command, error }
    }
}

impl Ps {
    /// Lists the containers.
    #[allow(clippy::unused_self, reason = "every subcommand is executed alike")]
    pub fn execute(self, context: &Context) -> Outcome {
        // What a killed run left is nothing to list; that it cannot be removed is no reason not to list the others.
        if let Err(error) = context.registry().sweep() {
            tracing::warn!(%error, "what was left of a container that was never finished cannot be removed");
        }
        let list = context.registry().list()?;
        let open = store(context)?.unsettled()?;
        let lines: Vec<Line> = list
            .into_iter()
            .map(|(name, record)| match record {
                Ok(record) => Line::new(name, &record, &open),
                Err(error) => Line::damaged(name, format!("{:#}", anyhow::Error::from(error))),
            })
            .collect();
        let mut rows = vec![["NAME", "STATE", "PID", "AGE", "ADDRESS", "COMMAND"].map(str::to_owned)];
        rows.extend(lines.iter().map(|line| {
            let dash = || "-".to_owned();
            [
                line.name.to_string(),
                line.state.to_owned(),
                line.pid.map_or_else(dash, |pid| pid.to_string()),
                line.created.map_or_else(dash, age),
                if line.addresses.is_empty() { dash() } else { line.addresses.join(",") },
                line.error.clone().unwrap_or_else(|| line.command.join(" ")),
            ]
        }));
        let notes = lines.iter().filter_map(|line| Some(line.migration.as_ref()?.note(&line.name)));
        context.report(&lines, notes.fold(table(&rows), |text, note| text + &note))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Stop containers: SIGTERM to the first process, SIGKILL after the timeout. Their files stay.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa stop web\n  limosa stop web db --timeout 2")]
pub struct Stop {
    /// The containers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,

    /// Seconds to wait before killing. A first process without a handler for SIGTERM takes all of them.
    #[arg(long, short, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
}

impl Stop {
    /// Stops the containers.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("stop", 1)?;
        for name in &self.names {
            limosa_container::stop(&context.registry(), name, Duration::from_secs(self.timeout))?;
        }
        report_names(context, &self.names)
    }
}

/// Remove containers that do not run, with their files and logs.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa rm web\n  limosa rm --force web")]
pub struct Rm {
    /// The containers.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,

    /// Kill a container that runs; remove one whose record is damaged.
    #[arg(long, short)]
    force: bool,
}

impl Rm {
    /// Removes the containers.
    pub fn execute(self, context: &Context) -> Outcome {
        super::require_root("rm", 1)?;
        for name in &self.names {
            limosa_container::remove(&context.registry(), name, self.force)?;
        }
        report_names(context, &self.names)
    }
}

fn report_names(context: &Context, names: &[Name]) -> Outcome {
    let text: String = names.iter().fold(String::new(), |text, name| text + name.as_str() + "\n");
    context.report(&names, text)?;
    Ok(ExitCode::SUCCESS)
}
