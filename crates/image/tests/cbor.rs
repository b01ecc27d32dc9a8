//! State survives encoding, whatever it is; bytes that are not state are refused, whatever they are.

use limosa_image::cbor::{decode, encode};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The shapes that state is made of.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
struct Everything {
    unsigned: u64,
    signed: i64,
    wide: u128,
    flag: bool,
    text: String,
    optional: Option<String>,
    bytes: Vec<u8>,
    pair: (u32, i8),
    map: BTreeMap<u32, String>,
    kinds: Vec<Kind>,
}

#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
enum Kind {
    Unit,
    One(u32),
    Two(u8, Option<u64>),
    Named { path: String, offset: u64 },
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Unit),
        any::<u32>().prop_map(Kind::One),
        any::<(u8, Option<u64>)>().prop_map(|(one, two)| Kind::Two(one, two)),
        (".*", any::<u64>()).prop_map(|(path, offset)| Kind::Named { path, offset }),
    ]
}

fn everything() -> impl Strategy<Value = Everything> {
    let numbers = (any::<u64>(), any::<i64>(), any::<u128>(), any::<bool>(), any::<(u32, i8)>());
    let texts = (".*", any::<Option<String>>(), any::<Vec<u8>>());
    (numbers, texts, btree_map(any::<u32>(), ".*", 0..9), vec(kind(), 0..9)).prop_map(
        |((unsigned, signed, wide, flag, pair), (text, optional, bytes), map, kinds)| Everything {
            unsigned,
            signed,
            wide,
            flag,
            text,
            optional,
            bytes,
            pair,
            map,
            kinds,
        },
    )
}

proptest! {
    #[test]
    fn values_come_back(value in everything()) {
        prop_assert_eq!(decode::<Everything>(&encode(&value).unwrap()).unwrap(), value);
    }

    #[test]
    fn a_prefix_or_an_addition_is_refused(value in everything(), cut in any::<prop::sample::Index>(), more: u8) {
        let mut bytes = encode(&value).unwrap();
        prop_assert!(decode::<Everything>(&bytes[..cut.index(bytes.len())]).is_err());
        bytes.push(more);
        let error = decode::<Everything>(&bytes).unwrap_err();
        prop_assert_eq!((error.offset, error.length), (bytes.len() as u64 - 1, bytes.len() as u64));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..300)) {
        let _ = decode::<Everything>(&bytes);
        let _ = decode::<Vec<Kind>>(&bytes);
        let _ = decode::<serde::de::IgnoredAny>(&bytes);
    }

    #[test]
    fn damaged_state_does_not_make_it_panic(value in everything(), at in any::<prop::sample::Index>(), byte: u8) {
        let mut bytes = encode(&value).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = decode::<Everything>(&bytes);
    }
}

/// A reader of an older or a newer program, of the same format version.
#[test]
fn fields_may_come_and_go() {
    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Old {
        pid: u32,
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct New {
        extra: Vec<Kind>,
        pid: u32,
        #[serde(default)]
        nice: Option<i8>,
    }
    #[derive(Deserialize, PartialEq, Debug)]
    struct Newer {
        pid: u32,
        #[serde(default)]
        nice: Option<i8>,
    }
    let new = New { extra: vec![Kind::Named { path: "x".into(), offset: 1 }], pid: 7, nice: Some(-3) };
    assert_eq!(decode::<Old>(&encode(&new).unwrap()).unwrap(), Old { pid: 7 });
    assert_eq!(decode::<Newer>(&encode(&Old { pid: 7 }).unwrap()).unwrap(), Newer { pid: 7, nice: None });
}

#[derive(Serialize, Deserialize)]
struct Nested(Vec<Nested>);

/// On the smallest stack a thread may have, so that recursion that goes with the input would show.
#[test]
fn deep_nesting_is_refused_before_the_stack_ends() {
    let attempt = || {
        for opening in [0x81, 0x9f, 0xd8] {
            let bytes = vec![opening; 1 << 20];
            assert!(decode::<Nested>(&bytes).is_err());
            assert!(decode::<serde::de::IgnoredAny>(&bytes).is_err());
        }
        let mut shallow = vec![0x81; 100];
        shallow.push(0x80);
        assert!(decode::<Nested>(&shallow).is_ok());
    };
    std::thread::Builder::new().stack_size(256 << 10).spawn(attempt).unwrap().join().unwrap();
}

#[test]
fn claimed_lengths_allocate_nothing() {
    for head in [0x5b_u8, 0x7b, 0x9b, 0xbb] {
        let bytes = [&[head][..], &u64::MAX.to_be_bytes(), &[0; 16]].concat();
        assert!(decode::<Vec<u64>>(&bytes).is_err());
        assert!(decode::<String>(&bytes).is_err());
        assert!(decode::<BTreeMap<u64, u64>>(&bytes).is_err());
        assert!(decode::<serde::de::IgnoredAny>(&bytes).is_err());
    }
}
