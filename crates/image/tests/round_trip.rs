//! What is put into a sink comes back out, whichever way it took.

mod common;

use std::os::unix::fs::{FileExt, PermissionsExt};

use common::{assert_filled, fill, meta, pages, read, write};
use limosa_image::{
    CHUNK, Checkpoint, CheckpointWriter, PAGE, ReadError, Sink, SpaceId, Staging, WriteError,
};

#[test]
fn through_a_directory() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("checkpoint");
    let committed = write(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_filled(&checkpoint);
    assert_eq!(checkpoint.manifest().meta.id, committed.id);
    let report = limosa_image::verify(&path).unwrap();
    assert_eq!((report.id, report.files), (committed.id, 6));
    assert_eq!(committed.files, 6);
    assert_eq!(home.path().read_dir().unwrap().count(), 1, "nothing hidden is left");
}

#[test]
fn only_the_owner_may_read_it() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("checkpoint");
    write(&path);
    let mode = |name: &str| path.join(name).metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(""), mode("blobs")), (0o700, 0o700));
    for file in ["manifest", "state", "memory.index", "memory.pages", "blobs/deleted.1"] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
}

#[test]
fn through_memory_and_from_there_into_a_directory() {
    let mut staging = Staging::new().unwrap();
    fill(&mut staging);
    let staged = staging.into_checkpoint(meta()).unwrap();
    assert_filled(&staged);

    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("copy");
    let mut writer = CheckpointWriter::create(&path).unwrap();
    staged.copy_into(&mut writer).unwrap();
    writer.commit(staged.manifest().meta.clone()).unwrap();
    let copy = Checkpoint::open(&path).unwrap();
    assert_filled(&copy);
    // In memory there are no checksums: four bytes for each MiB of each of the three extents, one of which is longer.
    assert!(copy.is_checked() && !staged.is_checked());
    let mut described = staged.describe();
    described.bytes += 4 * 4;
    assert_eq!(copy.describe(), described);
    // The copy has its pages in the order of the index, the original in that of the capture.
    let places = |checkpoint: &Checkpoint| {
        let extents = checkpoint.all_extents().iter();
        extents.map(|extent| (extent.space, extent.start, extent.length)).collect::<Vec<_>>()
    };
    assert_eq!(places(&copy), places(&staged));
}

#[test]
fn an_empty_checkpoint_is_one() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("empty");
    CheckpointWriter::create(&path).unwrap().commit(meta()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.spaces().is_empty() && checkpoint.extents(SpaceId(7)).is_empty());
    assert!(matches!(checkpoint.state::<String>("tasks"), Err(ReadError::NoSection(_))));
    assert!(matches!(checkpoint.blob("x"), Err(ReadError::NoBlob(_))));
    limosa_image::verify(&path).unwrap();
}

#[test]
fn pages_given_again_replace_the_former_ones() {
    let mut staging = Staging::new().unwrap();
    let space = SpaceId(3);
    let mut expected = pages(1, 600);
    staging.pages(space, 10 * PAGE, &expected).unwrap();
    // Over the end of the first chunk, at the beginning, and from inside to beyond the end.
    for (seed, at, count) in [(2, 250, 10), (3, 0, 1), (4, 590, 20)] {
        let new = pages(seed, count);
        staging.pages(space, (10 + at) * PAGE, &new).unwrap();
        let begin = (at * PAGE) as usize;
        expected.resize(expected.len().max(begin + new.len()), 0);
        expected[begin..begin + new.len()].copy_from_slice(&new);
    }
    // From before the beginning to inside.
    let before = pages(5, 12);
    staging.pages(space, 0, &before).unwrap();
    expected[..2 * PAGE as usize].copy_from_slice(&before[10 * PAGE as usize..]);
    let expected = [&before[..10 * PAGE as usize], &expected].concat();

    let checkpoint = staging.into_checkpoint(meta()).unwrap();
    let found =
        checkpoint.extents(space).iter().flat_map(|extent| read(&checkpoint, extent)).collect::<Vec<_>>();
    assert!(found == expected);
    let stored: u64 = checkpoint.all_extents().iter().map(|extent| extent.length).sum();
    assert_eq!(stored, 620 * PAGE, "no page is stored twice");
}

#[test]
fn any_range_of_an_extent_can_be_read() {
    let mut staging = Staging::new().unwrap();
    let expected = pages(9, 700);
    for (number, page) in expected.chunks(PAGE as usize).enumerate() {
        staging.pages(SpaceId(0), number as u64 * PAGE, page).unwrap();
    }
    let checkpoint = staging.into_checkpoint(meta()).unwrap();
    let [extent] = checkpoint.extents(SpaceId(0)) else { panic!("single pages become one extent") };
    let end = extent.length;
    for (from, to) in
        [(0, end), (0, 0), (5, 17), (CHUNK - 1, CHUNK + 1), (CHUNK, end), (CHUNK + 3, 2 * CHUNK)]
    {
        let mut buffer = vec![0; (to - from) as usize];
        checkpoint.read_pages(extent, from..to, &mut buffer).unwrap();
        assert!(buffer == expected[from as usize..to as usize], "{from}..{to}");
    }
    for (from, to, length) in [(0, end + 1, end + 1), (1, 0, 0), (0, 10, 9)] {
        let error = checkpoint.read_pages(extent, from..to, &mut vec![0; length as usize]);
        assert!(matches!(error, Err(ReadError::Range { .. })), "{from}..{to}");
    }
    checkpoint.verify_extent(extent).unwrap();
    let mut direct = vec![0; end as usize];
    let file = std::fs::File::from(checkpoint.pages_fd().try_clone_to_owned().unwrap());
    file.read_exact_at(&mut direct, extent.offset).unwrap();
    assert!(direct == expected);
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let mut staging = Staging::new().unwrap();
    for name in ["", "..", "a/b", "UPPER", ".x"] {
        assert!(matches!(staging.state(name, &[0]), Err(WriteError::Name(_))), "{name:?}");
        assert!(matches!(staging.blob(name, &mut &b""[..]), Err(WriteError::Name(_))), "{name:?}");
    }
    staging.state("once", &[0]).unwrap();
    assert!(matches!(staging.state("once", &[0]), Err(WriteError::Twice { kind: "section", .. })));
    staging.blob("once", &mut &b""[..]).unwrap();
    assert!(matches!(staging.blob("once", &mut &b""[..]), Err(WriteError::Twice { kind: "blob", .. })));
    let page = pages(0, 1);
    for (start, data) in [(1, &page[..]), (0, &page[1..]), (0_u64.wrapping_sub(PAGE), &page[..])] {
        let error = staging.pages(SpaceId(0), start, data);
        assert!(matches!(error, Err(WriteError::NotPages { .. })), "{start:#x}");
    }
}
