//! What a machine has: an archive that the kernel unpacks into memory and that stays the machine's root.
//!
//! The same programs as on the machine that builds it, with the libraries that their loader finds there. Limosa and its
//! tests are in `/suite`, laid out as in cargo's build directory, where the tests look for it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use limosa_e2e::built;

use crate::cpio::Writer;
use crate::kernel::Kernel;

/// Where modules lie in the machine, beside the list of their files in order.
pub const MODULES: &str = "modules";

/// Programs of Debian's that tests use; everything else is busybox. (Its `cat` keeps what is typed on a terminal to itself.)
const PROGRAMS: [&str; 13] = [
    "bash",
    "cat",
    "flock",
    "ip",
    "ipcmk",
    "redis-cli",
    "redis-server",
    "script",
    "setsid",
    "sha256sum",
    "sleep",
    "stty",
    "unshare",
];
/// Directories that a machine has from its beginning.
const DIRECTORIES: [&str; 12] =
    ["dev", "mnt", "newroot", "proc", "root", "run", "srv", "sys", "tmp", "usr/sbin", "usr/lib64", "var/lib"];
/// Places that a merged `/usr` has moved.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Where scripts/test-vm puts the paths of the tests that run in a machine, separated by colons.
const TESTS: &str = "LIMOSA_VM_TESTS";

/// Writes the initramfs of machines with this kernel into a file.
pub fn write(kernel: &Kernel, path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let writer = Writer::new(BufWriter::with_capacity(1 << 20, file));
    let mut tree = Tree { writer, libraries: BTreeSet::new(), scratch: path.with_extension("stripped") };
    tree.skeleton()?;
    tree.busybox()?;
    for program in PROGRAMS {
        let path = which(program);
        tree.program(
            &path.with_context(|| format!("{program} is not installed: run scripts/ensure-packages vm"))?,
        )?;
    }
    tree.own(&built("limosa-vm-init")?, Path::new("init"))?;
    for name in ["limosa", "limosa-target"] {
        tree.own(&built(name)?, &Path::new("suite").join(name))?;
    }
    for test in tests()? {
        tree.own(&test.path, &Path::new("suite/deps").join(&test.name))?;
    }
    tree.modules(kernel)?;
    tree.writer.finish()?;
    Ok(())
}

/// A test binary, built on this machine to run in another.
struct Test {
    /// `round_trips`
    name: String,
    path: PathBuf,
}

fn tests() -> Result<Vec<Test>> {
    let paths = std::env::var(TESTS).with_context(|| {
        format!("{TESTS} is not set: run scripts/test-vm, which builds what runs in the machines")
    })?;
    let tests = paths.split(':').map(|path| {
        let path = PathBuf::from(path);
        let name = path.file_name().and_then(OsStr::to_str).context("a test without a name")?;
        // cargo has added a hash.
        let name = name.rsplit_once('-').map_or(name, |(name, _)| name).to_owned();
        Ok(Test { name, path })
    });
    tests.collect()
}

/// Looks for a program where Debian has programs.
fn which(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/usr/sbin"].iter().map(|place| Path::new(place).join(name)).find(|path| path.exists())
}

struct Tree<W: Write> {
    writer: Writer<W>,
    libraries: BTreeSet<PathBuf>,
    /// A file for the moment.
    scratch: PathBuf,
}

impl<W: Write> Tree<W> {
    fn skeleton(&mut self) -> Result<()> {
        for directory in DIRECTORIES {
            self.writer.directory(Path::new(directory))?;
        }
        for place in MERGED {
            self.writer.link(Path::new(place), &Path::new("usr").join(place))?;
        }
        // The kernel opens it for process 1, before anything is mounted.
        self.writer.character_device(Path::new("dev/console"), 5, 1)?;
        for (path, content) in [
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
            ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
            ("etc/hosts", "127.0.0.1 localhost\n"),
        ] {
            self.writer.file(Path::new(path), 0o644, content.as_bytes())?;
        }
        Ok(())
    }

    fn busybox(&mut self) -> Result<()> {
        let path = which("busybox").context("busybox is not installed: run scripts/ensure-packages vm")?;
        let list = Command::new(&path).arg("--list").output().context("running busybox --list")?;
        self.writer.file(Path::new("usr/bin/busybox"), 0o755, &fs::read(&path)?)?;
        for applet in String::from_utf8(list.stdout)?.lines().filter(|name| *name != "busybox") {
            if !PROGRAMS.contains(&applet) {
                self.writer.link(&Path::new("usr/bin").join(applet), Path::new("busybox"))?;
            }
        }
        Ok(())
    }

    /// A program of this machine, at its place.
    fn program(&mut self, path: &Path) -> Result<()> {
        let name = path.file_name().context("a program without a name")?;
        self.needs(path)?;
        self.writer.file(&Path::new("usr/bin").join(name), 0o755, &fs::read(path)?)?;
        Ok(())
    }

    /// A program that cargo built, without its debug information.
    fn own(&mut self, path: &Path, to: &Path) -> Result<()> {
        self.needs(path)?;
        let output =
            Command::new("strip").arg("-o").args([&self.scratch, path]).output().context("running strip")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "strip {}: {said}", path.display());
        self.writer.file(to, 0o755, &fs::read(&self.scratch)?)?;
        fs::remove_file(&self.scratch)?;
        Ok(())
    }

    /// The libraries and the loader of a program.
    fn needs(&mut self, path: &Path) -> Result<()> {
        let output = Command::new("ldd").arg(path).output().context("running ldd")?;
        let text = String::from_utf8(output.stdout)?;
        for line in text.lines() {
            // "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)", "/lib64/ld-linux-x86-64.so.2 (0x…)"
            let found = line.split_once("=> ").map_or(line, |(_, found)| found).trim();
            if found.starts_with("not found") {
                bail!("{} needs a library that is not there: {line}", path.display());
            }
            let library = found.split(' ').next().unwrap_or_default();
            if library.starts_with('/') && self.libraries.insert(PathBuf::from(library)) {
                self.library(Path::new(library))?;
            }
        }
        Ok(())
    }

    fn library(&mut self, path: &Path) -> Result<()> {
        let (directory, name) =
            (path.parent().context("no directory")?, path.file_name().context("no name")?);
        // The place, without a merged /usr's links; the content behind the library's own link.
        let place = fs::canonicalize(directory)?.join(name);
        let place = place.strip_prefix("/")?;
        if !self.writer.contains(place) {
            self.writer.file(place, 0o755, &fs::read(path)?)?;
        }
        Ok(())
    }

    fn modules(&mut self, kernel: &Kernel) -> Result<()> {
        let mut list = String::new();
        for module in kernel.modules()? {
            self.writer.file(&Path::new(MODULES).join(&module.file), 0o644, &module.content)?;
            list.push_str(&module.file);
            list.push('\n');
        }
        self.writer.file(&Path::new(MODULES).join("list"), 0o644, list.as_bytes())?;
        Ok(())
    }
}
