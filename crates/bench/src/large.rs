//! A process with a GiB that runs on: how long a checkpoint freezes it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::figures::{Row, Samples};
use crate::program::{self, Target};

/// Checkpoints the same process by each mode, in turn with the floors.
pub fn measure(directory: &Path, rounds: u32, mebibytes: u32) -> Result<Vec<Row>> {
    let (mut twin, mut stop, mut fork) = <(Samples, Samples, Samples)>::default();
    let mut target = Target::start(directory, "ballast", &[&mebibytes.to_string()])?;
    let image = directory.join("image");
    let pid = format!("pid:{}", target.pid().as_raw_pid());
    // The first round warms what a guest's memory is slow in at its first touch, and is not counted.
    for round in 0..=rounds {
        let freeze = |mode: &str| -> Result<Duration> {
            let image = image.as_os_str();
            let out =
                ["checkpoint".as_ref(), pid.as_ref(), "--out".as_ref(), image, "--leave-running".as_ref()];
            let report = program::report(&[&out[..], &["--mode".as_ref(), mode.as_ref()]].concat())?;
            fs::remove_dir_all(image)?;
            Ok(Duration::from_micros(report["freeze_us"].as_u64().context("a report without freeze_us")?))
        };
        let (of_twin, of_stop) = (freeze("twin")?, freeze("stop")?);
        let answer = target.verify()?;
        let took = answer.trim_end().rsplit("fork_ns=").next().and_then(|number| number.parse().ok());
        let floor = Duration::from_nanos(took.context("the target did not say how long its fork took")?);
        if round > 0 {
            twin.add(of_twin);
            stop.add(of_stop);
            fork.add(floor);
        }
    }
    target.end()?;
    let floor = fork.spread();
    let row = |mode: &str, samples: &Samples, bound: Option<f64>| Row {
        work: format!("{mebibytes} MiB, runs on: freeze by {mode}"),
        took: samples.spread(),
        floor_of: "one fork of that process",
        floor,
        bound,
    };
    // How long a stop takes is there to be compared with.
    Ok(vec![row("twin", &twin, Some(1.3 * floor.median + 3.0)), row("stop", &stop, None)])
}
