//! The stage of a migration: two machines on a cable, a redis in a container, and its client, which is the test.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_e2e::sandbox::Sandbox;

use crate::counter::Counter;
use crate::kernel::Kernel;
use crate::machine::{Machine, Running};
use crate::network::{BRIDGE, CONTAINER, Cable, Card, PREFIX};

/// The container's name.
pub const NAME: &str = "web";
/// The port of redis.
const PORT: u16 = 6379;
/// For what takes a moment on real machines.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A cable for two machines; the container starts on the first.
pub struct Stage<'sandbox> {
    sandbox: &'sandbox Sandbox,
    cable: Cable,
    cards: [Card; 2],
}

impl<'sandbox> Stage<'sandbox> {
    /// The cable, and two cards.
    pub fn build(sandbox: &'sandbox Sandbox) -> Result<Self> {
        let cable = Cable::lay()?;
        let cards = [cable.card("a", 1)?, cable.card("b", 2)?];
        Ok(Self { sandbox, cable, cards })
    }

    /// The machine `a`.
    pub fn boot_a(&self, kernel: &Kernel) -> Result<Machine> {
        Machine::boot_with_card(self.sandbox, kernel, &self.cards[0])
    }

    /// The machine `b`, or another in its place.
    pub fn boot_b(&self, kernel: &Kernel) -> Result<Machine> {
        Machine::boot_with_card(self.sandbox, kernel, &self.cards[1])
    }

    /// `limosa receive` on a machine, and the destination that it prints.
    pub fn receive<'machine>(&self, on: &'machine Machine) -> Result<(Running<'machine>, String)> {
        self.receive_with(on, &[])
    }

    /// Likewise, with more options.
    pub fn receive_with<'machine>(
        &self,
        on: &'machine Machine,
        options: &[&str],
    ) -> Result<(Running<'machine>, String)> {
        let card = self.cards.iter().find(|card| card.name() == on.name).context("no card of that name")?;
        let listen = format!("{}:0", card.address());
        let receiver = on.begin([&["limosa", "receive", "--listen", &listen], options].concat())?;
        let ticket = |text: &str| text.lines().find(|line| line.starts_with("limosa://")).map(str::to_owned);
        let destination = receiver.out(PATIENCE, ticket)?;
        Ok((receiver, destination))
    }

    /// Takes the cable away, after the machines.
    pub fn end(self, machines: impl IntoIterator<Item = Machine>) -> Result<()> {
        drop(machines.into_iter().collect::<Vec<_>>());
        self.cable.remove(&self.cards)
    }
}

/// Starts a redis in a container, and its client.
pub fn start_redis(on: &Machine, megabytes: u64) -> Result<Counter> {
    let net = format!("{BRIDGE},ip={CONTAINER}/{PREFIX}");
    let run = ["limosa", "run", NAME, "--detach", "--net", &net, "--"];
    let redis = ["redis-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/"];
    let debug = ["--enable-debug-command", "local"];
    on.run(run.into_iter().chain(redis).chain(debug))?.success("run")?;
    let counter = Counter::start(SocketAddr::from((CONTAINER, PORT)))?;
    let fill = format!("debug populate {} key 1000", megabytes * 1000);
    let redis_cli = ["limosa", "exec", NAME, "--", "redis-cli"];
    on.run(redis_cli.into_iter().chain(fill.split(' ')))?.success("filling redis")?;
    counter.goes_on(PATIENCE)?;
    Ok(counter)
}

/// Fails unless redis on this machine has the keys that [`start_redis`] made, and the counter.
pub fn has_its_keys(on: &Machine, megabytes: u64) -> Result<()> {
    let said = on.run(["limosa", "exec", NAME, "--", "redis-cli", "dbsize"])?.success("dbsize")?;
    ensure!(said.out.trim() == (megabytes * 1000 + 1).to_string(), "redis has {} keys", said.out.trim());
    Ok(())
}

/// The states of the container on a machine, as `limosa ps` has them.
pub fn states(machine: &Machine) -> Result<Vec<String>> {
    let said = machine.run(["limosa", "ps", "--json"])?.success("ps")?;
    let list: Vec<serde_json::Value> = serde_json::from_str(&said.out)?;
    let ours = list.iter().filter(|one| one["name"] == NAME);
    Ok(ours.map(|one| one["state"].as_str().unwrap_or("?").to_owned()).collect())
}

/// Whether the container's control group is frozen.
pub fn is_sealed(machine: &Machine) -> Result<bool> {
    let look = format!("find /sys/fs/cgroup -path '*limosa/{NAME}*' -name cgroup.freeze -exec cat {{}} +");
    Ok(machine.shell(&look)?.lines().any(|line| line == "1"))
}
