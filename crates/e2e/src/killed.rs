//! Migrations of which one side is killed: at the end one copy runs, and nothing else is anywhere.
//!
//! The source reaches the other host by a stand-in for ssh, which enters that host's network and runs `limosa receive`
//! with its state directory, anew for each connection; or, if a listener is to be killed, over TLS.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_stage::{Host, receive_with};
use rustix::process::{WaitOptions, wait};

use crate::contained::Contained;
use crate::sandbox::{describe, processes};
use crate::{built, wait_for};

const NAME: &str = Contained::NAME;
/// How long it may take until one copy runs again and everything else is gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// A side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `limosa migrate`
    Source,
    /// `limosa receive`
    Destination,
    /// `limosa receive --listen`
    Listener,
}

/// What is to happen to a side.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// It counts its operations on the kernel.
    Counted,
    /// It is killed at this one.
    Killed(u64),
}

impl Contained<'_> {
    /// `limosa migrate` to the other host, in which `side` meets its fate. Gives what went wrong, if anything did.
    /// Where the container is then, [`Self::settled`] finds out.
    pub fn migrate_with(&self, side: Side, fate: Fate) -> Result<Option<String>> {
        let variable = match fate {
            Fate::Counted => ("LIMOSA_PASSED_FILE", self.passed().into_os_string()),
            Fate::Killed(number) => ("LIMOSA_KILL_AT", number.to_string().into()),
        };
        if side == Side::Listener {
            return self.migrate_to_listener(|command| command.env(variable.0, &variable.1));
        }
        if side == Side::Destination {
            let setting = format!("export {}={}\n", variable.0, variable.1.display());
            fs::write(self.first_receiver(), setting)?;
        }
        self.migrate_by_ssh(
            |command| {
                if side == Side::Source { command.env(variable.0, &variable.1) } else { command }
            },
        )
    }

    fn migrate_by_ssh(&self, adapt: impl FnOnce(&mut Command) -> &mut Command) -> Result<Option<String>> {
        let (here, there) = (self.host(), self.other());
        let script = self.stand_in(there)?;
        let destination = format!("ssh://{}", there.name);
        let run = self.limosa.start_with(here, ["migrate", NAME, &destination], |command| {
            adapt(command).stdin(Stdio::null()).env("LIMOSA_SSH", &script)
        })?;
        let outcome = run.finish();
        let _ = fs::remove_file(self.first_receiver());
        Ok(outcome.err().map(|error| format!("{error:#}")))
    }

    fn migrate_to_listener(
        &self,
        adapt: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<Option<String>> {
        let started =
            receive_with(&self.limosa, self.other(), || Ok(()), |it| adapt(it.stdin(Stdio::null())));
        let (receiver, destination) = match started {
            Ok(started) => started,
            Err(error) => return Ok(Some(format!("before there was a ticket: {error:#}"))),
        };
        let migrated = self.limosa.run(self.host(), || Ok(()), ["migrate", NAME, &destination]);
        let errors = [migrated.err(), receiver.finish().err()].into_iter().flatten();
        Ok(errors.map(|error| format!("{error:#}")).reduce(|one, other| format!("{one}; {other}")))
    }

    /// `limosa migrate` to the other host, where `limosa receive` runs after the shell commands `conditions`. Gives what
    /// went wrong, if anything did.
    pub fn migrate_under(&self, conditions: &str) -> Result<Option<String>> {
        fs::write(self.first_receiver(), conditions)?;
        self.migrate_by_ssh(|command| command)
    }

    /// `limosa` on the container's host, killed at operation `number`. Gives how many operations it had if it was not, and
    /// what went wrong, if anything did.
    pub fn kill_at(&self, arguments: &[&str], number: u64) -> Result<(Option<u64>, Option<String>)> {
        let (passed, at) = (self.passed(), number.to_string());
        let _ = fs::remove_file(&passed);
        let variables = [("LIMOSA_KILL_AT", at.as_ref()), ("LIMOSA_PASSED_FILE", passed.as_os_str())];
        let outcome = self.start(arguments, &variables)?.finish();
        // One that was killed does not come to count.
        let had = passed.exists().then(|| self.counted()).transpose()?;
        ensure!(had.is_none_or(|had| had < number), "{had:?} operations, and not killed at {number}");
        Ok((had, outcome.err().map(|error| format!("{error:#}"))))
    }

    /// Waits until nothing of Limosa runs on the container's host; whether the container is there then. If not, nothing of
    /// it is left anywhere.
    pub fn is_there(&self) -> Result<bool> {
        let mut there = false;
        let mut why = String::new();
        let decided = wait_for("the container whole, or nothing of it", PATIENCE, || {
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
            there = !self.running()?.is_empty();
            let looked = if there { self.look() } else { self.nothing() };
            why = looked.as_ref().err().map_or_else(String::new, |error| format!("{error:#}"));
            Ok(looked.is_ok().then_some(()))
        });
        decided.context(why)?;
        Ok(there)
    }

    fn nothing(&self) -> Result<()> {
        let left: Vec<_> = processes()?.into_iter().map(describe).collect();
        ensure!(left.is_empty(), "left: {left:?}");
        let groups: Vec<String> = groups()?.difference(&self.groups).cloned().collect();
        ensure!(groups.is_empty(), "control groups: {groups:?}");
        for (index, host) in self.hosts.iter().enumerate() {
            let kept = names(&host.state_dir.join("containers"))?;
            ensure!(kept.is_empty(), "containers on {}: {kept:?}", host.name);
            let links = links(host)?;
            ensure!(links.len() == self.links[index], "interfaces on {}: {links:?}", host.name);
        }
        Ok(())
    }

    /// How many operations the side had that was [`Fate::Counted`].
    pub fn counted(&self) -> Result<u64> {
        let text =
            fs::read_to_string(self.passed()).context("limosa was built without the feature 'fault'")?;
        Ok(text.parse()?)
    }

    /// Waits until the container runs on one host, and nothing of it or of Limosa is anywhere else.
    pub fn settled(&self) -> Result<()> {
        let mut why = String::new();
        let settled = wait_for("one copy, and nothing else", PATIENCE, || {
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
            Ok(match self.look() {
                Ok(()) => Some(()),
                Err(error) => {
                    why = format!("{error:#}");
                    None
                }
            })
        });
        settled.context(why)
    }

    fn look(&self) -> Result<()> {
        let running = self.running()?;
        let [(at, init)] = running[..] else { anyhow::bail!("running: {running:?}") };
        self.is_at(at, init);
        for pid in processes()? {
            let pid = pid.as_raw_pid();
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            // Those in the container have a PID there, too.
            let inside =
                status.lines().any(|line| line.starts_with("NSpid:") && line.split_whitespace().count() > 2);
            ensure!(
                inside || status.is_empty(),
                "left: {}",
                rustix::process::Pid::from_raw(pid).map_or_else(String::new, describe)
            );
        }
        let groups: Vec<String> = groups()?.difference(&self.groups).cloned().collect();
        ensure!(groups.len() <= 1, "control groups: {groups:?}");
        for (index, host) in self.hosts.iter().enumerate() {
            let kept: Vec<_> = names(&host.state_dir.join("containers"))?;
            let wanted: &[&str] = if index == at { &[NAME] } else { &[] };
            ensure!(kept == wanted, "containers on {}: {kept:?}", host.name);
            let (links, expected) = (links(host)?, self.links[index] + usize::from(index == at));
            ensure!(links.len() == expected, "interfaces on {}: {links:?} instead of {expected}", host.name);
        }
        Ok(())
    }

    /// Where it runs (index of the host, first process); nowhere, and in two places, are possible answers.
    fn running(&self) -> Result<Vec<(usize, i32)>> {
        let mut running = Vec::new();
        for (index, host) in self.hosts.iter().enumerate() {
            let list = self.limosa.run(host, || Ok(()), ["ps", "--json"])?;
            let list: Vec<serde_json::Value> = serde_json::from_str(&list)?;
            running.extend(list.iter().filter_map(|one| Some((index, one["pid"].as_i64()? as i32))));
        }
        Ok(running)
    }

    fn stand_in(&self, there: &Host) -> Result<PathBuf> {
        let path = self.path(&format!("ssh-to-{}", there.name));
        let first = self.first_receiver();
        let script = format!(
            "#!/bin/sh\nunset LIMOSA_KILL_AT LIMOSA_PASSED_FILE\nif [ -e {first} ]; then . {first}; rm {first}; fi\n\
             export LIMOSA_STATE_DIR={state}\nexec nsenter --net={network} {limosa} receive\n",
            first = first.display(),
            state = there.state_dir.display(),
            network = there.place.path().display(),
            limosa = built("limosa")?.display(),
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        Ok(path)
    }

    /// What the first `limosa receive` of a migration, and not those that are only asked, has in its environment.
    fn first_receiver(&self) -> PathBuf {
        self.path("first-receiver")
    }

    fn passed(&self) -> PathBuf {
        self.path("passed")
    }
}

/// The visible names in a directory; none if it is not there.
fn names(directory: &Path) -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(Vec::new()) };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.filter(|name: &Result<String>| !matches!(name, Ok(name) if name.starts_with('.'))).collect()
}

/// The interfaces of a host.
pub(crate) fn links(host: &Host) -> Result<Vec<String>> {
    let _there = host.place.enter()?;
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    Ok(text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect())
}

/// The control groups of containers of this name, in any hierarchy: each once.
pub(crate) fn groups() -> Result<BTreeSet<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let hierarchies = mounts.lines().filter(|line| line.contains(" - cgroup"));
    let mut found = BTreeSet::new();
    for place in hierarchies.filter_map(|line| line.split(' ').nth(4)) {
        found.extend(
            names(&Path::new(place).join("limosa"))?.into_iter().filter(|name| name.starts_with(NAME)),
        );
    }
    Ok(found)
}
