//! A checkpoint appears whole or not at all, and a writer leaves nothing behind.

mod common;

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use common::{assert_filled, fill, meta, pages, write};
use limosa_image::{Checkpoint, CheckpointWriter, PAGE, Sink, SpaceId, WriteError};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

fn names(path: &Path) -> Vec<String> {
    let mut names = path
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect::<Vec<_>>();
    names.sort();
    names
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("checkpoint");
    let mut writer = CheckpointWriter::create(&path).unwrap();
    fill(&mut writer);
    let [hidden] = &names(home.path())[..] else { panic!("one hidden directory") };
    assert!(hidden.starts_with(".checkpoint.partial-"), "{hidden}");
    drop(writer);
    assert!(names(home.path()).is_empty());
}

#[test]
fn an_occupied_place_is_refused_and_left_alone() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("checkpoint");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("mine"), "precious").unwrap();
    assert!(matches!(CheckpointWriter::create(&path), Err(WriteError::Exists(_))));
    let file = home.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(matches!(CheckpointWriter::create(&file), Err(WriteError::Exists(_))));
    let link = home.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    assert!(matches!(CheckpointWriter::create(&link), Err(WriteError::Exists(_))));
    for nameless in ["/", "..", ""] {
        assert!(matches!(CheckpointWriter::create(Path::new(nameless)), Err(WriteError::NoName(_))));
    }
    assert_eq!(names(home.path()), ["checkpoint", "file", "link"]);
}

#[test]
fn an_empty_directory_is_a_place() {
    let home = tempfile::tempdir().unwrap();
    write(home.path());
    assert_filled(&Checkpoint::open(home.path()).unwrap());
}

#[test]
fn of_two_writers_the_first_to_commit_wins() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("checkpoint");
    let mut first = CheckpointWriter::create(&path).unwrap();
    let mut second = CheckpointWriter::create(&path).unwrap();
    fill(&mut first);
    fill(&mut second);
    let committed = second.commit(meta()).unwrap();
    assert!(matches!(first.commit(meta()), Err(WriteError::Exists(_))));
    assert_eq!(names(home.path()), ["checkpoint"]);
    assert_eq!(Checkpoint::open(&path).unwrap().manifest().meta.id, committed.id);
}

#[test]
fn what_a_killed_writer_left_goes_with_the_next() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("checkpoint");
    let abandoned = home.path().join(".checkpoint.partial-0123456789abcdef");
    fs::create_dir_all(abandoned.join("blobs")).unwrap();
    fs::write(abandoned.join("memory.pages"), "half of it").unwrap();
    let other = home.path().join(".other.partial-0123456789abcdef");
    fs::create_dir(&other).unwrap();
    let writer = CheckpointWriter::create(&path).unwrap();
    assert!(!abandoned.exists());
    assert!(other.exists(), "another name's is not touched");
    drop(writer);
    assert_eq!(names(home.path()), [".other.partial-0123456789abcdef"]);
}

#[test]
fn a_blob_that_cannot_be_read_is_named() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(5))
        }
    }
    let home = tempfile::tempdir().unwrap();
    let mut writer = CheckpointWriter::create(&home.path().join("checkpoint")).unwrap();
    let error = writer.blob("log", &mut Broken).unwrap_err();
    assert!(matches!(&error, WriteError::Content { name, .. } if name == "log"), "{error}");
}

/// Something that puts content into a writer.
type Filling<'a> = &'a dyn Fn(&mut CheckpointWriter) -> Result<(), WriteError>;

/// A tmpfs of its own that is mounted nowhere and goes away with its descriptor.
fn small_filesystem(size: &str) -> Option<(OwnedFd, PathBuf)> {
    let made = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).and_then(|context| {
        rustix::mount::fsconfig_set_string(&context, "size", size)?;
        rustix::mount::fsconfig_create(&context)?;
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    });
    match made {
        Ok(mount) => {
            let path = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
            Some((mount, path))
        }
        Err(error) => {
            eprintln!("SKIPPED: mounting a tmpfs needs CAP_SYS_ADMIN: {error}");
            None
        }
    }
}

/// Fills a small filesystem with each kind of content in turn.
#[test]
fn a_full_filesystem_is_named_and_left_empty() {
    let Some((_mount, home)) = small_filesystem("1m") else { return };
    let path = home.join("checkpoint");
    let too_much = pages(1, 300);
    let fillings: [(&str, Filling); 4] = [
        ("memory.pages", &|writer| writer.pages(SpaceId(0), 0, &too_much)),
        ("memory.pages", &|writer| {
            // In small pieces: the failure comes with a later call, or at the commit.
            (0..300).try_for_each(|page| {
                let at = page * PAGE as usize;
                writer.pages(SpaceId(0), 2 * at as u64, &too_much[at..at + PAGE as usize])
            })
        }),
        ("state", &|writer| writer.state("large", &too_much)),
        ("blobs/layer.tar", &|writer| writer.blob("layer.tar", &mut &too_much[..]).map(drop)),
    ];
    for (file, filling) in fillings {
        let mut writer = CheckpointWriter::create(&path).unwrap();
        let error = filling(&mut writer).and_then(|()| writer.commit(meta()).map(drop)).unwrap_err();
        assert!(matches!(error, WriteError::NoSpace { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(path.join(file).to_str().unwrap()), "{message}");
        assert!(message.contains("free space"), "{message}");
        assert!(names(&home).is_empty(), "{file}: {:?}", names(&home));
    }
    // And with the space it needs it works there.
    let mut writer = CheckpointWriter::create(&path).unwrap();
    writer.pages(SpaceId(0), 0, &too_much[..200 * PAGE as usize]).unwrap();
    writer.commit(meta()).unwrap();
    limosa_image::verify(&path).unwrap();
}
