//! What `top` shows: lines of text, no wider than the terminal and no more than it has rows, made of two looks at the server.

use crate::cli::show;
use crate::cli::terminal::Size;
use std::collections::BTreeMap;
use std::time::Instant;
use vmm::api::{RequestKind, Stats, VmStats};
use vmm::plain;
use vmm::units::{ByteSize, count};

/// What the server told, and when.
#[derive(Clone, Debug)]
pub struct Sample {
    pub stats: Stats,
    pub at: Instant,
}

/// What bars are made of.
const PRIVATE: char = '█';
const SHARED: char = '▒';
const BALLOONED: char = '░';
const ON_DISK: char = '░';
const REST: char = '·';

/// A column of sizes.
const FIGURE: usize = 8;
/// The least that is worth a bar.
const BAR_MIN: usize = 8;
const BAR_MAX: usize = 60;
/// The least of a name that is shown.
const NAME_MIN: usize = 8;

/// All lines.
pub fn lines(before: &Sample, now: &Sample, size: Size) -> Vec<String> {
    // A terminal whose last column is written to may go on in the next line.
    let width = size.columns.saturating_sub(1).max(1);
    let mut lines = vec![summary(before, now), memory(&now.stats, width), legend()];
    lines.push(String::new());
    let vms = in_tree_order(&now.stats.vms);
    let depths: Vec<u32> = vms.iter().map(|(depth, _)| *depth).collect();
    let names: Vec<String> = show::branches(&depths)
        .iter()
        .zip(&vms)
        .map(|(branch, (_, vm))| show::shortened(branch) + &vm.vm.name)
        .collect();
    let columns = Columns::fit(width, names.iter().map(|name| name.chars().count()).max().unwrap_or(0));
    lines.push(columns.row("NAME", "STATE", "MEMORY", ["PRIVATE", "SHARED", "SWAPPED", "BALLOON", "FAULTS/s"]));
    // The last line tells of those for which there is no room.
    let room = size.rows.saturating_sub(lines.len());
    let shown = if vms.len() > room { room.saturating_sub(1) } else { vms.len() };
    for (name, (_, vm)) in names.iter().zip(&vms).take(shown) {
        let earlier = before.stats.vms.iter().find(|earlier| earlier.vm.id == vm.vm.id);
        let faults = earlier.map_or(vm.traps, |earlier| vm.traps.saturating_sub(earlier.traps));
        let pages = [vm.private_pages, vm.shared_pages, vm.swapped_pages, vm.ballooned_pages];
        let [private, shared, swapped, ballooned] = pages.map(|pages| ByteSize::pages(pages).short());
        let parts = [(PRIVATE, pages[0]), (SHARED, pages[1]), (BALLOONED, pages[3])];
        let bar = bar(columns.bar, &parts, vm.vm.mem_pages);
        let rate = rate(faults, before, now);
        lines.push(columns.row(name, show::word(vm.vm.state), &bar, [&private, &shared, &swapped, &ballooned, &rate]));
    }
    if shown < vms.len() {
        lines.push(format!("and {}", count((vms.len() - shown) as u64, "more VM")));
    }
    lines.truncate(size.rows.max(1));
    lines.iter().map(|line| cut(&plain::lines(line), width)).collect()
}

fn summary(before: &Sample, now: &Sample) -> String {
    let forks = |stats: &Stats| {
        let forks = stats.requests.iter().find(|request| request.kind == RequestKind::Fork);
        forks.map_or(0, |forks| forks.answers - forks.failures.min(forks.answers))
    };
    let total = &now.stats.total;
    format!(
        "{}, {} prepared   forks {}/s   faults {}/s   q quits",
        count(total.vms, "VM"),
        total.pooled,
        rate(forks(&now.stats).saturating_sub(forks(&before.stats)), before, now),
        rate(total.traps.saturating_sub(before.stats.total.traps), before, now),
    )
}

/// What the server has of pages, and where.
fn memory(stats: &Stats, width: usize) -> String {
    let total = &stats.total;
    let resident = ByteSize::pages(total.resident_pages);
    let parts = [(PRIVATE, resident.0), (SHARED, total.compressed_bytes), (ON_DISK, total.disk_bytes)];
    let ballooned = ByteSize::pages(stats.vms.iter().map(|vm| vm.ballooned_pages).sum());
    let told = format!(
        "{PRIVATE} in stores {}  {SHARED} compressed {}  {ON_DISK} on disk {}  ballooned {}  budget {}",
        resident.short(),
        ByteSize(total.compressed_bytes).short(),
        ByteSize(total.disk_bytes).short(),
        ballooned.short(),
        total.budget_bytes.map_or("none".into(), |bytes| ByteSize(bytes).short()),
    );
    let room = width.saturating_sub(told.chars().count() + 3).min(BAR_MAX);
    let all: u64 = parts.iter().map(|(_, part)| part).sum();
    if room < BAR_MIN { told } else { format!("[{}] {told}", bar(room, &parts, all)) }
}

fn legend() -> String {
    format!("of each VM's memory: {PRIVATE} private  {SHARED} shared  {BALLOONED} ballooned")
}

/// So many a second.
fn rate(events: u64, before: &Sample, now: &Sample) -> String {
    let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
    match events as f64 / seconds {
        _ if seconds <= 0.0 => "-".into(),
        rate if rate < 10.0 && events > 0 => format!("{rate:.1}"),
        rate => format!("{rate:.0}"),
    }
}

/// Each VM behind its parent and its older siblings, with how far below its root it stands.
fn in_tree_order(vms: &[VmStats]) -> Vec<(u32, &VmStats)> {
    let listed: BTreeMap<u64, &VmStats> = vms.iter().map(|vm| (vm.vm.id, vm)).collect();
    let mut children: BTreeMap<Option<u64>, Vec<&VmStats>> = BTreeMap::new();
    for vm in listed.values() {
        let parent = vm.vm.parent_id.filter(|parent| listed.contains_key(parent) && *parent != vm.vm.id);
        children.entry(parent).or_default().push(vm);
    }
    let mut stack: Vec<(u32, &VmStats)> =
        children.remove(&None).unwrap_or_default().into_iter().rev().map(|vm| (0, vm)).collect();
    let mut rows = Vec::new();
    while let Some((depth, vm)) = stack.pop() {
        rows.push((depth, vm));
        let below = children.remove(&Some(vm.vm.id)).unwrap_or_default();
        stack.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
    }
    rows
}

/// A bar of this many characters for `all`. What is there at all is seen, if there is room.
fn bar(width: usize, parts: &[(char, u64)], all: u64) -> String {
    let mut bar = String::new();
    let mut left = width;
    for &(of, part) in parts {
        let share = (u128::from(part) * width as u128).div_ceil(u128::from(all.max(1)));
        let length = usize::try_from(share).unwrap_or(width).min(left);
        left -= length;
        bar.extend(std::iter::repeat_n(of, length));
    }
    bar.extend(std::iter::repeat_n(REST, left));
    bar
}

/// How wide columns are. Those of figures go first where there is no room for all.
struct Columns {
    name: usize,
    bar: usize,
    figures: usize,
}

/// `running`, and the spaces behind it.
const STATE: usize = 9;

impl Columns {
    fn fit(width: usize, longest: usize) -> Self {
        let name = longest.clamp(NAME_MIN, (width / 3).max(NAME_MIN));
        let left = width.saturating_sub(name + 2 + STATE);
        let figures = (left / (FIGURE + 1)).min(5);
        let bar = left.saturating_sub(figures * (FIGURE + 1) + 1).min(BAR_MAX);
        Self { name, bar: if bar < BAR_MIN { 0 } else { bar }, figures }
    }

    fn row(&self, name: &str, state: &str, bar: &str, figures: [&str; 5]) -> String {
        let mut row = format!("{:<name$}  {state:<STATE$}", cut(name, self.name), name = self.name);
        if self.bar > 0 {
            row += &format!("{bar:<width$} ", width = self.bar);
        }
        for figure in figures.iter().take(self.figures) {
            row += &format!("{figure:>FIGURE$} ");
        }
        row.trim_end().to_owned()
    }
}

fn cut(line: &str, width: usize) -> String {
    if line.chars().count() <= width {
        return line.to_owned();
    }
    line.chars().take(width - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    fn vm(id: u64, parent: Option<u64>, traps: u64) -> VmStats {
        let mut vm = VmStats::default();
        vm.vm.name = format!("vm-{id}");
        (vm.vm.id, vm.vm.parent_id, vm.vm.mem_pages) = (id, parent, 1000);
        (vm.private_pages, vm.shared_pages, vm.ballooned_pages, vm.traps) = (250, 500, 100, traps);
        vm
    }

    fn looks(vms: Vec<VmStats>) -> (Sample, Sample) {
        let at = Instant::now();
        let mut stats = Stats::default();
        stats.vms = vms;
        stats.total.vms = stats.vms.len() as u64;
        let before = Sample { stats: stats.clone(), at };
        stats.total.traps = 84;
        stats.vms.iter_mut().for_each(|vm| vm.traps += 40);
        let fork = json!({"kind": "fork", "answers": 9, "failures": 1, "total_us": 1, "buckets": []});
        stats.requests = vec![serde_json::from_value(fork).expect("a histogram")];
        (before, Sample { stats, at: at + Duration::from_secs(2) })
    }

    fn shown(vms: Vec<VmStats>, columns: usize, rows: usize) -> Vec<String> {
        let (before, now) = looks(vms);
        lines(&before, &now, Size { columns, rows })
    }

    #[test]
    fn a_row_tells_all_of_a_vm() {
        let lines = shown(vec![vm(1, None, 7), vm(2, Some(1), 0)], 100, 24);
        assert!(lines[0].contains("2 VMs") && lines[0].contains("forks 4.0/s   faults 42/s"), "{lines:?}");
        let row = lines.iter().find(|line| line.starts_with("└─ vm-2")).expect("a row");
        assert!(row.contains("running") && row.contains("1000.0K     2.0M        0   400.0K       20"), "{row}");
        let length = |part: char| row.chars().filter(|&c| c == part).count();
        let bar = [PRIVATE, SHARED, BALLOONED, REST].map(length);
        assert!(bar[0] * 2 >= bar[1] && bar[1] > bar[0] && bar[2] > 0 && bar[3] > 0, "{row}");
    }

    #[test]
    fn it_fits_whatever_the_terminal_is() {
        let vms = || (1..=40).map(|id| vm(id, (id > 1).then_some(id - 1), 0)).collect::<Vec<_>>();
        for columns in 1..200 {
            for rows in [1, 2, 5, 6, 24, 60] {
                let lines = shown(vms(), columns, rows);
                assert!(lines.len() <= rows, "{columns} {rows}: {lines:?}");
                let widest = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0);
                assert!(widest < columns.max(2), "{columns} {rows}: {lines:?}");
            }
        }
        assert_eq!(shown(vms(), 80, 10).last().map(String::as_str), Some("and 36 more VMs"));
    }

    /// What is not to be believed: more than there is, parents in a circle, and names that a terminal would obey.
    #[test]
    fn nonsense_is_shown_as_well_as_can_be() {
        let mut liar = vm(1, Some(1), 0);
        (liar.private_pages, liar.shared_pages, liar.vm.mem_pages) = (u64::MAX, u64::MAX, 0);
        liar.vm.name = "a\u{1b}[2J\u{9b}31m\r".into();
        let lines = shown(vec![liar, vm(2, Some(3), 0), vm(3, Some(2), 0)], 100, 24);
        assert!(lines.iter().all(|line| !line.chars().any(char::is_control)), "{lines:?}");
        assert!(lines.iter().any(|line| line.starts_with("a\\u{1b}")), "{lines:?}");
    }
}
