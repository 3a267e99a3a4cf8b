//! Fork: one more VM that sees what its parent saw at its last freeze.

use crate::addr::GfnRange;
use crate::family::{Family, Pace, Vm, VmId};
use crate::object::Zeros;
use crate::ops::ZERO_CLUSTER;
use crate::pages::PageSet;
use crate::ranges::without;
use crate::window::{Run, Source};
use rangemap::{RangeMap, RangeSet};
use std::ops::Range;

impl Family {
    /// A child of `parent`. It shares the parent's stage-2 tables, root and all, and its objects: parent and child are
    /// equals from here on. Costs the same at any RAM size, but for the list of the child's runs.
    ///
    /// The parent's live layer must have been frozen, and not been written since. The child's window gets more runs than
    /// its parent's only up to `max_runs`.
    pub fn fork(&mut self, parent: VmId, max_runs: usize) -> VmId {
        let vm = self.vm_mut(parent);
        vm.map.share();
        let (map, root) = (vm.map.clone(), vm.root);
        let root = self.stage2.share(root);
        let runs = self.fresh_runs(parent, max_runs);
        let child_runs = runs.len();
        self.vm_mut(parent).child_runs = child_runs;
        self.insert_vm(Vm {
            map,
            root,
            runs,
            kept: PageSet::default(),
            spans: RangeMap::new(),
            child_runs,
            freezing: None,
            pace: Pace::Running,
            shed: None,
        })
    }

    /// The runs that a child of `vm` would have if it was forked now, without a freeze.
    pub fn runs_of_child(&self, vm: VmId, max_runs: usize) -> Vec<Run> {
        let runs = self.fresh_runs(vm, max_runs);
        runs.iter().map(|(pages, &source)| Run { pages: pages.clone().into(), source }).collect()
    }

    /// What the window of a VM maps, or would if it kept no copies.
    pub(crate) fn runs_beneath(&self, vm: &Vm) -> RangeMap<u64, Source> {
        let mut runs = vm.runs.clone();
        for run in vm.kept().flat_map(|pages| self.stage2.runs(vm.root, pages)) {
            runs.insert(run.pages.raw(), run.source);
        }
        runs
    }

    /// The runs of a new window on what `vm` sees: as its own, but with the stores where it keeps copies and between those,
    /// and anonymous where pages have turned out zero, the longest stretches first. Short ones, and what there are no runs
    /// left for, trap once, and are zero then.
    fn fresh_runs(&self, vm: VmId, max_runs: usize) -> RangeMap<u64, Source> {
        let vm = self.vm(vm);
        let mut runs = vm.runs.clone();
        let kept: Vec<GfnRange> = vm.kept().collect();
        let spans: Vec<GfnRange> = vm.spans.iter().map(|(pages, _)| pages.clone().into()).collect();
        let alone = without(&kept, &spans).into_iter();
        for run in alone.flat_map(|pages| self.stage2.runs(vm.root, pages)) {
            runs.insert(run.pages.raw(), run.source);
        }
        vm.spans.iter().for_each(|(pages, source)| runs.insert(pages.clone(), *source));
        let mut zeros: Vec<GfnRange> = Vec::new();
        let mut gone: Vec<Range<u64>> = Vec::new();
        for (run, source) in runs.iter() {
            let Source::Store { store, .. } = source else { continue };
            match self.objects.zeros(*store) {
                Zeros::None => {}
                Zeros::Some => zeros.extend(self.long_zeros(vm, run.clone().into())),
                Zeros::All => gone.push(run.clone()),
            }
        }
        gone.into_iter().for_each(|pages| runs.insert(pages, Source::Anonymous));
        zeros.sort_unstable_by_key(|pages| std::cmp::Reverse(pages.count()));
        for pages in zeros {
            // A run in the middle of another makes three of one.
            if runs.len() + 2 > max_runs {
                break;
            }
            runs.insert(pages.raw(), Source::Anonymous);
        }
        runs
    }

    /// The stretches of zeros among `pages` that are worth a mapping.
    fn long_zeros(&self, vm: &Vm, pages: GfnRange) -> Vec<GfnRange> {
        let entries = vm.map.iter();
        let segments = entries
            .flat_map(|(bounds, entry)| self.objects.resolve(entry.object, entry.origin, pages.intersect(bounds)));
        let zeros: RangeSet<u64> = segments
            .filter(|segment| segment.is_zero() && !segment.pages.is_empty())
            .map(|segment| segment.pages.raw())
            .collect();
        zeros.into_iter().map(GfnRange::from).filter(|stretch| stretch.count() >= ZERO_CLUSTER).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gfn, PageCount};
    use crate::effect::Effects;
    use crate::ops::Placed;
    use crate::stage2::Shape;
    use crate::window::Harvest;

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
            let middle = Gfn(job.pages.start().0 + 512);
            let zero = GfnRange::between(job.pages.start(), middle);
            let stored = GfnRange::between(middle, job.pages.end());
            family.settled(&job, &[(zero, Placed::Zero), (stored, Placed::Stored)], &mut effects);
        }
        let small = family.fork(parent, 16);
        let large = family.fork(parent, 1000);
        assert!((10..=16).contains(&family.vm(small).run_count()), "{}", family.vm(small).run_count());
        assert_eq!(family.vm(large).run_count(), 64);
        family.check_invariants().unwrap();
    }
}
