//! Tables, trees and JSON.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;
use std::borrow::Cow;
use std::io::{self, Write};
use vmm::api::{CheckReport, Confinement, GuestStats, Inspection, Stats, Totals, TreeRow, VmState, VmStats, VmSummary};
use vmm::host::{HostReport, Verdict};
use vmm::plain;
use vmm::units::{ByteSize, count};

pub fn json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// What a terminal shows in one line.
const WIDTH: usize = 80;

pub fn vms(out: &mut impl Write, vms: &[VmSummary]) -> io::Result<()> {
    let mut table = table(["NAME", "STATE", "PARENT", "MEMORY", "PID", ""]);
    for vm in vms {
        let reason = vm.reason.clone().unwrap_or_default();
        table.add_row([vm.name.clone(), word(vm.state).into(), parent(vm), mem(vm), dash(&vm.pid), reason]);
    }
    write_table(out, &mut table, &[3, 4])
}

/// One line for each VM, children below their parents, with what it has of its own and what it shares.
pub fn tree(out: &mut impl Write, rows: &[TreeRow]) -> io::Result<()> {
    let mut table = table(["NAME", "STATE", "PRIVATE", "SHARED", "TOTAL", ""]);
    let depths: Vec<u32> = rows.iter().map(|row| row.depth).collect();
    for (row, branch) in rows.iter().zip(branches(&depths)) {
        let name = format!("{}{}", shortened(&branch), row.vm.name);
        let total = row.private_pages + row.shared_pages;
        let [private, shared, total] = [row.private_pages, row.shared_pages, total].map(short_pages);
        let orphan = if row.vm.parent_is_gone { format!("of {}", parent(&row.vm)) } else { String::new() };
        table.add_row([name, word(row.vm.state).into(), private, shared, total, orphan]);
    }
    write_table(out, &mut table, &[2, 3, 4])
}

/// The rows of a VM and of those that descend from it.
pub fn below(rows: Vec<TreeRow>, name: &str) -> Vec<TreeRow> {
    let mut rows: Vec<TreeRow> = rows.into_iter().skip_while(|row| row.vm.name != name).collect();
    let depth = rows.first().map_or(0, |row| row.depth);
    let end = rows.iter().skip(1).position(|row| row.depth <= depth);
    rows.truncate(end.map_or(rows.len(), |end| end + 1));
    rows.iter_mut().for_each(|row| row.depth -= depth);
    rows
}

/// Levels of the tree that are drawn to the left of a name: those next to it.
const LEVELS: usize = 8;

/// The lines of a deep branch, with how many levels are not drawn.
pub fn shortened(branch: &str) -> String {
    let lines: Vec<char> = branch.chars().collect();
    match (lines.len() / 3).checked_sub(LEVELS) {
        None | Some(0) => branch.to_owned(),
        Some(hidden) => format!("…{hidden} {}", lines[hidden * 3..].iter().collect::<String>()),
    }
}

/// The lines of the tree to the left of each row's name, by how far below its root each stands.
pub fn branches(depths: &[u32]) -> Vec<String> {
    // Upwards: a row is its parent's last child if no sibling has been seen below it.
    let mut open: Vec<bool> = Vec::new();
    let mut branches: Vec<String> = depths
        .iter()
        .rev()
        .map(|&depth| {
            let depth = depth as usize;
            open.resize(depth + 1, false);
            let mut branch: String =
                open.iter().take(depth).skip(1).map(|&open| if open { "│  " } else { "   " }).collect();
            if depth > 0 {
                branch.push_str(if open[depth] { "├─ " } else { "└─ " });
            }
            open[depth] = true;
            branch
        })
        .collect();
    branches.reverse();
    branches
}

pub fn stats(out: &mut impl Write, stats: &Stats) -> io::Result<()> {
    vm_table(out, &stats.vms)?;
    writeln!(out)?;
    totals(out, &stats.total)
}

fn vm_table(out: &mut impl Write, vms: &[VmStats]) -> io::Result<()> {
    let mut table = table(["NAME", "STATE", "MEMORY", "PRIVATE", "SHARED", "SWAPPED", "BALLOON", "PSS"]);
    for vm in vms {
        let pages = [vm.private_pages, vm.shared_pages, vm.swapped_pages, vm.ballooned_pages].map(short_pages);
        let summary = [vm.vm.name.clone(), word(vm.vm.state).into(), mem(&vm.vm)];
        table.add_row(summary.into_iter().chain(pages).chain([ByteSize(vm.pss_bytes).short()]));
    }
    write_table(out, &mut table, &[2, 3, 4, 5, 6, 7])
}

/// All the figures of one VM, and the server's.
pub fn stats_of_one(out: &mut impl Write, stats: &Stats) -> io::Result<()> {
    for vm in &stats.vms {
        fields(
            out,
            &[
                ("name", &vm.vm.name),
                ("state", &state(&vm.vm)),
                ("memory", &mem(&vm.vm)),
                ("private", &pages(vm.private_pages)),
                ("shared", &pages(vm.shared_pages)),
                ("zero", &pages(vm.zero_pages)),
                ("swapped", &pages(vm.swapped_pages)),
                ("balloon", &pages(vm.ballooned_pages)),
                ("unsettled", &pages(vm.unsettled_pages)),
                ("guest's memory", &dash(&vm.guest_stats.as_ref().map(guest_memory))),
                ("process", &format_args!("pid {}, PSS {}", dash(&vm.vm.pid), ByteSize(vm.pss_bytes).approx())),
                ("window", &count(vm.window_runs, "mapping")),
                ("chain", &count(vm.chain_depth, "object")),
                ("traps", &vm.traps),
                ("messages", &vm.messages),
            ],
        )?;
    }
    writeln!(out)?;
    totals(out, &stats.total)
}

fn totals(out: &mut impl Write, total: &Totals) -> io::Result<()> {
    let vms = count(total.vms, "VM");
    fields(
        out,
        &[
            ("server", &format_args!("pid {}, {vms}, {} more prepared", total.server_pid, total.pooled)),
            ("objects", &format_args!("{} in {}", total.objects, count(total.stores, "store"))),
            ("in stores", &pages(total.resident_pages)),
            ("unsettled", &pages(total.unsettled_pages)),
            (
                "stage-2 tables",
                &format_args!("{} (unshared: {})", total.stage2_tables, total.stage2_tables_unshared_equivalent),
            ),
            (
                "swapped",
                &format_args!(
                    "{}: {} compressed, {} on disk",
                    pages(total.swapped_pages),
                    ByteSize(total.compressed_bytes).approx(),
                    ByteSize(total.disk_bytes).approx()
                ),
            ),
            (
                "swap traffic",
                &format_args!(
                    "{} out, {} in, {} dropped clean",
                    count(total.swap_out_pages, "page"),
                    total.swap_in_pages,
                    total.clean_eviction_pages
                ),
            ),
            ("budget", &total.budget_bytes.map_or("none".into(), |bytes| ByteSize(bytes).to_string())),
            ("accounted", &ByteSize(total.accounted_bytes).approx()),
            ("host memory", &ByteSize(total.host_bytes).approx()),
        ],
    )
}

pub fn inspection(out: &mut impl Write, inspection: &Inspection) -> io::Result<()> {
    let VmStats { vm, .. } = &inspection.stats;
    let stats = &inspection.stats;
    let isolation = match inspection.confinement.as_ref().map(|found| found.weaknesses.len()) {
        None | Some(0) => inspection.isolation.clone(),
        Some(weak) => format!("{}, with {weak} of its parts weaker than they should be", inspection.isolation),
    };
    fields(
        out,
        &[
            ("name", &vm.name),
            ("state", &state(vm)),
            ("id", &vm.id),
            ("parent", &parent(vm)),
            ("children", &dash(&Some(inspection.children.join(" ")).filter(|names| !names.is_empty()))),
            ("generation", &inspection.generation),
            ("ends", &vm.ttl_ms.map_or("-".into(), |ms| format!("in {}.{} s", ms / 1000, ms % 1000 / 100))),
            ("max. children", &dash(&vm.max_children)),
            ("memory", &mem(vm)),
            ("private", &pages(stats.private_pages)),
            ("shared", &pages(stats.shared_pages)),
            ("zero", &pages(stats.zero_pages)),
            ("unsettled", &pages(stats.unsettled_pages)),
            ("guest's memory", &dash(&stats.guest_stats.as_ref().map(guest_memory))),
            ("pid", &dash(&vm.pid)),
            ("keeper", &dash(&inspection.keeper_pid)),
            ("isolation", &isolation),
            ("vsock", &dash(&inspection.vsock.as_ref().map(|path| path.display()))),
            ("chain depth", &stats.chain_depth),
            ("window runs", &stats.window_runs),
        ],
    )?;
    if let Some(found) = &inspection.confinement {
        confinement(out, found)?;
    }
    writeln!(out, "entries")?;
    for entry in &inspection.entries {
        let chain: Vec<String> = entry.chain.iter().map(|id| format!("object {id}")).collect();
        let chain = if chain.is_empty() { "no object: zero".into() } else { chain.join(" → ") };
        let copy_on_write = if entry.copy_on_write { ", copy-on-write" } else { "" };
        let needs_copy = if entry.needs_copy { ", needs copy" } else { "" };
        writeln!(out, "  {:#013x}-{:#013x}  {chain}{copy_on_write}{needs_copy}", entry.start, entry.end)?;
    }
    writeln!(out, "runs")?;
    for run in &inspection.runs {
        writeln!(out, "  {:#013x}-{:#013x}  {}", run.start, run.end, run.source)?;
    }
    match stats.window_runs.saturating_sub(inspection.runs.len() as u64) {
        0 => Ok(()),
        more => writeln!(out, "  and {more} more"),
    }
}

/// What keeps a process apart.
fn confinement(out: &mut impl Write, found: &Confinement) -> io::Result<()> {
    let limit = |limit: Option<u64>| limit.map_or("any".into(), |limit| limit.to_string());
    let size = |limit: Option<u64>| limit.map_or("any".into(), |limit| ByteSize(limit).to_string());
    let root = match (found.root_entries, found.root_read_only) {
        (Some(entries), Some(read_only)) => {
            format!("{}, {}", count(entries, "file"), if read_only { "read-only" } else { "can be written" })
        }
        _ => "?".into(),
    };
    let limits = found.limits;
    writeln!(out, "confinement, as /proc tells it")?;
    let rows: [(&str, &dyn std::fmt::Display); 9] = [
        ("  user, group", &format_args!("{}, {}", found.user, found.group)),
        ("  system calls", &found.seccomp),
        ("  no new privs", &if found.no_new_privs { "yes" } else { "no" }),
        (
            "  capabilities",
            &format_args!("{}, bounded by {}", found.effective_capabilities, found.bounding_capabilities),
        ),
        ("  namespaces", &format_args!("own: {}", found.own_namespaces.join(" "))),
        ("", &format_args!("the server's: {}", found.shared_namespaces.join(" "))),
        ("  root", &root),
        ("  control group", &dash(&found.control_group)),
        (
            "  limits",
            &format_args!(
                "{} open files, {} processes, files of {}, {} locked, cores of {}",
                limit(limits.open_files),
                limit(limits.processes),
                size(limits.file_size_bytes),
                size(limits.locked_memory_bytes),
                size(limits.core_bytes)
            ),
        ),
    ];
    fields(out, &rows)?;
    found.weaknesses.iter().try_for_each(|weak| writeln!(out, "  weaker than it should be: {weak}"))
}

pub fn check(out: &mut impl Write, report: &CheckReport) -> io::Result<()> {
    for broken in &report.broken {
        writeln!(out, "broken: {broken}")?;
    }
    writeln!(
        out,
        "checked {}, {}, {}: {} broken",
        count(report.vms, "VM"),
        count(report.mappings, "window mapping"),
        count(report.pages, "page"),
        report.broken.len()
    )
}

pub fn host(out: &mut impl Write, report: &HostReport) -> io::Result<()> {
    let mut table = table(["", "ITEM", "VALUE", "WHAT FOLLOWS"]);
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH as u16);
    for item in &report.items {
        let verdict = match item.verdict {
            Verdict::Ok => "ok",
            Verdict::Degraded => "degraded",
            Verdict::Missing => "missing",
        };
        table.add_row([verdict, &item.item, &item.value, &item.meaning]);
    }
    write_table(out, &mut table, &[])?;
    let degraded = report.items.iter().filter(|item| item.verdict == Verdict::Degraded).count();
    match (report.can_run, degraded) {
        (false, _) => writeln!(out, "\nVMs cannot run on this host."),
        (true, 0) => writeln!(out, "\nVMs can run on this host."),
        (true, degraded) => writeln!(out, "\nVMs can run on this host; {degraded} of these could be better."),
    }
}

/// A table without lines: its columns, at least two spaces apart.
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Writes a table whose columns of numbers are those in `right`. What the last column has beyond a terminal's width is left
/// out.
pub fn write_table(out: &mut impl Write, table: &mut Table, right: &[usize]) -> io::Result<()> {
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().try_for_each(|line| writeln!(out, "{}", cut(&plain::lines(line.trim_end()))))
}

fn cut(line: &str) -> Cow<'_, str> {
    if line.chars().count() <= WIDTH {
        return line.into();
    }
    let shown: String = line.chars().take(WIDTH - 1).collect();
    format!("{}…", shown.trim_end()).into()
}

fn fields(out: &mut impl Write, fields: &[(&str, &dyn std::fmt::Display)]) -> io::Result<()> {
    // Whatever a guest or its process has to do with it, a terminal obeys none of it.
    fields.iter().try_for_each(|(name, value)| writeln!(out, "{name:<15} {}", plain::lines(&value.to_string())))
}

pub fn word(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Off => "off",
        _ => "dead",
    }
}

/// The whole of it.
fn state(vm: &VmSummary) -> String {
    let reason = vm.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
    format!("{}{reason}", word(vm.state))
}

fn parent(vm: &VmSummary) -> String {
    let gone = if vm.parent_is_gone { " (gone)" } else { "" };
    format!("{}{gone}", dash(&vm.parent))
}

fn mem(vm: &VmSummary) -> String {
    ByteSize::pages(vm.mem_pages).to_string()
}

fn pages(number: u64) -> String {
    format!("{} ({})", count(number, "page"), ByteSize::pages(number).approx())
}

fn short_pages(number: u64) -> String {
    ByteSize::pages(number).short()
}

/// What a guest said of its memory, in words.
fn guest_memory(said: &GuestStats) -> String {
    let size = |bytes: Option<u64>| bytes.map_or("?".into(), |bytes| ByteSize(bytes).approx());
    let [free, available, total] =
        [said.free_memory_bytes, said.available_memory_bytes, said.total_memory_bytes].map(size);
    format!("{free} free, {available} available of {total}, {} s ago", said.age_ms / 1000)
}

fn dash(value: &Option<impl ToString>) -> String {
    value.as_ref().map_or("-".into(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(name: &str, depth: u32) -> TreeRow {
        let row = json!({
            "name": name, "id": 1, "parent": null, "parent_id": null, "parent_is_gone": false, "state": "running",
            "reason": null, "mem_pages": 65536, "balloon_bytes": 0, "pid": 7, "depth": depth, "private_pages": 256,
            "shared_pages": 1024,
        });
        serde_json::from_value(row).unwrap()
    }

    fn text(write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        write(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let widest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        assert!(widest <= WIDTH, "{widest} columns: {text}");
        text
    }

    #[test]
    fn a_tree_is_drawn() {
        let rows = [
            row("a", 0),
            row("a-1", 1),
            row("a-2", 2),
            row("a-3", 2),
            row("a-4", 1),
            row("a-5", 2),
            row("b", 0),
            row("b-1", 1),
        ];
        assert_eq!(
            branches(&rows.each_ref().map(|row| row.depth)),
            ["", "├─ ", "│  ├─ ", "│  └─ ", "└─ ", "   └─ ", "", "└─ "]
        );
        let text = text(|out| tree(out, &rows[..2]));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "NAME    STATE    PRIVATE  SHARED  TOTAL");
        assert_eq!(lines[2], "└─ a-1  running     1.0M    4.0M   5.0M");
        let names = |rows: Vec<TreeRow>| rows.into_iter().map(|row| (row.vm.name, row.depth)).collect::<Vec<_>>();
        assert_eq!(names(below(rows.to_vec(), "a-1")), [("a-1".into(), 0), ("a-2".into(), 1), ("a-3".into(), 1)]);
        assert_eq!(names(below(rows.to_vec(), "b")), [("b".into(), 0), ("b-1".into(), 1)]);
        assert_eq!(names(below(rows.to_vec(), "c")), []);
    }

    #[test]
    fn a_deep_tree_fits() {
        let rows: Vec<TreeRow> = (0..1000).map(|depth| row(&format!("base-{depth}"), depth)).collect();
        let text = text(|out| tree(out, &rows));
        assert!(text.lines().nth(1000).unwrap().starts_with("…991 "), "{text}");
        assert!(text.lines().nth(9).unwrap().starts_with("                     └─ base-8 "), "{text}");
    }

    #[test]
    fn a_list_is_a_table() {
        let mut dead = row("b", 0).vm;
        (dead.state, dead.reason, dead.pid) = (VmState::Dead, Some("its process was killed".repeat(9)), None);
        (dead.parent, dead.parent_id, dead.parent_is_gone) = (Some("a".into()), Some(1), true);
        let text = text(|out| vms(out, &[row("a", 0).vm, dead]));
        assert_eq!(text.lines().next().unwrap(), "NAME  STATE    PARENT    MEMORY  PID");
        let last = text.lines().nth(2).unwrap();
        assert!(last.starts_with("b     dead     a (gone)    256M    -  its process was killed"), "{text}");
        assert!(last.ends_with('…') && text.lines().count() == 3, "{text}");
    }

    #[test]
    fn large_figures_fit() {
        let mut vm = serde_json::to_value(row("a-name-of-16-long", 0)).unwrap();
        let figures = json!({
            "private_pages": 8_000_000, "shared_pages": 8_000_000, "zero_pages": 8_000_000, "swapped_pages": 262_140,
            "ballooned_pages": 262_140, "unsettled_pages": 9, "chain_depth": 99, "window_runs": 9999,
            "pss_bytes": 1_073_741_823, "traps": 99_999_999, "messages": 99_999_999, "guest_stats": null,
        });
        vm.as_object_mut().unwrap().extend(figures.as_object().unwrap().clone());
        let vm = serde_json::from_value(vm).unwrap();
        text(|out| vm_table(out, &[vm]));
    }
}
