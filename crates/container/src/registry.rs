//! The containers of one host: a directory each, in the state directory.
//!
//! ```text
//! STATE/containers/.lock   held (flock(2)) while a name is taken, and while leftovers are removed
//! STATE/containers/NAME/   mode 0700
//!     config.json          Record, replaced by rename
//!     lock                 held by whoever is making the container
//!     cgroup.json          its control groups, from before they exist until the record names them
//!     upper/  work/        the writable layer of the overlay, and overlayfs's workshop
//!     merged/              where the root is mounted, in the container's mount namespace only
//!     log                  standard output and error
//!     terminal             socket of the keeper of its terminal
//!     fate                 what became of it, for who has it in the foreground
//! ```
//! A directory without record whose lock nobody holds is what a killed Limosa left: [`Registry::sweep`].

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use limosa_kernel::namespace::{self, Kind};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::config::{Config, Name};
use crate::link::{self, LinkError};
use crate::undo::Undo;

/// Where the containers are kept unless said otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/limosa";

/// The version of `config.json` that this program writes, and the only one that it reads.
const VERSION: u32 = 1;

/// The largest `config.json` that is read, bytes.
const MAX_RECORD: u64 = 4 << 20;

/// A container of a list: its name, and its record if that can be read.
pub type Listed = (Name, Result<Record, RegistryError>);

/// The containers below one state directory.
#[derive(Clone, Debug)]
pub struct Registry {
    state_dir: PathBuf,
}

/// The files of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    directory: PathBuf,
    state_dir: PathBuf,
}

impl Paths {
    /// The directory with all of them.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The state directory that it belongs to, which containers must not see.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The record.
    pub fn config(&self) -> PathBuf {
        self.directory.join("config.json")
    }

    /// Held by whoever is making the container.
    pub(crate) fn lock(&self) -> PathBuf {
        self.directory.join("lock")
    }

    /// The control groups of a container that is being made.
    pub(crate) fn cgroup(&self) -> PathBuf {
        self.directory.join("cgroup.json")
    }

    /// The writable layer.
    pub fn upper(&self) -> PathBuf {
        self.directory.join("upper")
    }

    /// Overlayfs's working directory.
    pub fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    /// The mount point of the container's root.
    pub fn merged(&self) -> PathBuf {
        self.directory.join("merged")
    }

    /// What became of it, where somebody wants to be told.
    pub(crate) fn fate(&self) -> PathBuf {
        self.directory.join("fate")
    }

    /// Its standard output and error.
    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }
}

/// What is known about a container: `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Format version.
    pub version: u32,
    /// What it is.
    pub config: Config,
    /// Its first process, once started.
    pub init: Option<Init>,
    /// Its control groups on this host.
    pub cgroup: Cgroup,
    /// The host's end of its veth pair.
    pub host_link: Option<String>,
    /// When it was made, seconds since 1970.
    pub created: u64,
}

impl Record {
    /// A record of a container made now.
    pub fn new(config: Config, init: Option<Init>, cgroup: Cgroup, host_link: Option<String>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let created = now.map_or(0, |now| now.as_secs());
        Self { version: VERSION, config, init, cgroup, host_link, created }
    }

    /// The PID of its first process, if that runs.
    pub fn running(&self) -> Option<i32> {
        self.init.filter(Init::is_running).map(|init| init.pid)
    }

    /// Tells this container from any other of its name, before or after it.
    pub fn instance(&self) -> String {
        self.init.map_or_else(String::new, |init| format!("{}:{}", init.pid, init.start_time))
    }

    /// Lets a container that was disconnected and the host's network reach each other again. The calling
    /// thread must be in the network namespace that the container was started from.
    pub fn connect(&self) -> Result<(), LinkError> {
        self.host_link.as_deref().map_or(Ok(()), |name| link::set_up(name, true))
    }

    /// Cuts the container from the host's network; everything inside stays as it is. The calling thread must
    /// be in the network namespace that the container was started from.
    pub fn disconnect(&self) -> Result<(), LinkError> {
        self.host_link.as_deref().map_or(Ok(()), |name| link::set_up(name, false))
    }

    /// Tells the link that the addresses of the container, which must run and be connected, are here.
    pub fn announce(&self) -> Result<(), LinkError> {
        let (Some(network), Some(pid)) = (&self.config.network, self.running()) else { return Ok(()) };
        link::inside(namespace::of_process(pid, Kind::Network)?, || link::announce_all(network))
    }
}

/// The first process of a container. PIDs are used again, so its start time belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Init {
    /// Its PID in the PID namespace of whoever started it.
    pub pid: i32,
    /// When it was started: field 22 of `/proc/PID/stat`, clock ticks since boot.
    pub start_time: u64,
}

impl Init {
    /// The process that has this PID now.
    pub fn of(pid: i32) -> Result<Self, RegistryError> {
        let (start_time, _) =
            start_time_and_state(pid).map_err(|source| RegistryError::Vanished { pid, source })?;
        Ok(Self { pid, start_time })
    }

    /// Whether this very process still runs; a zombie does not.
    pub fn is_running(&self) -> bool {
        start_time_and_state(self.pid)
            .is_ok_and(|(start_time, state)| start_time == self.start_time && !matches!(state, 'Z' | 'X'))
    }
}

fn start_time_and_state(pid: i32) -> io::Result<(u64, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let parse = || {
        // The command's name, in parentheses, may hold spaces and parentheses itself.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        Some((fields.nth(18)?.parse().ok()?, state))
    };
    parse().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected form of /proc/PID/stat"))
}

impl Registry {
    /// The registry below `state_dir`, which need not exist yet.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self { state_dir: state_dir.into() }
    }

    /// Where the files of a container are, or would be.
    pub fn paths(&self, name: &Name) -> Paths {
        let directory = self.state_dir.join("containers").join(name.as_str());
        Paths { directory, state_dir: self.state_dir.clone() }
    }

    /// Takes `name` for a new container and makes its directories.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] if there is one of that name, running or not.
    pub fn reserve(&self, name: &Name) -> Result<Reservation, RegistryError> {
        let paths = self.paths(name);
        let containers = self.state_dir.join("containers");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&containers)
            .map_err(|source| RegistryError::io("make", &containers, source))?;
        let _guard = self.guard()?;
        self.sweep_guarded()?;
        match fs::DirBuilder::new().mode(0o700).create(paths.directory()) {
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RegistryError::Exists { name: name.clone() });
            }
            result => result.map_err(|source| RegistryError::io("make", paths.directory(), source))?,
        }
        let mut undo = Undo::default();
        let directory = paths.directory().to_owned();
        undo.add(move || {
            let _ = fs::remove_dir_all(directory);
        });
        let lock =
            lock_file(&paths.lock()).map_err(|source| RegistryError::io("open", &paths.lock(), source))?;
        try_lock(&lock);
        for directory in [paths.upper(), paths.work(), paths.merged()] {
            fs::create_dir(&directory).map_err(|source| RegistryError::io("make", &directory, source))?;
        }
        Ok(Reservation { paths, undo, _lock: lock })
    }

    /// What is known about a container.
    pub fn load(&self, name: &Name) -> Result<Record, RegistryError> {
        let path = self.paths(name).config();
        let text = match read_limited(&path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(RegistryError::Unknown { name: name.clone(), state_dir: self.state_dir.clone() });
            }
            result => result.map_err(|source| RegistryError::io("read", &path, source))?,
        };
        let record: Record = serde_json::from_slice(&text)
            .map_err(|source| RegistryError::Malformed { path: path.clone(), source })?;
        if record.version != VERSION {
            return Err(RegistryError::Version { path, version: record.version });
        }
        Ok(record)
    }

    /// Replaces what is known about a container.
    pub fn save(&self, record: &Record) -> Result<(), RegistryError> {
        let path = self.paths(&record.config.name).config();
        let new = path.with_extension("new");
        let write = || {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| RegistryError::io("write", &path, source))
    }

    /// All containers, by name. One whose record cannot be read is an error in the list, not of it; one that
    /// is being made is not in it yet.
    pub fn list(&self) -> Result<Vec<Listed>, RegistryError> {
        let mut list = Vec::new();
        for name in self.names()? {
            match self.load(&name) {
                Err(RegistryError::Unknown { .. }) => {}
                record => list.push((name, record)),
            }
        }
        list.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(list)
    }

    fn names(&self) -> Result<Vec<Name>, RegistryError> {
        let containers = self.state_dir.join("containers");
        let entries = match fs::read_dir(&containers) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(|source| RegistryError::io("list", &containers, source))?,
        };
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok()).collect())
    }

    /// Removes what a killed Limosa left of containers that it was making: their names are free again.
    pub fn sweep(&self) -> Result<(), RegistryError> {
        if !self.state_dir.join("containers").exists() {
            return Ok(());
        }
        let _guard = self.guard()?;
        self.sweep_guarded()
    }

    /// [`Self::sweep`] right after the death of whoever was making a container: the kernel may close its connections before
    /// it gives back its lock, without which what it left looks as if it were being made. Waits up to two seconds.
    pub fn sweep_after_a_death(&self) -> Result<(), RegistryError> {
        let begun = Instant::now();
        loop {
            self.sweep()?;
            let unfinished = self.names()?.iter().any(|name| !self.paths(name).config().exists());
            if !unfinished || begun.elapsed() > Duration::from_secs(2) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn sweep_guarded(&self) -> Result<(), RegistryError> {
        for name in self.names()? {
            let paths = self.paths(&name);
            if paths.config().exists() {
                continue;
            }
            let lock = lock_file(&paths.lock())
                .map_err(|source| RegistryError::io("open", &paths.lock(), source))?;
            if !try_lock(&lock) {
                continue;
            }
            tracing::info!(%name, "removing what was left of a container that was never finished");
            let groups = read_limited(&paths.cgroup()).ok();
            if let Some(cgroup) = groups.and_then(|text| serde_json::from_slice::<Cgroup>(&text).ok())
                && let Err(error) = cgroup.remove()
            {
                tracing::warn!(%error, %name, "a control group of a container that was never finished is left");
                continue;
            }
            fs::remove_dir_all(paths.directory())
                .map_err(|source| RegistryError::io("remove", paths.directory(), source))?;
        }
        Ok(())
    }

    /// Waits for, and holds, the lock on all names.
    fn guard(&self) -> Result<fs::File, RegistryError> {
        let path = self.state_dir.join("containers/.lock");
        let open = || {
            let file = lock_file(&path)?;
            rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        };
        open().map_err(|source| RegistryError::io("lock", &path, source))
    }

    /// Removes the directory of a container, with its writable layer and its log. It must not run.
    pub fn remove(&self, name: &Name) -> Result<(), RegistryError> {
        let paths = self.paths(name);
        match fs::remove_dir_all(paths.directory()) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                Err(RegistryError::Unknown { name: name.clone(), state_dir: self.state_dir.clone() })
            }
            result => result.map_err(|source| RegistryError::io("remove", paths.directory(), source)),
        }
    }
}

/// A name that is taken, with its directories. Dropped without [`Reservation::keep`], all of it is removed.
#[derive(Debug)]
pub struct Reservation {
    paths: Paths,
    undo: Undo,
    /// Shows others that somebody is still at it.
    _lock: fs::File,
}

impl Reservation {
    /// The files of the container.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The container stays.
    pub fn keep(mut self) {
        self.undo.release();
    }
}

fn lock_file(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Whether the lock is ours now.
fn try_lock(file: &fs::File) -> bool {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut text = Vec::new();
    fs::File::open(path)?.take(MAX_RECORD).read_to_end(&mut text)?;
    Ok(text)
}

/// The registry could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The name is taken.
    #[error("there is a container {name} already: choose another name, or remove it with `limosa rm {name}`")]
    Exists {
        /// The name.
        name: Name,
    },
    /// There is no such container.
    #[error("there is no container {name} in {}: `limosa ps` lists those there are", state_dir.display())]
    Unknown {
        /// The name.
        name: Name,
        /// Where it was looked for.
        state_dir: PathBuf,
    },
    /// A record is not in the form it is written in.
    #[error("cannot understand {}: it is damaged; `limosa rm --force` removes the container", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A record of another version of this program.
    #[error("{} has format version {version}, this program knows version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A container's first process ended before it could be recorded.
    #[error("the container's first process {pid} ended before it could be recorded")]
    Vanished {
        /// Its PID.
        pid: i32,
        /// What was seen.
        #[source]
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl RegistryError {
    fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Calls `replace` on each value in the tree.
    fn each(value: &mut Value, replace: &mut impl FnMut(&mut Value)) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| each(item, replace)),
            Value::Object(entries) => entries.values_mut().for_each(|item| each(item, replace)),
            _ => {}
        }
        replace(value);
    }

    /// Every value of a record replaced by what it should never be: it is read, or it is called damaged.
    #[test]
    fn damaged_records_are_read_or_called_damaged() {
        let directory = tempfile::tempdir().expect("a directory");
        let registry = Registry::new(directory.path());
        let name: Name = "web".parse().expect("a name");
        let config = json!({
            "name": "web", "command": ["sleep", "1"], "environment": {"A": "B"}, "rootfs": "/", "memory": 1 << 30,
            "network": {"bridge": "br0", "addresses": ["10.0.0.7/24"], "gateways": ["10.0.0.1"]},
        });
        let config: Config = serde_json::from_value(config).expect("a configuration");
        let init = Init::of(std::process::id() as i32).expect("this process");
        let record = Record::new(config, Some(init), Cgroup::default(), Some("veth1".to_owned()));
        std::fs::create_dir_all(registry.paths(&name).directory()).expect("a directory");
        registry.save(&record).expect("saved");
        assert_eq!(registry.load(&name).expect("a record"), record);
        let original = serde_json::to_value(&record).expect("JSON");
        let mut count = 0;
        each(&mut original.clone(), &mut |_| count += 1);
        let text = "x".repeat(100_000);
        let wrong = [
            json!(null),
            json!(0),
            json!(-1),
            json!(u64::MAX),
            json!(1e300),
            json!(""),
            json!("../.."),
            json!(text),
            json!([]),
            json!({}),
        ];
        let (mut read, mut damaged) = (0, 0);
        for number in 0..count {
            for wrong in &wrong {
                let (mut changed, mut at) = (original.clone(), 0);
                each(&mut changed, &mut |value| {
                    if at == number {
                        *value = wrong.clone();
                    }
                    at += 1;
                });
                std::fs::write(registry.paths(&name).config(), changed.to_string()).expect("written");
                match registry.load(&name) {
                    Ok(record) => {
                        let _ = (
                            record.running(),
                            record.instance(),
                            record.cgroup.is_frozen(),
                            record.cgroup.processes(),
                        );
                        read += 1;
                    }
                    Err(RegistryError::Malformed { .. } | RegistryError::Version { .. }) => damaged += 1,
                    Err(error) => panic!("{changed}: {error}"),
                }
                assert_eq!(registry.list().expect("a list").len(), 1);
            }
        }
        assert!(read > 20 && damaged > 50, "{read} read, {damaged} damaged");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_record_or_called_damaged(bytes: Vec<u8>) {
            let directory = tempfile::tempdir().expect("a directory");
            let registry = Registry::new(directory.path());
            let name: Name = "web".parse().expect("a name");
            std::fs::create_dir_all(registry.paths(&name).directory()).expect("a directory");
            std::fs::write(registry.paths(&name).config(), &bytes).expect("written");
            let damaged = matches!(registry.load(&name), Err(RegistryError::Malformed { .. }));
            proptest::prop_assert!(damaged);
        }
    }
}
