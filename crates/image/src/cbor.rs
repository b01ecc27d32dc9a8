//! State as self-describing CBOR (RFC 8949), through serde.
//!
//! Structs are maps keyed by field name, so a reader skips fields it does not know and takes
//! `#[serde(default)]` for those that are missing: that is how sections evolve within one format version.

use cbor4ii::core::dec::Read;
use cbor4ii::core::utils::SliceReader;
use serde::{Deserialize, Serialize};

/// A value that has no CBOR form (a map of unknown length, for instance), or too little memory for it.
#[derive(Debug, thiserror::Error)]
#[error("cannot be encoded as CBOR: {reason}")]
pub struct EncodeError {
    /// What serde or the encoder said.
    pub reason: String,
}

/// Bytes that are not the CBOR form of the expected type.
#[derive(Debug, thiserror::Error)]
#[error("not the CBOR that was expected, at byte {offset} of {length}: {reason}")]
pub struct DecodeError {
    /// How many bytes were read before the fault.
    pub offset: u64,
    /// How many bytes there are.
    pub length: u64,
    /// What serde or the decoder said.
    pub reason: String,
}

/// The CBOR form of `value`.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, EncodeError> {
    cbor4ii::serde::to_vec(Vec::with_capacity(256), &value)
        .map_err(|error| EncodeError { reason: error.to_string() })
}

/// Decodes `bytes`, all of them: bytes after the value are an error.
///
/// Safe on hostile input: nesting deeper than 256 is an error, nothing is allocated by a length that
/// the bytes claim beyond what they contain.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, DecodeError> {
    let mut reader = SliceReader::new(bytes);
    let decoded = {
        let mut deserializer = cbor4ii::serde::Deserializer::new(&mut reader);
        T::deserialize(&mut deserializer)
    };
    let left = match reader.fill(usize::MAX) {
        Ok(rest) => rest.as_ref().len(),
        Err(never) => match never {},
    };
    let offset = (bytes.len() - left) as u64;
    let error = |reason| DecodeError { offset, length: bytes.len() as u64, reason };
    match decoded {
        Ok(_) if left > 0 => Err(error(format!("{left} bytes follow the value"))),
        Ok(value) => Ok(value),
        Err(cause) => Err(error(cause.to_string())),
    }
}
