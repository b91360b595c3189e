//! Answers of a running daemon as its command line shows them: tables for people, or JSON for programs.

use std::io::{self, Write};
use std::ops::Range;

use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, Table, TableStyle};
use serde::Serialize;

/// How an answer is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
pub struct Form {
    /// Prints JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

impl Form {
    /// Writes an answer: one JSON object on a line, or what `as_text` makes of it.
    pub fn show<T: Serialize>(self, answer: &T, as_text: fn(&T) -> String, out: &mut dyn Write) -> io::Result<()> {
        if self.json {
            serde_json::to_writer(&mut *out, answer).map_err(io::Error::from)?;
            writeln!(out)
        } else {
            out.write_all(as_text(answer).as_bytes())
        }
    }
}

/// A table with nothing in it but its header.
#[must_use]
pub fn empty(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(TableStyle::new())
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.iter().copied());
    table
}

/// A table as text, with its columns of numbers aligned to the right.
#[must_use]
pub fn aligned(mut table: Table, right: Range<usize>) -> String {
    for column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// A number of bytes in its largest unit, to a tenth.
#[must_use]
pub fn size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => {
            let tenths = (u128::from(bytes) * 10) >> shift;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} B"),
    }
}

/// An age in its two largest units.
#[must_use]
pub fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_line_of_json_or_a_table() {
        let mut json = Vec::new();
        let rows = ["a".to_owned(), "b".to_owned()];
        let as_text = |rows: &[String; 2]| {
            let mut table = empty(&["LETTER", "N"]);
            for (number, row) in rows.iter().enumerate() {
                table.add_row([row.clone(), number.to_string()]);
            }
            aligned(table, 1..2)
        };
        Form { json: true }.show(&rows, as_text, &mut json).unwrap();
        assert_eq!(json, b"[\"a\",\"b\"]\n");
        let mut text = Vec::new();
        Form { json: false }.show(&rows, as_text, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.lines().count(), 3, "{text}");
    }

    #[test]
    fn a_size_has_its_largest_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (10 << 20, "10.0 MiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn an_age_has_its_two_largest_units() {
        for (seconds, text) in [(5, "5s"), (61, "1m1s"), (7_260, "2h1m"), (90_000, "1d1h")] {
            assert_eq!(age(seconds), text);
        }
    }
}
