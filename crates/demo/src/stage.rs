//! The demo's stage: hosts, redis and its client; and how all of it is taken away again.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use limosa_stage::{BRIDGE, CONTAINER, Host, Limosa, MARK, PREFIX, Place, Running, TICK, join, join_client};
use tempfile::TempDir;

use crate::counter::{Counter, Live, Seen, Totals};
use crate::data;
use crate::display::Display;
use crate::interrupt::Interrupt;
use crate::inventory;
use crate::resp::Client;

/// The port of redis.
pub const PORT: u16 = 6379;
/// A file that redis' container gets, to see that its file system moves with it.
const NOTE: &str = "/srv/limosa-demo-note";

/// The stage.
pub struct Stage {
    limosa: Limosa,
    /// Ctrl-C.
    pub interrupt: Interrupt,
    directory: TempDir,
    /// The host that redis is on comes first.
    hosts: [Host; 2],
    client: Place,
    counter: Option<Counter>,
    keys: u64,
    note: String,
    /// Whether there may be a container.
    started: bool,
}

impl Stage {
    /// Hosts and client, not connected yet.
    pub fn build(limosa: Limosa, interrupt: Interrupt) -> Result<Self> {
        // Processes whose parents end become children of this one, which can then reap them.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("becoming a reaper")?;
        let directory = tempfile::Builder::new().prefix("limosa-demo-").tempdir()?;
        let state = |name| directory.path().join(name);
        let hosts = [Host::new("A", 1, state("a"))?, Host::new("B", 2, state("b"))?];
        let client = Place::new()?;
        let (counter, note) = (None, String::new());
        Ok(Self { limosa, interrupt, directory, hosts, client, counter, keys: 0, note, started: false })
    }

    /// The cables.
    pub fn connect_hosts(&self) -> Result<()> {
        let [a, b] = &self.hosts;
        join(a, b)?;
        join_client(&self.client, a)
    }

    /// The host that redis is on.
    pub fn here(&self) -> &Host {
        &self.hosts[0]
    }

    /// The other one.
    pub fn there(&self) -> &Host {
        &self.hosts[1]
    }

    /// Redis is on the other host now.
    pub fn moved(&mut self) {
        self.hosts.swap(0, 1);
        inventory::reap();
    }

    /// The container's name, which no other container on this machine has.
    pub fn name(&self) -> String {
        format!("redis-demo-{}", self.limosa.mark)
    }

    fn server(&self) -> SocketAddr {
        (CONTAINER, PORT).into()
    }

    /// `limosa run` on host A, and a file in the container's writable layer.
    pub fn start_redis(&mut self) -> Result<()> {
        let (name, port) = (self.name(), PORT.to_string());
        let net = format!("{BRIDGE},ip={CONTAINER}/{PREFIX}");
        let mark = format!("{MARK}={}", self.limosa.mark);
        let run = ["run", &name, "--detach", "--net", &net, "--env", &mark, "--"];
        let redis = ["redis-server", "--save", "", "--port", &port, "--bind", "0.0.0.0"];
        let options = ["--protected-mode", "no", "--dir", "/"];
        self.started = true;
        self.limosa.run(
            self.here(),
            || self.interrupt.check(),
            run.into_iter().chain(redis).chain(options),
        )?;
        let begun = Instant::now();
        while self.connect().is_err() {
            self.interrupt.check()?;
            ensure!(begun.elapsed() < Duration::from_secs(20), "redis does not answer: {}", self.log());
            std::thread::sleep(TICK);
        }
        let script = format!("head -c 1000000 /dev/urandom >{NOTE} && {}", Self::sum_of_note());
        self.note = self.execute(&script).context("writing a file in the container")?;
        Ok(())
    }

    fn sum_of_note() -> String {
        format!("sha256sum {NOTE}")
    }

    /// Runs a shell script in the container.
    fn execute(&self, script: &str) -> Result<String> {
        let name = self.name();
        self.limosa.run(self.here(), || self.interrupt.check(), ["exec", &name, "--", "sh", "-c", script])
    }

    /// What redis wrote.
    fn log(&self) -> String {
        let logs = self.limosa.run(self.here(), || self.interrupt.check(), ["logs", &self.name()]);
        logs.unwrap_or_else(|error| format!("({error:#})"))
    }

    fn connect(&self) -> Result<Client> {
        let _there = self.client.enter()?;
        Ok(Client::connect(self.server())?)
    }

    /// Fills redis; seconds that took.
    pub fn load(&mut self, megabytes: u64, display: &Display) -> Result<f64> {
        self.keys = data::keys(megabytes);
        display.step(&format!("loading {megabytes} MiB: {} keys", self.keys));
        let begun = Instant::now();
        let mut client = self.connect()?;
        data::load(&mut client, self.keys, |done| {
            display.live("loading", &format!(", {done} of {} keys", self.keys), None);
            self.interrupt.check()
        })?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Compares all that redis holds, and the file in its container, with what was written.
    pub fn verify(&self, display: &Display) -> Result<()> {
        let mut client = self.connect().context("connecting to verify the data")?;
        data::verify(&mut client, self.keys, |done| {
            display.live("comparing all data", &format!(", {done} of {} keys", self.keys), self.live());
            self.interrupt.check()
        })?;
        let note = self.execute(&Self::sum_of_note()).context("reading a file in the container")?;
        ensure!(note == self.note, "the file {NOTE} in the container changed: {note:?} was {:?}", self.note);
        Ok(())
    }

    /// The client begins to count.
    pub fn start_counting(&mut self) -> Result<()> {
        self.counter = Some(Counter::start(self.client.share()?, self.server())?);
        Ok(())
    }

    /// Lets the client count for a while.
    pub fn count(&self, pause: Duration, display: &Display) -> Result<Seen> {
        self.open_window()?;
        let begun = Instant::now();
        while begun.elapsed() < pause {
            self.interrupt.check()?;
            display.live(&format!("counting on {}", self.here().name), "", self.live());
            std::thread::sleep(TICK.min(pause));
        }
        self.end_window()
    }

    /// What the client does now.
    pub fn live(&self) -> Option<Live> {
        self.counter.as_ref().map(Counter::live)
    }

    fn counter(&self) -> Result<&Counter> {
        self.counter.as_ref().context("the client does not run")
    }

    /// From now on gaps are gathered anew.
    pub fn open_window(&self) -> Result<()> {
        self.counter()?.open_window();
        Ok(())
    }

    /// Waits for a reply, and tells what the client saw since [`Self::open_window`].
    pub fn end_window(&self) -> Result<Seen> {
        let counter = self.counter()?;
        counter.wait_for_replies(Duration::from_mins(1), || self.interrupt.check())?;
        let totals = counter.totals();
        if totals.resets > 0 || totals.lost > 0 || totals.repeated > 0 {
            bail!(
                "the client saw {} broken connections ({}), {} increments lost, {} repeated",
                totals.resets,
                totals.errors.join("; "),
                totals.lost,
                totals.repeated
            );
        }
        Ok(counter.seen())
    }

    /// The client stops.
    pub fn stop_counting(&mut self) -> Result<Totals> {
        self.counter.take().context("the client does not run")?.stop()
    }

    /// `limosa receive` on the other host, and where to migrate to.
    pub fn receive(&self) -> Result<(Running, String)> {
        limosa_stage::receive(&self.limosa, self.there(), || self.interrupt.check())
    }

    /// `limosa migrate` on this host.
    pub fn migrate_to(&self, destination: &str) -> Result<Running> {
        let arguments = ["--json", "migrate", &self.name(), destination, "--progress", "json"];
        self.limosa.start(self.here(), arguments)
    }

    /// Takes everything away, whatever state it is in: what is left after that, one line each.
    pub fn clear(mut self) -> Result<Vec<String>> {
        self.interrupt.forget();
        drop(self.counter.take());
        let mut left = Vec::new();
        if self.started {
            for host in &self.hosts {
                left.extend(self.remove_container(host));
            }
        }
        let traces = inventory::Traces {
            mark: format!("{MARK}={}", self.limosa.mark),
            name: self.name(),
            directory: self.directory.path().to_owned(),
            namespaces: [self.hosts[0].place.inode, self.hosts[1].place.inode, self.client.inode],
        };
        left.extend(traces.end_processes());
        let Self { directory, hosts, client, .. } = self;
        drop((hosts, client));
        if let Err(error) = directory.close() {
            left.push(format!("files: {error}"));
        }
        left.extend(traces.look()?);
        Ok(left)
    }

    /// `limosa rm --force`, where there is a container: what Limosa failed to remove.
    fn remove_container(&self, host: &Host) -> Vec<String> {
        let path = host.state_dir.join("containers").join(self.name());
        if path.exists()
            && let Err(error) = self.force_remove(host)
        {
            return vec![format!("{error:#}")];
        }
        let kept = std::fs::read_dir(host.state_dir.join("containers")).into_iter().flatten().flatten();
        let kept = kept.filter(|entry| entry.file_name() != ".lock");
        kept.map(|entry| format!("file {}", entry.path().display())).collect()
    }

    fn force_remove(&self, host: &Host) -> Result<()> {
        let mut running = self.limosa.start(host, ["rm", "--force", &self.name()])?;
        while running.step()? {
            inventory::reap_orphans(running.pid());
        }
        running.finish().map(drop)
    }
}
