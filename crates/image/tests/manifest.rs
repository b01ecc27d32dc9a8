//! Manifests whose checksum is right and whose content is not, and manifests of other versions.

mod common;

use common::meta;
use limosa_image::cbor;
use limosa_image::{Digest, FORMAT_VERSION, FileEntry, Manifest, Meta, OpenError, SectionEntry};
use serde::Serialize;

/// A change of a good manifest, and what the refusal says.
type Change<'a> = (&'a dyn Fn(&mut Manifest), &'a str);

/// The bytes of a manifest of `version` with this body and a checksum that fits.
fn frame(version: u32, body: &[u8]) -> Vec<u8> {
    let header =
        [&b"LIMOSACP"[..], &version.to_le_bytes(), &[0; 4], &(body.len() as u64).to_le_bytes()].concat();
    let checksum = blake3::Hasher::new().update(&header).update(body).finalize();
    [&header[..], checksum.as_bytes(), body].concat()
}

fn file(path: &str) -> FileEntry {
    let digest = (path != "memory.pages").then(|| Digest::of(path.as_bytes()));
    FileEntry { path: path.into(), length: 10, digest }
}

fn section(name: &str, length: u64) -> SectionEntry {
    SectionEntry { name: name.into(), length }
}

fn good() -> Manifest {
    Manifest {
        meta: meta(),
        files: ["memory.pages", "state", "memory.index", "blobs/a"].map(file).into(),
        sections: vec![section("tasks", 4), section("files", 6)],
    }
}

#[test]
fn the_layout_is_the_documented_one() {
    let manifest = good();
    let bytes = manifest.to_bytes().unwrap();
    assert_eq!(bytes, frame(FORMAT_VERSION, &cbor::encode(&manifest).unwrap()));
    assert_eq!(Manifest::from_bytes(&bytes).unwrap(), manifest);
}

#[test]
fn a_newer_version_is_refused_with_both_numbers() {
    let error = Manifest::from_bytes(&frame(7, b"anything at all")).unwrap_err();
    assert!(matches!(error, OpenError::Version { found: 7, supported: FORMAT_VERSION, .. }));
    let message = error.to_string();
    assert!(message.contains("version 7") && message.contains("up to 1"), "{message}");
}

/// What a later writer of the same version may add.
#[test]
fn fields_that_are_not_known_are_ignored() {
    #[derive(Serialize)]
    struct LaterMeta {
        zone: (u32, Vec<&'static str>),
        #[serde(flatten)]
        meta: Meta,
    }
    #[derive(Serialize)]
    struct Later {
        signature: Vec<u8>,
        meta: LaterMeta,
        files: Vec<FileEntry>,
        sections: Vec<SectionEntry>,
        compression: Option<&'static str>,
    }
    let Manifest { meta, files, sections } = good();
    let later = Later {
        signature: vec![1, 2, 3],
        meta: LaterMeta { zone: (5, vec!["x", "y"]), meta: meta.clone() },
        files: files.clone(),
        sections: sections.clone(),
        compression: Some("zstd"),
    };
    let body = cbor::encode(&later).unwrap();
    let read = Manifest::from_bytes(&frame(FORMAT_VERSION, &body)).unwrap();
    assert_eq!(read, Manifest { meta, files, sections });
}

#[test]
fn misleading_content_is_refused() {
    let refusal = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good();
        change(&mut manifest);
        let body = cbor::encode(&manifest).unwrap();
        Manifest::from_bytes(&frame(FORMAT_VERSION, &body)).unwrap_err().to_string()
    };
    for path in
        ["/etc/passwd", "../state", "blobs/../state", "blobs/", "blobs/a/b", "blobs/.x", "manifest", ""]
    {
        let message = refusal(&|manifest| manifest.files.push(file(path)));
        assert!(message.contains("no file of a checkpoint"), "{path}: {message}");
    }
    let changes: [Change; 9] = [
        (&|manifest| manifest.files.push(file("state")), "twice"),
        (&|manifest| drop(manifest.files.remove(0)), "does not list memory.pages"),
        (&|manifest| drop(manifest.files.remove(1)), "does not list state"),
        (&|manifest| manifest.files[1].digest = None, "must have a digest"),
        (&|manifest| manifest.files[0].digest = Some(Digest::of(b"")), "must have a digest"),
        (&|manifest| manifest.sections[0].length = 5, "bytes long together"),
        (&|manifest| manifest.sections[0].length = u64::MAX, "overflow"),
        (&|manifest| manifest.sections[0].name = "files".into(), "appears twice"),
        (&|manifest| manifest.sections[0].name = "../x".into(), "bad name"),
    ];
    for (change, reason) in changes {
        let message = refusal(change);
        assert!(message.contains(reason), "{reason}: {message}");
    }
}

#[test]
fn a_body_that_is_no_manifest_is_refused() {
    for body in
        [&b""[..], b"\xa0", b"\xff", &vec![0x81; 100_000], &[0x9b, 255, 255, 255, 255, 255, 255, 255, 255]]
    {
        let error = Manifest::from_bytes(&frame(FORMAT_VERSION, body)).unwrap_err();
        assert!(matches!(error, OpenError::Malformed { offset: 56, .. }), "{error}");
    }
}
