//! A container without processes: its namespaces, with root, interface and host name in place, and its
//! control groups.
//!
//! `limosa run` starts a command in a shell ([`crate::run`]); restore builds a process tree in one. The PID
//! namespace is made by whoever starts the first process; `/proc` is mounted then.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_kernel::namespace::{self, Kind, TimeOffsets};
use limosa_kernel::spawn::{Spawn, Step};

use crate::cgroup::{Cgroup, CgroupError};
use crate::config::Config;
use crate::link::{self, LinkError};
use crate::registry::{Init, Paths, Record, Registry, RegistryError, Reservation};
use crate::root::{self, RootError};
use crate::undo::Undo;

/// How a shell is prepared beyond what the container's configuration says.
#[derive(Clone, Copy, Debug)]
pub struct ShellOptions {
    /// What its clocks show beyond the host's.
    pub time_offsets: TimeOffsets,
    /// Whether `eth0` gets the configured addresses and routes; a restore applies the captured ones itself.
    pub configure_network: bool,
    /// Whether the host's end of the veth pair goes up at once. If not, nothing reaches the container, nor
    /// does it reach anything, until [`Shell::connect`]: source and destination of a migration never both answer.
    pub connect: bool,
    /// Whether the writable layer is new: its root then gets owner and mode of the read-only layer's. One that
    /// was extracted has them.
    pub new_layer: bool,
    /// The hardware address of `eth0`; chosen by the kernel if `None`.
    pub mac: Option<[u8; 6]>,
}

impl Default for ShellOptions {
    /// For a new container: connected, configured, with the host's clocks.
    fn default() -> Self {
        Self {
            time_offsets: TimeOffsets::default(),
            configure_network: true,
            connect: true,
            new_layer: true,
            mac: None,
        }
    }
}

/// The prepared namespaces and control groups. Dropped without [`Shell::keep`], everything is removed.
#[derive(Debug)]
pub struct Shell {
    config: Config,
    namespaces: Vec<(Kind, OwnedFd)>,
    host_network: OwnedFd,
    cgroup: Cgroup,
    host_link: Option<String>,
    undo: Undo,
}

impl Shell {
    /// Prepares a shell for `config`, whose directories are `paths` (see [`crate::Registry::reserve`]).
    /// Interfaces belong to the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// What could not be done; everything done before is undone then.
    pub fn prepare(config: &Config, paths: &Paths, options: &ShellOptions) -> Result<Self, ShellError> {
        if !config.rootfs.is_dir() {
            return Err(ShellError::NoRoot { path: config.rootfs.clone() });
        }
        root::prepare_layer(&config.rootfs, paths, options.new_layer)?;
        let mut shell = Self {
            config: config.clone(),
            namespaces: Vec::new(),
            host_network: namespace::of_thread(Kind::Network)?,
            cgroup: Cgroup::create(&config.name, config.memory, |cgroup| write_down(cgroup, paths))?,
            host_link: None,
            undo: Undo::default(),
        };
        let cgroup = shell.cgroup.clone();
        shell.undo.add(move || {
            if let Err(error) = cgroup.remove() {
                tracing::warn!(%error, "a control group of a container that was not started is left");
            }
        });
        shell.namespaces.push((Kind::Cgroup, cgroup_namespace(&shell.cgroup)?));
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| make_namespaces(config, paths, options.time_offsets));
            thread.join().unwrap_or(Err(ShellError::Panicked))
        })?;
        shell.namespaces.extend(made);
        if let Some(network) = &config.network {
            let name = link::host_name(&config.name);
            link::create(network, &name, shell.namespace(Kind::Network)?, options.mac)?;
            shell.host_link = Some(name.clone());
            shell.undo.add(move || link::delete(&name));
            if options.configure_network {
                link::inside(shell.namespace(Kind::Network)?, || link::configure(network))?;
            }
            if options.connect {
                shell.connect()?;
            }
        }
        Ok(shell)
    }

    /// The namespaces: all kinds but user (which is the host's) and pid. They live as long as the shell or
    /// any process in them.
    pub fn namespaces(&self) -> impl Iterator<Item = (Kind, BorrowedFd<'_>)> {
        self.namespaces.iter().map(|(kind, descriptor)| (*kind, descriptor.as_fd()))
    }

    /// One of the namespaces.
    pub fn namespace(&self, kind: Kind) -> Result<BorrowedFd<'_>, ShellError> {
        let found = self.namespaces.iter().find(|(other, _)| *other == kind);
        found.map(|(_, descriptor)| descriptor.as_fd()).ok_or(ShellError::NoNamespace { kind })
    }

    /// The control groups.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The host's end of the veth pair.
    pub fn host_link(&self) -> Option<&str> {
        self.host_link.as_deref()
    }

    /// The configuration it was prepared for.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Mounts `/proc` for the PID namespace behind `pid_namespace`, in which a first process must exist.
    /// A short-lived process in that namespace does it, so one PID is used up and free again.
    pub fn mount_proc(&self, pid_namespace: BorrowedFd<'_>) -> Result<(), ShellError> {
        let mount = self.namespace(Kind::Mount)?.try_clone_to_owned().map_err(ShellError::Descriptor)?;
        let done = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // For the children of this thread only.
                namespace::enter(pid_namespace, Kind::Pid)?;
                let steps = vec![Step::Enter(mount, Kind::Mount), Step::MountProc(c"/proc".to_owned())];
                Spawn { steps, ..Spawn::default() }.run()
            });
            thread.join().map_err(|_| ShellError::Panicked)
        })?;
        done?;
        Ok(())
    }

    /// Lets the container and the host's network reach each other.
    pub fn connect(&self) -> Result<(), ShellError> {
        self.set_link(true)
    }

    /// Cuts the container from the host's network; everything inside stays as it is.
    pub fn disconnect(&self) -> Result<(), ShellError> {
        self.set_link(false)
    }

    fn set_link(&self, up: bool) -> Result<(), ShellError> {
        let Some(name) = &self.host_link else { return Ok(()) };
        Ok(link::inside(&self.host_network, || link::set_up(name, up))?)
    }

    /// Tells the link that the container's addresses are here now: gratuitous ARP and unsolicited
    /// neighbour advertisements. The container must be connected.
    pub fn announce(&self) -> Result<(), ShellError> {
        let Some(network) = &self.config.network else { return Ok(()) };
        Ok(link::inside(self.namespace(Kind::Network)?, || link::announce_all(network))?)
    }

    /// Records the container, whose first process is `init` (a PID in the caller's PID namespace), and keeps
    /// everything: from now on `limosa ps`, `stop` and the like know it.
    pub fn register(
        self,
        registry: &Registry,
        reservation: Reservation,
        init: i32,
    ) -> Result<Record, RegistryError> {
        let init = Init::of(init)?;
        let record = self.record(Some(init));
        registry.save(&record)?;
        self.keep();
        reservation.keep();
        Ok(record)
    }

    /// The record of the container.
    pub(crate) fn record(&self, init: Option<Init>) -> Record {
        Record::new(self.config.clone(), init, self.cgroup.clone(), self.host_link.clone())
    }

    /// Keeps everything: from now on it belongs to the processes in it, and to the container's record.
    pub fn keep(mut self) {
        self.undo.release();
    }
}

/// Writes down which control groups will be made, for [`Registry::sweep`] after a kill.
fn write_down(cgroup: &Cgroup, paths: &Paths) -> Result<(), ShellError> {
    let path = paths.cgroup();
    let write = || std::fs::write(&path, serde_json::to_vec(cgroup)?);
    write().map_err(|source| RootError::Io { operation: "write", path: path.clone(), source }.into())
}

/// A cgroup namespace whose root is the container's groups: it is made by a process in them.
fn cgroup_namespace(cgroup: &Cgroup) -> Result<OwnedFd, ShellError> {
    let mut steps: Vec<Step> = cgroup.open()?.into_iter().map(|file| Step::JoinCgroup(file.into())).collect();
    steps.push(Step::Unshare(Kind::Cgroup));
    let held = Spawn { steps, ..Spawn::default() }.start()?;
    Ok(namespace::of_process(held.pid(), Kind::Cgroup)?)
}

/// Makes the namespaces in the calling thread, which ends afterwards, and furnishes them.
fn make_namespaces(
    config: &Config,
    paths: &Paths,
    time_offsets: TimeOffsets,
) -> Result<Vec<(Kind, OwnedFd)>, ShellError> {
    const KINDS: [Kind; 5] = [Kind::Mount, Kind::Network, Kind::Uts, Kind::Ipc, Kind::Time];
    namespace::unshare_directories()?;
    namespace::unshare(&KINDS)?;
    namespace::set_time_offsets(time_offsets)?;
    namespace::set_host_name(config.name.as_str())?;
    link::loopback_up()?;
    // Opened first: the new root has no /proc yet.
    let descriptors = KINDS
        .into_iter()
        .map(|kind| Ok((kind, namespace::of_thread(kind)?)))
        .collect::<Result<Vec<_>, limosa_kernel::Error>>()?;
    root::mount_all(&config.rootfs, paths)?;
    Ok(descriptors)
}

/// A shell could not be prepared or changed.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The read-only layer is no directory.
    #[error("the root filesystem {} is not a directory: give one with --rootfs", path.display())]
    NoRoot {
        /// Its path.
        path: std::path::PathBuf,
    },
    /// The control groups could not be made.
    #[error("cannot make the container's control groups")]
    Cgroup(#[from] CgroupError),
    /// The root could not be put together.
    #[error("cannot put the container's root together")]
    Root(#[from] RootError),
    /// The network could not be set up.
    #[error("cannot set up the container's network")]
    Link(#[from] LinkError),
    /// A namespace could not be made or entered.
    #[error("cannot prepare the container's namespaces")]
    Namespace(#[from] limosa_kernel::Error),
    /// The shell has no namespace of this kind.
    #[error("the container has no {kind} namespace of its own")]
    NoNamespace {
        /// The kind.
        kind: Kind,
    },
    /// A descriptor could not be duplicated.
    #[error("cannot duplicate a namespace's descriptor: the limit of open files is reached")]
    Descriptor(#[source] std::io::Error),
    /// A thread of this program panicked: a bug.
    #[error("internal error: the thread that prepares the container's namespaces panicked")]
    Panicked,
}
