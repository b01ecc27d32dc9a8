//! Whatever order pages come in and are taken out again, and however often, what was given last is what is read.

mod common;

use std::collections::BTreeMap;

use common::{meta, pages, read};
use limosa_image::{CheckpointWriter, PAGE, Sink, SpaceId, Staging};
use proptest::prelude::*;

/// One call: the space, the first page, how many pages, what is in them.
fn calls() -> impl Strategy<Value = Vec<(u32, u64, u64, u64)>> {
    // Mostly small runs that collide; now and then one that is longer than a chunk and is written directly.
    let count = prop_oneof![9 => 1..20_u64, 1 => 200..600_u64];
    prop::collection::vec((0..3_u32, 0..300_u64, count, any::<u64>()), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_last_write_wins(calls in calls()) {
        let home = tempfile::tempdir().unwrap();
        let mut writer = CheckpointWriter::create(&home.path().join("checkpoint")).unwrap();
        let mut staging = Staging::new().unwrap();
        let mut model = BTreeMap::new();
        for (space, first, count, seed) in calls {
            if seed % 4 == 0 {
                writer.forget(SpaceId(space), first * PAGE, count * PAGE).unwrap();
                staging.forget(SpaceId(space), first * PAGE, count * PAGE).unwrap();
                model.retain(|(owner, start), _: &mut Vec<u8>| {
                    *owner != SpaceId(space) || !(first..first + count).contains(&(start / PAGE))
                });
                continue;
            }
            let data = pages(seed, count);
            writer.pages(SpaceId(space), first * PAGE, &data).unwrap();
            staging.pages(SpaceId(space), first * PAGE, &data).unwrap();
            for (number, page) in data.chunks(PAGE as usize).enumerate() {
                model.insert((SpaceId(space), (first + number as u64) * PAGE), page.to_vec());
            }
        }
        let path = writer.commit(meta()).unwrap().path;
        limosa_image::verify(&path).unwrap();
        let written = limosa_image::Checkpoint::open(&path).unwrap();
        for checkpoint in [written, staging.into_checkpoint(meta()).unwrap()] {
            let mut found = BTreeMap::new();
            for extent in checkpoint.all_extents() {
                for (number, page) in read(&checkpoint, extent).chunks(PAGE as usize).enumerate() {
                    found.insert((extent.space, extent.start + number as u64 * PAGE), page.to_vec());
                }
            }
            prop_assert!(found == model);
            let stored: u64 = checkpoint.all_extents().iter().map(|extent| extent.length).sum();
            prop_assert_eq!(stored, model.len() as u64 * PAGE);
        }
    }
}
