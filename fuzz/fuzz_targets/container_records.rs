//! Records of containers, and what a user or a peer writes of one: names, addresses, networks, sizes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_container::{Address, Name, Network, Record, parse_size};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(record) = serde_json::from_slice::<Record>(bytes) {
        let _ = (record.running(), record.instance(), record.config.environment_strings());
        let again = serde_json::to_vec(&record).expect("a record that was read");
        assert_eq!(serde_json::from_slice::<Record>(&again).expect("a record"), record);
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Ok(name) = text.parse::<Name>() {
            assert!(name.as_str() == text && !text.contains('/') && !text.starts_with('.'));
        }
        if let Ok(address) = text.parse::<Address>() {
            assert_eq!(address.to_string().parse::<Address>().expect("an address"), address);
        }
        let _ = text.parse::<Network>();
        let _ = parse_size(text);
    }
});
