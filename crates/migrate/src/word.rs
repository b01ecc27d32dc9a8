//! What a command tells the guard that it posted, as bytes: one datagram each, on a socket between two processes of a host.
//!
//! | word | then | with | |
//! | --- | --- | --- | --- |
//! | `.` | | | the command has ended: nothing is to be done |
//! | `L` | a [`Legacy`], CBOR | a listening socket | what a receiver needs to be answered for |
//! | `A` | the migration's id, 32 digits | | its source may come to ask |
//! | `K` | | | the source knows the outcome |

use limosa_image::cbor;

use crate::id::IdError;
use crate::incoming::Note;
use crate::listen::Legacy;

/// No word is longer, in bytes.
pub const MAX_WORD: usize = 64 << 10;

/// What a guard is told.
pub enum Word {
    /// It is not needed.
    Ended,
    /// What it needs to answer in the place of the receiver, should that die; a socket comes with it.
    Legacy(Legacy),
    /// Whether somebody will ask.
    Note(Note),
}

/// Bytes that are no word, or a word that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WordError {
    /// Nothing, or more than any word.
    #[error("a word of {length} bytes (1 to {MAX_WORD} are possible)")]
    Length {
        /// How many.
        length: usize,
    },
    /// None of the four, or with something behind it that does not belong there.
    #[error("a word that begins with {first:#04x} and makes no sense")]
    Unknown {
        /// Its first byte.
        first: u8,
    },
    /// The id of a migration is none.
    #[error("a word about a migration")]
    Id(#[from] IdError),
    /// What a receiver leaves cannot be read.
    #[error("what a receiver left to its guard")]
    Read(#[from] cbor::DecodeError),
    /// What a receiver leaves cannot be written.
    #[error("what a receiver leaves to its guard")]
    Write(#[from] cbor::EncodeError),
}

impl Word {
    /// As a datagram.
    pub fn encode(&self) -> Result<Vec<u8>, WordError> {
        let bytes = match self {
            Self::Ended => b".".to_vec(),
            Self::Legacy(legacy) => [b"L", cbor::encode(legacy)?.as_slice()].concat(),
            Self::Note(Note::MayAsk(id)) => format!("A{id}").into_bytes(),
            Self::Note(Note::Knows) => b"K".to_vec(),
        };
        if bytes.len() > MAX_WORD { Err(WordError::Length { length: bytes.len() }) } else { Ok(bytes) }
    }

    /// The word that a datagram is.
    pub fn parse(bytes: &[u8]) -> Result<Self, WordError> {
        let wrong_length = WordError::Length { length: bytes.len() };
        if bytes.len() > MAX_WORD {
            return Err(wrong_length);
        }
        match bytes.split_first().ok_or(wrong_length)? {
            (b'.', []) => Ok(Self::Ended),
            (b'L', legacy) => Ok(Self::Legacy(cbor::decode(legacy)?)),
            (b'A', id) => {
                let id = std::str::from_utf8(id).map_err(|_| WordError::Unknown { first: b'A' })?;
                Ok(Self::Note(Note::MayAsk(id.parse()?)))
            }
            (b'K', []) => Ok(Self::Note(Note::Knows)),
            (first, _) => Err(WordError::Unknown { first: *first }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Limits, ListenOptions, Listener, MigrationId};

    fn legacy() -> Vec<u8> {
        let any = ([127, 0, 0, 1], 0).into();
        let listener = Listener::bind(any, ListenOptions::default(), Limits::default()).expect("a listener");
        Word::Legacy(listener.legacy().expect("its legacy").0).encode().expect("a word")
    }

    #[test]
    fn each_word_comes_back() {
        let id = MigrationId::from_bytes([7; 16]);
        for word in [Word::Ended, Word::Note(Note::MayAsk(id)), Word::Note(Note::Knows)] {
            let bytes = word.encode().expect("bytes");
            assert_eq!(Word::parse(&bytes).expect("a word").encode().expect("bytes"), bytes);
        }
        let bytes = legacy();
        let Ok(Word::Legacy(again)) = Word::parse(&bytes) else { panic!("no legacy") };
        assert_eq!(Word::Legacy(again).encode().expect("bytes"), bytes);
    }

    #[test]
    fn what_is_too_long_or_nothing_is_no_word() {
        assert!(matches!(Word::parse(&[]), Err(WordError::Length { length: 0 })));
        let long = vec![b'L'; MAX_WORD + 1];
        assert!(matches!(Word::parse(&long), Err(WordError::Length { length }) if length == MAX_WORD + 1));
        assert!(matches!(Word::parse(b".."), Err(WordError::Unknown { first: b'.' })));
        assert!(matches!(Word::parse(b"K\0"), Err(WordError::Unknown { first: b'K' })));
        assert!(matches!(Word::parse(b"A\xff"), Err(WordError::Unknown { first: b'A' })));
        assert!(matches!(Word::parse(b"A7"), Err(WordError::Id(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_word_or_none(first in prop_oneof![Just(b'L'), Just(b'A'), any::<u8>()], rest: Vec<u8>) {
            let bytes = [vec![first], rest].concat();
            if let Ok(word) = Word::parse(&bytes) {
                // Whatever was understood is said so again: nothing hides in a word.
                let again = word.encode().expect("a word that was read");
                prop_assert!(Word::parse(&again).is_ok());
            }
        }

        #[test]
        fn a_damaged_legacy_is_read_or_refused(at: prop::sample::Index, value: u8, cut: prop::sample::Index) {
            let whole = legacy();
            let mut bytes = whole.clone();
            let at = at.index(bytes.len());
            bytes[at] = value;
            let _ = Word::parse(&bytes);
            prop_assert!(Word::parse(&whole[..cut.index(whole.len())]).is_err(), "it was cut");
        }
    }
}
