//! An index whose digest is right and whose content is made to mislead.

use super::*;

const PAGES_LENGTH: u64 = 4 * CHUNK;

fn extent(space: u32, start: u64, length: u64, offset: u64, first_checksum: u64) -> Extent {
    Extent { space: SpaceId(space), start, length, offset, first_checksum }
}

fn index(extents: &[Extent]) -> Index {
    let (extents, checksums) = (extents.to_vec(), vec![0x1234_5678; 4]);
    Index { extents, checksums, pages_length: PAGES_LENGTH, checked: true }
}

fn refusal(extents: &[Extent]) -> String {
    Index::from_bytes(&index(extents).to_bytes(), PAGES_LENGTH).unwrap_err().to_string()
}

#[test]
fn what_is_written_is_read() {
    let written = index(&[
        extent(0, PAGE, CHUNK + PAGE, CHUNK, 1),
        extent(0, CHUNK + 2 * PAGE, PAGE, 0, 0),
        extent(7, 0, PAGE, 3 * CHUNK, 3),
    ]);
    let read = Index::from_bytes(&written.to_bytes(), PAGES_LENGTH).unwrap();
    assert_eq!((&read.extents, &read.checksums), (&written.extents, &written.checksums));
    assert_eq!(written.to_bytes().len() as u64, written.size());
    assert_eq!(read.of(SpaceId(0)).len(), 2);
    assert_eq!(read.of(SpaceId(7)).len(), 1);
    assert!(read.of(SpaceId(3)).is_empty());
    let end = 3 * CHUNK + PAGE;
    assert_eq!(read.gaps(), [PAGE..CHUNK, 2 * CHUNK + PAGE..3 * CHUNK, end..PAGES_LENGTH]);
}

#[test]
fn impossible_extents_are_refused() {
    let last_page = 0_u64.wrapping_sub(PAGE);
    for (bad, reason) in [
        (extent(0, 0, 0, 0, 0), "not whole pages"),
        (extent(0, 1, PAGE, 0, 0), "not whole pages"),
        (extent(0, 0, PAGE + 1, 0, 0), "not whole pages"),
        (extent(0, 0, PAGE, 512, 0), "not whole pages"),
        (extent(0, last_page, PAGE, 0, 0), "beyond any address"),
        (extent(0, PAGE, last_page, 0, 0), "beyond any address"),
        (extent(0, 0, PAGE, PAGES_LENGTH, 0), "not inside"),
        (extent(0, 0, PAGE, last_page, 0), "not inside"),
        (extent(0, 0, PAGES_LENGTH + PAGE, 0, 0), "not inside"),
        (extent(0, 0, PAGE, 0, 4), "not among"),
        (extent(0, 0, CHUNK + PAGE, 0, 3), "not among"),
        (extent(0, 0, PAGE, 0, u64::MAX), "not among"),
    ] {
        let message = refusal(&[bad]);
        assert!(
            message.starts_with("memory.index, byte 48: ") && message.contains(reason),
            "{bad:?}: {message}"
        );
    }
}

#[test]
fn extents_that_overlap_are_refused() {
    let first = extent(1, 0, 2 * PAGE, 0, 0);
    for (second, reason) in [
        (extent(1, PAGE, PAGE, CHUNK, 1), "overlaps the one before it or is out of order"),
        (extent(0, 0, PAGE, CHUNK, 1), "overlaps the one before it or is out of order"),
        (extent(1, 2 * PAGE, PAGE, PAGE, 1), "overlap in memory.pages"),
        (extent(2, 0, PAGE, 0, 1), "overlap in memory.pages"),
        (extent(1, 2 * PAGE, PAGE, CHUNK, 0), "overlap in the checksums"),
    ] {
        let message = refusal(&[first, second]);
        assert!(message.contains(reason), "{second:?}: {message}");
    }
}

#[test]
fn counts_that_do_not_fit_the_file_allocate_nothing() {
    let whole = index(&[extent(0, 0, PAGE, 0, 0)]).to_bytes();
    for (at, value) in
        [(16, 0), (16, 2), (16, u64::MAX), (16, 1 << 60), (24, 3), (24, u64::MAX), (24, u64::MAX / 4)]
    {
        let mut bytes = whole.clone();
        bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
        let error = Index::from_bytes(&bytes, PAGES_LENGTH).unwrap_err().to_string();
        assert!(error.contains("do not make"), "{at} {value}: {error}");
    }
    let error = Index::from_bytes(&whole, PAGES_LENGTH - PAGE).unwrap_err().to_string();
    assert!(error.contains("the manifest has"), "{error}");
}

#[test]
fn another_version_is_refused_with_both_numbers() {
    let mut bytes = index(&[]).to_bytes();
    bytes[8] = 9;
    let error = Index::from_bytes(&bytes, PAGES_LENGTH).unwrap_err();
    assert!(matches!(error, OpenError::Version { found: 9, supported: FORMAT_VERSION, .. }), "{error}");
}

#[test]
fn unknown_flags_are_refused() {
    let mut bytes = index(&[extent(0, 0, PAGE, 0, 0)]).to_bytes();
    bytes[52] = 1;
    let error = Index::from_bytes(&bytes, PAGES_LENGTH).unwrap_err().to_string();
    assert!(error.contains("unknown flags 0x1"), "{error}");
}
