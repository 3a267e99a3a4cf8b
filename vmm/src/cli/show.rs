//! Tables, trees and JSON.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::io::{self, Write};
use vmm::api::{CheckReport, GuestStats, Inspection, Stats, TreeRow, VmState, VmStats, VmSummary};
use vmm::host::{HostReport, Verdict};
use vmm::units::ByteSize;

pub fn json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

pub fn vms(out: &mut impl Write, vms: &[VmSummary]) -> io::Result<()> {
    let mut table = table(["NAME", "STATE", "PARENT", "MEM", "PID"]);
    for vm in vms {
        table.add_row([vm.name.clone(), state(vm), dash(&vm.parent), mem(vm), dash(&vm.pid)]);
    }
    write_table(out, &mut table, &[3, 4])
}

/// One line for each VM, children below their parents, with what it has of its own and what it shares.
pub fn tree(out: &mut impl Write, rows: &[TreeRow]) -> io::Result<()> {
    let mut table = table(["NAME", "STATE", "PRIVATE", "SHARED", "TOTAL"]);
    for (row, branch) in rows.iter().zip(branches(rows)) {
        let name = format!("{branch}{}", row.vm.name);
        let total = row.private_pages + row.shared_pages;
        table.add_row([name, state(&row.vm), pages(row.private_pages), pages(row.shared_pages), pages(total)]);
    }
    write_table(out, &mut table, &[2, 3, 4])
}

/// The lines of the tree to the left of each row's name.
fn branches(rows: &[TreeRow]) -> Vec<String> {
    // Upwards: a row is its parent's last child if no sibling has been seen below it.
    let mut open: Vec<bool> = Vec::new();
    let mut branches: Vec<String> = rows
        .iter()
        .rev()
        .map(|row| {
            let depth = row.depth as usize;
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
    let header = [
        "NAME",
        "STATE",
        "MEM",
        "PRIVATE",
        "SHARED",
        "ZERO",
        "SWAPPED",
        "BALLOONED",
        "UNSETTLED",
        "DEPTH",
        "RUNS",
        "PSS",
        "TRAPS",
        "MESSAGES",
    ];
    let mut table = table(header);
    for vm in &stats.vms {
        let summary = [vm.vm.name.clone(), state(&vm.vm), mem(&vm.vm)];
        let pages = [
            vm.private_pages,
            vm.shared_pages,
            vm.zero_pages,
            vm.swapped_pages,
            vm.ballooned_pages,
            vm.unsettled_pages,
        ];
        let rest = [vm.chain_depth.to_string(), vm.window_runs.to_string(), ByteSize(vm.pss_bytes).approx()];
        let counts = [vm.traps, vm.messages].map(|count| count.to_string());
        table.add_row(summary.into_iter().chain(pages.map(|count| count.to_string())).chain(rest).chain(counts));
    }
    write_table(out, &mut table, &(2..header.len()).collect::<Vec<_>>())?;
    let total = &stats.total;
    let tables = format!("{} (unshared: {})", total.stage2_tables, total.stage2_tables_unshared_equivalent);
    writeln!(out)?;
    fields(
        out,
        &[
            ("server", &format_args!("pid {}, {} VMs, {} more prepared", total.server_pid, total.vms, total.pooled)),
            ("objects", &format_args!("{} in {} stores", total.objects, total.stores)),
            (
                "pages",
                &format_args!(
                    "{} resident, {} swapped, {} unsettled",
                    total.resident_pages, total.swapped_pages, total.unsettled_pages
                ),
            ),
            ("stage-2 tables", &tables),
            (
                "swap",
                &format_args!(
                    "{} compressed, {} on disk; {} pages out, {} in, {} dropped clean",
                    ByteSize(total.compressed_bytes).approx(),
                    ByteSize(total.disk_bytes).approx(),
                    total.swap_out_pages,
                    total.swap_in_pages,
                    total.clean_evictions
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
    fields(
        out,
        &[
            ("name", &vm.name),
            ("state", &state(vm)),
            ("parent", &dash(&vm.parent)),
            ("children", &dash(&Some(inspection.children.join(" ")).filter(|names| !names.is_empty()))),
            ("generation", &inspection.generation),
            ("memory", &mem(vm)),
            ("private", &pages(stats.private_pages)),
            ("shared", &pages(stats.shared_pages)),
            ("zero", &pages(stats.zero_pages)),
            ("unsettled", &pages(stats.unsettled_pages)),
            ("guest's memory", &dash(&stats.guest_stats.as_ref().map(guest_memory))),
            ("pid", &dash(&vm.pid)),
            ("keeper", &dash(&inspection.keeper_pid)),
            ("isolation", &inspection.isolation),
            ("chain depth", &stats.chain_depth),
            ("window runs", &stats.window_runs),
        ],
    )?;
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

pub fn check(out: &mut impl Write, report: &CheckReport) -> io::Result<()> {
    for broken in &report.broken {
        writeln!(out, "broken: {broken}")?;
    }
    writeln!(
        out,
        "checked {} VMs, {} window mappings, {} pages: {} broken",
        report.vms,
        report.mappings,
        report.pages,
        report.broken.len()
    )
}

pub fn host(out: &mut impl Write, report: &HostReport) -> io::Result<()> {
    let mut table = table(["", "ITEM", "VALUE", "WHAT FOLLOWS"]);
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
        (true, count) => writeln!(out, "\nVMs can run on this host; {count} of these could be better."),
    }
}

/// A table without lines: its columns, at least two spaces apart.
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Writes a table whose columns of numbers are those in `right`.
pub fn write_table(out: &mut impl Write, table: &mut Table, right: &[usize]) -> io::Result<()> {
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().try_for_each(|line| writeln!(out, "{}", line.trim_end()))
}

fn fields(out: &mut impl Write, fields: &[(&str, &dyn std::fmt::Display)]) -> io::Result<()> {
    fields.iter().try_for_each(|(name, value)| writeln!(out, "{name:<15} {value}"))
}

fn state(vm: &VmSummary) -> String {
    match (vm.state, &vm.reason) {
        (VmState::Running, _) => "running".into(),
        (VmState::Paused, _) => "paused".into(),
        (VmState::Off, None) => "off".into(),
        (VmState::Off, Some(reason)) => format!("off: {reason}"),
        (VmState::Dead, None) => "dead".into(),
        (VmState::Dead, Some(reason)) => format!("dead: {reason}"),
    }
}

fn mem(vm: &VmSummary) -> String {
    ByteSize::pages(vm.mem_pages).to_string()
}

fn pages(count: u64) -> String {
    format!("{count} ({})", ByteSize::pages(count).approx())
}

/// What a guest said of its memory, in words.
fn guest_memory(said: &GuestStats) -> String {
    let size = |bytes: Option<u64>| bytes.map_or("?".into(), |bytes| ByteSize(bytes).approx());
    let [free, available, total] = [said.free_memory, said.available_memory, said.total_memory].map(size);
    format!("{free} free, {available} available of {total}, {} s ago", said.age_ms / 1000)
}

fn dash(value: &Option<impl ToString>) -> String {
    value.as_ref().map_or("-".into(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, depth: u32) -> TreeRow {
        let vm = VmSummary {
            name: name.into(),
            parent: None,
            state: VmState::Running,
            reason: None,
            mem_pages: 65536,
            balloon_bytes: 0,
            pid: Some(7),
        };
        TreeRow { vm, depth, private_pages: 256, shared_pages: 1024 }
    }

    #[test]
    fn a_tree_is_drawn() {
        let rows = [
            row("a", 0),
            row("a-1", 1),
            row("a-1-1", 2),
            row("a-1-2", 2),
            row("a-2", 1),
            row("a-2-1", 2),
            row("b", 0),
            row("b-1", 1),
        ];
        assert_eq!(branches(&rows), ["", "├─ ", "│  ├─ ", "│  └─ ", "└─ ", "   └─ ", "", "└─ "]);
        let mut out = Vec::new();
        tree(&mut out, &rows[..2]).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "NAME    STATE          PRIVATE          SHARED           TOTAL");
        assert_eq!(lines[2], "└─ a-1  running  256 (1.0 MiB)  1024 (4.0 MiB)  1280 (5.0 MiB)");
    }

    #[test]
    fn a_list_is_a_table() {
        let mut dead = row("b", 0).vm;
        (dead.state, dead.reason, dead.pid) = (VmState::Dead, Some("its process was killed".into()), None);
        let mut out = Vec::new();
        vms(&mut out, &[row("a", 0).vm, dead]).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.lines().nth(2).unwrap().starts_with("b     dead: its process was killed  -"), "{text}");
        assert_eq!(text.lines().count(), 3);
    }
}
