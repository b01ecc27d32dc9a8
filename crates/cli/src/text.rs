//! What reports for a person have in common: tables, sizes, times.

use std::fmt::Write;
use std::time::SystemTime;

use limosa_engine::{Report, Times};

/// Rows with columns as wide as their widest cell, the last one free.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The time since `created`, seconds since 1970, in its largest whole unit.
pub fn age(created: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let seconds = now.saturating_sub(created);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How memory was stored, why so, and in which rounds.
pub fn memory(report: &Report) -> String {
    let mut text =
        report.memory.as_ref().map_or_else(String::new, |memory| format!("  memory by {memory}\n"));
    for (number, round) in (1..).zip(&report.rounds) {
        let milliseconds = round.duration_us as f64 / 1000.0;
        let (stored, left) = (size(round.bytes), size(round.left));
        let _ =
            writeln!(text, "    round {number}: {stored} in {milliseconds:.1} ms, {left} written meanwhile");
    }
    text
}

/// A number of bytes in its largest unit.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

/// The times of an operation, and with `verbose` its phases: aligned lines, indented.
pub fn times(times: &Times, report: &Report, verbose: bool) -> String {
    let mut text = String::new();
    let lines = [
        ("frozen", times.freeze_us),
        ("durable", times.durable_us),
        ("first instruction", times.first_instruction_us),
        ("last page", times.last_page_us),
        ("whole", Some(times.whole_us)),
    ];
    for (name, time) in lines {
        if let Some(time) = time {
            let _ = writeln!(text, "  {name:<20}{:>10.1} ms", time as f64 / 1000.0);
        }
    }
    if verbose {
        let _ = writeln!(text, "  of which");
        for phase in &report.phases {
            let _ = writeln!(text, "    {:<18}{:>10.1} ms", phase.name, phase.duration_us as f64 / 1000.0);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_spaces() {
        let rows = [["a", "bbb"], ["cc", "d"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a   bbb\ncc  d\n");
    }

    #[test]
    fn sizes_have_the_unit_that_suits_them() {
        assert_eq!(
            [0, 1023, 1024, 5 << 20, 3 << 30].map(size),
            ["0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 GiB"]
        );
    }
}
