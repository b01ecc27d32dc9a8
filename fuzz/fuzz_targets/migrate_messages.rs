//! Frames and control messages of a migration, without a connection.
#![no_main]

use libfuzzer_sys::fuzz_target;
use limosa_migrate::frame::{Kind, read_frame, read_preamble};
use limosa_migrate::message::{self, decode};
use limosa_migrate::{Address, MigrationId, Ticket};

fuzz_target!(|bytes: &[u8]| {
    let mut stream = bytes;
    let _ = read_preamble(&mut stream);
    let mut stream = bytes;
    while let Ok(frame) = read_frame(&mut stream, Vec::new()) {
        let (kind, payload) = (frame.kind, frame.payload.as_slice());
        assert!(payload.len() <= kind.max_payload());
        let _ = decode::<message::Hello>(kind, payload);
        if let Ok(offer) = decode::<message::Offer>(kind, payload) {
            // What was read can be written, and is read again as the same.
            let again = message::encode(Kind::Offer, &offer).expect("an offer that was read");
            assert_eq!(decode::<message::Offer>(Kind::Offer, &again).expect("an offer"), offer);
        }
        let _ = decode::<message::Accept>(kind, payload);
        let _ = decode::<message::Refuse>(kind, payload);
        let _ = decode::<message::End>(kind, payload);
        let _ = decode::<message::Answer>(kind, payload);
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = text.parse::<MigrationId>();
        if let Ok(ticket) = text.parse::<Ticket>() {
            assert_eq!(ticket.to_string(), text);
        }
        if let Ok(address) = text.parse::<Address>() {
            assert_eq!(address.to_string().parse::<Address>().expect("an address"), address);
        }
    }
});
