//! What a command tells its guard.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_migrate::Word;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(word) = Word::parse(bytes) {
        let again = word.encode().expect("a word that was read");
        assert!(Word::parse(&again).is_ok());
    }
});
