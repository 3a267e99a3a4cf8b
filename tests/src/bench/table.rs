//! Figures as a table for eyes.

use super::entry::Entry;
use comfy_table::{CellAlignment, Table, presets};

/// The table's columns.
pub const COLUMNS: [&str; 9] = ["measure", "median", "p99", "unit", "n", "reference", "its median", "ratio", "aim"];

/// The cells of a row.
pub fn cells(entry: &Entry) -> [String; 9] {
    let figure = |value: Option<f64>| value.map_or("–".into(), number);
    let aim = match (&entry.aim, entry.met) {
        (Some(aim), Some(true)) => format!("{aim}: met"),
        (Some(aim), Some(false)) => format!("{aim}: NOT MET"),
        (Some(aim), None) => aim.clone(),
        (None, _) => String::new(),
    };
    [
        entry.measure.clone(),
        figure(entry.value),
        figure(entry.p99),
        entry.unit.clone(),
        entry.samples.to_string(),
        entry.reference.clone().unwrap_or_default(),
        entry.reference.as_ref().map_or(String::new(), |_| figure(entry.reference_value)),
        entry.ratio.map_or(String::new(), |ratio| format!("{ratio:.2}")),
        aim,
    ]
}

/// A table of these entries.
pub fn table(entries: &[Entry]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(COLUMNS);
    for entry in entries {
        table.add_row(cells(entry));
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if [1, 2, 4, 6, 7].contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// Three digits, or all before the point.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        assert_eq!([1234.5, 12.34, 1.234, 0.1234, 0.0].map(number), ["1234", "12.3", "1.23", "0.123", "0.00"]);
    }
}
