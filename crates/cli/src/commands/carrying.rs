//! Options that say what of a source is carried.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use limosa_container::{Name, Registry, Source};
use limosa_engine::checkpoint::{Options, TcpConnections, Unaccepted};

/// Those of `checkpoint`, and of `check`, which looks what it would refuse.
#[derive(Debug, Args)]
pub struct Carrying {
    /// What becomes of TCP connections: they go on after the restore, or are closed.
    #[arg(long, value_enum, value_name = "HOW", default_value = "established")]
    tcp: Tcp,

    #[command(flatten)]
    unaccepted: NotAccepted,

    /// A file outside the mounts of the process tree or container, or a terminal that is shown outside it, that it may
    /// have open; restore needs the same KEY. May be given several times.
    #[arg(long, value_name = "KEY=PATH", value_parser = super::key_and_path)]
    external: Vec<(String, PathBuf)>,
}

impl Carrying {
    /// For a process tree; it is to end.
    pub fn of_process_tree(&self) -> anyhow::Result<Options> {
        Ok(Options {
            container: false,
            externals: self.externals()?,
            tcp: self.tcp.into(),
            unaccepted: self.unaccepted.how(),
            ..Options::default()
        })
    }

    /// For the container `name`.
    pub fn of_container(&self, registry: &Registry, name: &Name) -> anyhow::Result<Source> {
        Ok(Source::find(registry, name)?
            .with_connections(self.tcp.into(), self.unaccepted.how())
            .with_externals(self.externals()?))
    }

    /// The files of `--external` by device and inode.
    fn externals(&self) -> anyhow::Result<HashMap<(u64, u64), String>> {
        let look = |(key, path): &(String, PathBuf)| {
            let file = std::fs::metadata(path)
                .with_context(|| format!("the file of --external {key}={}", path.display()))?;
            Ok(((file.dev(), file.ino()), key.clone()))
        };
        self.external.iter().map(look).collect()
    }
}

/// The values of `--tcp`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Tcp {
    /// Carried: after the restore they go on.
    Established,
    /// Not carried: after the restore the sockets are not connected.
    Close,
}

impl From<Tcp> for TcpConnections {
    fn from(tcp: Tcp) -> Self {
        match tcp {
            Tcp::Established => Self::Established,
            Tcp::Close => Self::Close,
        }
    }
}

/// What becomes of connections that a program does not accept.
#[derive(Clone, Copy, Debug, Args)]
pub struct NotAccepted {
    /// What becomes of connections that wait in listening sockets, if the program does not accept them within a second:
    /// the command fails, or they are closed.
    #[arg(long, value_enum, value_name = "HOW", default_value = "refuse")]
    unaccepted: How,
}

/// The values of `--unaccepted`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    /// The command fails, and everything runs on.
    Refuse,
    /// Not carried: who made them is told when the source ends or, of a container, when next it sends something.
    Close,
}

impl NotAccepted {
    /// As the engine has it.
    pub fn how(self) -> Unaccepted {
        match self.unaccepted {
            How::Refuse => Unaccepted::Refuse,
            How::Close => Unaccepted::Close,
        }
    }
}
