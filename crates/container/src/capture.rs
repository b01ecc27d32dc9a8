//! Checkpoint of a container: its process tree, its writable layer, and what another host needs to know of it.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;

use limosa_engine::checkpoint::{self, Captured, TcpConnections, Unaccepted};
use limosa_engine::twin::Remainder;
use limosa_engine::{CaptureError, MemoryMode, Mode, Refusal, Refusals, Report, preflight};
use limosa_image::{Sink, WriteError};
use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupError;
use crate::config::{Config, Name};
use crate::fate::Fate;
use crate::groups;
use crate::layer::{self, LayerError};
use crate::link::{self, LinkError};
use crate::registry::{Record, Registry, RegistryError};
use crate::rootfs::{self, IdentityError};
use crate::run::LOG_KEY;
use crate::stop::{StopError, remove};
use crate::terminal;

/// Name of the section that holds the [`ContainerState`].
pub const SECTION: &str = "container";
/// Name of the blob that holds the writable layer, as [`layer::archive`] writes it.
pub const LAYER_BLOB: &str = "layer.tar";
/// Name of the blob that holds the log.
pub const LOG_BLOB: &str = "log";

/// What a checkpoint says of a container beyond its processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerState {
    /// What it is; the identity of its read-only layer is filled in.
    pub config: Config,
    /// The hardware address of its `eth0`: neighbours know it.
    pub mac: Option<[u8; 6]>,
}

/// A running container, about to be captured.
#[derive(Debug)]
pub struct Source {
    record: Record,
    state: ContainerState,
    pid: i32,
    tcp: TcpConnections,
    externals: HashMap<(u64, u64), String>,
    unaccepted: Unaccepted,
    memory: MemoryMode,
    leaves_running: bool,
}

/// A container that is captured, and still frozen.
#[derive(Debug)]
pub struct CapturedContainer {
    record: Record,
    captured: Captured,
    disconnected: bool,
}

impl Source {
    /// Finds the running container `name` and everything about it that need not wait for the freeze.
    pub fn find(registry: &Registry, name: &Name) -> Result<Self, ContainerCaptureError> {
        let record = registry.load(name)?;
        let pid = record.running().ok_or_else(|| ContainerCaptureError::NotRunning { name: name.clone() })?;
        let mut config = record.config.clone();
        config.rootfs_identity = Some(rootfs::identity(&config.rootfs)?);
        let mac = match &config.network {
            Some(_) => Some(link::hardware_address(pid)?),
            None => None,
        };
        Ok(Self {
            record,
            state: ContainerState { config, mac },
            pid,
            tcp: TcpConnections::default(),
            externals: HashMap::new(),
            unaccepted: Unaccepted::default(),
            memory: MemoryMode::default(),
            leaves_running: false,
        })
    }

    /// Says what is to become of its TCP connections (by default they are carried), and of those that it does not accept.
    #[must_use]
    pub fn with_connections(self, tcp: TcpConnections, unaccepted: Unaccepted) -> Self {
        Self { tcp, unaccepted, ..self }
    }

    /// Says whether it is to run on afterwards; by default it ends.
    #[must_use]
    pub fn running_on(self, leaves_running: bool) -> Self {
        Self { leaves_running, ..self }
    }

    /// Says how its memory is to be stored; by default while it is frozen.
    #[must_use]
    pub fn stored(self, memory: MemoryMode) -> Self {
        Self { memory, ..self }
    }

    /// Says why its memory cannot be stored but while it is frozen.
    #[must_use]
    pub fn stored_at_once(self, why: &str) -> Self {
        let memory = if self.memory.mode == Mode::Precopy { self.memory.but(why) } else { self.memory };
        Self { memory, ..self }
    }

    /// Says which files that are not its own it may have open: keys by device and inode.
    #[must_use]
    pub fn with_externals(self, externals: HashMap<(u64, u64), String>) -> Self {
        Self { externals, ..self }
    }

    /// What the checkpoint will say of it.
    pub fn state(&self) -> &ContainerState {
        &self.state
    }

    /// Its first process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Everything in it that a checkpoint would refuse, found without freezing it.
    pub fn preflight(&self, registry: &Registry) -> Result<Vec<Refusal>, ContainerCaptureError> {
        let mut found = preflight::look(self.pid, &self.options(registry)?)?;
        found.extend(groups::examine(&self.record.cgroup, self.pid)?);
        Ok(found)
    }

    /// Fails with everything that [`Self::preflight`] finds.
    pub fn refuse_early(&self, registry: &Registry) -> Result<(), ContainerCaptureError> {
        Ok(Refusals::check(self.preflight(registry)?)?)
    }

    /// Fails where it could not be frozen in the way that a hand-over needs ([`CapturedContainer::seal`]).
    pub fn refuse_unsealable(&self) -> Result<(), ContainerCaptureError> {
        Ok(self.record.cgroup.check_freezer()?)
    }

    fn options(&self, registry: &Registry) -> Result<checkpoint::Options, ContainerCaptureError> {
        let path = registry.paths(&self.record.config.name).log();
        let log = match std::fs::metadata(&path) {
            Ok(log) => log,
            Err(source) => return Err(ContainerCaptureError::Log { path, source }),
        };
        let mut externals = self.externals.clone();
        externals.insert((log.dev(), log.ino()), LOG_KEY.to_owned());
        Ok(checkpoint::Options {
            container: true,
            control_group: self.record.cgroup.mark(),
            externals,
            tcp: self.tcp,
            unaccepted: self.unaccepted,
            leaves_running: self.leaves_running,
            memory: self.memory.clone(),
            kept_terminal: self.record.config.terminal.then_some(terminal::NUMBER),
        })
    }

    /// Freezes it and puts everything about it into `sink`. Dropping the result lets it run on.
    pub fn capture(
        self,
        registry: &Registry,
        sink: &mut dyn Sink,
        report: &mut Report,
    ) -> Result<CapturedContainer, ContainerCaptureError> {
        let paths = registry.paths(&self.record.config.name);
        let options = self.options(registry)?;
        limosa_image::put(sink, SECTION, &self.state)?;
        let captured = checkpoint::capture(self.pid, sink, &options, report)?;
        Refusals::check(groups::examine(&self.record.cgroup, self.pid)?)?;
        let groups = groups::capture(&self.record.cgroup, &captured.own_pids())?;
        limosa_image::put(sink, groups::SECTION, &groups)?;
        report.phase("filesystem", |_| store_layer(&paths.upper(), sink))?;
        let mut content = std::fs::File::open(paths.log())
            .map_err(|source| ContainerCaptureError::Log { path: paths.log(), source })?;
        sink.blob(LOG_BLOB, &mut content)?;
        Ok(CapturedContainer { record: self.record, captured, disconnected: false })
    }
}

/// Streams the archive of the layer into the sink: the archive is made on a thread of its own.
fn store_layer(upper: &std::path::Path, sink: &mut dyn Sink) -> Result<(), ContainerCaptureError> {
    let (mut reader, writer) = io::pipe().map_err(ContainerCaptureError::Pipe)?;
    std::thread::scope(|scope| {
        let archiving = scope.spawn(move || layer::archive(upper, writer).map(drop));
        let stored = sink.blob(LAYER_BLOB, &mut reader);
        drop(reader);
        let archived = archiving.join().unwrap_or(Err(LayerError::Stream {
            operation: "write",
            source: io::Error::other("the archiving thread panicked"),
        }));
        // A sink that failed broke the pipe: its error is the cause.
        stored?;
        archived?;
        Ok(())
    })
}

impl CapturedContainer {
    /// Cuts it from the network: from here on nobody hears from it, whatever happens to its sockets.
    pub fn disconnect(&mut self) -> Result<(), ContainerCaptureError> {
        if let Some(name) = &self.record.host_link {
            link::set_up(name, false)?;
            self.disconnected = true;
        }
        Ok(())
    }

    /// Which container it is: [`Record::instance`].
    pub fn instance(&self) -> String {
        self.record.instance()
    }

    /// Freezes it in a way that outlives this process: when a tracer dies, its tracees run on.
    pub fn seal(&self) -> Result<(), ContainerCaptureError> {
        Ok(self.record.cgroup.freeze(true)?)
    }

    /// Lets it run on. What is still to be stored of its memory, while it does, is returned.
    pub fn release(self) -> Result<Remainder, ContainerCaptureError> {
        if self.disconnected
            && let Some(name) = &self.record.host_link
        {
            link::set_up(name, true)?;
        }
        self.record.cgroup.freeze(false)?;
        Ok(self.captured.release()?)
    }

    /// Ends it and removes all of it here: it lives on in the checkpoint, or elsewhere. Whoever has it in the foreground is
    /// told its `fate`.
    pub fn end(mut self, registry: &Registry, fate: &str) -> Result<(), ContainerCaptureError> {
        Fate::tell(&registry.paths(&self.record.config.name), fate);
        // Sockets that are closed say so to their peers: nobody may hear it.
        if !self.disconnected {
            self.disconnect()?;
        }
        self.captured.end()?;
        self.record.cgroup.freeze(false)?;
        Ok(remove(registry, &self.record.config.name, true)?)
    }
}

/// A container could not be checkpointed. It runs on.
#[derive(Debug, thiserror::Error)]
pub enum ContainerCaptureError {
    /// It is not there, or its record cannot be read.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Things in it that cannot be carried, found before it was frozen.
    #[error(transparent)]
    Refused(#[from] Refusals),
    /// It does not run.
    #[error("container {name} does not run: there is nothing to checkpoint")]
    NotRunning {
        /// Its name.
        name: Name,
    },
    /// Its processes.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The checkpoint could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Its writable layer.
    #[error("cannot store the container's writable layer")]
    Layer(#[from] LayerError),
    /// Its read-only layer.
    #[error("cannot identify the container's read-only layer")]
    Identity(#[from] IdentityError),
    /// Its log.
    #[error("cannot read the container's log {}", path.display())]
    Log {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No pipe for the layer's archive.
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    /// Its interface.
    #[error("cannot change the container's interface")]
    Link(#[from] LinkError),
    /// Its control groups.
    #[error("cannot freeze, thaw or read the container's control groups")]
    Cgroup(#[from] CgroupError),
    /// What is left of it here could not be removed.
    #[error("the checkpoint is complete, but the container's remains could not be removed")]
    Remove(#[from] StopError),
}
