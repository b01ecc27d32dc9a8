//! Open files: offsets, flags, deleted files, directories half read, locks, `O_PATH`, devices, and offsets that
//! descriptors and processes share.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys;

struct State {
    half_read: File,
    duplicate: File,
    log: File,
    deleted: File,
    directory: OwnedFd,
    names: Vec<String>,
    path_only: OwnedFd,
    null: File,
    random: File,
    locked: [File; 3],
    shared: File,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let base = |name: &str| setting.protocol.beside(name);
    fs::write(base("shared"), sys::pattern(1000, 5))?;
    let shared = File::open(base("shared"))?;
    let inherited = shared.try_clone()?;
    let child = Child::start(&setting.protocol, "child", move |_| seek_on(inherited))?;

    fs::write(base("half-read"), sys::pattern(10_000, 1))?;
    let mut half_read = OpenOptions::new().read(true).write(true).open(base("half-read"))?;
    half_read.seek(SeekFrom::Start(4321))?;
    let duplicate = half_read.try_clone()?;
    rustix::io::fcntl_setfd(&duplicate, rustix::io::FdFlags::empty())?;
    let mut log = OpenOptions::new().append(true).create(true).open(base("log"))?;
    log.write_all(b"begin\n")?;
    let mut deleted =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(base("deleted"))?;
    deleted.write_all(&sys::pattern(9000, 2))?;
    deleted.seek(SeekFrom::Start(77))?;
    fs::remove_file(base("deleted"))?;

    let (directory, names) = half_read_directory(setting)?;
    let path_only = rustix::fs::open(base("half-read"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut state = State {
        half_read,
        duplicate,
        log,
        deleted,
        directory,
        names,
        path_only,
        null: OpenOptions::new().write(true).open("/dev/null")?,
        random: OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/urandom")?,
        locked: locked(setting)?,
        shared,
    };
    let described = state.describe()?;
    let log = base("log");
    let half_read_inode = fs::metadata(base("half-read"))?.ino();
    Ok(Box::new(move || {
        sys::compare_lines("descriptors", &state.describe()?, &described)?;
        state.check()?;
        state.check_log(&log)?;
        let inode = rustix::fs::fstat(&state.path_only)?.st_ino;
        ensure!(inode == half_read_inode, "O_PATH leads to another file");
        state.shared.seek(SeekFrom::Start(500))?;
        child.verify()?;
        let position = state.shared.stream_position()?;
        ensure!(position == 600, "the offset shared with a child is {position} instead of 600");
        Ok(String::new())
    }))
}

/// The child reads 100 bytes at the offset that it shares with its parent.
fn seek_on(mut file: File) -> Result<Box<Verify>> {
    Ok(Box::new(move || {
        let position = file.stream_position()? as usize;
        let mut bytes = [0; 100];
        file.read_exact(&mut bytes).context("reading in the child")?;
        sys::compare("the file in the child", &bytes, &sys::pattern(1000, 5)[position..position + 100])?;
        Ok(String::new())
    }))
}

/// A directory whose reader stands between two entries, and the entries that are still to come.
fn half_read_directory(setting: &Setting) -> Result<(OwnedFd, Vec<String>)> {
    let path = setting.protocol.beside("directory");
    fs::create_dir_all(&path)?;
    for number in 0..20 {
        fs::write(path.join(format!("entry-{number:02}")), [])?;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(&path, flags, Mode::empty())?;
    // Five entries (24 bytes of header and a name, rounded) and no more.
    let mut buffer = [const { std::mem::MaybeUninit::uninit() }; 160];
    let mut entries = rustix::fs::RawDir::new(&directory, &mut buffer);
    entries.next().context("an empty directory")??;
    let position = rustix::fs::tell(&directory)?;
    let names = remaining(&directory)?;
    ensure!((10..20).contains(&names.len()), "{} entries are left to read", names.len());
    rustix::fs::seek(&directory, rustix::fs::SeekFrom::Start(position))?;
    Ok((directory, names))
}

fn remaining(directory: &OwnedFd) -> Result<Vec<String>> {
    let mut buffer = [const { std::mem::MaybeUninit::uninit() }; 4096];
    let mut entries = rustix::fs::RawDir::new(directory, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// One file under each kind of lock: `flock`, POSIX, open file description.
fn locked(setting: &Setting) -> Result<[File; 3]> {
    let open = |name: &str| -> Result<File> {
        let path = setting.protocol.beside(name);
        fs::write(&path, sys::pattern(100, 3))?;
        Ok(OpenOptions::new().read(true).write(true).open(path)?)
    };
    let files = [open("flock")?, open("posix")?, open("ofd")?];
    rustix::fs::flock(&files[0], FlockOperation::LockExclusive).context("flock")?;
    lock(&files[1], libc::F_SETLK, libc::F_WRLCK, 10, 20)?;
    lock(&files[1], libc::F_SETLK, libc::F_RDLCK, 50, 0)?;
    lock(&files[2], libc::F_OFD_SETLK, libc::F_WRLCK, 5, 5)?;
    Ok(files)
}

fn lock(file: &File, command: i32, kind: i32, start: i64, length: i64) -> Result<()> {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: the kernel reads the structure.
    sys::check(i64::from(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) }))
        .context("locking a range of a file")?;
    Ok(())
}

impl State {
    /// For each descriptor: number, path, offset and flags, locks.
    fn describe(&self) -> Result<String> {
        let mut text = String::new();
        let mut add = |name: &str, fd: BorrowedFd<'_>| -> Result<()> {
            let number = fd.as_raw_fd();
            let link = fs::read_link(format!("/proc/self/fd/{number}"))?;
            let close = rustix::io::fcntl_getfd(fd)?.contains(rustix::io::FdFlags::CLOEXEC);
            let _ = writeln!(text, "{name}: {number} {} close-on-exec={close}", link.display());
            for line in fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?.lines() {
                if ["pos:", "flags:", "lock:"].iter().any(|kept| line.starts_with(kept)) {
                    let _ =
                        writeln!(text, "{name}: {}", line.split_whitespace().collect::<Vec<_>>().join(" "));
                }
            }
            Ok(())
        };
        add("half-read", self.half_read.as_fd())?;
        add("duplicate", self.duplicate.as_fd())?;
        add("log", self.log.as_fd())?;
        add("directory", self.directory.as_fd())?;
        add("path-only", self.path_only.as_fd())?;
        add("null", self.null.as_fd())?;
        add("random", self.random.as_fd())?;
        add("flock", self.locked[0].as_fd())?;
        add("posix", self.locked[1].as_fd())?;
        add("ofd", self.locked[2].as_fd())?;
        // `/proc` calls a deleted file whatever it was called last; its number, offset and flags must be kept.
        let (number, position) = (self.deleted.as_raw_fd(), rustix::fs::tell(&self.deleted)?);
        let _ = writeln!(text, "deleted: {number} {position} {:?}", rustix::fs::fcntl_getfl(&self.deleted)?);
        Ok(text.replace(&format!(" {} ", std::process::id()), " self "))
    }

    fn check(&mut self) -> Result<()> {
        let mut bytes = [0; 100];
        self.duplicate.read_exact(&mut bytes)?;
        sys::compare("a half-read file", &bytes, &sys::pattern(10_000, 1)[4321..4421])?;
        let position = self.half_read.stream_position()?;
        ensure!(position == 4421, "a duplicate has an offset of its own: {position}");
        self.half_read.seek(SeekFrom::Start(4321))?;

        let metadata = self.deleted.metadata()?;
        ensure!(metadata.nlink() == 0, "the deleted file has {} names", metadata.nlink());
        let mut content = vec![0; metadata.len() as usize];
        self.deleted.read_exact_at(&mut content, 0)?;
        sys::compare("the deleted file", &content, &sys::pattern(9000, 2))?;

        let position = rustix::fs::tell(&self.directory)?;
        let names = remaining(&self.directory)?;
        ensure!(names == self.names, "what is left of a directory is {names:?} instead of {:?}", self.names);
        rustix::fs::seek(&self.directory, rustix::fs::SeekFrom::Start(position))?;

        self.null.write_all(&bytes)?;
        self.random.read_exact(&mut bytes)?;
        Ok(())
    }

    /// Appends go to the end, wherever others have written meanwhile. The offset is put back for the next look.
    fn check_log(&mut self, path: &std::path::Path) -> Result<()> {
        let before = fs::metadata(path)?.len();
        let position = self.log.stream_position()?;
        self.log.write_all(b"line\n")?;
        ensure!(fs::metadata(path)?.len() == before + 5, "an append did not go to the end of the file");
        self.log.seek(SeekFrom::Start(position))?;
        Ok(())
    }
}
