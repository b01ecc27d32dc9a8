//! A process with a few MiB: what a checkpoint and a restore cost when there is nearly nothing to move.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::figures::{Row, Samples};
use crate::program::{self, Target};

/// Whole programs are to take single-digit milliseconds.
const BOUND: f64 = 9.99;

/// Checkpoints and restores the same process in turn with the floor.
pub fn measure(directory: &Path, rounds: u32, mebibytes: u32) -> Result<Vec<Row>> {
    let (mut checkpoint, mut restore, mut floor) = <(Samples, Samples, Samples)>::default();
    let image = directory.join("image");
    let mut target = Target::start(directory, "ballast", &[&mebibytes.to_string()])?;
    // The first round warms caches and is not counted.
    for round in 0..=rounds {
        let pid = format!("pid:{}", target.pid().as_raw_pid());
        let written =
            program::limosa(&["checkpoint".as_ref(), pid.as_ref(), "--out".as_ref(), image.as_os_str()])?;
        target.has_ended()?;
        let idle = program::nothing()?;
        let rebuilt = program::limosa(&["restore".as_ref(), image.as_os_str(), "--detach".as_ref()])?;
        target.verify()?;
        fs::remove_dir_all(&image)?;
        if round > 0 {
            checkpoint.add(written);
            restore.add(rebuilt);
            floor.add(idle);
        }
    }
    target.end()?;
    let row = |what: &str, samples: &Samples| Row {
        work: format!("process of {mebibytes} MiB: {what}, whole"),
        took: samples.spread(),
        floor_of: "fork and exec of true",
        floor: floor.spread(),
        bound: Some(BOUND),
    };
    Ok(vec![row("checkpoint", &checkpoint), row("restore", &restore)])
}
