//! The README's figures: a block between two comments, which is written from the entries of a run.

use super::entry::Entry;
use super::host::Host;
use super::{Result, table};
use std::fs;
use std::path::Path;

const BEGIN: &str = "<!-- figures: written by tests/bench --readme -->";
const END: &str = "<!-- end of figures -->";

/// Replaces the block.
pub fn put(entries: &[Entry], host: &Host) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let before = fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let after = with_block(&before, &block(entries, host)).ok_or("the README has no place for figures")?;
    Ok(fs::write(&path, after).map_err(|e| format!("write {}: {e}", path.display()))?)
}

fn with_block(text: &str, block: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{block}{END}{after}"))
}

fn block(entries: &[Entry], host: &Host) -> String {
    let mut text = format!("Measured on: {}. Medians of one interleaved run.\n\n", host.line());
    text += "| measure | median | p99 | unit | reference | its median | ratio | aim | met |\n";
    text += "| --- | ---: | ---: | --- | --- | ---: | ---: | --- | --- |\n";
    for entry in entries {
        let [measure, median, p99, unit, _, reference, of_reference, ratio, _] = table::cells(entry);
        let aim = entry.aim.as_deref().unwrap_or_default();
        let met = entry.met.map_or("", |met| if met { "yes" } else { "**no**" });
        text += &format!(
            "| {measure} | {median} | {p99} | {unit} | {reference} | {of_reference} | {ratio} | {aim} | {met} |\n"
        );
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
