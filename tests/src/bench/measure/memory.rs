//! Memory of an idle clone: its part of all pages, its page tables, and the kernel's memory for it.

use super::{PRIVATE, clones};
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::processes::Group;
use crate::reference::Reference;
use crate::stats::Samples;
use crate::{Result, processes};
use std::thread;
use std::time::Duration;

const MIB: u64 = 256;

/// Bytes that some processes take.
#[derive(Clone, Copy)]
struct Taken {
    pss: f64,
    page_tables: f64,
    /// Page tables included.
    kernel: Option<f64>,
}

impl Taken {
    fn of(processes: &[i32], group: Option<&Group>) -> Self {
        // What has just happened is accounted for in batches.
        thread::sleep(Duration::from_millis(500));
        let all = processes.iter().map(|&pid| processes::taken(pid));
        let (pss, page_tables) = all.fold((0, 0), |(pss, tables), (p, t)| (pss + p, tables + t));
        let kernel = group.and_then(Group::kernel_bytes).map(|bytes| bytes as f64);
        Self { pss: pss as f64, page_tables: page_tables as f64, kernel }
    }

    /// For each of `count`, since `before`.
    fn each(self, before: Self, count: usize) -> [f64; 4] {
        let kib = |now: f64, before: f64| (now - before) / count as f64 / 1024.0;
        let (pss, tables) = (kib(self.pss, before.pss), kib(self.page_tables, before.page_tables));
        let kernel = self.kernel.zip(before.kernel).map_or(tables, |(now, before)| kib(now, before));
        [pss + kernel, pss, tables, kernel]
    }
}

pub fn run(bench: &mut Bench) -> Result<()> {
    let count = bench.pick(50, 20);
    let mut ours = [(); 4].map(|()| Samples::default());
    let mut theirs = ours.clone();
    for round in bench.rounds(3, 1) {
        let group = Group::new(&format!("ours-{round}"));
        if group.is_none() {
            bench.note("SKIPPED: kernel memory beside page tables: no control group can be made here");
        }
        let home = bench.home()?;
        if let Some(group) = &group {
            group.admit(home.server())?;
            for pid in crate::processes::children_of(home.server()) {
                group.admit(pid)?;
            }
        }
        let before = Taken::of(&home.processes(), group.as_ref());
        let parent = home.launch_settled("p", MIB, PRIVATE)?;
        clones(&parent, count)?;
        home.rest(1 + count)?;
        let each = Taken::of(&home.processes(), group.as_ref()).each(before, 1 + count);
        ours.iter_mut().zip(each).for_each(|(samples, each)| samples.push(each));
        drop(home);
        drop(group);

        let group = Group::new(&format!("floor-{round}"));
        let mut floor = Reference::start("floor", &[MIB, PRIVATE])?;
        if let Some(group) = &group {
            group.admit(floor.pid())?;
        }
        // What was prepared before it was in the group is not counted.
        floor.ask("fork")?;
        let before = Taken::of(&[floor.pid()], group.as_ref());
        let children: Vec<i32> = floor.ask(format!("hold {count}"))?.into_iter().map(|pid| pid as i32).collect();
        let all: Vec<i32> = children.into_iter().chain([floor.pid()]).collect();
        let each = Taken::of(&all, group.as_ref()).each(before, count);
        theirs.iter_mut().zip(each).for_each(|(samples, each)| samples.push(each));
    }
    let parts = [("", Aim::AtMost(1.5)), ("PSS", Aim::Report), ("page tables", Aim::Report), ("kernel", Aim::Report)];
    for (((what, aim), ours), theirs) in parts.into_iter().zip(&ours).zip(&theirs) {
        bench.figure(&Figure { of: what.into(), unit: "KiB", subject: ours, reference: Some(("floor", theirs)), aim });
    }
    bench.note(format!(
        "all that the server's processes take with 1 parent, {count} clones and the pool, less what the server took before, \
         over {}; the kernel's part (page tables included) as the control group counts it",
        1 + count
    ));
    Ok(())
}
