//! A program in a container of `limosa run`, on one of two hosts, with its clients outside.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_kernel::net::InNetns;
use limosa_stage::{BRIDGE, CONTAINER, Host, Limosa, PREFIX, Place, Running, join, join_client, receive};
use rustix::process::Pid;

use crate::ground::{Ground, quoted};
use crate::killed::{groups, links};
use crate::sandbox::Sandbox;
use crate::{built, wait_for};

/// Where the program's files are, in the container.
const DIRECTORY: &str = "/srv/moving";
const PATIENCE: Duration = Duration::from_secs(20);

/// The container, the hosts and the clients' place. What is dropped with it takes all interfaces away; [`Self::end`]
/// removes the container.
pub struct Contained<'s> {
    sandbox: &'s Sandbox,
    pub(crate) limosa: Limosa,
    pub(crate) hosts: [Host; 2],
    /// How many interfaces each host has without the container's.
    pub(crate) links: [usize; 2],
    /// Control groups of this name that were there before.
    pub(crate) groups: BTreeSet<String>,
    /// Index of the host that the container is on.
    here: Cell<usize>,
    clients: Place,
    /// The container's first process.
    init: Cell<Pid>,
    checkpoints: Cell<u32>,
    /// What `limosa` reported last.
    report: RefCell<String>,
}

impl<'s> Contained<'s> {
    /// The container's name.
    pub const NAME: &'static str = "moving";

    /// Two hosts, and on the first a container that waits for its program.
    pub fn new(sandbox: &'s Sandbox) -> Result<Self> {
        let limosa = Limosa::find(Some(built("limosa")?))?;
        let hosts = [Host::new("A", 1, sandbox.path("a"))?, Host::new("B", 2, sandbox.path("b"))?];
        let clients = Place::new()?;
        join(&hosts[0], &hosts[1])?;
        join_client(&clients, &hosts[0])?;
        let links = [links(&hosts[0])?.len(), links(&hosts[1])?.len()];
        let contained = Self {
            sandbox,
            limosa,
            links,
            groups: groups()?,
            hosts,
            here: Cell::new(0),
            clients,
            init: Cell::new(Pid::INIT),
            checkpoints: Cell::new(0),
            report: RefCell::default(),
        };
        let net = format!("{BRIDGE},ip={CONTAINER}/{PREFIX}");
        let wait = format!(
            "mkdir {DIRECTORY}; until [ -e {DIRECTORY}/start ]; do sleep 0.01; done; . {DIRECTORY}/start"
        );
        contained.limosa(&["run", Self::NAME, "--detach", "--net", &net, "--", "sh", "-c", &wait])?;
        contained.find_init()?;
        let directory = contained.seen(Path::new(DIRECTORY));
        wait_for("the container's directory", PATIENCE, || Ok(directory.is_dir().then_some(())))?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
        Ok(contained)
    }

    pub(crate) fn host(&self) -> &Host {
        &self.hosts[self.here.get()]
    }

    pub(crate) fn other(&self) -> &Host {
        &self.hosts[1 - self.here.get()]
    }

    /// The name of the host that it is on.
    pub fn location(&self) -> &'static str {
        self.host().name
    }

    /// A file of the test's.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.sandbox.path(name)
    }

    /// It was found on that host, with that first process.
    pub(crate) fn is_at(&self, host: usize, init: i32) {
        self.here.set(host);
        self.init.set(Pid::from_raw(init).unwrap_or(Pid::INIT));
    }

    /// Runs `limosa` on the host that the container is on.
    pub fn limosa(&self, arguments: &[&str]) -> Result<String> {
        self.limosa.run(self.host(), || Ok(()), arguments)
    }

    fn find_init(&self) -> Result<()> {
        let list: serde_json::Value = serde_json::from_str(&self.limosa(&["ps", "--json"])?)?;
        let pid = list[0]["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32));
        self.init.set(pid.with_context(|| format!("the container does not run: {list}"))?);
        Ok(())
    }

    /// `limosa checkpoint`, which ends the container, and `limosa restore` on the same host.
    pub fn checkpoint_and_restore(&self) -> Result<()> {
        self.checkpoints.set(self.checkpoints.get() + 1);
        let out = self.sandbox.path(&format!("checkpoint-{}", self.checkpoints.get()));
        let out = out.to_str().context("a path that is not UTF-8")?;
        self.limosa(&["checkpoint", Self::NAME, "--out", out])?;
        ensure!(self.limosa(&["ps", "--json"])?.trim() == "[]", "a container is left after its checkpoint");
        self.limosa(&["restore", out, "--detach"])?;
        self.find_init()
    }

    /// `limosa migrate` to the other host.
    pub fn migrate(&self) -> Result<()> {
        self.migrate_by(&[])
    }

    /// Likewise, with more options.
    pub fn migrate_by(&self, options: &[&str]) -> Result<()> {
        let there = 1 - self.here.get();
        let (receiver, destination) = receive(&self.limosa, &self.hosts[there], || Ok(()))?;
        let report = self.limosa(&[&["--json", "migrate", Self::NAME, &destination], options].concat())?;
        receiver.finish()?;
        self.moved(report)
    }

    /// Takes note that it was migrated to the other host, with this report.
    pub fn moved(&self, report: String) -> Result<()> {
        self.report.replace(report);
        ensure!(self.limosa(&["ps", "--json"])?.trim() == "[]", "a container is left after its migration");
        self.here.set(1 - self.here.get());
        self.find_init()
    }

    /// Starts `limosa` on the host that the container is on, with `variables` in its environment.
    pub fn start(&self, arguments: &[&str], variables: &[(&str, &OsStr)]) -> Result<Running> {
        self.limosa.start_with(self.host(), arguments, |command| {
            command.stdin(Stdio::null()).envs(variables.iter().copied())
        })
    }

    /// The host that the container is not on.
    pub fn there(&self) -> &Host {
        &self.hosts[1 - self.here.get()]
    }

    /// Fails if there is a container on the other host, or something of one after a moment.
    pub fn nothing_arrives(&self) -> Result<()> {
        wait_for("the end of what was arriving on the other host", PATIENCE, || {
            let containers = self.there().state_dir.join("containers");
            let left = fs::read_dir(containers).into_iter().flatten().flatten();
            Ok((left.filter(|entry| entry.file_name() != ".lock").count() == 0).then_some(()))
        })
    }

    /// How long the last migration froze it, by its own report.
    pub fn frozen(&self) -> Duration {
        let report: serde_json::Value = serde_json::from_str(&self.report.borrow()).unwrap_or_default();
        Duration::from_micros(report["frozen_us"].as_u64().unwrap_or_default())
    }

    /// Removes the container, of which there may be another later.
    pub fn remove(&self) -> Result<()> {
        self.limosa(&["rm", "--force", Self::NAME]).map(drop)
    }

    /// Removes the container, for good.
    pub fn end(self) -> Result<()> {
        self.remove()
    }
}

impl Ground for Contained<'_> {
    fn address(&self) -> Ipv4Addr {
        CONTAINER
    }

    fn directory(&self) -> PathBuf {
        DIRECTORY.into()
    }

    fn seen(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.init.get().as_raw_pid()));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn program(&self, program: &Path) -> Result<PathBuf> {
        let inside = Path::new(DIRECTORY).join(program.file_name().context("a program without a name")?);
        fs::copy(program, self.seen(&inside)).with_context(|| format!("copying {}", program.display()))?;
        Ok(inside)
    }

    fn start(&self, name: &str, command: &[&OsStr]) -> Result<Pid> {
        let command = quoted(command)?;
        let script = format!("cd {DIRECTORY}\nexec {command} </dev/null >{name}.out 2>{name}.err\n");
        let start = Path::new(DIRECTORY).join("start");
        let new = self.seen(&start.with_extension("new"));
        fs::write(&new, script)?;
        fs::rename(new, self.seen(&start))?;
        Ok(self.init.get())
    }

    fn root(&self, _: Pid) -> Pid {
        self.init.get()
    }

    fn among_clients(&self) -> Result<Option<InNetns>> {
        Ok(Some(self.clients.enter()?))
    }

    fn clients(&self) -> &Path {
        Sandbox::directory(self.sandbox)
    }
}
