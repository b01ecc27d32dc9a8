//! A container's root: the overlay, and the mounts that every container has.
//!
//! ```text
//! /            overlay: lowerdir = the read-only layer, upperdir and workdir = the container's
//! /proc        proc of its PID namespace (mounted when that exists, see `Shell::mount_proc`)
//! /sys         sysfs, read-only
//! /dev         tmpfs: null zero full random urandom tty, ptmx, fd, stdin, stdout, stderr
//! /dev/pts     devpts of its own
//! /dev/shm     tmpfs
//! /dev/mqueue  mqueue of its IPC namespace
//! ```
//! The read-only layer is one filesystem: what is mounted below its directory is not part of it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use limosa_kernel::mount::{self, Attributes, Filesystem};
use rustix::fs::{CWD, FileType, Mode, OFlags};

use crate::registry::Paths;

/// Character devices of `/dev`: name, major and minor number (Linux, Documentation/admin-guide/devices.txt).
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Symbolic links of `/dev`.
const LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Prepares the writable layer: gives it, if it is new, the owner and mode of the read-only layer's directory, and hides
/// the state directory, where other containers' files are, if it lies in the read-only layer.
pub(crate) fn prepare_layer(lower: &Path, paths: &Paths, new: bool) -> Result<(), RootError> {
    let upper = paths.upper();
    if new {
        copy_attributes(lower, &upper).map_err(|source| RootError::io("prepare", &upper, source))?;
    }
    // A state directory on a filesystem of its own does not show in the overlay.
    let hidden = || {
        let (lower, state) = (fs::canonicalize(lower)?, fs::canonicalize(paths.state_dir())?);
        let same_filesystem = fs::metadata(&lower)?.dev() == fs::metadata(&state)?.dev();
        let relative = state.strip_prefix(&lower).map(Path::to_owned).ok();
        Ok(relative.filter(|path| same_filesystem && !path.as_os_str().is_empty()).map(|path| (lower, path)))
    };
    let hidden = hidden().map_err(|source| RootError::io("resolve", lower, source))?;
    let Some((lower, relative)) = hidden else { return Ok(()) };
    white_out(&lower, &upper, &relative).map_err(|source| RootError::io("hide", &relative, source))
}

/// Makes `relative` in the upper layer a whiteout (a character device 0:0), its parents like those of the
/// lower layer. What the container has already made there itself stays.
fn white_out(lower: &Path, upper: &Path, relative: &Path) -> io::Result<()> {
    let mut so_far = PathBuf::new();
    for component in relative.parent().into_iter().flat_map(Path::components) {
        so_far.push(component);
        match fs::create_dir(upper.join(&so_far)) {
            Ok(()) => copy_attributes(&lower.join(&so_far), &upper.join(&so_far))?,
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                if !fs::symlink_metadata(upper.join(&so_far))?.is_dir() {
                    return Ok(());
                }
            }
            Err(source) => return Err(source),
        }
    }
    match rustix::fs::mknodat(CWD, upper.join(relative), FileType::CharacterDevice, Mode::empty(), 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())
}

/// Mounts the overlay, makes it the root of the calling thread's (new) mount namespace, and mounts the rest
/// below it but `/proc`, which needs the PID namespace. The thread must have a working directory and umask
/// of its own, and be in the container's network and IPC namespaces.
pub(crate) fn mount_all(lower: &Path, paths: &Paths) -> Result<(), RootError> {
    rustix::process::umask(Mode::empty());
    mount::make_all_private()?;
    // The kernel takes parameters of at most 255 bytes, and some characters are special in them; what
    // /proc makes of a descriptor is short and plain.
    let layers = [lower.to_owned(), paths.upper(), paths.work()];
    let descriptors = layers
        .iter()
        .map(|path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|errno| RootError::io("open", path, errno.into()))
        })
        .collect::<Result<Vec<OwnedFd>, _>>()?;
    let parameters: Vec<PathBuf> = layers
        .iter()
        .zip(&descriptors)
        .map(|(path, descriptor)| {
            let bytes = path.as_os_str().as_encoded_bytes();
            if bytes.len() > 255 || bytes.iter().any(|byte| b":,\\\"".contains(byte)) {
                PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
            } else {
                path.clone()
            }
        })
        .collect();
    let mut overlay = Filesystem::new("overlay")?;
    for (key, value) in ["lowerdir", "upperdir", "workdir"].into_iter().zip(&parameters) {
        overlay = overlay.set(key, value)?;
    }
    // No options that put file handles or partial copies into the layer: it must mean the same elsewhere.
    overlay = overlay.set("index", "off")?.set("metacopy", "off")?.set("redirect_dir", "on")?;
    let merged = paths.merged();
    overlay.mount(Attributes::empty())?.attach(&merged)?;
    mount::change_root(&merged)?;

    let quiet = Attributes::MOUNT_ATTR_NOSUID | Attributes::MOUNT_ATTR_NODEV | Attributes::MOUNT_ATTR_NOEXEC;
    for directory in ["/proc", "/sys", "/dev", "/tmp"] {
        make_directory(Path::new(directory))?;
    }
    let read_only = quiet | Attributes::MOUNT_ATTR_RDONLY;
    Filesystem::new("sysfs")?.mount(read_only)?.attach(Path::new("/sys"))?;
    let devices = Filesystem::new("tmpfs")?.set("mode", "755")?.set("size", "65536k")?;
    devices
        .mount(Attributes::MOUNT_ATTR_NOSUID | Attributes::MOUNT_ATTR_NOEXEC)?
        .attach(Path::new("/dev"))?;
    populate_dev()?;
    let terminals = Filesystem::new("devpts")?
        .flag("newinstance")?
        .set("ptmxmode", "0666")?
        .set("mode", "0620")?
        .set("gid", "5")?;
    terminals
        .mount(Attributes::MOUNT_ATTR_NOSUID | Attributes::MOUNT_ATTR_NOEXEC)?
        .attach(Path::new("/dev/pts"))?;
    Filesystem::new("tmpfs")?.set("mode", "1777")?.mount(quiet)?.attach(Path::new("/dev/shm"))?;
    Filesystem::new("mqueue")?.mount(quiet)?.attach(Path::new("/dev/mqueue"))?;
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), RootError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(RootError::io("make", path, source))
        }
        Err(_) => Ok(()),
        Ok(()) => {
            let mode = if path == Path::new("/tmp") { 0o1777 } else { 0o755 };
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
                .map_err(|source| RootError::io("chmod", path, source))
        }
    }
}

fn populate_dev() -> Result<(), RootError> {
    let dev = Path::new("/dev");
    for (name, major, minor) in DEVICES {
        let path = dev.join(name);
        let number = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), number)
            .map_err(|errno| RootError::io("make device", &path, errno.into()))?;
    }
    for (name, target) in LINKS {
        let path = dev.join(name);
        symlink(target, &path).map_err(|source| RootError::io("make link", &path, source))?;
    }
    for name in ["pts", "shm", "mqueue"] {
        make_directory(&dev.join(name))?;
    }
    Ok(())
}

/// The root of a container could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
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
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] limosa_kernel::Error),
}

impl RootError {
    fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.to_owned(), source }
    }
}
