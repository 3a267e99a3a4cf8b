//! Fork: one more VM that sees what its parent saw at its last freeze.

use crate::family::{Family, VmBooks};
use crate::ids::{Run, Source, VmId};
use crate::space::overlay::{NewWindow, Overlay};
use crate::space::runs::{Runs, changed, over};

impl Family {
    /// A child of `parent`. It shares the parent's stage-2 tables, root and all, and its objects: parent and child are
    /// equals from here on. Costs the same at any RAM size and for any number of runs, but for the first fork after a change
    /// of what a child maps (a freeze or a balloon of the parent, a long stretch of zeros, a store that is gone): that one goes
    /// over all runs a few times, and all further children share its list.
    ///
    /// The parent's live layer must have been frozen, and not been written since. The child's window gets more runs than
    /// its parent's only up to `max_runs`.
    pub fn fork(&mut self, parent: VmId, max_runs: usize) -> VmId {
        let window = self.new_window(parent, max_runs);
        let vm = self.vm_mut(parent);
        vm.map.share();
        let (map, root) = (vm.map.clone(), vm.root);
        let root = self.stage2.share(root);
        let overlay = Overlay::new(window.zeros.clone());
        // As long as the child changes nothing, its children are like it.
        let (runs, child_runs) = (window.runs.clone().into(), window.runs.len());
        self.insert_vm(VmBooks { overlay, runs, child_runs, child: Some(window), ..VmBooks::new(map, root) })
    }

    /// The runs that a child of `vm` would have if it was forked now, without a freeze.
    pub fn runs_of_child(&mut self, vm: VmId, max_runs: usize) -> Runs {
        self.new_window(vm, max_runs).runs
    }

    /// The window of a child: as its parent's, but with the stores where the parent keeps copies and between those, and
    /// anonymous where pages have turned out zero, the longest stretches first. Short ones, and what there are no runs left
    /// for, trap once, and are zero then.
    fn new_window(&mut self, parent: VmId, max_runs: usize) -> NewWindow {
        let made_for = (self.objects.accounts.hollowed, max_runs);
        let vm = self.vm(parent);
        if let Some(window) = vm.child.as_ref().filter(|window| window.made_for == made_for) {
            return window.clone();
        }
        let shown = self.stage2_runs(vm);
        let bridged = over(&over(&shown, vm.overlay.zeros.iter().copied()), vm.bridges.iter().copied());
        let (mut gone, mut zeros) = (Vec::new(), Vec::new());
        let anonymous = |pages| Run { pages, source: Source::Anonymous };
        for run in &bridged {
            let Source::Store { store, origin } = run.source else { continue };
            match self.objects.accounts.zeros(store) {
                Some(of_store) => {
                    let long = of_store.long(origin.pages(run.pages)).map(|pages| origin.frames(pages));
                    zeros.extend(long.map(anonymous));
                }
                None => gone.push(anonymous(run.pages)),
            }
        }
        let mapped = over(&bridged, gone);
        zeros.sort_unstable_by_key(|run| std::cmp::Reverse(run.pages.count()));
        // A run in the middle of another makes three of one.
        zeros.truncate(max_runs.saturating_sub(mapped.len()) / 2);
        zeros.sort_unstable_by_key(|run| run.pages.start());
        let runs = over(&mapped, zeros);
        let window = NewWindow { zeros: changed(&runs, &shown).into(), runs: runs.into(), made_for };
        let vm = self.vm_mut(parent);
        (vm.child_runs, vm.child) = (window.runs.len(), Some(window.clone()));
        window
    }

    /// All that stage-2 shows a VM.
    pub(crate) fn stage2_runs(&self, vm: &VmBooks) -> Vec<Run> {
        let end = vm.map.iter().last().map_or(0, |(pages, _)| pages.end().0);
        self.stage2.runs(vm.root, (0..end).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gfn, GfnRange, PageCount, PageIndex, PageRange};
    use crate::effect::Effects;
    use crate::ops::Placed;
    use crate::stage2::Shape;
    use crate::steps::steps;
    use crate::testing::ranges;
    use crate::window::Harvest;
    use std::sync::Arc;

    /// A parent whose pages turn out zero and not zero by turns: its children's windows had two mappings for each
    /// stretch of zeros, however many there were.
    #[test]
    fn zeros_make_no_more_runs_than_a_window_may_have() {
        let ram = GfnRange::new(Gfn(0), PageCount(32 * 1024));
        let mut family = Family::new(Shape::X86_64);
        let mut effects = Effects::default();
        let parent = family.launch(&[ram], &[]);
        family.begin_freeze(parent);
        family.finish_freeze(
            parent,
            &Harvest { moved: vec![ram], moved_private: vec![ram], ..Harvest::default() },
            PageCount(0),
            &mut effects,
        );
        while let Some(job) = family.next_job(PageCount(1024)) {
            let middle = PageIndex(job.pages.start().0 + 512);
            let zero = PageRange::between(job.pages.start(), middle);
            let stored = PageRange::between(middle, job.pages.end());
            family.written_back(&job, &[(zero, Placed::Zero), (stored, Placed::Stored)], &mut effects);
        }
        let small = family.fork(parent, 16);
        let large = family.fork(parent, 1000);
        assert!((10..=16).contains(&family.runs(small).len()), "{}", family.runs(small).len());
        assert_eq!(family.runs(large).len(), 64);
        family.check_invariants().unwrap();
    }

    fn freeze(family: &mut Family, vm: VmId, moved: Vec<GfnRange>) {
        family.begin_freeze(vm);
        let harvest = Harvest { moved_private: moved.clone(), moved, ..Harvest::default() };
        family.finish_freeze(vm, &harvest, PageCount(0), &mut Effects::default());
        family.tidy(&mut Effects::default());
    }

    /// Half of each 32 pages of a parent was zero. Each child had all of the parent's pages looked up, in vain: such zeros
    /// are not worth a mapping. A fork of 50 paid 50 times.
    #[test]
    fn zeros_cost_a_fork_nothing() {
        let cost = |pages: u64| {
            let ram = GfnRange::new(Gfn(0), PageCount(pages));
            let mut family = Family::new(Shape::X86_64);
            let parent = family.launch(&[ram], &[]);
            freeze(&mut family, parent, vec![ram]);
            while let Some(job) = family.next_job(PageCount(32)) {
                let middle = PageIndex(job.pages.start().0 + 16);
                let zero = PageRange::between(job.pages.start(), middle);
                let stored = PageRange::between(middle, job.pages.end());
                family.written_back(&job, &[(zero, Placed::Zero), (stored, Placed::Stored)], &mut Effects::default());
            }
            let (_, first) = steps(|| family.fork(parent, 1000));
            let (_, others) = steps(|| [(); 50].map(|()| family.fork(parent, 1000)));
            (first, others)
        };
        let (small, large) = (cost(1 << 12), cost(1 << 18));
        assert!(large.0 <= small.0 * 3 / 2 && large.1 == small.1, "{small:?} {large:?}");
    }

    /// Each child got a copy of the list of its parent's runs, and had it looked through for zeros.
    #[test]
    fn a_fork_costs_the_same_for_ten_runs_and_for_ten_thousand() {
        let cost = |runs: u64| {
            let mut family = Family::new(Shape::X86_64);
            let parent = family.launch(&[(0..2 * runs).into()], &[]);
            freeze(&mut family, parent, (0..runs).map(|run| (2 * run..2 * run + 1).into()).collect());
            let (first, listing) = steps(|| family.fork(parent, 1 << 20));
            assert_eq!(family.runs(first).len() as u64, 2 * runs);
            assert!(listing <= 64 + 12 * 2 * runs, "the first goes over {} runs in {listing} steps", 2 * runs);
            let (child, steps) = steps(|| family.fork(parent, 1 << 20));
            assert!(Arc::ptr_eq(family.runs(child), family.runs(first)), "all children of a freeze share one list");
            assert!(Arc::ptr_eq(&family.runs_of_child(child, 1 << 20), family.runs(first)), "theirs, too");
            family.check_invariants().unwrap();
            steps
        };
        let (few, many) = (cost(10), cost(10_000));
        assert!(many <= few * 3 / 2, "{few} steps for 10 runs, {many} for 10,000");
    }

    /// What children have been given is no other's: who changes its own window leaves its siblings' alone.
    #[test]
    fn siblings_share_a_list_until_one_of_them_changes_its_window() {
        let mut family = Family::new(Shape::X86_64);
        let parent = family.launch(&[(0..2048).into()], &[]);
        family.begin_freeze(parent);
        let harvest = Harvest { copied: ranges(&[(100, 101), (110, 111)]), ..Harvest::default() };
        family.finish_freeze(parent, &harvest, PageCount(512), &mut Effects::default());
        let [one, other] = [(); 2].map(|()| family.fork(parent, 1000));
        let before = family.runs(other).clone();
        freeze(&mut family, one, ranges(&[(105, 106)]));
        family.balloon(one, &ranges(&[(0, 103)]), &mut Effects::default());
        family.check_invariants().unwrap();
        assert_eq!(family.runs(one).len(), 5, "{:?}", family.runs(one));
        assert_eq!(family.runs(other), &before);
        assert!(family.vm(one).overlay.zeros.len() > family.vm(other).overlay.zeros.len());
    }
}
