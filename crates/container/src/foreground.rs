//! Running a container in the foreground: its output here, our signals there, its exit status back.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};

use limosa_kernel::signals::Signals;
use limosa_kernel::spawn::{Exit, Process};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;

use crate::config::Config;
use crate::logs::{INTERVAL, copy_new};
use crate::registry::Registry;
use crate::run::{RunError, Streams, record_and_release, run, start};
use crate::shell::{Shell, ShellOptions};
use crate::terminal;

/// Signals that are passed on.
const PASSED_ON: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];

/// Makes a container, starts its command, and copies what it writes to standard output until it ends.
///
/// `SIGINT`, `SIGTERM`, `SIGHUP` and `SIGQUIT` go to the command; the second of them kills it.
pub fn run_in_foreground(registry: &Registry, config: &Config) -> Result<Exit, RunError> {
    let signals = gather(&[])?;
    let path = registry.paths(&config.name).log();
    let started = run(registry, config)?;
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
    started.process.wait().map_err(|source| RunError::Wait { source })
}

/// Makes a container and starts its command on a terminal of the container, joined to ours until it ends.
pub fn run_on_terminal(registry: &Registry, config: &Config) -> Result<Exit, RunError> {
    let reservation = registry.reserve(&config.name)?;
    let shell = Shell::prepare(config, reservation.paths(), &ShellOptions::default())?;
    let log = crate::run::open_log(&reservation.paths().log())?;
    let mount = shell.namespace(limosa_kernel::namespace::Kind::Mount)?;
    let pair = terminal::open(mount).map_err(|source| RunError::Terminal { source })?;
    let held = start(&shell, Streams::Terminal(pair.inside))?;
    let started = record_and_release(registry, &shell, held)?;
    shell.keep();
    reservation.keep();
    terminal::join(&pair.outside, &started.process, Some(&mut File::from(log)))
        .map_err(|source| RunError::Terminal { source })?;
    started.process.wait().map_err(|source| RunError::Wait { source })
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
