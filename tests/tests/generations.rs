//! Lines of VMs that are forked again and again: descriptors, stores and mappings do not grow with their generations.

use offshoot_tests::{Guest, TestHome};
use std::fs;
use vmm::client::{ForkOptions, Vm};
use vmm::units::ByteSize;

const GENERATIONS: u64 = 300;
const FIRST: u64 = 4096;

/// Which VM is forked next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// Always the same: its children are removed at once.
    Parent,
    /// The last child: its parent is removed.
    Child,
}

/// Descriptors that a process has of memory: stores. Those of VM processes that have been removed go when the processes are
/// gone, which takes as long as the host takes.
fn memory_descriptors(pid: i32) -> usize {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    all.filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|link| link.to_string_lossy().starts_with("/memfd:"))
        .count()
}

/// Each generation writes a page, and is forked. Every one of them is as it was written at the end, and the last ones cost
/// what those cost that came when there was first something to compact.
fn live(line: Line, page: impl Fn(u64) -> u64) {
    let Some(home) = TestHome::new() else { return };
    let mut vm: Vm = home.launch("p", ByteSize::mib(128));
    let mut costs = Vec::new();
    for generation in 0..GENERATIONS {
        vm.fill(page(generation)..page(generation) + 1, generation + 1);
        let forked = vm.fork(ForkOptions::new().prefix(format!("g{generation}")).wait_settled(true)).unwrap().remove(0);
        match line {
            Line::Parent => forked.vm.remove().unwrap(),
            Line::Child => std::mem::replace(&mut vm, forked.vm).remove().unwrap(),
        }
        let descriptors = memory_descriptors(home.server().unwrap());
        costs.push((descriptors, forked.figures.window_runs));
        // Of the monitor's own pages it writes a few each time.
        let taken = forked.figures.moved_pages;
        assert!(generation == 0 || taken <= 16, "{line:?} stood still for {taken} pages, having written one");
    }
    // Stores pile up until a freeze takes them along, some generations later where the host is busy: their mean is what lasts.
    let mean = |costs: &[(usize, u64)]| {
        let sums = costs.iter().fold((0, 0), |(descriptors, runs), cost| (descriptors + cost.0, runs + cost.1));
        (sums.0 / costs.len(), sums.1 / costs.len() as u64)
    };
    let (second, last) = (mean(&costs[100..200]), mean(&costs[200..]));
    println!("{line:?}: descriptors of memory and mappings of the second hundred {second:?}, of the last {last:?}");
    assert!(last.0 * 10 <= second.0 * 13, "descriptors");
    assert!(last.1 * 10 <= second.1.max(128) * 13, "mappings");
    let most = costs.iter().map(|cost| cost.0).max().unwrap_or(0);
    assert!(most <= 240, "{most} descriptors");
    (0..GENERATIONS).for_each(|generation| vm.verify(page(generation)..page(generation) + 1, generation + 1));
    home.check();
}

#[test]
fn a_lasting_parent_of_many_children() {
    live(Line::Parent, |generation| FIRST + 3 * generation);
}

/// Over 48 MiB.
#[test]
fn a_lasting_parent_that_writes_here_and_there() {
    live(Line::Parent, |generation| FIRST + generation * 7919 % 12288);
}

#[test]
fn a_line_of_children() {
    live(Line::Child, |generation| FIRST + 3 * generation);
}

/// Over 48 MiB.
#[test]
fn a_line_that_writes_here_and_there() {
    live(Line::Child, |generation| FIRST + generation * 7919 % 12288);
}
