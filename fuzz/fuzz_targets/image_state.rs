//! CBOR sections: values of the shapes that state has, and any value that is skipped.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use limosa_image::cbor::{decode, encode};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct Section {
    number: u64,
    signed: i64,
    text: String,
    #[serde(default)]
    list: Vec<Kind>,
    #[serde(default)]
    map: BTreeMap<u32, Option<String>>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
enum Kind {
    Unit,
    One(u32),
    Nested(Vec<Kind>),
    Named { path: String, offset: u64 },
}

fuzz_target!(|bytes: &[u8]| {
    let _ = decode::<serde::de::IgnoredAny>(bytes);
    let _ = decode::<Vec<Kind>>(bytes);
    if let Ok(section) = decode::<Section>(bytes) {
        let again = encode(&section).expect("what was read can be written");
        assert_eq!(decode::<Section>(&again).expect("and read again"), section);
    }
});
