//! A directory with everything in it as a stream, to travel with a checkpoint: a container's writable layer, and the
//! content of its memory filesystems.
//!
//! The stream is a tar archive (pax, with GNU records for long names and sparse files). What plain tar cannot
//! say is in pax records of our own; names and values that may hold any byte are hexadecimal digits:
//!
//! | record | meaning |
//! | --- | --- |
//! | `mtime` | time of modification, `SECONDS.NNNNNNNNN`, seconds rounded down (POSIX has the same record) |
//! | `LIMOSA.xattr.NAME` | extended attribute NAME (hexadecimal), value hexadecimal |
//! | `LIMOSA.link` | target of a symbolic link, hexadecimal |
//! | `LIMOSA.socket` | the entry is a unix socket, for which tar has no type |
//!
//! Directories come before what is in them. The layer itself, `./`, comes last: an archive without it was cut
//! off. Overlayfs's own marks are kept as they are: whiteouts (character devices 0:0), opaque directories and
//! redirects (`trusted.overlay.*`).

mod archive;
mod extract;

use std::io;
use std::path::PathBuf;

pub use archive::archive;
pub use extract::extract;

const MTIME: &str = "mtime";
const XATTR: &str = "LIMOSA.xattr.";
const LINK: &str = "LIMOSA.link";
const SOCKET: &str = "LIMOSA.socket";

/// Extended attributes that travel. Others, such as those of security modules, are the host's affair.
fn travels(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.")
        || name.starts_with(b"user.")
        || name == b"security.capability"
        || name.starts_with(b"system.posix_acl_")
}

fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits =
        bytes.iter().flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    digits.map(char::from).collect()
}

fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    let digit = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

/// A layer could not be archived or extracted.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A file of the layer could not be read or made.
    #[error("cannot {operation} {} of the archived directory", path.display())]
    File {
        /// What was being done.
        operation: &'static str,
        /// The file, relative to the layer.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The stream could not be read or written.
    #[error("cannot {operation} the archive")]
    Stream {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The archive holds something that no layer holds.
    #[error("the archive is damaged or forged at {}: {why}", path.display())]
    Malformed {
        /// The entry.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The archive ends before its last entry.
    #[error("the archive is cut off")]
    Truncated,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_comes_back_and_nonsense_does_not() {
        assert_eq!(from_hex(to_hex(b"\0\n\xff=").as_bytes()), Some(b"\0\n\xff=".to_vec()));
        for text in ["0", "0g", "\u{e9}", "+1"] {
            assert_eq!(from_hex(text.as_bytes()), None, "{text}");
        }
    }
}
