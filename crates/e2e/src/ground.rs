//! Where a program under test runs: beside its clients in the sandbox, or in a container of a host.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use limosa_kernel::net::InNetns;
use rustix::process::Pid;

use crate::sandbox::Sandbox;

/// A place for one program.
pub trait Ground {
    /// The address at which the program is reached.
    fn address(&self) -> Ipv4Addr;

    /// A directory for the program's files, by the path that the program knows; everybody may write there.
    fn directory(&self) -> PathBuf;

    /// Where the test finds what the program knows by `path`.
    fn seen(&self, path: &Path) -> PathBuf;

    /// A path by which the program can execute `program`, a file of the test's.
    fn program(&self, program: &Path) -> Result<PathBuf>;

    /// Starts `command` as the leader of a session, in [`Self::directory`], with `NAME.out` and `NAME.err` there as its
    /// standard output and error. Gives its process, as the test sees it.
    fn start(&self, name: &str, command: &[&OsStr]) -> Result<Pid>;

    /// The process that was started as `root`, wherever it has gone since.
    fn root(&self, root: Pid) -> Pid;

    /// Puts the calling thread among the program's clients until the guard is dropped.
    fn among_clients(&self) -> Result<Option<InNetns>>;

    /// A directory for the clients' files.
    fn clients(&self) -> &Path;
}

/// Fails if the program `name`, started as `root`, has ended; says what it wrote.
pub fn check_alive(ground: &dyn Ground, name: &str, root: Pid) -> Result<()> {
    let pid = ground.root(root).as_raw_pid();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    if matches!(state, Some(state) if state != 'Z') {
        return Ok(());
    }
    let said = |end| fs::read_to_string(ground.seen(&ground.directory().join(format!("{name}.{end}"))));
    bail!("{name} has ended: {} {}", said("out").unwrap_or_default(), said("err").unwrap_or_default())
}

/// Beside the clients: to Limosa the sandbox is the host.
impl Ground for Sandbox {
    fn address(&self) -> Ipv4Addr {
        Ipv4Addr::LOCALHOST
    }

    fn directory(&self) -> PathBuf {
        Sandbox::directory(self).to_owned()
    }

    fn seen(&self, path: &Path) -> PathBuf {
        path.to_owned()
    }

    fn program(&self, program: &Path) -> Result<PathBuf> {
        Ok(program.to_owned())
    }

    fn start(&self, name: &str, command: &[&OsStr]) -> Result<Pid> {
        // `setsid` becomes the program (it forks only where it leads a group already).
        let child = Command::new("setsid")
            .args(command)
            .current_dir(Sandbox::directory(self))
            .stdin(Stdio::null())
            .stdout(File::create(self.path(&format!("{name}.out")))?)
            .stderr(File::create(self.path(&format!("{name}.err")))?)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Pid::from_child(&child))
    }

    fn root(&self, root: Pid) -> Pid {
        root
    }

    fn among_clients(&self) -> Result<Option<InNetns>> {
        Ok(None)
    }

    fn clients(&self) -> &Path {
        Sandbox::directory(self)
    }
}

/// A shell command of these words.
pub(crate) fn quoted(words: &[&OsStr]) -> Result<String> {
    let quote = |word: &&OsStr| {
        let word = word.to_str().context("an argument that is not UTF-8")?;
        ensure!(!word.contains('\''), "the argument {word:?} cannot be quoted");
        Ok(format!("'{word}'"))
    };
    Ok(words.iter().map(quote).collect::<Result<Vec<_>>>()?.join(" "))
}
