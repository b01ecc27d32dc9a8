//! Samples, what they are compared with, and the table of them.

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

/// How long one thing took, each time it was done.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// Least, median and most, in milliseconds; zeros if there are no samples.
    pub fn spread(&self) -> Spread {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let at = |index: usize| sorted.get(index).map_or(0.0, |sample| sample.as_secs_f64() * 1e3);
        Spread { min: at(0), median: at(sorted.len() / 2), max: at(sorted.len().saturating_sub(1)) }
    }
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

/// One figure, beside its floor and its bound.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub work: String,
    /// How long it took, in milliseconds.
    pub took: Spread,
    /// What the floor is.
    pub floor_of: &'static str,
    /// How long the floor took, in milliseconds.
    pub floor: Spread,
    /// What the median must not exceed, in milliseconds; none if it is only there to be compared with.
    pub bound: Option<f64>,
}

impl Row {
    /// Whether the median keeps the bound.
    pub fn is_met(&self) -> bool {
        self.bound.is_none_or(|bound| self.took.median <= bound)
    }
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<40}{:>9}{:>9}{:>9}{:>8}  {:<4}  floor\n",
        "milliseconds", "min", "median", "max", "bound", ""
    );
    for row in rows {
        let Spread { min, median, max } = row.took;
        let (bound, met) = match row.bound {
            Some(bound) => (format!("{bound:.1}"), if row.is_met() { "met" } else { "MISS" }),
            None => ("-".into(), ""),
        };
        let _ = writeln!(
            text,
            "{:<40}{min:>9.2}{median:>9.2}{max:>9.2}{bound:>8}  {met:<4}  {:.2} ({})",
            row.work, row.floor.median, row.floor_of
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_decides() {
        let mut samples = Samples::default();
        for milliseconds in [9, 1, 5] {
            samples.add(Duration::from_millis(milliseconds));
        }
        let took = samples.spread();
        assert_eq!([took.min, took.median, took.max].map(|figure| figure.round() as u32), [1, 5, 9]);
        let row = |bound: f64| Row { work: "x".into(), took, floor_of: "y", floor: took, bound: Some(bound) };
        assert!(row(5.0).is_met() && !row(4.9).is_met());
    }
}
