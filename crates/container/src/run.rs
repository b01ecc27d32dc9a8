//! Starting a container: a shell, and the command as its first process.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use limosa_kernel::spawn::{Held, Process, Program, Spawn, Step};
use rustix::fs::OFlags;

use crate::config::Config;
use crate::registry::{Init, Record, Registry, RegistryError};
use crate::shell::{Shell, ShellError, ShellOptions};

/// The key under which a checkpoint knows a container's log, a file outside its root.
pub const LOG_KEY: &str = "container:log";

/// The standard streams of a container's first process.
#[derive(Debug)]
pub enum Streams {
    /// Input from `/dev/null`, output and errors appended to this file.
    Log(OwnedFd),
    /// A terminal of the container.
    Terminal(OwnedFd),
}

/// A container that runs.
#[derive(Debug)]
pub struct Started {
    /// Its first process, a child of the caller.
    pub process: Process,
    /// What the registry knows about it.
    pub record: Record,
}

/// Makes a container and starts its command, with output to its log.
///
/// # Errors
/// Why it could not; nothing is left then.
pub fn run(registry: &Registry, config: &Config) -> Result<Started, RunError> {
    let reservation = registry.reserve(&config.name)?;
    let shell = Shell::prepare(config, reservation.paths(), &ShellOptions::default())?;
    let log = open_log(&reservation.paths().log())?;
    let held = start(&shell, Streams::Log(log))?;
    let started = record_and_release(registry, &shell, held)?;
    shell.keep();
    reservation.keep();
    Ok(started)
}

/// The log, as a container's streams have it open: appending, so that several may write.
pub(crate) fn open_log(path: &std::path::Path) -> Result<OwnedFd, RunError> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    Ok(file.map_err(|source| RunError::Log { path: path.to_owned(), source })?.into())
}

/// Writes the container's record, then lets its first process become the command.
pub(crate) fn record_and_release(
    registry: &Registry,
    shell: &Shell,
    held: Held,
) -> Result<Started, RunError> {
    let record = shell.record(Some(Init::of(held.pid())?));
    registry.save(&record)?;
    let process = held.release().map_err(|source| command_error(shell.config(), source))?;
    Ok(Started { process, record })
}

/// Starts the first process of a container in its shell, PID 1 of a new PID namespace; it waits to be
/// released before it becomes the command.
pub fn start(shell: &Shell, streams: Streams) -> Result<Held, RunError> {
    let config = shell.config();
    let mut steps = Vec::new();
    for file in shell.cgroup().open().map_err(ShellError::from)? {
        steps.push(Step::JoinCgroup(file.into()));
    }
    for (kind, descriptor) in shell.namespaces() {
        let descriptor = descriptor.try_clone_to_owned().map_err(ShellError::Descriptor)?;
        steps.push(Step::Enter(descriptor, kind));
    }
    steps.push(Step::MountProc(c"/proc".to_owned()));
    steps.extend([Step::NewSession, Step::NewSessionKeyring]);
    steps.extend(stream_steps(streams).map_err(ShellError::Descriptor)?);
    steps.push(Step::ChangeDirectory(c"/".to_owned()));
    steps.extend([Step::Umask(0o022), Step::ResetSignals, Step::CloseOthersOnExec]);
    let program = Program::new(&config.command, &config.environment_strings(), config.search_path())
        .map_err(|source| command_error(config, source))?;
    let spawn = Spawn { new_pid_namespace: true, steps, program: Some(program) };
    spawn.start().map_err(|source| RunError::Start { source })
}

/// The steps by which a child gets its standard streams.
pub(crate) fn stream_steps(streams: Streams) -> io::Result<Vec<Step>> {
    let copy = |descriptor: &OwnedFd| descriptor.try_clone();
    Ok(match streams {
        Streams::Log(log) => vec![
            Step::Open { path: c"/dev/null".to_owned(), flags: OFlags::RDONLY, to: 0 },
            Step::Duplicate { from: copy(&log)?, to: 1 },
            Step::Duplicate { from: log, to: 2 },
        ],
        Streams::Terminal(terminal) => vec![
            Step::ControllingTerminal(copy(&terminal)?),
            Step::Duplicate { from: copy(&terminal)?, to: 0 },
            Step::Duplicate { from: copy(&terminal)?, to: 1 },
            Step::Duplicate { from: terminal, to: 2 },
        ],
    })
}

fn command_error(config: &Config, source: limosa_kernel::Error) -> RunError {
    let command = config.command.first().cloned().unwrap_or_default();
    RunError::Command { command, source }
}

/// A container could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its name or files.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Its shell.
    #[error(transparent)]
    Shell(#[from] ShellError),
    /// Its log.
    #[error("cannot open the container's log {}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its first process did not get into its namespaces.
    #[error("cannot start the container's first process")]
    Start {
        /// The step that failed.
        #[source]
        source: limosa_kernel::Error,
    },
    /// The container runs, but could not be waited for.
    #[error("cannot wait for the container's end; it goes on")]
    Wait {
        /// Why.
        #[source]
        source: limosa_kernel::Error,
    },
    /// Its terminal.
    #[error("cannot join the container's terminal to this one")]
    Terminal {
        /// Why.
        #[source]
        source: io::Error,
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
}
