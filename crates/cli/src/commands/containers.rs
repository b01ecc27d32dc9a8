//! `limosa ps`, `stop` and `rm`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use limosa_container::{Name, Record};
use serde::Serialize;

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
    /// `running`, `stopped` or `damaged`.
    state: &'static str,
    pid: Option<i32>,
    /// Seconds since 1970.
    created: Option<u64>,
    addresses: Vec<String>,
    command: Vec<String>,
    /// Why a damaged one cannot be read.
    error: Option<String>,
}

impl Line {
    fn new(name: Name, record: &Record) -> Self {
        let pid = record.running();
        let addresses = record.config.network.iter().flat_map(|network| &network.addresses);
        Self {
            name,
            state: if pid.is_some() { "running" } else { "stopped" },
            pid,
            created: Some(record.created),
            addresses: addresses.map(ToString::to_string).collect(),
            command: record.config.command.clone(),
            error: None,
        }
    }

    fn damaged(name: Name, error: String) -> Self {
        let (addresses, command) = (Vec::new(), Vec::new());
        Self { name, state: "damaged", pid: None, created: None, addresses, command, error: Some(error) }
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
        let lines: Vec<Line> = list
            .into_iter()
            .map(|(name, record)| match record {
                Ok(record) => Line::new(name, &record),
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
        context.report(&lines, table(&rows))?;
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
