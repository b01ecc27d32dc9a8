//! Writing a layer as an archive.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use tar::{Builder, EntryType, Header};

use super::{LINK, LayerError, MTIME, SOCKET, XATTR, to_hex, travels};

/// Writes the layer in the directory `upper` to `output`.
///
/// Nobody may change the layer meanwhile (the container is frozen): a file that shrinks spoils the archive.
/// Links in the layer are never followed. Returns `output`.
pub fn archive<W: Write>(upper: &Path, output: W) -> Result<W, LayerError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(upper, flags, Mode::empty()).map_err(|errno| LayerError::File {
        operation: "open",
        path: upper.into(),
        source: errno.into(),
    })?;
    let mut builder = Builder::new(output);
    builder.follow_symlinks(false);
    let mut archive = Archive { builder, root, links: HashMap::new() };
    let mut pending = archive.children(Path::new("."))?;
    while let Some(path) = pending.pop() {
        let attributes = archive.entry(&path)?;
        if FileType::from_raw_mode(attributes.st_mode) == FileType::Directory {
            pending.extend(archive.children(&path)?);
        }
    }
    archive.entry(Path::new("."))?;
    archive.builder.into_inner().map_err(stream)
}

fn stream(source: io::Error) -> LayerError {
    LayerError::Stream { operation: "write", source }
}

struct Archive<W: Write> {
    builder: Builder<W>,
    root: OwnedFd,
    /// Files with several names, by device and inode: the name under which they are already in the archive.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Archive<W> {
    /// Opens a file of the layer without following any link.
    fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)?)
    }

    /// What is in a directory of the layer, in reverse order of names so that popping gives them in order.
    fn children(&self, path: &Path) -> Result<Vec<PathBuf>, LayerError> {
        let read = || {
            let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let mut names = Vec::new();
            for entry in Dir::new(directory)? {
                let name = entry?.file_name().to_bytes().to_owned();
                if name != b"." && name != b".." {
                    let name = OsStr::from_bytes(&name);
                    names.push(if path == Path::new(".") { name.into() } else { path.join(name) });
                }
            }
            names.sort_unstable_by(|one, other| other.cmp(one));
            Ok(names)
        };
        read().map_err(|source| LayerError::File { operation: "list", path: path.to_owned(), source })
    }

    /// Appends one file, and returns its attributes.
    fn entry(&mut self, path: &Path) -> Result<Stat, LayerError> {
        let failed =
            |source: io::Error| LayerError::File { operation: "read", path: path.to_owned(), source };
        let file = self.open(path, OFlags::PATH).map_err(failed)?;
        let attributes =
            rustix::fs::statat(&file, "", AtFlags::EMPTY_PATH).map_err(|errno| failed(errno.into()))?;
        let kind = FileType::from_raw_mode(attributes.st_mode);
        if kind != FileType::Directory && attributes.st_nlink > 1 {
            let identity = (attributes.st_dev, attributes.st_ino);
            if let Some(first) = self.links.get(&identity) {
                let mut header = header(EntryType::Link, &attributes);
                self.builder.append_link(&mut header, path, first).map_err(stream)?;
                return Ok(attributes);
            }
            self.links.insert(identity, path.to_owned());
        }
        let mut records =
            vec![(MTIME.to_owned(), format!("{}.{:09}", attributes.st_mtime, attributes.st_mtime_nsec))];
        records.extend(extended_attributes(&file).map_err(failed)?);
        let entry_type = match kind {
            FileType::RegularFile => return self.regular(path, &records, attributes),
            FileType::Directory => EntryType::Directory,
            FileType::CharacterDevice => EntryType::Char,
            FileType::BlockDevice => EntryType::Block,
            FileType::Fifo => EntryType::Fifo,
            FileType::Symlink => {
                let target =
                    rustix::fs::readlinkat(&file, "", Vec::new()).map_err(|errno| failed(errno.into()))?;
                records.push((LINK.to_owned(), to_hex(target.to_bytes())));
                EntryType::Symlink
            }
            FileType::Socket => {
                records.push((SOCKET.to_owned(), String::new()));
                EntryType::Regular
            }
            FileType::Unknown => {
                return Err(failed(io::Error::new(io::ErrorKind::Unsupported, "a file of unknown type")));
            }
        };
        let mut header = header(entry_type, &attributes);
        header.set_device_major(rustix::fs::major(attributes.st_rdev)).map_err(failed)?;
        header.set_device_minor(rustix::fs::minor(attributes.st_rdev)).map_err(failed)?;
        let name = if path == Path::new(".") { Path::new("./") } else { path };
        self.append_records(&records)?;
        self.builder.append_data(&mut header, name, io::empty()).map_err(stream)?;
        Ok(attributes)
    }

    fn regular(
        &mut self,
        path: &Path,
        records: &[(String, String)],
        attributes: Stat,
    ) -> Result<Stat, LayerError> {
        let file = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK).map_err(|source| LayerError::File {
            operation: "open",
            path: path.to_owned(),
            source,
        })?;
        self.append_records(records)?;
        self.builder.append_file(path, &mut File::from(file)).map_err(stream)?;
        Ok(attributes)
    }

    fn append_records(&mut self, records: &[(String, String)]) -> Result<(), LayerError> {
        let records = records.iter().map(|(key, value)| (key.as_str(), value.as_bytes()));
        self.builder.append_pax_extensions(records).map_err(stream)
    }
}

fn header(kind: EntryType, attributes: &Stat) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(attributes.st_mode & 0o7777);
    header.set_uid(attributes.st_uid.into());
    header.set_gid(attributes.st_gid.into());
    header.set_mtime(attributes.st_mtime.try_into().unwrap_or(0));
    header
}

/// The extended attributes that travel, as records.
fn extended_attributes(file: &OwnedFd) -> io::Result<Vec<(String, String)>> {
    // The calls for descriptors refuse one that is only a path; its name in /proc leads to the file itself.
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mut names = vec![0_u8; 65_536];
    let length = match rustix::fs::listxattr(&path, &mut names[..]) {
        Ok(length) => length,
        // Whole filesystems, and some types of file, have none.
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM) => 0,
        Err(errno) => return Err(errno.into()),
    };
    names.truncate(length);
    let mut records = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| travels(name)) {
        let mut value = vec![0_u8; 65_536];
        let name_text = std::ffi::OsString::from_vec(name.to_owned());
        let length = rustix::fs::getxattr(&path, name_text.as_os_str(), &mut value[..])?;
        value.truncate(length);
        records.push((format!("{XATTR}{}", to_hex(name)), to_hex(&value)));
    }
    Ok(records)
}
