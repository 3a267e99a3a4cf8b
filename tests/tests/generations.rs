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
        let descriptors = fs::read_dir(format!("/proc/{}/fd", home.server().unwrap())).unwrap().count();
        costs.push((descriptors, forked.figures.window_runs));
        // Of the monitor's own pages it writes a few each time.
        let taken = forked.figures.moved_pages;
        assert!(generation == 0 || taken <= 16, "{line:?} stood still for {taken} pages, having written one");
    }
    let most = |costs: &[(usize, u64)]| {
        let (descriptors, runs) = costs.iter().copied().unzip::<_, _, Vec<_>, Vec<_>>();
        (descriptors.into_iter().max().unwrap_or(0), runs.into_iter().max().unwrap_or(0))
    };
    let (second, last) = (most(&costs[100..200]), most(&costs[200..]));
    println!("{line:?}: descriptors and mappings of the second hundred {second:?}, of the last {last:?}");
    assert!(last.0 * 10 <= second.0 * 13, "descriptors");
    assert!(last.1 * 10 <= second.1.max(128) * 13, "mappings");
    assert!(last.0 <= 300, "{} descriptors", last.0);
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
