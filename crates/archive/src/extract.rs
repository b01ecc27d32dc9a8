//! Making a layer from an archive, which may come from anyone.
//!
//! Nothing is ever made outside the directory: an entry's parent is opened beneath it with no link followed
//! (openat2(2)), and the entry itself is made there under its last name only, exclusively. The directory must
//! be empty before, so that no link lies in wait.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};
use tar::{Entry, EntryType};

use super::{LINK, LayerError, MTIME, SOCKET, XATTR, from_hex, travels};

/// Extracts an archive that [`super::archive`] wrote into `upper`, an empty directory that nobody else uses.
///
/// # Errors
/// Of an archive that is damaged or forged, or a filesystem that is full; what was made by then stays in
/// `upper`.
pub fn extract(input: impl Read, upper: &Path) -> Result<(), LayerError> {
    let failed = |source| LayerError::File { operation: "open", path: upper.to_owned(), source };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(upper, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    if std::fs::read_dir(upper).map_err(failed)?.next().is_some() {
        return Err(failed(io::Error::new(io::ErrorKind::DirectoryNotEmpty, "the directory is not empty")));
    }
    let mut layer = Layer { root, directories: Vec::new() };
    let mut archive = tar::Archive::new(input);
    let mut complete = false;
    for entry in archive.entries().map_err(stream)? {
        let mut entry = entry.map_err(stream)?;
        let path = PathBuf::from(OsString::from_vec(entry.path_bytes().into_owned()));
        if complete {
            return Err(LayerError::Malformed { path, why: "it comes after the last entry" });
        }
        complete = layer.entry(&path, &mut entry)?;
    }
    if complete { layer.finish() } else { Err(LayerError::Truncated) }
}

fn stream(source: io::Error) -> LayerError {
    LayerError::Stream { operation: "read", source }
}

/// What an entry says beyond its header.
#[derive(Default)]
struct Records {
    modified: Option<Timespec>,
    attributes: Vec<(OsString, Vec<u8>)>,
    link: Option<OsString>,
    socket: bool,
}

struct Layer {
    root: OwnedFd,
    /// Directories with their times, which making something in them changes.
    directories: Vec<(PathBuf, Timespec)>,
}

/// Where an entry goes: the directory, open, and the last name.
struct Place<'a> {
    parent: OwnedFd,
    name: &'a OsStr,
}

impl Layer {
    /// Makes one entry; whether it was the layer itself, the last.
    fn entry<R: Read>(&mut self, path: &Path, entry: &mut Entry<'_, R>) -> Result<bool, LayerError> {
        let malformed = |why| LayerError::Malformed { path: path.to_owned(), why };
        let failed =
            |source: io::Error| LayerError::File { operation: "make", path: path.to_owned(), source };
        let records = Records::parse(entry, path)?;
        let kind = entry.header().entry_type();
        if path == Path::new(".") {
            if kind != EntryType::Directory {
                return Err(malformed("the layer itself must be a directory"));
            }
            let root = self.root.try_clone().map_err(failed)?;
            let place = Place { parent: root, name: OsStr::new(".") };
            place.set_attributes(entry.header(), &records, kind).map_err(failed)?;
            self.directories.push((path.to_owned(), records.modified.unwrap_or(NOW)));
            return Ok(true);
        }
        let place = self.place(path)?;
        match kind {
            EntryType::Link => {
                let target = entry.link_name_bytes().ok_or_else(|| malformed("a link without a target"))?;
                let target = PathBuf::from(OsString::from_vec(target.into_owned()));
                let target = self.place(&target)?;
                let (old, new) = ((&target.parent, target.name), (&place.parent, place.name));
                // The target is in the layer, and a symbolic link there is itself what is linked to.
                rustix::fs::linkat(old.0, old.1, new.0, new.1, AtFlags::empty())
                    .map_err(|errno| failed(errno.into()))?;
                return Ok(false);
            }
            EntryType::Directory => place.make_directory().map_err(failed)?,
            EntryType::Symlink => {
                let target = records.link.as_deref().ok_or_else(|| malformed("a link without a target"))?;
                rustix::fs::symlinkat(target, &place.parent, place.name)
                    .map_err(|errno| failed(errno.into()))?;
            }
            EntryType::Regular if records.socket => place.make_node(FileType::Socket, 0).map_err(failed)?,
            EntryType::Regular | EntryType::GNUSparse => place.make_file(entry).map_err(failed)?,
            EntryType::Fifo => place.make_node(FileType::Fifo, 0).map_err(failed)?,
            EntryType::Char | EntryType::Block => {
                let number = |number: io::Result<Option<u32>>| number.ok().flatten();
                let header = entry.header();
                let (major, minor) = number(header.device_major())
                    .zip(number(header.device_minor()))
                    .ok_or_else(|| malformed("a device without a number"))?;
                let kind =
                    if kind == EntryType::Char { FileType::CharacterDevice } else { FileType::BlockDevice };
                place.make_node(kind, rustix::fs::makedev(major, minor)).map_err(failed)?;
            }
            _ => return Err(malformed("an entry of a type that no layer has")),
        }
        place.set_attributes(entry.header(), &records, kind).map_err(failed)?;
        if kind == EntryType::Directory {
            self.directories.push((path.to_owned(), records.modified.unwrap_or(NOW)));
        }
        Ok(false)
    }

    /// Opens the directory in which `path` lies.
    fn place<'a>(&self, path: &'a Path) -> Result<Place<'a>, LayerError> {
        let malformed = |why| LayerError::Malformed { path: path.to_owned(), why };
        if !path.components().all(|component| matches!(component, Component::Normal(_))) {
            return Err(malformed("the path leaves the layer"));
        }
        let name = path.file_name().ok_or_else(|| malformed("an empty path"))?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let parent =
            rustix::fs::openat2(&self.root, parent, flags, Mode::empty(), resolve).map_err(|errno| {
                LayerError::File {
                    operation: "find the directory of",
                    path: path.into(),
                    source: errno.into(),
                }
            })?;
        Ok(Place { parent, name })
    }

    /// Sets the times of the directories, now that nothing is made in them any more.
    fn finish(&self) -> Result<(), LayerError> {
        for (path, modified) in self.directories.iter().rev() {
            let root = Path::new(".");
            let set = if path == root {
                set_modified(&self.root, OsStr::new("."), *modified)
            } else {
                let place = self.place(path)?;
                set_modified(&place.parent, place.name, *modified)
            };
            set.map_err(|source| LayerError::File {
                operation: "set the time of",
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };

fn set_modified(parent: &OwnedFd, name: &OsStr, modified: Timespec) -> io::Result<()> {
    let times = Timestamps { last_access: NOW, last_modification: modified };
    Ok(rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

impl Place<'_> {
    fn make_directory(&self) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.parent, self.name, Mode::RWXU)?)
    }

    fn make_node(&self, kind: FileType, device: u64) -> io::Result<()> {
        Ok(rustix::fs::mknodat(&self.parent, self.name, kind, Mode::empty(), device)?)
    }

    fn make_file(&self, content: &mut impl Read) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.parent, self.name, flags, Mode::RUSR | Mode::WUSR)?;
        copy_sparse(content, &mut File::from(file))
    }

    /// Owner, then mode (changing the owner clears set-user-ID), then attributes, then time.
    fn set_attributes(&self, header: &tar::Header, records: &Records, kind: EntryType) -> io::Result<()> {
        let id = |id: io::Result<u64>| {
            let id = id.ok().and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX);
            id.ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "an owner that is no user or group ID")
            })
        };
        let (owner, group) = (Uid::from_raw(id(header.uid())?), Gid::from_raw(id(header.gid())?));
        rustix::fs::chownat(&self.parent, self.name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        if kind != EntryType::Symlink {
            // The entry was just made, exclusively: it is no link.
            let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
            rustix::fs::chmodat(&self.parent, self.name, mode, AtFlags::empty())?;
        }
        let path = Path::new("/proc/self/fd").join(self.parent.as_raw_fd().to_string()).join(self.name);
        for (name, value) in &records.attributes {
            rustix::fs::lsetxattr(&path, name.as_os_str(), value, XattrFlags::empty())?;
        }
        if let Some(modified) = records.modified.filter(|_| kind != EntryType::Directory) {
            set_modified(&self.parent, self.name, modified)?;
        }
        Ok(())
    }
}

/// Copies with holes where there are whole blocks of zeros.
fn copy_sparse(content: &mut impl Read, file: &mut File) -> io::Result<()> {
    const BLOCK: usize = 4096;
    let mut buffer = vec![0_u8; 32 * BLOCK];
    let mut length = 0;
    loop {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match content.read(rest)? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            return file.set_len(length);
        }
        length += filled as u64;
        for block in buffer.get(..filled).unwrap_or_default().chunks(BLOCK) {
            if block.iter().all(|byte| *byte == 0) {
                file.seek(SeekFrom::Current(block.len() as i64))?;
            } else {
                file.write_all(block)?;
            }
        }
    }
}

impl Records {
    fn parse<R: Read>(entry: &mut Entry<'_, R>, path: &Path) -> Result<Self, LayerError> {
        let malformed = |why| LayerError::Malformed { path: path.to_owned(), why };
        let mut records = Self::default();
        let Some(extensions) = entry.pax_extensions().map_err(stream)? else { return Ok(records) };
        for record in extensions {
            let record = record.map_err(|_| malformed("a record that is not understood"))?;
            let key = record.key().map_err(|_| malformed("a record whose name is no text"))?;
            let value = record.value_bytes();
            if key == MTIME {
                let time = parse_time(value).ok_or_else(|| malformed("a time that is none"))?;
                records.modified = Some(time);
            } else if key == LINK {
                let target = from_hex(value).filter(|target| !target.is_empty() && !target.contains(&0));
                records.link =
                    Some(OsString::from_vec(target.ok_or_else(|| malformed("a link without a target"))?));
            } else if key == SOCKET {
                records.socket = true;
            } else if let Some(name) = key.strip_prefix(XATTR) {
                let name = from_hex(name.as_bytes()).filter(|name| travels(name) && !name.contains(&0));
                let name = name.ok_or_else(|| malformed("an extended attribute that no layer has"))?;
                let value =
                    from_hex(value).ok_or_else(|| malformed("an extended attribute without value"))?;
                records.attributes.push((OsStr::from_bytes(&name).to_owned(), value));
            }
        }
        Ok(records)
    }
}

/// `SECONDS.NNNNNNNNN`.
fn parse_time(text: &[u8]) -> Option<Timespec> {
    let (seconds, nanoseconds) = std::str::from_utf8(text).ok()?.split_once('.')?;
    let nanoseconds: u32 = nanoseconds.parse().ok().filter(|_| nanoseconds.len() == 9)?;
    (nanoseconds < 1_000_000_000).then_some(())?;
    Some(Timespec { tv_sec: seconds.parse().ok()?, tv_nsec: nanoseconds.into() })
}
