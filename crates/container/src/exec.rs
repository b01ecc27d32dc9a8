//! Running another command in a container.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::spawn::{Exit, Held, Program, Spawn, Step};

use crate::cgroup::CgroupError;
use crate::config::Name;
use crate::registry::{Record, Registry, RegistryError};
use crate::run::{Streams, stream_steps};
use crate::terminal::{self, Manner};

/// Runs `command` in the namespaces and control groups of the running container `name`, with our standard
/// streams, or with a terminal of the container joined to ours; waits for its end.
pub fn exec(registry: &Registry, name: &Name, command: &[String], tty: bool) -> Result<Exit, ExecError> {
    let record = registry.load(name)?;
    let namespaces = Namespaces::open(&record)?;
    let mut steps = Vec::new();
    for file in record.cgroup.open()? {
        steps.push(Step::JoinCgroup(file.into()));
    }
    let pair = if tty {
        Some(terminal::open(namespaces.mount()?).map_err(|source| ExecError::Terminal { source })?)
    } else {
        None
    };
    let (pid, rest) = namespaces.take();
    steps.extend(rest.into_iter().map(|(kind, descriptor)| Step::Enter(descriptor, kind)));
    let mut outside = None;
    if let Some(pair) = pair {
        outside = Some(pair.outside);
        steps.push(Step::NewSession);
        steps.extend(
            stream_steps(Streams::Terminal(pair.inside)).map_err(|source| ExecError::Terminal { source })?,
        );
    }
    steps.push(Step::NewSessionKeyring);
    steps.push(Step::ChangeDirectory(c"/".to_owned()));
    steps.extend([Step::Umask(0o022), Step::ResetSignals, Step::CloseOthersOnExec]);
    let refused =
        |source| ExecError::Command { command: command.first().cloned().unwrap_or_default(), source };
    let program = Program::new(command, &record.config.environment_strings(), record.config.search_path());
    let program = program.map_err(refused)?;
    let held = start_in(pid, Spawn { new_pid_namespace: false, steps, program: Some(program) })?;
    let process = held.release().map_err(refused)?;
    if let Some(outside) = outside {
        terminal::join(&outside, process.as_fd(), None, Manner::Foreground)
            .map_err(|source| ExecError::Terminal { source })?;
    }
    process.wait().map_err(|source| ExecError::Start { source })
}

/// The namespaces of a running container.
struct Namespaces {
    pid: OwnedFd,
    rest: Vec<(Kind, OwnedFd)>,
}

impl Namespaces {
    /// Opens those of the container's first process, and makes sure that it was that process's.
    fn open(record: &Record) -> Result<Self, ExecError> {
        let stopped = || ExecError::NotRunning { name: record.config.name.clone() };
        let pid = record.running().ok_or_else(stopped)?;
        let open = |kind| namespace::of_process(pid, kind);
        // The mount namespace after those whose files might have to be looked up by path.
        let kinds = [Kind::Cgroup, Kind::Uts, Kind::Ipc, Kind::Network, Kind::Time, Kind::Mount];
        let opened = (|| {
            let rest = kinds.into_iter().map(|kind| Ok((kind, open(kind)?)));
            Ok(Self { rest: rest.collect::<limosa_kernel::Result<_>>()?, pid: open(Kind::Pid)? })
        })();
        if record.running().is_none() {
            return Err(stopped());
        }
        opened.map_err(|source| ExecError::Start { source })
    }

    fn mount(&self) -> Result<BorrowedFd<'_>, ExecError> {
        let found = self.rest.iter().find(|(kind, _)| *kind == Kind::Mount);
        found.map(|(_, descriptor)| descriptor.as_fd()).ok_or(ExecError::Panicked)
    }

    fn take(self) -> (OwnedFd, Vec<(Kind, OwnedFd)>) {
        (self.pid, self.rest)
    }
}

/// Starts a child in the PID namespace behind `pid_namespace`: only children made after entering it are there,
/// so a thread of its own enters it.
fn start_in(pid_namespace: OwnedFd, spawn: Spawn) -> Result<Held, ExecError> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            namespace::enter(pid_namespace, Kind::Pid)?;
            spawn.start()
        });
        thread.join().map_err(|_| ExecError::Panicked)?.map_err(|source| ExecError::Start { source })
    })
}

/// A command could not be run in a container.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The container.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The container does not run.
    #[error("container {name} does not run: `limosa ps` shows which do")]
    NotRunning {
        /// Its name.
        name: Name,
    },
    /// Its control groups.
    #[error("cannot join the container's control groups")]
    Cgroup(#[from] CgroupError),
    /// Its namespaces.
    #[error("cannot enter the container")]
    Start {
        /// The step that failed.
        #[source]
        source: limosa_kernel::Error,
    },
    /// The command is not there, or no program.
    #[error("cannot execute {command:?} in the container: it must exist there and be executable")]
    Command {
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: limosa_kernel::Error,
    },
    /// The terminal.
    #[error("cannot join the container's terminal to this one")]
    Terminal {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A thread of this program panicked: a bug.
    #[error("internal error: the thread that enters the container panicked")]
    Panicked,
}
