//! What the kernel says of networks and sockets: rtnetlink, socket diagnosis, multicast groups, peers.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| limosa_kernel::net::feed(bytes));
