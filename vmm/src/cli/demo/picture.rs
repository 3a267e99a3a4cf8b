//! The tree of VMs, and how much of the memory of each is its own, as a picture.

use std::fmt::Write;
use vmm::api::TreeRow;
use vmm::units::ByteSize;

const ROW: u64 = 26;
const INDENT: u64 = 22;
const TOP: u64 = 58;
/// Where the bars begin, and how long the longest is.
const BARS: u64 = 170;
const LONGEST: u64 = 420;
const WIDTH: u64 = 760;

const PRIVATE: &str = "#d9730d";
const SHARED: &str = "#9cc3d5";

/// A row for each VM: its name below its parent's, and a bar of what it alone has and of what others see as well.
pub fn svg(rows: &[TreeRow]) -> String {
    let height = TOP + ROW * rows.len() as u64 + 14;
    let total = |row: &TreeRow| row.private_pages + row.shared_pages;
    let most = rows.iter().map(total).max().unwrap_or(0).max(1);
    let seen = ByteSize::pages(rows.iter().map(total).sum()).approx();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    out += &text(16, 24, &format!("{} VMs, which together see {seen} of memory", rows.len()));
    out += &bar(BARS, 36, 12, PRIVATE);
    out += &text(BARS + 18, 46, "seen by this VM alone");
    out += &bar(BARS + 200, 36, 12, SHARED);
    out += &text(BARS + 218, 46, "shared with others");
    for (index, row) in rows.iter().enumerate() {
        let (x, y) = (16 + INDENT * u64::from(row.depth), TOP + ROW * index as u64);
        // The last row before this that stands one level higher.
        if let Some(parent) = rows[..index].iter().rposition(|above| above.depth + 1 == row.depth) {
            let (left, from) = (x - INDENT + 6, TOP + ROW * parent as u64 + 18);
            // Writing to a string cannot fail.
            let _ = writeln!(out, "<path d=\"M{left} {from}V{}H{}\" fill=\"none\" stroke=\"#888\"/>", y + 10, x - 4);
        }
        let length = |pages: u64| (pages * LONGEST).div_ceil(most).min(LONGEST);
        let private = length(row.private_pages);
        out += &text(x, y + 14, &row.vm.name);
        out += &bar(BARS, y + 4, private, PRIVATE);
        out += &bar(BARS + private, y + 4, length(row.shared_pages).min(LONGEST - private), SHARED);
        let [own, shared] = [row.private_pages, row.shared_pages].map(|pages| ByteSize::pages(pages).approx());
        out += &text(BARS + LONGEST + 10, y + 14, &format!("{own} + {shared}"));
    }
    out + "</svg>\n"
}

fn text(x: u64, y: u64, text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x}\" y=\"{y}\">{text}</text>\n")
}

fn bar(x: u64, y: u64, width: u64, colour: &str) -> String {
    format!("<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"12\" fill=\"{colour}\"/>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, depth: u32, private_pages: u64, shared_pages: u64) -> TreeRow {
        let mut row = TreeRow::default();
        row.vm.name = name.into();
        (row.depth, row.private_pages, row.shared_pages) = (depth, private_pages, shared_pages);
        row
    }

    #[test]
    fn a_row_for_each_vm_and_a_line_to_its_parent() {
        let svg = svg(&[row("base", 0, 256, 768), row("base-1", 1, 0, 1024), row("base-2", 1, 512, 512)]);
        assert_eq!(svg.matches("<path").count(), 2, "{svg}");
        assert!(svg.contains("3 VMs, which together see 12.0 MiB of memory"), "{svg}");
        let widths: Vec<&str> = svg.split("width=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(widths, ["760", "12", "12", "105", "315", "0", "420", "210", "210"]);
    }
}
