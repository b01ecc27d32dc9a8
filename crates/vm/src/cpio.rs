//! The archive format of an initramfs: cpio, "newc".
//!
//! ```text
//! header: "070701", then 13 numbers of 8 hexadecimal digits: inode, mode, uid, gid, links, mtime, size,
//!         device (major, minor), the device that a node stands for (major, minor), length of the name, checksum (0)
//! name, NUL, zeros up to a multiple of 4
//! content, zeros up to a multiple of 4
//! the end: an entry called TRAILER!!!
//! ```
//!
//! Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Directories come before what is
//! in them: the kernel makes none by itself.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;
const CHARACTER: u32 = 0o020_600;

/// An archive while it is written. Paths are relative to the root of the machine's file system.
pub struct Writer<W: Write> {
    to: W,
    entries: u32,
    names: BTreeSet<Vec<u8>>,
}

impl<W: Write> Writer<W> {
    /// An empty archive.
    pub fn new(to: W) -> Self {
        Self { to, entries: 0, names: BTreeSet::new() }
    }

    /// A directory, and those that it is in, where they are not there yet.
    pub fn directory(&mut self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.directory(parent)?,
            _ => {}
        }
        if self.names.contains(path.as_os_str().as_bytes()) {
            Ok(())
        } else {
            self.entry(path, DIRECTORY, (0, 0), b"")
        }
    }

    /// A file with these permissions.
    pub fn file(&mut self, path: &Path, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.inside(path)?;
        self.entry(path, FILE | (permissions & 0o7777), (0, 0), content)
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &Path, target: &Path) -> io::Result<()> {
        self.inside(path)?;
        self.entry(path, LINK, (0, 0), target.as_os_str().as_bytes())
    }

    /// A character device.
    pub fn character_device(&mut self, path: &Path, major: u32, minor: u32) -> io::Result<()> {
        self.inside(path)?;
        self.entry(path, CHARACTER, (major, minor), b"")
    }

    /// Whether there is something of this name.
    pub fn contains(&self, path: &Path) -> bool {
        self.names.contains(path.as_os_str().as_bytes())
    }

    /// The end of the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry(Path::new("TRAILER!!!"), 0, (0, 0), b"")?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn inside(&mut self, path: &Path) -> io::Result<()> {
        path.parent().map_or(Ok(()), |parent| self.directory(parent))
    }

    fn entry(&mut self, path: &Path, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let name = path.as_os_str().as_bytes();
        if path.is_absolute() || !self.names.insert(name.to_owned()) {
            let problem = format!("{} is absolute or there already", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, format!("{}: 4 GiB or more", path.display()))
        })?;
        self.entries += 1;
        let links = 1;
        let fields =
            [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        let header = fields.iter().fold("070701".to_owned(), |header, field| format!("{header}{field:08x}"));
        self.to.write_all(header.as_bytes())?;
        self.to.write_all(name)?;
        self.to.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1)?;
        self.to.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, length: usize) -> io::Result<()> {
        self.to.write_all(&[0; 3][..length.next_multiple_of(4) - length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_as_the_kernel_documents_it() {
        let mut writer = Writer::new(Vec::new());
        writer.file(Path::new("a/b"), 0o755, b"hello").expect("written");
        let archive = writer.finish().expect("ended");
        let directory = "070701000000010000 41ed".replace(' ', "");
        assert!(archive.starts_with(directory.as_bytes()));
        let text = String::from_utf8_lossy(&archive);
        let at = text.find("a/b\0").expect("the file");
        // Header (110) and name (4) end at a multiple of four after the directory's 112.
        assert_eq!(at, 112 + 110);
        assert_eq!(&text[at + 4..at + 4 + 2 + 8], "\0\0hello\0\0\0");
        assert_eq!(&text[112 + 14..112 + 22], "000081ed");
        assert_eq!(&text[112 + 54..112 + 62], "00000005");
        assert_eq!(archive.len() % 4, 0);
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"));
    }

    #[test]
    fn nothing_is_there_twice_or_outside() {
        let mut writer = Writer::new(Vec::new());
        writer.file(Path::new("a/b"), 0o644, b"").expect("written");
        writer.link(Path::new("a/c"), Path::new("b")).expect("written");
        writer.directory(Path::new("a")).expect("there already, which is no error");
        assert!(writer.file(Path::new("a/c"), 0o644, b"").is_err());
        assert!(writer.file(Path::new("/etc/passwd"), 0o644, b"").is_err());
        assert!(writer.contains(Path::new("a/b")) && !writer.contains(Path::new("b")));
    }
}
