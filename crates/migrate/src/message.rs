//! Control messages: CBOR maps with named fields. Unknown fields are ignored; optional ones have defaults.

use limosa_image::cbor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::frame::Kind;
use crate::id::MigrationId;
use crate::version::VersionRange;

/// Who speaks, and which versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions spoken.
    pub versions: VersionRange,
    /// Program and version, for error messages: `limosa 0.1.0`.
    #[serde(default)]
    pub software: String,
}

/// The read-only layer under a container's writable one. It does not travel: it must be there already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// What identifies its content; how it is computed is the engine's affair.
    #[serde(with = "octets")]
    pub digest: Vec<u8>,
    /// How a person calls it: a path, an image's name.
    pub name: String,
}

/// What the source would send. The destination checks it before anything is frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The migration's id.
    pub id: MigrationId,
    /// The container's name.
    pub container: String,
    /// Features of the kernel that the restore needs, in the engine's words.
    #[serde(default)]
    pub kernel_features: Vec<String>,
    /// Features of the CPU that the processes use.
    #[serde(default)]
    pub cpu_features: Vec<String>,
    /// The read-only layer.
    #[serde(default)]
    pub layer: Option<Layer>,
    /// An estimate of the memory that will be sent, in bytes.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Network addresses that move with the container.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// What else the two engines have to tell each other: CBOR that the protocol does not look into.
    /// At most about 200 KiB: the whole message must fit [`crate::frame::MAX_CONTROL`].
    #[serde(default, with = "octets")]
    pub extra: Vec<u8>,
}

impl Offer {
    /// An offer that needs nothing.
    pub fn new(id: MigrationId, container: impl Into<String>) -> Self {
        Self {
            id,
            container: container.into(),
            kernel_features: Vec::new(),
            cpu_features: Vec::new(),
            layer: None,
            memory_bytes: 0,
            addresses: Vec::new(),
            extra: Vec::new(),
        }
    }
}

/// The destination's consent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// After `Ready` the destination waits for `HandOver` this long, in milliseconds.
    pub hand_over_ms: u64,
    /// The longest piece of state it takes, in bytes.
    pub max_state: u64,
}

/// One reason why a destination cannot take a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What it is about: a feature, an address, the name, the layer.
    pub what: String,
    /// Why it is in the way.
    pub why: String,
    /// What can be done about it.
    #[serde(default)]
    pub remedy: Option<String>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", printable(&self.what), printable(&self.why))?;
        self.remedy.iter().try_for_each(|remedy| write!(f, " ({})", printable(remedy)))
    }
}

/// All reasons of a refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// The reasons; at least one.
    pub reasons: Vec<Refusal>,
}

/// A piece of state begins; `StateData` follows until its length is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
}

/// A blob begins; `BlobData` follows until `BlobEnd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its name in the checkpoint.
    pub name: String,
}

/// A blob is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobEnd {
    /// Its length in bytes.
    pub length: u64,
}

/// What was sent in all. Both sides count; they must agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Pieces of state.
    pub states: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Blobs.
    pub blobs: u64,
    /// Bytes of blobs.
    pub blob_bytes: u64,
    /// Content messages.
    pub messages: u64,
    /// BLAKE3 over the headers of all content messages in order. A header holds the CRC-32C of its payload, so this
    /// covers what was sent, all of it, and in which order.
    #[serde(with = "octets")]
    pub digest: Vec<u8>,
}

/// Everything is built at the destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// How long building took, in microseconds.
    #[serde(default)]
    pub prepare_us: u64,
}

/// Why one side gives up, or why the container does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// For a person to read.
    pub reason: String,
}

/// What the destination's engine reports about the container that now runs there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartReport {
    /// How long it took from `HandOver` until the first process ran, in microseconds.
    #[serde(default)]
    pub start_us: u64,
    /// What else the engine reports: CBOR that the protocol does not look into.
    #[serde(default, with = "octets")]
    pub extra: Vec<u8>,
}

/// Asks what became of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Which.
    pub id: MigrationId,
}

/// What a destination says about a migration that it had, or had not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It runs here (or did, and ended here).
    Started(StartReport),
    /// It does not run here and never will. Saying so makes it true: the destination records it first.
    NeverStarted(Reason),
    /// It is being started right now; ask again after so many milliseconds.
    Undecided {
        /// The pause, in milliseconds.
        again_ms: u64,
    },
}

/// A control message that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Not CBOR, or not the fields of this message.
    #[error("a {kind:?} message cannot be read")]
    Malformed {
        /// The kind.
        kind: Kind,
        /// What the decoder says.
        #[source]
        source: cbor::DecodeError,
    },
    /// A message that this side wanted to send cannot be written.
    #[error("a {kind:?} message cannot be written")]
    Encode {
        /// The kind.
        kind: Kind,
        /// What the encoder says.
        #[source]
        source: cbor::EncodeError,
    },
    /// A message that this side wanted to send is too long.
    #[error("a {kind:?} message would be {length} bytes long; the most allowed is {limit}")]
    TooLong {
        /// The kind.
        kind: Kind,
        /// Its length, in bytes.
        length: usize,
        /// The limit, in bytes.
        limit: usize,
    },
}

/// The CBOR of a control message.
pub fn encode<T: Serialize>(kind: Kind, message: &T) -> Result<Vec<u8>, MessageError> {
    let bytes = cbor::encode(message).map_err(|source| MessageError::Encode { kind, source })?;
    let limit = kind.max_payload();
    if bytes.len() > limit {
        return Err(MessageError::TooLong { kind, length: bytes.len(), limit });
    }
    Ok(bytes)
}

/// The control message in a payload.
pub fn decode<T: DeserializeOwned>(kind: Kind, payload: &[u8]) -> Result<T, MessageError> {
    cbor::decode(payload).map_err(|source| MessageError::Malformed { kind, source })
}

/// Text from the other side, made fit for a terminal: no control characters, not too long.
pub fn printable(text: &str) -> String {
    const LONGEST: usize = 4096;
    let clean = |c: char| if c.is_control() && c != '\n' { '\u{fffd}' } else { c };
    text.chars().take(LONGEST).map(clean).collect()
}

/// An error and its causes on one line, as it is told to the other side.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Byte strings as CBOR byte strings (serde's default for `Vec<u8>` is a list of numbers).
pub(crate) mod octets {
    use serde::de::{SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Octets;
        impl<'de> Visitor<'de> for Octets {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a byte string")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u8>, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = list.next_element()? {
                    bytes.push(byte);
                }
                Ok(bytes)
            }
        }
        from.deserialize_byte_buf(Octets)
    }
}
