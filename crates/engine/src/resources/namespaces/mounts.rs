//! The mount namespace: what is mounted where (mount_namespaces(7)).
//!
//! The container's root and the mounts that every container has are there before the tree is born. This room
//! mounts what is missing, parents first: `/proc`, which belongs to the new PID namespace; file systems of the
//! kernel's that the container mounted itself; its tmpfs, with all that is in them (in `/dev/shm`, too, but not in
//! `/dev`); and bind mounts of what is in the container. Other mounts of its own are refused.
//!
//! What a tmpfs holds is a blob for each, as [`limosa_archive`] writes it. Files that are open or mapped there are
//! opened again by their paths.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use std::os::unix::ffi::OsStrExt;

use limosa_archive::LayerError;
use limosa_image::{Checkpoint, Sink};
use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::proc::Mount as Found;
use limosa_puppet::Program;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Refusal, RestoreError};
use crate::restore::Nursery;
use crate::view::ProcessView;

/// File systems that can be mounted again from nothing.
const FROM_NOTHING: [&[u8]; 5] = [b"proc", b"sysfs", b"mqueue", b"cgroup2", b"cgroup"];
/// What a container's shell has mounted already.
const SHELL: [(&[u8], &[u8]); 6] = [
    (b"/", b"overlay"),
    (b"/sys", b"sysfs"),
    (b"/dev", b"tmpfs"),
    (b"/dev/pts", b"devpts"),
    (b"/dev/shm", b"tmpfs"),
    (b"/dev/mqueue", b"mqueue"),
];
/// The one of these whose content travels.
const SHARED_MEMORY: &[u8] = b"/dev/shm";
/// Options of a tmpfs that it is mounted with again.
const TMPFS_OPTIONS: [&[u8]; 8] =
    [b"size", b"nr_blocks", b"nr_inodes", b"mode", b"uid", b"gid", b"huge", b"mpol"];

/// The mounts, parents first.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Mounts(pub Vec<Mount>);

/// A mount.
#[derive(Debug, Serialize, Deserialize)]
pub struct Mount {
    /// Where.
    pub point: serde_bytes::ByteBuf,
    /// Type of the file system.
    pub kind: serde_bytes::ByteBuf,
    /// `MS_*` flags of the mount.
    pub flags: u64,
    /// Options of the file system.
    #[serde(default)]
    pub options: serde_bytes::ByteBuf,
    /// What mountinfo calls its source, by custom the type or `none`.
    #[serde(default)]
    pub device: serde_bytes::ByteBuf,
    /// Of a bind mount: the path that it shows.
    #[serde(default)]
    pub source: Option<serde_bytes::ByteBuf>,
    /// The blob with what is in it.
    #[serde(default)]
    pub content: Option<String>,
    /// Whether every container has it: only its content is put back.
    #[serde(default)]
    pub of_shell: bool,
}

/// `MS_*` by option of mountinfo.
const FLAGS: [(&[u8], u64); 7] = [
    (b"ro", libc::MS_RDONLY),
    (b"nosuid", libc::MS_NOSUID),
    (b"nodev", libc::MS_NODEV),
    (b"noexec", libc::MS_NOEXEC),
    (b"noatime", libc::MS_NOATIME),
    (b"nodiratime", libc::MS_NODIRATIME),
    (b"relatime", libc::MS_RELATIME),
];

fn flags(options: &[u8]) -> u64 {
    let has = |option: &[u8]| options.split(|byte| *byte == b',').any(|one| one == option);
    FLAGS.iter().filter(|(option, _)| has(option)).fold(0, |all, (_, flag)| all | flag)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Mounts {
    /// Captures the mounts of the container whose root process is `root`, and puts the content of its tmpfs into
    /// `sink`, if there is one. `control_group` is what the path of its control group ends with.
    pub fn capture(
        root: &ProcessView,
        control_group: Option<&str>,
        mut sink: Option<&mut dyn Sink>,
    ) -> Result<Self, CaptureError> {
        let found = root.proc.mountinfo()?;
        let namespace = namespace::of_process(root.pid, Kind::Mount)?;
        let mut points = HashSet::new();
        let mut mounts: Vec<Mount> = Vec::new();
        for (number, mount) in found.iter().enumerate() {
            if !points.insert(&mount.point) {
                let reason =
                    format!("two file systems are mounted on {}, one over the other", text(&mount.point));
                return Err(refuse(root, reason, mount));
            }
            let of_shell = SHELL.contains(&(mount.point.as_slice(), mount.fs_type.as_slice()));
            if of_shell && mount.point != SHARED_MEMORY {
                continue;
            }
            // What is the root of a hierarchy to the container is a group to us.
            let is_group = mount.fs_type.starts_with(b"cgroup")
                && control_group.is_some_and(|group| mount.root.ends_with(group.as_bytes()));
            let is_known = of_shell || is_group;
            let source = if is_known { None } else { bind_source(root, &found[..number], mount)? };
            let plain = source.is_none() && (mount.root == b"/" || is_group);
            let is_tmpfs = plain && mount.fs_type == b"tmpfs";
            if source.is_none() && !is_tmpfs && !(plain && FROM_NOTHING.contains(&mount.fs_type.as_slice())) {
                let (kind, point) = (text(&mount.fs_type), text(&mount.point));
                let reason = format!("a {kind} is mounted on {point}, which this version cannot carry");
                return Err(refuse(root, reason, mount));
            }
            let content = match &mut sink {
                Some(sink) if is_tmpfs => Some(store(root, &namespace, mount, &mut **sink, number)?),
                _ => None,
            };
            mounts.push(Mount {
                flags: flags(&mount.options),
                options: options(mount).into(),
                device: mount.source.clone().into(),
                point: mount.point.clone().into(),
                kind: mount.fs_type.clone().into(),
                source: source.map(Into::into),
                content,
                of_shell,
            });
        }
        Ok(Self(mounts))
    }

    /// Mounts everything again in the namespace of the root puppet, and fills it.
    pub(crate) fn rebuild(&self, nursery: &mut Nursery, checkpoint: &Checkpoint) -> Result<(), RestoreError> {
        for mount in &self.0 {
            if !mount.of_shell {
                let mut program = Program::new();
                mount.make(&mut program)?;
                let (puppet, arena) = nursery.puppet(0);
                puppet.run(arena, program)?;
            }
            if let Some(blob) = &mount.content {
                let root = PathBuf::from(format!("/proc/{}/root", nursery.puppets[0].pid()));
                mount.fill(&root, blob, checkpoint)?;
            }
            if !mount.of_shell && (mount.source.is_some() || mount.flags & libc::MS_RDONLY != 0) {
                let mut program = Program::new();
                let point = program.string(&mount.point);
                let flags = libc::MS_REMOUNT | libc::MS_BIND | mount.flags;
                let arguments = [0.into(), point.into(), 0.into(), flags.into(), 0.into()];
                program.call("set a mount's flags", libc::SYS_mount, arguments);
                let (puppet, arena) = nursery.puppet(0);
                puppet.run(arena, program)?;
            }
        }
        Ok(())
    }
}

fn refuse(root: &ProcessView, reason: String, mount: &Found) -> CaptureError {
    Refusal::process(root.pid, reason, format!("unmount {} first", text(&mount.point))).into()
}

/// The options that a tmpfs or control group hierarchy is mounted with.
fn options(mount: &Found) -> Vec<u8> {
    let key = |option: &&[u8]| -> bool {
        let key = option.split(|byte| *byte == b'=').next().unwrap_or_default();
        match mount.fs_type.as_slice() {
            b"tmpfs" => TMPFS_OPTIONS.contains(&key),
            b"cgroup" => !matches!(key, b"rw" | b"ro"),
            _ => false,
        }
    };
    let kept: Vec<&[u8]> = mount.super_options.split(|byte| *byte == b',').filter(key).collect();
    kept.join(&b","[..])
}

/// A path of the container as it is seen now; symbolic links do not lead out of it.
fn open_inside(root: &Path, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::openat2(&root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
}

fn root_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root"))
}

/// The path that a bind mount shows, if it shows part of a file system that is mounted in the container before.
fn bind_source(root: &ProcessView, before: &[Found], mount: &Found) -> Result<Option<Vec<u8>>, CaptureError> {
    let identity = |path: &[u8]| {
        let file = open_inside(&root_of(root.pid), path, OFlags::PATH).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    for other in before.iter().filter(|other| other.dev == mount.dev) {
        let Some(rest) = mount.root.strip_prefix(other.root.as_slice()) else { continue };
        let mut source = other.point.clone();
        if source.last() != Some(&b'/') && !rest.is_empty() && rest.first() != Some(&b'/') {
            source.push(b'/');
        }
        source.extend(rest);
        while source.windows(2).any(|pair| pair == b"//") {
            let at = source.windows(2).position(|pair| pair == b"//").unwrap_or_default();
            source.remove(at);
        }
        if identity(&source).is_some_and(|same| Some(same) == identity(&mount.point)) {
            return Ok(Some(source));
        }
    }
    // A file system of the host's, or a path that is hidden by now.
    if before.iter().any(|other| other.dev == mount.dev) || mount.root != b"/" {
        let reason = format!("what is mounted on {} is found at no other path", text(&mount.point));
        return Err(refuse(root, reason, mount));
    }
    Ok(None)
}

/// Puts what is in a tmpfs, without what is mounted below, into a blob; gives its name.
fn store(
    root: &ProcessView,
    namespace: &OwnedFd,
    mount: &Found,
    sink: &mut dyn Sink,
    number: usize,
) -> Result<String, CaptureError> {
    let point = Path::new(std::ffi::OsStr::from_bytes(&mount.point));
    // A copy of the mount has nothing mounted below it.
    let copy = namespace::inside(namespace, Kind::Mount, || limosa_kernel::mount::clone_tree(point, false))?;
    let directory = PathBuf::from(format!("/proc/self/fd/{}", copy.as_fd().as_raw_fd()));
    let fail = |source| CaptureError::Io { what: "archiving a tmpfs", pid: root.pid, source };
    let name = format!("tmpfs.{number}");
    let (mut reader, writer) = io::pipe().map_err(fail)?;
    std::thread::scope(|scope| {
        let archiving = scope.spawn(|| limosa_archive::archive(&directory, writer).map(drop));
        let stored = sink.blob(&name, &mut reader);
        drop(reader);
        let archived = match archiving.join() {
            Ok(archived) => archived,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        // A sink that failed broke the pipe: its error is the cause.
        stored?;
        archived.map_err(|source| CaptureError::Archive { path: text(&mount.point), source })
    })?;
    Ok(name)
}

impl Mount {
    /// Adds the call that mounts it, still writable.
    fn make(&self, program: &mut Program) -> Result<(), RestoreError> {
        let (point, kind) = (program.string(&self.point), program.string(&self.kind));
        if let Some(source) = &self.source {
            let source = program.string(source);
            let arguments = [source.into(), point.into(), 0.into(), libc::MS_BIND.into(), 0.into()];
            program.call("bind a mount", libc::SYS_mount, arguments);
            return Ok(());
        }
        let known = self.kind.as_ref() == b"tmpfs" || FROM_NOTHING.contains(&self.kind.as_slice());
        if !known {
            return Err(RestoreError::inconsistent(format!("a mount of type {}", text(&self.kind))));
        }
        let options = program.string(&self.options);
        let flags = self.flags & !libc::MS_RDONLY;
        let device = program.string(&self.device);
        let arguments = [device.into(), point.into(), kind.into(), flags.into(), options.into()];
        program.call("mount a file system", libc::SYS_mount, arguments);
        Ok(())
    }

    fn fill(&self, root: &Path, blob: &str, checkpoint: &Checkpoint) -> Result<(), RestoreError> {
        let path = || text(&self.point);
        let directory = open_inside(root, &self.point, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(RestoreError::rebuild(path(), "open"))?;
        let place = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        limosa_archive::extract(checkpoint.blob(blob)?, &place)
            .map_err(|source: LayerError| RestoreError::Archive { path: path(), source })
    }
}
