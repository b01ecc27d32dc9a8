//! What redis is filled with, and the check that it is still there: every byte of it.
//!
//! The value of a key follows from its number, so that nothing has to be remembered to compare it.

use std::io;

use anyhow::{Context, Result, ensure};

use crate::counter::{COUNTERS, key};
use crate::resp::{Client, Reply, encode};

/// Bytes of a value.
const VALUE: usize = 1024;
/// Keys that are written or read at once.
const BATCH: u64 = 128;

/// How many keys hold `megabytes` MiB.
pub fn keys(megabytes: u64) -> u64 {
    megabytes * (1 << 20) / VALUE as u64
}

fn name(number: u64) -> String {
    format!("key:{number}")
}

/// The value of a key: numbers of the splitmix64 generator, which no compression makes smaller.
fn value(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let next = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)).to_le_bytes()
    });
    next.flatten().take(VALUE).collect()
}

fn batches(keys: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    (0..keys).step_by(BATCH as usize).map(move |first| first..(first + BATCH).min(keys))
}

/// Writes `keys` keys. `progress` is told how many are there, and stops the loading with an error.
pub fn load(client: &mut Client, keys: u64, mut progress: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let mut requests = Vec::new();
    for batch in batches(keys) {
        requests.clear();
        for number in batch.clone() {
            encode(&[b"SET", name(number).as_bytes(), &value(number)], &mut requests);
        }
        client.send(&requests)?;
        for number in batch.clone() {
            let reply = client.receive()?;
            ensure!(reply == Reply::Status("OK".to_owned()), "SET {} answered {reply:?}", name(number));
        }
        progress(batch.end)?;
    }
    Ok(())
}

/// Compares the number of keys, and every byte of every value. `progress` as above.
pub fn verify(client: &mut Client, keys: u64, mut progress: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let wanted = Reply::Integer((keys + COUNTERS as u64) as i64);
    let found = client.call(&[b"DBSIZE"])?;
    ensure!(found == wanted, "redis has {found:?} keys instead of {wanted:?}");
    for which in 0..COUNTERS {
        let found = client.call(&[b"EXISTS", key(which).as_bytes()])?;
        ensure!(found == Reply::Integer(1), "{} is not there any more", key(which));
    }
    for batch in batches(keys) {
        let names: Vec<String> = batch.clone().map(name).collect();
        let mut arguments: Vec<&[u8]> = vec![b"MGET"];
        arguments.extend(names.iter().map(String::as_bytes));
        let found = values(client.call(&arguments)?).context("reading values back")?;
        ensure!(found.len() == names.len(), "MGET of {} keys answered {}", names.len(), found.len());
        for (number, found) in batch.clone().zip(found) {
            ensure!(
                found.as_ref() == Some(&value(number)),
                "the value of {} is not what was written",
                name(number)
            );
        }
        progress(batch.end)?;
    }
    Ok(())
}

fn values(reply: Reply) -> io::Result<Vec<Option<Vec<u8>>>> {
    let unexpected = || io::Error::new(io::ErrorKind::InvalidData, "MGET answered something else");
    let Reply::Array(replies) = reply else { return Err(unexpected()) };
    let text = |reply| if let Reply::Bulk(text) = reply { Ok(text) } else { Err(unexpected()) };
    replies.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_from_key_to_key_and_within() {
        assert_eq!(value(1), value(1));
        assert_ne!(value(0), value(1));
        assert_eq!(value(7).len(), VALUE);
        let whole = value(7);
        let (first, second) = whole.split_at(VALUE / 2);
        assert_ne!(first, second);
    }

    #[test]
    fn batches_cover_all_keys_once() {
        let all: Vec<u64> = batches(BATCH * 2 + 3).flatten().collect();
        assert_eq!(all, (0..BATCH * 2 + 3).collect::<Vec<_>>());
    }
}
