//! Running a container in the foreground: its output here, our signals there, its exit status back.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use limosa_kernel::signals::Signals;
use limosa_kernel::spawn::{Exit, Process};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::process::Signal;

use crate::config::Config;
use crate::fate::Fate;
use crate::logs::{INTERVAL, copy_new};
use crate::rebuild::Restored;
use crate::registry::Registry;
use crate::run::{RunError, Started, Streams, record_and_release, run, start};
use crate::shell::{Shell, ShellOptions};
use crate::terminal::{self, Keep, Manner};

/// Signals that are passed on.
const PASSED_ON: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];

/// Makes a container, starts its command, and copies what it writes to standard output until it ends.
///
/// `SIGINT`, `SIGTERM`, `SIGHUP` and `SIGQUIT` go to the command; the second of them kills it.
pub fn run_in_foreground(registry: &Registry, config: &Config) -> Result<Ended, RunError> {
    let signals = gather(&[])?;
    let path = registry.paths(&config.name).log();
    let started = run(registry, config)?;
    let fate = watch(registry, config)?;
    let mut log = File::open(&path).map_err(|source| RunError::Log { path: path.clone(), source })?;
    let mut sender = Sender::default();
    let mut output = io::stdout();
    let mut ended = false;
    while !ended {
        ended = wait(&[started.process.as_fd(), signals.as_fd()])?[0];
        sender.pass_on(&signals, &started.process);
        if let Err(source) = copy_new(&mut log, &mut output)
            && source.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(RunError::Log { path, source });
        }
    }
    conclude(&started.process, fate)
}

fn watch(registry: &Registry, config: &Config) -> Result<Fate, RunError> {
    let path = registry.paths(&config.name).fate();
    Fate::watch(&registry.paths(&config.name)).map_err(|source| RunError::Log { path, source })
}

/// The end of a container that was in the foreground: its exit status, and what became of it if that was not its own end.
fn conclude(process: &Process, fate: Fate) -> Result<Ended, RunError> {
    let exit = process.wait().map_err(|source| RunError::Wait { source })?;
    Ok(Ended { exit, fate: fate.told() })
}

/// How a container in the foreground ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What its first process did.
    pub exit: Exit,
    /// What became of it, if that was not its own end.
    pub fate: Option<String>,
}

/// Makes a container and starts its command on a terminal of the container, joined to ours until it ends.
pub fn run_on_terminal(registry: &Registry, config: &Config) -> Result<Ended, RunError> {
    let (started, outside, mut log) = start_on_terminal(registry, config, |_, _| Ok(()))?;
    let fate = watch(registry, config)?;
    terminal::join(&outside, started.process.as_fd(), Some(&mut log), Manner::Foreground)
        .map_err(|source| RunError::Terminal { source })?;
    conclude(&started.process, fate)
}

/// Makes a container and starts its command on a terminal of the container, which `keep` keeps.
pub fn run_detached_on_terminal(
    registry: &Registry,
    config: &Config,
    keep: Keep,
) -> Result<Started, RunError> {
    let keep = |master: &OwnedFd, pid| keep(master.try_clone()?, pid, &config.name);
    start_on_terminal(registry, config, keep).map(|(started, ..)| started)
}

/// Joins the terminal of a container that was restored, whose first process is our child, to ours until it ends; what
/// became of it, if that was not its own end.
pub fn join_restored(
    registry: &Registry,
    restored: &Restored,
    master: &OwnedFd,
) -> Result<Option<String>, RunError> {
    let paths = registry.paths(&restored.name);
    let failed = |source| RunError::Terminal { source };
    let pidfd = limosa_kernel::task::pidfd_open(restored.pid).map_err(|source| RunError::Wait { source })?;
    let fate = Fate::watch(&paths).map_err(|source| RunError::Log { path: paths.fate(), source })?;
    let mut log = File::from(crate::run::open_log(&paths.log())?);
    let flags = rustix::fs::fcntl_getfl(master).map_err(|errno| failed(errno.into()))?;
    rustix::fs::fcntl_setfl(master, flags | OFlags::NONBLOCK).map_err(|errno| failed(errno.into()))?;
    terminal::show_anew(master);
    terminal::join(master, pidfd.as_fd(), Some(&mut log), Manner::Foreground).map_err(failed)?;
    Ok(fate.told())
}

/// Makes a container and starts its command on a terminal of the container: with its master and its log. `prepared` is
/// called with master and PID before the command starts.
fn start_on_terminal(
    registry: &Registry,
    config: &Config,
    prepared: impl FnOnce(&OwnedFd, i32) -> io::Result<()>,
) -> Result<(Started, OwnedFd, File), RunError> {
    let reservation = registry.reserve(&config.name)?;
    let shell = Shell::prepare(config, reservation.paths(), &ShellOptions::default())?;
    let log = crate::run::open_log(&reservation.paths().log())?;
    let mount = shell.namespace(limosa_kernel::namespace::Kind::Mount)?;
    let pair = terminal::open(mount).map_err(|source| RunError::Terminal { source })?;
    let held = start(&shell, Streams::Terminal(pair.inside))?;
    prepared(&pair.outside, held.pid()).map_err(|source| RunError::Terminal { source })?;
    let started = record_and_release(registry, &shell, held)?;
    shell.keep();
    reservation.keep();
    Ok((started, pair.outside, File::from(log)))
}

/// Gathers the signals that are passed on, and `more`.
pub(crate) fn gather(more: &[Signal]) -> Result<Signals, RunError> {
    let numbers: Vec<i32> = PASSED_ON.iter().chain(more).map(|signal| signal.as_raw()).collect();
    Signals::gather(&numbers).map_err(|source| RunError::Wait { source })
}

/// Passes signals on, and knows whether it has before.
#[derive(Debug, Default)]
struct Sender {
    sent: bool,
}

impl Sender {
    fn pass_on(&mut self, signals: &Signals, process: &Process) {
        while let Some(signal) = signals.next().and_then(Signal::from_named_raw) {
            let signal = if self.sent { Signal::KILL } else { signal };
            if !self.sent && io::stderr().is_terminal() {
                eprintln!("limosa: passed the signal on; the next one kills the container");
            }
            self.sent = true;
            // It may have ended just now.
            let _ = process.signal(signal);
        }
    }
}

/// Waits until one of the descriptors is readable, or a short while: which are.
fn wait<const N: usize>(descriptors: &[BorrowedFd<'_>; N]) -> Result<[bool; N], RunError> {
    let mut polled = descriptors.map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
    let timeout = Timespec { tv_sec: 0, tv_nsec: INTERVAL.subsec_nanos().into() };
    match rustix::event::poll(&mut polled, Some(&timeout)) {
        Ok(_) => Ok(polled.map(|descriptor| !descriptor.revents().is_empty())),
        Err(rustix::io::Errno::INTR) => Ok([false; N]),
        Err(errno) => {
            Err(RunError::Wait { source: limosa_kernel::Error::new("poll", "the container", errno) })
        }
    }
}
