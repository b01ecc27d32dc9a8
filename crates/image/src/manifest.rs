//! The manifest: who this checkpoint is, what it needs, and the digest of everything else in it.
//!
//! ```text
//! offset  size  field
//!      0     8  magic            "LIMOSACP"
//!      8     4  format version   little-endian, 1
//!     12     4  reserved         0
//!     16     8  body length      little-endian; the file ends with the body
//!     24    32  BLAKE3 of bytes 0..24 and of the body
//!     56     n  body             one CBOR map, see [`Manifest`]
//! ```
//!
//! **Versions.** A field that old readers may ignore is added to the body as an optional one, and the
//! version stays. Whatever they would misread raises the version. A reader refuses versions above its own
//! and says both numbers; it reads every older one.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::cbor;
use crate::error::{OpenError, WriteError};

/// The newest format this crate reads, and the one it writes.
pub const FORMAT_VERSION: u32 = 1;
/// No manifest is larger: 16 MiB, about 100,000 files and sections.
pub(crate) const MAX_MANIFEST: u64 = 16 << 20;

pub(crate) const MANIFEST: &str = "manifest";
pub(crate) const STATE: &str = "state";
pub(crate) const INDEX: &str = "memory.index";
pub(crate) const PAGES: &str = "memory.pages";
pub(crate) const BLOBS: &str = "blobs";

const MAGIC: [u8; 8] = *b"LIMOSACP";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    body_length: U64,
}

/// Defines a fixed number of bytes that is written as hexadecimal, in CBOR, JSON and messages alike.
macro_rules! hex_bytes {
    ($(#[$doc:meta])* $name:ident, $size:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $size]);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseHexError;

            fn from_str(text: &str) -> Result<Self, ParseHexError> {
                parse_hex(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

hex_bytes! {
    /// The identity of a checkpoint: 128 random bits, written as 32 hexadecimal digits.
    CheckpointId, 16
}
hex_bytes! {
    /// A BLAKE3 digest, written as 64 hexadecimal digits.
    Digest, 32
}

/// Text that is not the expected number of lower-case hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("expected {expected} lower-case hexadecimal digits, found {found:?}")]
pub struct ParseHexError {
    /// How many digits there must be.
    pub expected: usize,
    /// What there is instead (its first 80 characters).
    pub found: String,
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseHexError> {
    let error = || ParseHexError { expected: 2 * N, found: text.chars().take(80).collect() };
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return Err(error());
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let (high, low) = (digit(pair[0]).ok_or_else(error)?, digit(pair[1]).ok_or_else(error)?);
        *byte = high << 4 | low;
    }
    Ok(bytes)
}

impl CheckpointId {
    /// A new identity from the kernel's random numbers (getrandom(2)).
    pub fn random() -> Self {
        Self(crate::error::random_bytes())
    }
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

/// What the one who makes a checkpoint says about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The checkpoint's identity.
    pub id: CheckpointId,
    /// The checkpoint it is based on, if it holds only what changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<CheckpointId>,
    /// When it was made: milliseconds since 1970-01-01 UTC.
    pub created: u64,
    /// The release of the kernel it was made on (`uname -r`).
    pub kernel: String,
    /// The CPU features without which it cannot continue, in the spelling of `/proc/cpuinfo`.
    pub cpu_features: Vec<String>,
}

impl Meta {
    /// A checkpoint made now, with a new identity and no parent.
    pub fn new(kernel: impl Into<String>, cpu_features: Vec<String>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self {
            id: CheckpointId::random(),
            parent: None,
            created: now.as_millis() as u64,
            kernel: kernel.into(),
            cpu_features,
        }
    }
}

/// One file of the checkpoint other than the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its path below the checkpoint: `state`, `memory.index`, `memory.pages` or `blobs/NAME`.
    pub path: String,
    /// Its length in bytes.
    pub length: u64,
    /// The digest of its content. `memory.pages` has none: its checksums are in `memory.index`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// One section of the `state` file. Sections follow each other without gaps, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionEntry {
    /// Its name, see [`crate::is_valid_name`].
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
}

/// The body of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What was said by the one who made the checkpoint.
    pub meta: Meta,
    /// Every other file.
    pub files: Vec<FileEntry>,
    /// The table of the `state` file.
    pub sections: Vec<SectionEntry>,
}

impl Manifest {
    /// The entry of the file `path`.
    pub fn file(&self, path: &str) -> Option<&FileEntry> {
        self.files.iter().find(|entry| entry.path == path)
    }

    /// The names, lengths and digests of the blobs.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = (&str, &FileEntry)> {
        self.files.iter().filter_map(|entry| {
            let name = entry.path.strip_prefix(BLOBS)?.strip_prefix('/')?;
            Some((name, entry))
        })
    }

    /// The bytes of the file `manifest`.
    pub fn to_bytes(&self) -> Result<Vec<u8>, cbor::EncodeError> {
        let body = cbor::encode(self)?;
        let header = Header {
            magic: MAGIC,
            version: U32::new(FORMAT_VERSION),
            reserved: U32::new(0),
            body_length: U64::new(body.len() as u64),
        };
        let mut bytes = Vec::with_capacity(size_of::<Header>() + 32 + body.len());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&checksum(header.as_bytes(), &body));
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Reads the bytes of the file `manifest` and checks all that can be checked without the other files.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, OpenError> {
        let malformed = |offset: usize, reason: String| OpenError::Malformed {
            file: MANIFEST.into(),
            offset: offset as u64,
            reason,
        };
        let short = || malformed(bytes.len(), format!("it ends after {} bytes", bytes.len()));
        let (header, rest) = Header::read_from_prefix(bytes).map_err(|_| short())?;
        let (digest, body) = rest.split_first_chunk::<32>().ok_or_else(short)?;
        if header.magic != MAGIC {
            return Err(malformed(0, "it does not begin as a Limosa checkpoint does".into()));
        }
        // The version comes before the checksum: a later version may compute that differently.
        let version = header.version.get();
        if version != FORMAT_VERSION {
            return Err(OpenError::Version {
                file: MANIFEST.into(),
                found: version,
                supported: FORMAT_VERSION,
            });
        }
        if header.body_length.get() != body.len() as u64 {
            let reason =
                format!("its body is {} bytes long and should be {}", body.len(), header.body_length);
            return Err(malformed(16, reason));
        }
        if checksum(&bytes[..size_of::<Header>()], body) != *digest {
            return Err(malformed(24, "its checksum does not match: it is damaged".into()));
        }
        let manifest: Self = cbor::decode(body).map_err(|error| malformed(56, error.to_string()))?;
        manifest.check().map_err(|reason| malformed(56, reason))?;
        Ok(manifest)
    }

    /// What must hold whoever wrote it: known paths, each once; digests; sections that fill `state`.
    fn check(&self) -> Result<(), String> {
        let mut seen = std::collections::BTreeSet::new();
        for entry in &self.files {
            let known = match entry.path.strip_prefix("blobs/") {
                Some(name) => crate::name::is_valid(name),
                None => [STATE, INDEX, PAGES].contains(&entry.path.as_str()),
            };
            if !known {
                return Err(format!("it lists {:?}, which is no file of a checkpoint", entry.path));
            }
            if !seen.insert(&entry.path) {
                return Err(format!("it lists {} twice", entry.path));
            }
            if entry.digest.is_some() == (entry.path == PAGES) {
                return Err(format!("{} must have a digest, memory.pages none", entry.path));
            }
        }
        if let Some(missing) = [STATE, INDEX, PAGES].iter().find(|path| self.file(path).is_none()) {
            return Err(format!("it does not list {missing}"));
        }
        let mut names = std::collections::BTreeSet::new();
        let mut total = 0_u64;
        for section in &self.sections {
            if !crate::name::is_valid(&section.name) || !names.insert(&section.name) {
                return Err(format!("section {:?} has a bad name or appears twice", section.name));
            }
            total = total.checked_add(section.length).ok_or("the sections' lengths overflow")?;
        }
        let state = self.file(STATE).map_or(0, |entry| entry.length);
        if total != state {
            return Err(format!("the sections are {total} bytes long together, the state file {state}"));
        }
        Ok(())
    }
}

/// Refuses to write a manifest that could not be read back.
pub(crate) fn check_length(length: u64) -> Result<(), WriteError> {
    if length > MAX_MANIFEST {
        return Err(WriteError::TooLarge { what: "the manifest", length, limit: MAX_MANIFEST });
    }
    Ok(())
}

fn checksum(header: &[u8], body: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(header).update(body).finalize().as_bytes()
}
