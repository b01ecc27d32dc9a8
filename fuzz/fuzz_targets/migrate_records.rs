//! What each side remembers of a migration.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_image::cbor::{decode, encode};
use limosa_migrate::record::{ArrivalRecord, DepartureRecord};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(record) = decode::<ArrivalRecord>(bytes) {
        let again = encode(&record).expect("a record that was read");
        assert_eq!(decode::<ArrivalRecord>(&again).expect("a record"), record);
    }
    if let Ok(record) = decode::<DepartureRecord>(bytes) {
        let _ = record.is_open();
        let again = encode(&record).expect("a record that was read");
        assert_eq!(decode::<DepartureRecord>(&again).expect("a record"), record);
    }
});
