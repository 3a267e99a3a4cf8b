//! The figures of two READMEs: a block between two comments in each, which is written from the entries of a run.

use super::entry::Entry;
use super::host::Host;
use super::{Result, table};
use std::fs;
use std::path::Path;

const BEGIN: &str = "<!-- figures: written by tests/bench --readme -->";
const END: &str = "<!-- end of figures -->";

/// What the project's first page shows; the tests' page shows all.
const SHOWN: [&str; 9] = [
    "fork/first-instruction",
    "ram/flat",
    "depth/flat",
    "pause/64 MiB",
    "writes/not read before/500 live",
    "crowd/500 forks, each answers",
    "memory",
    "launch",
    "overcommit/accounted",
];

/// Replaces the blocks.
pub fn put(entries: &[Entry], host: &Host, how: &str) -> Result<()> {
    let shown: Vec<&Entry> =
        entries.iter().filter(|entry| SHOWN.iter().any(|name| entry.measure.starts_with(name))).collect();
    for (page, entries) in [("../README.md", shown), ("README.md", entries.iter().collect())] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
        let before = fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
        let after =
            with_block(&before, &block(&entries, host, how)).ok_or(format!("{page} has no place for figures"))?;
        fs::write(&path, after).map_err(|e| format!("write {}: {e}", path.display()))?;
    }
    Ok(())
}

fn with_block(text: &str, block: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{block}{END}{after}"))
}

/// What has an aim, met or not.
fn block(entries: &[&Entry], host: &Host, how: &str) -> String {
    let mut text = format!("Measured on: {}. Medians of one interleaved run{how}.\n\n", host.line());
    text += "| measure | median | unit | reference | its median | ratio | aim | met |\n";
    text += "| --- | ---: | --- | --- | ---: | ---: | --- | --- |\n";
    for entry in entries {
        let (Some(aim), Some(met)) = (&entry.aim, entry.met) else { continue };
        let [measure, median, _, unit, _, reference, of_reference, ratio, _] = table::cells(entry);
        let met = if met { "yes" } else { "**no**" };
        text +=
            &format!("| {measure} | {median} | {unit} | {reference} | {of_reference} | {ratio} | {aim} | {met} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_replaced_and_nothing_else() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        assert_eq!(with_block(&text, "new\n").unwrap(), format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert_eq!(with_block("a\nb\n", "new\n"), None);
    }
}
