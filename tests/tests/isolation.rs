//! What one VM writes after a fork, nobody else sees.

use offshoot_tests::{Setup, TestHome, Traced};
use std::ops::Range;
use vmm::client::ForkOptions;
use vmm::units::ByteSize;

const REGION: Range<u64> = 1000..5000;

/// Written pages, cleared pages, and pages that nobody has touched, side by side.
fn mixed(home: &TestHome) -> Traced {
    let mut parent = Traced::new(home.launch("p", ByteSize::mib(32)), REGION);
    parent.write(1000..2500);
    parent.write(3000..3400);
    parent.zero(3050..3350);
    parent
}

/// Both sides of a fork, and its siblings, write to pages of every kind: alone, in the middle, and across their bounds.
fn separate_ways(home: &TestHome, options: ForkOptions) {
    let mut parent = mixed(home);
    let children = parent.fork(options.count(3));
    let [mut first, mut second, third] = <[Traced; 3]>::try_from(children).expect("three children");
    for pages in [1100..1150, 1999..2000, 2490..2510, 3040..3060, 3200..3201, 4000..4100] {
        parent.write(pages);
    }
    parent.zero(1200..1300);
    first.verify();
    for pages in [1140..1160, 1250..1251, 3300..3360, 4099..4101] {
        first.write(pages);
    }
    second.zero(1000..2500);
    second.write(3100..3110);
    second.zero(4050..4060);
    for vm in [&third, &parent, &first, &second] {
        vm.verify();
    }
    let report = home.client().check().unwrap();
    assert!(report.broken.is_empty() && report.vms == 4, "{report:?}");
}

/// The parent writes on while its pages have not settled.
#[test]
fn nobody_sees_a_write_right_after_a_fork() {
    let Some(home) = TestHome::new() else { return };
    separate_ways(&home, ForkOptions::new());
}

/// And when all has settled.
#[test]
fn nobody_sees_a_write_after_a_fork_has_settled() {
    let Some(home) = TestHome::new() else { return };
    separate_ways(&home, ForkOptions::new().wait_settled(true));
}

/// A child that was left paused starts later from what its parent had at the fork, not from what it has now.
#[test]
fn a_paused_child_keeps_the_moment_of_the_fork() {
    let Some(home) = TestHome::new() else { return };
    let mut parent = mixed(&home);
    let children = parent.fork(ForkOptions::new().count(2).paused(true));
    parent.write(REGION);
    parent.verify();
    for child in children {
        child.vm.resume().unwrap();
        child.verify();
    }
}

/// A parent that forks and writes in turn, many times: every child keeps the state of its own fork.
#[test]
fn each_fork_is_a_moment_of_its_own() {
    let Some(home) = TestHome::new() else { return };
    let mut parent = mixed(&home);
    let mut children = Vec::new();
    for round in 0..12 {
        children.extend(parent.fork(ForkOptions::new()));
        let start = 1000 + round * 137;
        parent.write(start..start + 300);
        parent.zero(start + 100..start + 120);
    }
    // Now and then one of them goes, and takes with it what only it saw.
    for gone in [7, 3, 0] {
        children.remove(gone).vm.remove().unwrap();
    }
    children.iter().chain([&parent]).for_each(Traced::verify);
}

/// Without the kernel features that have a fallback, all of this holds as well, four levels deep.
fn without(disable: &'static str) {
    let Some(home) = (Setup { disable, ..Setup::default() }).home() else { return };
    separate_ways(&home, ForkOptions::new());
    home.client().remove_all().unwrap();
    let mut line = vec![mixed(&home)];
    for level in 0..4 {
        let mut child = line.last().expect("there is a parent").fork(ForkOptions::new()).remove(0);
        child.write(1000 + level * 100..1150 + level * 100);
        line.push(child);
    }
    line.iter().for_each(Traced::verify);
    let report = home.client().check().unwrap();
    assert!(report.broken.is_empty() && report.vms == 5, "{report:?}");
}

/// No userfaultfd: forks settle within the pause.
#[test]
fn without_userfaultfd_forks_are_as_good() {
    without("userfaultfd");
}

/// No `PAGEMAP_SCAN`: private pages are found by reading the pagemap.
#[test]
fn without_pagemap_scan_forks_are_as_good() {
    without("pagemap-scan");
}

/// Neither.
#[test]
fn without_both_forks_are_as_good() {
    without("userfaultfd,pagemap-scan");
}
