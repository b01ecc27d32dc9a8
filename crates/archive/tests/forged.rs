//! Archives that nobody but an attacker writes: each is refused or extracted, and nothing outside of the layer is touched.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use limosa_archive::{LayerError, archive, extract};
use proptest::prelude::*;
use tar::{EntryType, Header};

/// An entry as its header says it, with records before it.
#[derive(Debug, Clone)]
struct Forged {
    path: Vec<u8>,
    kind: u8,
    link: Vec<u8>,
    mode: u32,
    owner: u64,
    records: Vec<(String, Vec<u8>)>,
    content: Vec<u8>,
    /// What the header says instead of the content's length.
    size: Option<u64>,
}

impl Forged {
    fn write(&self, to: &mut Vec<u8>) {
        if !self.records.is_empty() {
            let records: Vec<u8> = self.records.iter().flat_map(|(key, value)| record(key, value)).collect();
            block(&header(b'x', b"records", b"", records.len() as u64), &records, to);
        }
        let size = self.size.unwrap_or(self.content.len() as u64);
        let mut header = header(self.kind, &self.path, &self.link, size);
        header.set_mode(self.mode);
        header.set_uid(self.owner);
        header.set_gid(self.owner);
        header.set_cksum();
        block(&header, &self.content, to);
    }
}

fn header(kind: u8, path: &[u8], link: &[u8], size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::new(kind));
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let _ = header.set_device_major(1).and_then(|()| header.set_device_minor(3));
    // Not by `set_path`, which forbids what an attacker would write.
    let old = header.as_old_mut();
    for (field, bytes) in [(&mut old.name, path), (&mut old.linkname, link)] {
        let length = bytes.len().min(field.len());
        field[..length].copy_from_slice(&bytes[..length]);
    }
    header.set_cksum();
    header
}

fn block(header: &Header, content: &[u8], to: &mut Vec<u8>) {
    to.extend_from_slice(header.as_bytes());
    to.extend_from_slice(content);
    to.resize(to.len().next_multiple_of(512), 0);
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

fn hexadecimal(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect()
}

/// Paths that stay, that leave, and that lead through what other entries have made.
fn path() -> impl Strategy<Value = Vec<u8>> {
    let part = prop::sample::select(vec!["a", "b", "c", "..", ".", "", "\u{fc}"]);
    let parts = prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/").into_bytes());
    let whole = prop::sample::select(vec![
        "/a",
        "/",
        "../outside/victim",
        "a/../../outside/victim",
        "./",
        "/proc/self/root/tmp",
    ]);
    prop_oneof![6 => parts, 2 => whole.prop_map(|text| text.as_bytes().to_vec()), 1 => prop::collection::vec(any::<u8>(), 0..100)]
}

fn target() -> impl Strategy<Value = Vec<u8>> {
    let known =
        prop::sample::select(vec!["../outside", "../outside/victim", "..", "/", "a", "b", "/proc/self/cwd"]);
    prop_oneof![known.prop_map(|text| text.as_bytes().to_vec()), path()]
}

fn records() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    let time = prop::sample::select(vec![
        "0.000000000",
        "-1.999999999",
        "99999999999999999999.0",
        "1.5",
        "",
        "9223372036854775807.999999999",
    ]);
    let name = prop::sample::select(vec![
        "user.a",
        "trusted.overlay.opaque",
        "security.selinux",
        "user.",
        "security.capability",
        "user.a\0b",
    ]);
    let one = prop_oneof![
        time.prop_map(|time| ("mtime".to_owned(), time.as_bytes().to_vec())),
        target().prop_map(|target| ("LIMOSA.link".to_owned(), hexadecimal(&target))),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(|bytes| ("LIMOSA.link".to_owned(), bytes)),
        (name, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(name, value)| {
            let name = String::from_utf8(hexadecimal(name.as_bytes())).expect("digits");
            (format!("LIMOSA.xattr.{name}"), hexadecimal(&value))
        }),
        Just(("LIMOSA.socket".to_owned(), Vec::new())),
        path().prop_map(|path| ("path".to_owned(), path)),
        target().prop_map(|path| ("linkpath".to_owned(), path)),
        any::<u64>().prop_map(|size| ("size".to_owned(), size.to_string().into_bytes())),
        any::<u64>().prop_map(|id| ("uid".to_owned(), id.to_string().into_bytes())),
    ];
    prop::collection::vec(one, 0..3)
}

fn forged() -> impl Strategy<Value = Forged> {
    let kind = prop_oneof![8 => prop::sample::select(b"0123456".to_vec()), 1 => prop::sample::select(b"7LKxgSVM\0".to_vec())];
    let size = prop_oneof![8 => Just(None), 1 => any::<u64>().prop_map(Some)];
    let owner = prop_oneof![4 => Just(0), 1 => any::<u64>()];
    let content = prop::collection::vec(any::<u8>(), 0..600);
    let names = (path(), kind, target());
    (names, any::<u32>(), owner, records(), content, size).prop_map(
        |((path, kind, link), mode, owner, records, content, size)| Forged {
            path,
            kind,
            link,
            mode: mode & 0o7777,
            owner,
            records,
            content,
            size,
        },
    )
}

/// All that is below a directory, by path, with what an attacker would change of it.
fn everything(below: &Path, except: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![below.to_owned()];
    while let Some(path) = pending.pop() {
        if path == except {
            continue;
        }
        let metadata = fs::symlink_metadata(&path).expect("metadata");
        let content = if metadata.is_file() { fs::read(&path).expect("content") } else { Vec::new() };
        if metadata.is_dir() {
            pending.extend(
                fs::read_dir(&path).expect("a directory").map(|entry| entry.expect("an entry").path()),
            );
        }
        // A directory's links count those that are in it.
        let of = (metadata.mode(), metadata.uid(), metadata.gid(), metadata.nlink(), metadata.mtime_nsec());
        found.insert(path, format!("{of:?} {content:?}"));
    }
    found
}

/// Extracts; what is outside of the layer must be as before.
fn extracted(bytes: &[u8]) -> Result<(), LayerError> {
    let place = tempfile::tempdir().expect("a directory");
    let (upper, outside) = (place.path().join("upper"), place.path().join("outside"));
    fs::create_dir(&upper).expect("a layer");
    fs::create_dir(&outside).expect("an outside");
    fs::write(outside.join("victim"), "untouched").expect("a victim");
    let before = everything(place.path(), &upper);
    let result = extract(bytes, &upper);
    assert_eq!(everything(place.path(), &upper), before, "{result:?}");
    result
}

/// The layer itself, which ends an archive.
fn last() -> Forged {
    let (kind, records, content) = (b'5', Vec::new(), Vec::new());
    Forged {
        path: b"./".to_vec(),
        kind,
        link: Vec::new(),
        mode: 0o755,
        owner: 0,
        records,
        content,
        size: None,
    }
}

fn bytes_of(entries: &[Forged]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        entry.write(&mut bytes);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

/// A layer with one of each kind, as an archive.
fn honest() -> Vec<u8> {
    let layer = tempfile::tempdir().expect("a directory");
    let path = |name: &str| layer.path().join(name);
    fs::create_dir(path("directory")).expect("a directory");
    fs::write(path("directory/file"), vec![7; 3000]).expect("a file");
    fs::hard_link(path("directory/file"), path("second")).expect("a link");
    std::os::unix::fs::symlink("/nowhere", path("link")).expect("a link");
    std::os::unix::net::UnixListener::bind(path("socket")).expect("a socket");
    fs::write(path(&"long".repeat(40)), "").expect("a file");
    archive(layer.path(), Vec::new()).expect("an archive")
}

#[test]
fn what_the_tests_forge_is_otherwise_whole() {
    let file = Forged { path: b"a".to_vec(), kind: b'0', content: b"whole".to_vec(), ..last() };
    extracted(&bytes_of(&[file, last()])).expect("an archive");
}

#[test]
fn a_link_that_leads_out_is_made_and_not_followed() {
    let link = [("LIMOSA.link".to_owned(), hexadecimal(b"../outside"))];
    let link = Forged { path: b"a".to_vec(), kind: b'2', records: link.to_vec(), ..last() };
    let through = Forged { path: b"a/victim".to_vec(), kind: b'0', content: b"touched".to_vec(), ..last() };
    let over = Forged { path: b"a".to_vec(), ..through.clone() };
    let hard = Forged { path: b"b".to_vec(), kind: b'1', link: b"a/victim".to_vec(), ..last() };
    extracted(&bytes_of(&[link.clone(), last()])).expect("a link as such");
    for entry in [through, over, hard] {
        let error = extracted(&bytes_of(&[link.clone(), entry, last()])).expect_err("it leads out");
        assert!(matches!(error, LayerError::File { .. }), "{error:?}");
    }
}

#[test]
fn an_honest_archive_cut_anywhere_is_refused() {
    let whole = honest();
    extracted(&whole).expect("an archive");
    // Two blocks of zeros follow the last entry.
    for length in (0..whole.len() - 1536).step_by(97) {
        extracted(&whole[..length]).expect_err("cut off");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn forged_entries_stay_in_the_layer(entries in prop::collection::vec(forged(), 1..6), whole: bool) {
        let mut entries = entries;
        entries.extend(whole.then(last));
        let _ = extracted(&bytes_of(&entries));
    }

    #[test]
    fn damaged_archives_are_refused_or_stay_in_the_layer(
        places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), repair: bool
    ) {
        let mut bytes = honest();
        for (place, value) in places {
            let at = place.index(bytes.len());
            bytes[at] = value;
            if repair && at % 512 < 500 {
                let block = at / 512 * 512;
                let mut header = Header::from_byte_slice(&bytes[block..block + 512]).clone();
                header.set_cksum();
                bytes[block..block + 512].copy_from_slice(header.as_bytes());
            }
        }
        let _ = extracted(&bytes);
    }

    #[test]
    fn any_bytes_are_refused(bytes: Vec<u8>) {
        prop_assert!(extracted(&bytes).is_err());
    }
}

#[test]
fn an_honest_archive_comes_back() {
    let place = tempfile::tempdir().expect("a directory");
    extract(honest().as_slice(), place.path()).expect("an archive");
    let mut content = Vec::new();
    fs::File::open(place.path().join("second")).expect("a file").read_to_end(&mut content).expect("content");
    assert_eq!(content, vec![7; 3000]);
    assert!(fs::symlink_metadata(place.path().join("socket")).expect("a socket").file_type().is_socket());
}
