//! The summary at the end: for a person, or as JSON.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::counter::{Seen, Totals};
use crate::figures::Spread;
use crate::migration::Migration;

/// So many migrations are listed one by one.
const LISTED: usize = 10;

/// How it went.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Data in redis, MiB.
    pub megabytes: u64,
    /// Seconds it took to load them.
    pub load_seconds: f64,
    /// What the client saw before the first migration.
    pub baseline: Seen,
    /// The migrations.
    pub migrations: Vec<Migration>,
    /// What the client saw from beginning to end.
    pub client: Totals,
    /// What the demo left behind.
    pub left_behind: Vec<String>,
}

impl Summary {
    /// Of a demo that is about to begin.
    pub fn new(megabytes: u64) -> Self {
        Self {
            megabytes,
            load_seconds: 0.0,
            baseline: Seen::default(),
            migrations: Vec::new(),
            client: Totals::default(),
            left_behind: Vec::new(),
        }
    }

    /// Whether nothing was lost and nothing is left behind.
    pub fn is_good(&self) -> bool {
        let Totals { lost, repeated, resets, .. } = self.client;
        lost == 0 && repeated == 0 && resets == 0 && self.left_behind.is_empty()
    }

    /// Writes it to standard output.
    pub fn show(&self, json: bool) -> Result<()> {
        let mut output = std::io::stdout().lock();
        if json {
            serde_json::to_writer_pretty(&mut output, self)?;
            writeln!(output)?;
        } else {
            write!(output, "{}", self.text())?;
        }
        Ok(output.flush()?)
    }

    fn text(&self) -> String {
        let mut lines = vec![String::new()];
        if let Some(Migration { report, .. }) = self.migrations.last() {
            lines.push(format!(
                "Moved: redis with {} MiB of data, {}, {}, {} open files and sockets, {:.0} MiB of memory;",
                self.megabytes,
                number(report.processes, "process", "processes"),
                number(report.threads, "thread", "threads"),
                report.descriptions,
                mib(report.page_bytes),
            ));
            lines.push(
                "       its address, its open connections, and its file system's writable layer".to_owned(),
            );
        }
        lines.push(String::new());
        lines.extend(self.table());
        let all = &self.client;
        lines.extend([
            String::new(),
            format!(
                "Without a migration the client's longest gap was {:.1} ms, and 99 % were below {:.1} ms.",
                self.baseline.longest_gap_ms, self.baseline.p99_gap_ms
            ),
            String::new(),
            format!("  increments confirmed  {:>9}", all.increments),
            format!("  increments lost       {:>9}", all.lost),
            format!("  increments repeated   {:>9}", all.repeated),
            format!("  connection resets     {:>9}", all.resets),
            "  data compared after each migration: every byte as written".to_owned(),
        ]);
        lines.push(if self.left_behind.is_empty() {
            "  left behind: no process, namespace, interface, mount, control group or file".to_owned()
        } else {
            format!("  LEFT BEHIND: {}", self.left_behind.join("\n               "))
        });
        lines.push(String::new());
        lines.join("\n")
    }

    /// The migrations, or their spread if they are many.
    fn table(&self) -> Vec<String> {
        let mut lines = vec!["  migration      frozen    client's longest gap    whole migration".to_owned()];
        for (round, one) in self.migrations.iter().enumerate().take(LISTED) {
            lines.push(format!(
                "  {:>3}  {} → {}   {:7.1} ms     {:7.1} ms              {:5.2} s",
                round + 1,
                one.from,
                one.to,
                one.frozen_ms(),
                one.client.longest_gap_ms,
                one.seconds
            ));
        }
        if self.migrations.len() > LISTED {
            lines.push(format!("  … {} in all", self.migrations.len()));
        }
        if self.migrations.len() > 2 {
            let all = || self.migrations.iter();
            lines.push(String::new());
            lines.push("                    min      median         max".to_owned());
            lines.extend(row("frozen, ms", Spread::of(all().map(Migration::frozen_ms))));
            lines.extend(row("gap, ms", Spread::of(all().map(|one| one.client.longest_gap_ms))));
            lines.extend(row("whole, s", Spread::of(all().map(|one| one.seconds))));
        }
        lines
    }
}

fn row(title: &str, spread: Option<Spread>) -> Option<String> {
    let Spread { min, median, max } = spread?;
    Some(format!("  {title:<12} {min:9.2}   {median:9.2}   {max:9.2}"))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

fn number(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_lost_or_left_is_bad() {
        let good = || Summary::new(1);
        assert!(good().is_good());
        let mut bad = good();
        bad.client.lost = 1;
        assert!(!bad.is_good());
        let mut bad = good();
        bad.client.resets = 1;
        assert!(!bad.is_good());
        let mut bad = good();
        bad.left_behind.push("file /tmp/x".to_owned());
        assert!(!bad.is_good() && bad.text().contains("LEFT BEHIND: file /tmp/x"));
    }
}
