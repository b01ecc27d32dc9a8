//! Files whose names say less than usual: opened by a name that is gone while others are left, without any name
//! (`O_TMPFILE`), directories that have been deleted (one of them the working directory), `O_PATH` descriptors of what
//! cannot be opened, files of `/proc` that tell of this process, and offsets beyond 32 bits.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FileType, Mode, OFlags};

use super::{Setting, Verify};
use crate::sys;

const FAR: u64 = (7 << 32) + 5;

struct State {
    /// A file, and a name that it has; that by which it was opened is gone.
    linked: [(File, PathBuf); 3],
    nameless: File,
    misnamed: File,
    sparse: File,
    deleted_directory: OwnedFd,
    /// Descriptors that only stand for a place, and its type.
    places: Vec<(OwnedFd, FileType)>,
    process: [File; 2],
    memory: File,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let directory = setting.protocol.beside("odd");
    fs::create_dir_all(&directory)?;
    let path = |name: &str| directory.join(name);
    let create = |name: &str| -> Result<File> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path(name))?;
        file.write_all(name.as_bytes())?;
        Ok(file)
    };

    fs::create_dir_all(path("elsewhere"))?;
    let mut linked = Vec::new();
    for (name, other) in [("beside", "other"), ("moved", "elsewhere/deep"), ("replaced", "former")] {
        let file = create(name)?;
        let _ = fs::remove_file(path(other));
        fs::hard_link(path(name), path(other))?;
        fs::remove_file(path(name))?;
        linked.push((file, path(other)));
    }
    drop(create("replaced")?);

    let nameless = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(&directory)
        .context("O_TMPFILE")?;
    nameless.write_all_at(b"nameless", 0)?;
    let mut sparse = create("sparse")?;
    sparse.write_all_at(b"beyond", FAR)?;
    sparse.seek(SeekFrom::Start(FAR + 6))?;
    fs::remove_file(path("sparse"))?;

    let state = State {
        linked: linked.try_into().map_err(|_| anyhow::anyhow!("not three files"))?,
        nameless,
        // The kernel would say so of a file that is not.
        misnamed: create("not (deleted)")?,
        sparse,
        deleted_directory: deleted_directory(&path("gone"))?,
        places: places(&directory)?,
        process: [File::open("/proc/self/stat")?, File::open("/proc/thread-self/comm")?],
        memory: File::open("/proc/self/mem")?,
    };
    fs::create_dir_all(path("gone too"))?;
    std::env::set_current_dir(path("gone too"))?;
    fs::remove_dir(path("gone too"))?;
    Ok(Box::new(move || {
        state.check()?;
        Ok(String::new())
    }))
}

fn deleted_directory(path: &Path) -> Result<OwnedFd> {
    fs::create_dir_all(path)?;
    let descriptor = rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    fs::remove_dir(path)?;
    Ok(descriptor)
}

/// A socket, a FIFO, a symbolic link, a device that opening would be noticed by, and the root directory.
fn places(directory: &Path) -> Result<Vec<(OwnedFd, FileType)>> {
    let path = |name: &str| {
        let path = directory.join(name);
        let _ = fs::remove_file(&path);
        path
    };
    let (socket, fifo, link) = (path("socket"), path("fifo"), path("link"));
    drop(UnixListener::bind(&socket)?);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0)?;
    std::os::unix::fs::symlink("nowhere", &link)?;
    let places = [
        (socket, FileType::Socket),
        (fifo, FileType::Fifo),
        (link, FileType::Symlink),
        ("/dev/ptmx".into(), FileType::CharacterDevice),
        ("/".into(), FileType::Directory),
    ];
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |(path, kind): (PathBuf, _)| Ok((rustix::fs::open(path, flags, Mode::empty())?, kind));
    places.into_iter().map(open).collect()
}

impl State {
    fn check(&self) -> Result<()> {
        for (file, name) in &self.linked {
            let (open, named) = (file.metadata()?, fs::metadata(name)?);
            ensure!(open.ino() == named.ino(), "{} is another file than the open one", name.display());
        }
        self.check_content()?;
        for directory in [self.deleted_directory.as_raw_fd().to_string(), "cwd".to_owned()] {
            let link = match directory.as_str() {
                "cwd" => "/proc/self/cwd".to_owned(),
                number => format!("/proc/self/fd/{number}"),
            };
            ensure!(fs::metadata(&link)?.nlink() == 0, "the deleted directory {link} has a name");
            ensure!(fs::read_dir(&link)?.next().is_none(), "the deleted directory {link} is not empty");
        }
        for (place, kind) in &self.places {
            let found = FileType::from_raw_mode(rustix::fs::fstat(place)?.st_mode);
            let flags = rustix::fs::fcntl_getfl(place)?;
            ensure!(found == *kind, "an O_PATH descriptor of {found:?} instead of {kind:?}");
            ensure!(flags.contains(OFlags::PATH), "an O_PATH descriptor of {kind:?} is open: {flags:?}");
        }
        self.check_process()
    }

    fn check_content(&self) -> Result<()> {
        let content = |file: &File, at: u64, length: usize| -> Result<Vec<u8>> {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at)?;
            Ok(bytes)
        };
        sys::compare("a file without a name", &content(&self.nameless, 0, 8)?, b"nameless")?;
        sys::compare("a sparse file's end", &content(&self.sparse, FAR, 6)?, b"beyond")?;
        ensure!((&self.sparse).stream_position()? == FAR + 6, "an offset beyond 32 bits moved");
        ensure!(self.sparse.metadata()?.blocks() < 1000, "the holes of a sparse file are filled");
        let links = [self.nameless.metadata()?.nlink(), self.misnamed.metadata()?.nlink()];
        ensure!(links == [0, 1], "a nameless and a named file have {links:?} names");
        Ok(())
    }

    fn check_process(&self) -> Result<()> {
        let [mut stat, mut name] = self.process.each_ref().map(|file| -> &File { file });
        let (mut text, pid) = (String::new(), std::process::id().to_string());
        stat.seek(SeekFrom::Start(0))?;
        stat.read_to_string(&mut text)?;
        ensure!(text.split(' ').next() == Some(&*pid), "/proc/self/stat tells of another process: {text}");
        text.clear();
        name.seek(SeekFrom::Start(0))?;
        name.read_to_string(&mut text)?;
        ensure!(text.starts_with("limosa-target"), "/proc/thread-self/comm says {text}");
        let known = *b"known";
        let mut bytes = [0; 5];
        self.memory.read_exact_at(&mut bytes, known.as_ptr().addr() as u64)?;
        sys::compare("/proc/self/mem", &bytes, &known)
    }
}
