//! Dedup: a window gives up copies of frozen pages that stayed in it, and shows their store instead.
//!
//! A freeze may leave pages where they are, and have copies of them written back. As long as the window keeps them they are in
//! memory twice, and no others can share this VM's.

use crate::addr::{Gfn, GfnRange, PageCount, PageOrigin};
use crate::effect::{Effect, Effects};
use crate::family::{DedupProgress, Family, VmBooks};
use crate::ids::{Source, StoreId, VmId};
use crate::object::{Segment, Slot};
use crate::steps::step;

impl Family {
    /// Stretches of pages that the window of `vm` keeps though they are in `store`, or in swap for it: each of at least
    /// `least` pages (shorter ones are not worth a mapping), about `limit` pages in all. Its window gets more runs by them
    /// only up to `max_runs`.
    pub fn to_dedup(
        &self,
        vm: VmId,
        store: StoreId,
        least: PageCount,
        limit: PageCount,
        max_runs: usize,
    ) -> Vec<GfnRange> {
        let mut runs = self.runs_at_most(vm, store);
        let vm = self.vm(vm);
        let mut left = limit.0;
        let mut stretches = Vec::new();
        let mut placed = self.placed(vm, store).peekable();
        while left > 0
            && let Some(mut stretch) = placed.next()
        {
            while stretch.count().0 < left.max(least.0)
                && let Some(next) = placed.next_if(|next| next.start() == stretch.end())
            {
                stretch = GfnRange::between(stretch.start(), next.end());
            }
            if stretch.count() < least {
                continue;
            }
            // A run in the middle of another makes three of one.
            runs += 2;
            if runs > max_runs {
                break;
            }
            let end = Gfn(stretch.start().0 + stretch.count().0.min(left.max(least.0)));
            left = left.saturating_sub(end.0 - stretch.start().0);
            stretches.push(GfnRange::between(stretch.start(), end));
        }
        stretches
    }

    /// How many runs the window has at most, while it gives copies up.
    fn runs_at_most(&self, vm: VmId, store: StoreId) -> usize {
        let dedup = self.vm(vm).dedup.filter(|dedup| dedup.store == store);
        dedup.map_or_else(|| self.runs(vm).len(), |dedup| dedup.runs)
    }

    /// The kept pages that are in `store`, or in swap for it, from where dedup goes on. In pieces: no more is looked at than
    /// is asked for.
    fn placed<'a>(&'a self, vm: &'a VmBooks, store: StoreId) -> impl Iterator<Item = GfnRange> + 'a {
        let from = vm.dedup.filter(|dedup| dedup.store == store).map_or(0, |dedup| dedup.next.0);
        let pieces = vm.map.iter().flat_map(move |(bounds, entry)| {
            let kept = vm.overlay.kept.parts(bounds.intersect((from..u64::MAX).into()));
            kept.map(move |(piece, _)| (piece, entry))
        });
        pieces.flat_map(move |(piece, entry)| {
            step();
            // What has moved has other numbers in the store than a window would map there.
            let source = Source::Store { store, origin: PageOrigin(0) };
            let runs = self.stage2.runs(vm.root, piece).into_iter().filter(|run| run.source == source);
            let runs: Vec<GfnRange> = runs.map(|run| run.pages).collect();
            let segments =
                runs.into_iter().flat_map(move |pages| self.objects.resolve(entry.object, entry.origin, pages));
            segments.filter(is_placed).map(|segment| segment.pages)
        })
    }

    /// The window of `vm` maps `store`, which stage-2 shows, where it kept these pages; what its guest has written there since
    /// they were frozen is in its live layer.
    pub fn dedup(&mut self, vm: VmId, store: StoreId, pages: &[GfnRange], effects: &mut Effects) {
        let runs = self.runs_at_most(vm, store) + 2 * pages.len();
        let books = self.vm_mut(vm);
        books.dedup = pages.last().map(|last| DedupProgress { store, next: last.end(), runs });
        books.overlay.uncover(pages);
        books.runs.take();
        let books = self.vm(vm);
        if books.freezing.is_some() {
            // A freeze may move out what its guest has written over zeros.
            return;
        }
        for (bounds, entry) in books.map.iter() {
            for part in pages.iter().map(|pages| pages.intersect(bounds)).filter(|part| !part.is_empty()) {
                let segments = self.objects.resolve(entry.object, entry.origin, part).into_iter();
                let zeros = segments.filter(|segment| segment.found.is_some_and(|found| found.slot == Slot::Zero));
                zeros.for_each(|segment| effects.push(Effect::Zero(vm, segment.pages)));
            }
        }
    }
}

/// Whether pages have been written back, and are not lost.
fn is_placed(segment: &Segment) -> bool {
    segment.found.is_some_and(|found| !found.slot.is_pending() && !matches!(found.slot, Slot::Lost(..)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Placed;
    use crate::stage2::Shape;
    use crate::steps::steps;
    use crate::window::Harvest;

    const PIECE: u64 = 512;

    /// The first look at a stretch went to its end: the batches of 1 TiB took 60 ms each, those of 1 GiB 50 µs.
    #[test]
    fn a_batch_costs_the_same_of_a_long_stretch() {
        let cost = |pieces: u64| {
            let mut family = Family::new(Shape::X86_64);
            let vm = family.launch(&[(0..pieces * PIECE).into()], &[]);
            let store = family.begin_freeze(vm);
            let copied = Harvest { copied: vec![(0..pieces * PIECE).into()], ..Harvest::default() };
            family.finish_freeze(vm, &copied, PageCount(0), &mut Effects::default());
            for _ in 0..4 {
                let job = family.next_job(PageCount(PIECE)).unwrap();
                family.written_back(&job, &[(job.pages, Placed::Stored)], &mut Effects::default());
            }
            // What its window maps is listed once for each change of it.
            family.runs(vm);
            let (pages, steps) = steps(|| family.to_dedup(vm, store, PageCount(17), PageCount(2 * PIECE), 1000));
            assert_eq!(pages, [(0..2 * PIECE).into()]);
            steps
        };
        let (short, long) = (cost(8), cost(4096));
        assert!(long <= 2 * short, "{short} steps, {long} in a long stretch");
    }

    /// Each of many batches looked at all that stayed.
    #[test]
    fn a_batch_costs_as_much_as_it_has_pages() {
        let ram = GfnRange::from(0..64 * PIECE);
        let mut family = Family::new(Shape::X86_64);
        let vm = family.launch(&[ram], &[]);
        let store = family.begin_freeze(vm);
        // Many that are too short before all that are not.
        let short = (0..1000).map(|at| (at * 16..at * 16 + 8).into());
        let copied = short.chain([(32 * PIECE..64 * PIECE).into()]).collect();
        let copied = Harvest { copied, ..Harvest::default() };
        family.finish_freeze(vm, &copied, PageCount(0), &mut Effects::default());
        while let Some(job) = family.next_job(PageCount(PIECE)) {
            family.written_back(&job, &[(job.pages, Placed::Stored)], &mut Effects::default());
        }
        let mut batch = |limit| {
            let (pages, steps) = steps(|| family.to_dedup(vm, store, PageCount(17), PageCount(limit), 1000));
            family.dedup(vm, store, &pages, &mut Effects::default());
            (pages.iter().map(|pages| pages.count().0).sum::<u64>(), steps)
        };
        assert_eq!(batch(4 * PIECE).0, 4 * PIECE);
        for _ in 1..8 {
            let (dedup, steps) = batch(4 * PIECE);
            assert_eq!(dedup, 4 * PIECE);
            assert!(steps <= 4 * 20, "{steps} steps for 4 pieces");
        }
        assert_eq!(batch(4 * PIECE), (0, 0));
    }
}
