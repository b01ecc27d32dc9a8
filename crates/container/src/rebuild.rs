//! Restore of a container: a new shell, its writable layer, its process tree.
//!
//! ```text
//!   prepare ──► Prepared (built, cut from the network, not running) ── start ──► Running
//! ```
//!
//! Dropped before it is started, nothing of it is left.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use limosa_engine::resources::processor::Rule;
use limosa_engine::restore::{Loaded, Options, Place, Planned};
use limosa_engine::{Report, RestoreError};
use limosa_image::{Checkpoint, ReadError};
use limosa_kernel::namespace::TimeOffsets;

use crate::capture::{ContainerState, LAYER_BLOB, LOG_BLOB, SECTION};
use crate::config::Name;
use crate::groups::{self, Hierarchy};
use crate::layer::{self, LayerError};
use crate::registry::{Init, Record, Registry, RegistryError, Reservation};
use crate::rootfs::{self, Identity, IdentityError};
use crate::run::{LOG_KEY, RunError, open_log};
use crate::shell::{Shell, ShellError, ShellOptions};
use crate::terminal::Keep;

/// A container that is built and does not run. Dropped, all of it is removed.
///
/// The fields are dropped in this order: first the processes, then what they are in.
pub struct Prepared {
    loaded: Loaded,
    shell: Shell,
    reservation: Reservation,
    record: Record,
}

/// A container that runs again.
#[derive(Debug)]
pub struct Restored {
    /// Its first process, a child of the caller.
    pub pid: i32,
    /// Its name here.
    pub name: Name,
}

/// Whether the checkpoint is one of a container.
pub fn holds_container(checkpoint: &Checkpoint) -> bool {
    checkpoint.section(SECTION).is_some()
}

/// What the checkpoint says of its container; none if it is one of a process tree.
pub fn container_state(checkpoint: &Checkpoint) -> Result<Option<ContainerState>, ReadError> {
    if holds_container(checkpoint) { checkpoint.state(SECTION).map(Some) } else { Ok(None) }
}

/// A read-only layer here that was found to be the one that a container had. To find that takes a fraction of a
/// second: a migration does it once, before anything is frozen.
#[derive(Debug, PartialEq, Eq)]
pub struct CheckedRoot {
    path: PathBuf,
    identity: Option<Identity>,
}

/// Checks that the read-only layer here is the one that the container had.
pub fn check_root(state: &ContainerState) -> Result<CheckedRoot, RebuildError> {
    let checked =
        CheckedRoot { path: state.config.rootfs.clone(), identity: state.config.rootfs_identity.clone() };
    let Some(wanted) = &checked.identity else { return Ok(checked) };
    match rootfs::identity(&checked.path)?.difference(wanted) {
        None => Ok(checked),
        Some(difference) => Err(RebuildError::OtherRoot { path: checked.path, difference }),
    }
}

impl CheckedRoot {
    /// Whether it is the one of this container.
    fn is_of(&self, state: &ContainerState) -> bool {
        self.path == state.config.rootfs && self.identity == state.config.rootfs_identity
    }
}

/// What is to be different here.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Another name.
    pub name: Option<Name>,
    /// Where its read-only layer is.
    pub rootfs: Option<PathBuf>,
    /// Where the files are that are not the container's own, by the keys that the checkpoint has for them.
    pub externals: HashMap<String, PathBuf>,
    /// Which features of the processor must be there.
    pub processor: Rule,
}

/// Builds the container in `checkpoint`, with some changes.
pub fn prepare(
    registry: &Registry,
    checkpoint: &Checkpoint,
    changes: Changes,
    report: &mut Report,
) -> Result<Prepared, RebuildError> {
    prepare_on(registry, checkpoint, changes, None, report)
}

/// Likewise, on a read-only layer that has been `checked` already, if it is the right one.
pub(crate) fn prepare_on(
    registry: &Registry,
    checkpoint: &Checkpoint,
    changes: Changes,
    checked: Option<&CheckedRoot>,
    report: &mut Report,
) -> Result<Prepared, RebuildError> {
    let mut state: ContainerState = checkpoint.state(SECTION)?;
    if let Some(name) = changes.name {
        state.config.name = name;
    }
    if let Some(rootfs) = changes.rootfs {
        state.config.rootfs = rootfs;
    }
    let config = state.config.clone();
    if !checked.is_some_and(|checked| checked.is_of(&state)) {
        report.phase("root", |_| check_root(&state))?;
    }
    // Checkpoints that are older have none.
    let groups =
        checkpoint.section(groups::SECTION).map(|_| checkpoint.state::<Vec<Hierarchy>>(groups::SECTION));
    let groups = groups.transpose()?;
    if let Some(groups) = &groups {
        groups::check(groups).map_err(ShellError::from)?;
    }
    let processor = changes.processor;
    let planned = Planned::new(checkpoint, Options { processor, ..Options::default() })?;
    let reservation = registry.reserve(&config.name)?;
    let paths = reservation.paths().clone();
    report.phase("filesystem", |_| -> Result<(), RebuildError> {
        layer::extract(checkpoint.blob(LAYER_BLOB)?, &paths.upper())?;
        let mut log = fs::File::from(open_log(&paths.log())?);
        io::copy(&mut checkpoint.blob(LOG_BLOB)?, &mut log)
            .map_err(|source| RebuildError::Log { path: paths.log(), source })?;
        Ok(())
    })?;
    let mut externals = changes.externals;
    externals.insert(LOG_KEY.to_owned(), paths.log());
    let clocks = planned.tree().namespaces.clocks;
    let options = ShellOptions {
        time_offsets: clocks.map_or_else(TimeOffsets::default, |clocks| clocks.offsets()),
        // Checkpoints that are older say nothing of it.
        configure_network: planned.tree().namespaces.interfaces.is_none(),
        connect: false,
        new_layer: false,
        mac: state.mac,
    };
    let shell = report.phase("shell", |_| Shell::prepare(&config, &paths, &options))?;
    let planned = planned.with(Options {
        root: None,
        place: Some(place(&shell)?),
        externals,
        detached: true,
        processor,
    });
    let loaded = planned.build(report)?;
    if let Some(groups) = &groups {
        groups::rebuild(shell.cgroup(), groups, &loaded.pids()).map_err(ShellError::from)?;
    }
    let record = shell.record(Some(Init::of(loaded.root())?));
    Ok(Prepared { loaded, shell, reservation, record })
}

fn place(shell: &Shell) -> Result<Place, RebuildError> {
    let namespaces = shell
        .namespaces()
        .map(|(kind, namespace)| Ok((kind, namespace.try_clone_to_owned().map_err(ShellError::Descriptor)?)))
        .collect::<Result<Vec<_>, ShellError>>()?;
    let cgroups = shell.cgroup().open().map_err(ShellError::from)?.into_iter().map(Into::into).collect();
    Ok(Place { namespaces, cgroups })
}

impl Prepared {
    /// Its name here.
    pub fn name(&self) -> &Name {
        &self.record.config.name
    }

    /// Its first process.
    pub fn pid(&self) -> i32 {
        self.loaded.root()
    }

    /// The master of its terminal, if it has one: it hangs up when that is closed.
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.loaded.take_terminal()
    }

    /// Has its terminal, if it has one, kept by `keep`.
    pub fn have_terminal_kept(&mut self, keep: Keep) -> Result<(), RebuildError> {
        let Some(master) = self.take_terminal() else { return Ok(()) };
        keep(master, self.pid(), self.name()).map_err(RebuildError::Terminal)
    }

    /// Lets it run, reachable, and tells its neighbours where it is now.
    pub fn start(self, registry: &Registry, report: &mut Report) -> Result<Restored, RebuildError> {
        registry.save(&self.record)?;
        // Connected only when it is sure to stay: sockets of one that ends after all would say so to their peers.
        let connect = || {
            self.shell.connect()?;
            // Before its first packets, so that the answers find their way.
            if let Err(error) = self.shell.announce() {
                // Its neighbours will find out by themselves, later.
                tracing::warn!(%error, "the container's addresses could not be announced");
            }
            Ok::<_, RebuildError>(())
        };
        let started = self.loaded.start_with(report, connect)?;
        self.shell.keep();
        self.reservation.keep();
        Ok(Restored { pid: started.root, name: self.record.config.name })
    }
}

/// A container could not be restored. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// Its processes.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The checkpoint.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Its name or files.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Its shell.
    #[error(transparent)]
    Shell(#[from] ShellError),
    /// Its log or first process.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Nobody keeps its terminal.
    #[error("cannot have the container's terminal kept")]
    Terminal(#[source] io::Error),
    /// Its writable layer.
    #[error("cannot put the container's writable layer back")]
    Layer(#[from] LayerError),
    /// Its log.
    #[error("cannot write the container's log {}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The read-only layer could not be looked at.
    #[error("cannot identify the read-only layer here")]
    Identity(#[from] IdentityError),
    /// The read-only layer is another one.
    #[error(
        "the read-only layer {} is not the one the container had: {difference}; it must be the same on both hosts",
        path.display()
    )]
    OtherRoot {
        /// Its path.
        path: PathBuf,
        /// What differs.
        difference: &'static str,
    },
}
