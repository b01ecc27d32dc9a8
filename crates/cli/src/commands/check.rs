//! `limosa check`.

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;
use limosa_engine::check::{self, Area, Feature};
use limosa_engine::resources::processor;
use limosa_engine::summary::printable;
use limosa_engine::{Refusal, preflight};
use serde::Serialize;

use super::carrying::Carrying;
use super::checkpoint::Target;
use crate::context::{Context, Outcome};
use crate::text;

/// Exit status when something essential is missing, or something in the target cannot be carried.
const NOT_POSSIBLE: u8 = 2;

/// Show what this kernel, these privileges and this CPU allow, or what in a target cannot be carried.
///
/// Without a target every feature is tried; with one, the running processes are looked at without freezing them, as
/// `checkpoint` and `migrate` do it first. What is left for them to find is in the threads' own hands (keys, Landlock, timers on other
/// threads' clocks, supervised seccomp filters), or on its way in a unix socket. Lost without a word is what the kernel tells
/// nobody: programs that choose among sockets of a port (SO_ATTACH_REUSEPORT_*), IPsec policies of sockets, IPV6_PKTINFO and
/// IPV6_MTU that were set, and an interface of IP_MULTICAST_IF that was set by its number alone.
/// The exit status is 2 if checkpoint and restore cannot work here, or if anything in the target is refused.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    limosa check\n  \
    limosa check web --unaccepted close\n  \
    limosa check pid:1234 --json")]
pub struct Check {
    /// NAME of a container, or pid:N for the process tree rooted at N.
    target: Option<Target>,

    #[command(flatten)]
    carrying: Carrying,
}

/// The report without a target.
#[derive(Debug, Serialize)]
struct Host {
    sufficient: bool,
    features: Vec<Feature>,
    /// What programs that start here can find, and so may need elsewhere.
    cpu_features: Vec<String>,
}

/// The report with a target.
#[derive(Debug, Serialize)]
struct Carried {
    possible: bool,
    refusals: Vec<Refusal>,
}

impl Check {
    /// Checks.
    pub fn execute(self, context: &Context) -> Outcome {
        let possible = match &self.target {
            None => host(context)?,
            Some(target) => carried(context, target, &self.carrying)?,
        };
        Ok(if possible { ExitCode::SUCCESS } else { ExitCode::from(NOT_POSSIBLE) })
    }
}

fn host(context: &Context) -> anyhow::Result<bool> {
    let features = check::features();
    let sufficient = check::is_sufficient(&features);
    let mut rows = vec![["FEATURE", "THERE", "WITHOUT IT"].map(str::to_owned)];
    for feature in &features {
        let lost = match &feature.why {
            None => feature.lost.to_owned(),
            Some(why) => format!("{} ({})", feature.lost, printable(why.as_bytes())),
        };
        rows.push([feature.name.to_owned(), if feature.available { "yes" } else { "NO" }.to_owned(), lost]);
    }
    let mut text = text::table(&rows);
    let missing: Vec<&str> = features
        .iter()
        .filter(|feature| !feature.available && feature.area == Area::Essential)
        .map(|feature| feature.name)
        .collect();
    let _ = if sufficient {
        writeln!(text, "\nCheckpoint and restore work here.")
    } else {
        writeln!(text, "\nCheckpoint and restore do not work here, for want of {}.", missing.join(", "))
    };
    let cpu_features = processor::features()?;
    let _ = writeln!(
        text,
        "\nWhat programs start with here, a processor that they go on with must have, too: {}.",
        processor::names(&cpu_features)
    );
    context.report(&Host { sufficient, features, cpu_features }, text)?;
    Ok(sufficient)
}

fn carried(context: &Context, target: &Target, carrying: &Carrying) -> anyhow::Result<bool> {
    let refusals = match target {
        Target::Pid(pid) => preflight::look(*pid, &carrying.of_process_tree()?)?,
        Target::Name(name) => {
            let registry = context.registry();
            carrying.of_container(&registry, name)?.preflight(&registry)?
        }
    };
    let mut text = String::new();
    for refusal in &refusals {
        let _ = writeln!(text, "{}", printable(refusal.to_string().as_bytes()));
    }
    if refusals.is_empty() {
        text.push_str("nothing was found that could not be carried\n");
    }
    let possible = refusals.is_empty();
    context.report(&Carried { possible, refusals }, text)?;
    Ok(possible)
}
