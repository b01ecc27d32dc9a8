//! A writable layer comes back from its archive as it was, and no archive writes outside its directory.
//! Needs root: ownership, devices and `trusted` attributes are its affair.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Cursor, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use limosa_container::layer::{LayerError, archive, extract};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: this test needs root");
    }
    root
}

/// Directories on a tmpfs, which like a real layer's filesystem keeps nanoseconds and attributes.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory")
}

/// Everything that must come back, by path.
fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut inodes: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).expect("attributes");
        let first = inodes.entry(metadata.ino()).or_insert_with(|| path.clone()).clone();
        let mut text = format!(
            "mode {:o} owner {}:{} device {} modified {}.{} first name {}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.rdev(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            first.strip_prefix(root).expect("below").display(),
        );
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).expect("a listing");
            pending.extend(entries.map(|entry| entry.expect("an entry").path()));
            pending.sort_by(|one, other| other.cmp(one));
        } else if metadata.is_file() {
            let _ = write!(text, " content {}", blake3::hash(&fs::read(&path).expect("content")));
        } else if metadata.is_symlink() {
            let _ = write!(text, " to {}", fs::read_link(&path).expect("a target").display());
        }
        let mut names = vec![0_u8; 4096];
        let length = rustix::fs::llistxattr(&path, &mut names[..]).unwrap_or(0);
        let mut attributes = Vec::new();
        for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let name = CString::new(name).expect("a name");
            let mut value = vec![0_u8; 4096];
            let length = rustix::fs::lgetxattr(&path, &name, &mut value[..]).expect("a value");
            attributes.push((name, value[..length].to_owned()));
        }
        attributes.sort();
        let _ = write!(text, " attributes {attributes:?}");
        all.insert(path.strip_prefix(root).expect("below").to_owned(), text);
    }
    all
}

fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).expect("an attribute");
}

fn set_modified(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("a time");
}

fn furnish(layer: &Path) {
    let dir = layer.join("var/lib/some data");
    fs::create_dir_all(&dir).expect("directories");
    fs::write(dir.join("file"), b"content").expect("a file");
    fs::hard_link(dir.join("file"), layer.join("other name")).expect("a link");
    chown(dir.join("file"), Some(1234), Some(3_000_000_000)).expect("an owner");
    fs::set_permissions(dir.join("file"), fs::Permissions::from_mode(0o6755)).expect("a mode");
    set_attribute(&dir.join("file"), "user.note", b"line\nline=\0\xff");
    symlink("../../../../etc/passwd", dir.join("link")).expect("a link");
    symlink("x".repeat(300), dir.join("long link")).expect("a link");
    let node = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, layer.join(name), kind, Mode::RUSR, device).expect("a node");
    };
    node("whiteout", FileType::CharacterDevice, 0);
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("fifo", FileType::Fifo, 0);
    drop(UnixListener::bind(layer.join("socket")).expect("a socket"));
    set_attribute(&dir, "trusted.overlay.opaque", b"y");
    set_attribute(&layer.join("var"), "trusted.overlay.redirect", b"/usr/old\nname");
    let long = layer.join("a".repeat(200)).join("b".repeat(200));
    fs::create_dir_all(&long).expect("directories");
    fs::write(long.join("empty"), b"").expect("a file");
    let sparse = File::create(layer.join("sparse")).expect("a file");
    sparse.set_len(64 << 20).expect("a length");
    sparse.write_all_at(b"in the middle", 30 << 20).expect("content");
    set_modified(&dir.join("file"), 1_700_000_000, 123_456_789);
    set_modified(&dir.join("link"), -5, 1);
    set_modified(&dir, 1_600_000_000, 1);
    set_modified(&layer.join("var"), 1_500_000_000, 999_999_999);
    fs::set_permissions(layer, fs::Permissions::from_mode(0o711)).expect("a mode");
    set_modified(layer, 1_400_000_000, 5);
}

#[test]
fn a_layer_comes_back_as_it_was() {
    if !is_root() {
        return;
    }
    let (from, to) = (scratch(), scratch());
    furnish(from.path());
    let stream = archive(from.path(), Vec::new()).expect("an archive");
    extract(&stream[..], to.path()).expect("a layer");
    assert_eq!(describe(from.path()), describe(to.path()));
    assert!(stream.len() < 4 << 20, "holes are not archived: {} bytes", stream.len());
    let blocks = fs::metadata(to.path().join("sparse")).expect("attributes").blocks();
    assert!(blocks * 512 < 4 << 20, "holes come back as holes: {blocks} blocks");
    // The same layer gives the same archive.
    assert_eq!(archive(to.path(), Vec::new()).expect("an archive"), stream);
}

#[test]
fn an_archive_that_is_cut_off_is_refused() {
    if !is_root() {
        return;
    }
    let from = scratch();
    fs::create_dir(from.path().join("directory")).expect("a directory");
    fs::write(from.path().join("directory/file"), [7; 3000]).expect("a file");
    let stream = archive(from.path(), Vec::new()).expect("an archive");
    // The last two blocks are tar's own end mark: without them everything is there all the same.
    for length in (0..stream.len() - 1024).step_by(256) {
        let to = scratch();
        assert!(extract(&stream[..length], to.path()).is_err(), "{length} of {} bytes", stream.len());
    }
}

/// An archive with these entries, and the layer itself at the end.
fn forge(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, path, target) in entries.iter().chain(&[(EntryType::Directory, "./", "")]) {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o700);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        let raw = header.as_gnu_mut().expect("a header");
        raw.name[..path.len()].copy_from_slice(path.as_bytes());
        raw.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        if *kind == EntryType::Symlink {
            let target = target.bytes().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
            builder.append_pax_extensions([("LIMOSA.link", target.as_bytes())]).expect("a record");
        }
        builder.append(&header, std::io::empty()).expect("an entry");
    }
    builder.into_inner().expect("an archive")
}

#[test]
fn no_archive_leads_out_of_its_directory() {
    use EntryType::{Directory, Link, Regular, Symlink};
    if !is_root() {
        return;
    }
    let outside = scratch();
    let out = outside.path().to_str().expect("a path").to_owned();
    let absolute = format!("{out}/made");
    fs::write(outside.path().join("secret"), b"secret").expect("a file");
    let secret = format!("{out}/secret");
    let cases: Vec<Vec<(EntryType, &str, &str)>> = vec![
        vec![(Regular, "../made", "")],
        vec![(Regular, &absolute, "")],
        vec![(Directory, "d", ""), (Regular, "d/../../made", "")],
        vec![(Symlink, "link", &out), (Regular, "link/made", "")],
        vec![(Symlink, "link", &absolute), (Regular, "link", "")],
        vec![(Symlink, "link", ".."), (Directory, "link/made", "")],
        vec![(Link, "made", &secret)],
        vec![(Link, "made", "../secret")],
        vec![(Symlink, "link", &out), (Link, "made", "link/secret")],
        vec![(Directory, "", "")],
        vec![(Directory, "..", "")],
        vec![(Regular, "twice", ""), (Regular, "twice", "")],
    ];
    for case in cases {
        let layers = tempfile::tempdir_in(outside.path()).expect("a directory");
        let upper = layers.path().join("upper");
        fs::create_dir(&upper).expect("a directory");
        let refused = extract(&forge(&case)[..], &upper).expect_err("refused");
        assert!(
            matches!(refused, LayerError::File { .. } | LayerError::Malformed { .. }),
            "{case:?}: {refused}"
        );
        let names = |path: &Path| fs::read_dir(path).expect("a listing").count();
        assert_eq!((names(layers.path()), names(outside.path())), (1, 2), "{case:?}");
    }
}

#[test]
fn a_link_that_leads_outside_is_kept_but_not_followed() {
    if !is_root() {
        return;
    }
    let outside = scratch();
    fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o751)).expect("a mode");
    let before = describe(outside.path());
    let to = scratch();
    let target = outside.path().to_str().expect("a path");
    extract(&forge(&[(EntryType::Symlink, "link", target)])[..], to.path()).expect("a layer");
    assert_eq!(fs::read_link(to.path().join("link")).expect("a link"), outside.path());
    assert_eq!(describe(outside.path()), before);
}

#[test]
fn damaged_archives_never_panic() {
    if !is_root() {
        return;
    }
    let from = scratch();
    fs::write(from.path().join("file"), b"content").expect("a file");
    set_attribute(&from.path().join("file"), "user.note", b"value");
    let stream = archive(from.path(), Vec::new()).expect("an archive");
    for position in (0..stream.len()).step_by(17) {
        let mut damaged = stream.clone();
        damaged[position] ^= 0x41;
        let to = scratch();
        // Tar's own checksum covers headers only: what is caught here is caught, the rest by the checkpoint's.
        let _ = extract(&damaged[..], to.path());
    }
}

#[test]
fn a_layer_that_is_not_empty_is_not_extracted_into() {
    if !is_root() {
        return;
    }
    let to = scratch();
    symlink("/etc", to.path().join("etc")).expect("a link");
    assert!(extract(&forge(&[])[..], to.path()).is_err());
}

#[test]
fn sparse_copies_end_in_holes_of_the_right_length() {
    if !is_root() {
        return;
    }
    let (from, to) = (scratch(), scratch());
    for (name, length) in [("none", 0_u64), ("odd", 12_345), ("zeros", 300_000)] {
        let mut file = File::create(from.path().join(name)).expect("a file");
        file.seek(SeekFrom::Start(0)).expect("a position");
        file.write_all(&vec![0; length as usize]).expect("content");
    }
    extract(Cursor::new(archive(from.path(), Vec::new()).expect("an archive")), to.path()).expect("a layer");
    assert_eq!(describe(from.path()), describe(to.path()));
}
