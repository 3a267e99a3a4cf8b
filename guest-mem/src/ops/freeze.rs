//! Freeze: what a VM has written becomes an object.
//!
//! In two halves around the window's part, which takes time and can fail: [`begin`](Family::begin_freeze) reserves,
//! [`finish`](Family::finish_freeze) cannot fail, [`abort`](Family::abort_freeze) leaves no trace.

use crate::addr::extents::{merged, push, within, without};
use crate::addr::{Gfn, GfnRange, PageCount, PageOrigin, PageRange};
use crate::effect::{Effect, Effects};
use crate::family::{Family, Freezing};
use crate::ids::{ObjectId, Run, Source, StoreId, VmId};
use crate::object::{Backing, Segment, Slot};
use crate::ops::Taking;
use crate::space::map::MapEntry;
use crate::space::runs::{among, outside, over, push_run};
use crate::stage2::Cursor;
use crate::window::Harvest;

/// Stretches of hidden pages tidied up at a time, and pages of them.
const TIDIED_BATCH: usize = 512;
const TIDIED_PAGES: u64 = 1 << 16;

/// Where the pages of a freeze go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    /// Into the freeze's store.
    #[default]
    Store,
    /// Into swap, but for those that somebody waits for. Into the store where swap does not take them.
    Swap,
}

/// What an object on top gets; sorted, apart.
struct Filling<'a> {
    /// All of it.
    taken: &'a [GfnRange],
    /// What was written.
    private: &'a [GfnRange],
    /// What is known to be zero.
    zeros: &'a [GfnRange],
}

/// Where these frames are in the store of a freeze, and in an object that it stacks: each at its own number.
fn in_store(frames: GfnRange) -> PageRange {
    PageOrigin(0).pages(frames)
}

impl Family {
    /// Reserves the store that is to take the place of what `vm` has written.
    ///
    /// # Panics
    /// If a freeze of this VM is under way.
    pub fn begin_freeze(&mut self, vm: VmId) -> StoreId {
        let store = self.reserve_store();
        let before = self.vm_mut(vm).freezing.replace(Freezing::Stopping(store));
        assert_eq!(before, None, "one freeze of a VM at a time");
        store
    }

    /// The VM that is being frozen stands still: from now on its pages may be moved out any moment.
    pub fn stands(&mut self, vm: VmId) {
        let freezing = &mut self.vm_mut(vm).freezing;
        *freezing = freezing.map(|freezing| Freezing::Standing(freezing.store()));
    }

    fn end_freeze(&mut self, vm: VmId) -> StoreId {
        self.vm_mut(vm).freezing.take().expect("a freeze under way").store()
    }

    /// The window changed nothing: forget the freeze.
    pub fn abort_freeze(&mut self, vm: VmId, effects: &mut Effects) {
        let store = self.end_freeze(vm);
        self.vm_mut(vm).taking = Taking::default();
        effects.push(Effect::DropStore(store));
    }

    /// The window has taken `harvest`: makes it the top of the VM's chains. Where nothing was private, no object is
    /// made. Children get one mapping of its pages where some stayed and fewer than `bridge` zeros lie between them. What
    /// nobody sees any more is freed when it is [tidied up](Self::tidy). Of shared memory nothing is taken, whatever is said.
    pub fn finish_freeze(&mut self, vm: VmId, harvest: &Harvest, bridge: PageCount, effects: &mut Effects) {
        let store = self.end_freeze(vm);
        let shared: Vec<GfnRange> = self.vm(vm).map.shared().collect();
        let harvest = if shared.is_empty() { harvest } else { &harvest.besides(&shared) };
        if harvest.is_empty() {
            self.vm_mut(vm).taking = Taking::default();
            effects.push(Effect::DropStore(store));
            return;
        }
        self.objects.accounts.open_store(store, vm);
        let source = Source::Store { store, origin: PageOrigin(0) };
        let before = self.vm(vm).map.clone();
        let mut replaced = Vec::new();
        let (harvest_taken, all_private) = (harvest.taken(), harvest.private());
        let Taking { moves, kept } = self.still_taken(vm, &harvest.moved, &harvest_taken);
        let all = merged(&harvest_taken, &kept);
        for (pages, entry) in before.iter() {
            let taken: Vec<GfnRange> = within(&all, pages).collect();
            if taken.is_empty() {
                continue;
            }
            let private: Vec<GfnRange> = within(&all_private, pages).collect();
            let zeros = self.clean_zeros(entry, &within(&moves, pages).collect::<Vec<_>>(), &private);
            let top = match entry.object {
                Some(top) if !entry.needs_copy && entry.origin == PageOrigin(0) && taken == private => top,
                _ => self.stack_top(vm, pages, entry),
            };
            let clean = without(&without(&taken, &private), &zeros);
            let copy_ups = self.stage2.runs_of(self.vm(vm).root, &clean);
            self.fill_top(top, &Filling { taken: &taken, private: &private, zeros: &zeros }, store, effects);
            for runs in copy_ups.chunk_by(|a, b| a.source == b.source) {
                let pages = runs.iter().map(|run| in_store(run.pages));
                self.objects.put_all(top, pages, Slot::CopyUp(store, runs[0].source));
            }
            if let Some(below) = entry.object.filter(|&below| below != top) {
                let activity = self.vm(vm).activity;
                self.objects.unmap_untidily(below, vm, activity);
            }
        }
        let books = self.vms.get_mut(&vm).expect("a VM of this family");
        // Over what it keeps a copy of already it goes on to.
        let kept = books.overlay.kept.absent(&harvest.copied);
        let before = self.stage2.runs_of(books.root, &kept);
        let mut cursor = Cursor::new(&mut self.stage2, &mut books.root);
        cursor.set_all(&all, source, &mut replaced);
        books.overlay.keep(&kept, &before);
        books.overlay.uncover(&harvest.moved);
        (books.runs, books.child, books.dedup) = Default::default();
        let left = outside(&books.bridges, &all);
        self.vm_mut(vm).bridges = over(&left, self.bridges(vm, source, &harvest.copied, bridge));
        self.left.tops.extend(self.vms[&vm].map.iter().filter_map(|(_, entry)| entry.object));
        self.left.replaced.append(&mut replaced);
    }

    /// What was to be [taken along](Self::compact), and is: what the window has `moved`, and what it still keeps apart from all
    /// that was `taken`.
    fn still_taken(&mut self, vm: VmId, moved: &[GfnRange], taken: &[GfnRange]) -> Taking {
        let asked = std::mem::take(&mut self.vm_mut(vm).taking);
        let vm = self.vm(vm);
        let moves = asked.moves.iter().flat_map(|&pages| within(moved, pages)).collect();
        let kept: Vec<GfnRange> = asked.kept.iter().flat_map(|&pages| vm.kept_within(pages)).collect();
        Taking { moves, kept: without(&kept, taken) }
    }

    /// The zeros in what was taken along: they take no storage, and windows trap there.
    fn clean_zeros(&self, entry: MapEntry, moves: &[GfnRange], private: &[GfnRange]) -> Vec<GfnRange> {
        let mut zeros = Vec::new();
        for &pages in moves {
            let segments = self.objects.resolve(entry.object, entry.origin, pages).into_iter();
            segments.filter(Segment::is_zero).for_each(|segment| push(&mut zeros, segment.pages));
        }
        without(&zeros, private)
    }

    /// Frees some of what freezes and exits have hidden from everybody.
    pub fn tidy(&mut self, effects: &mut Effects) {
        std::mem::take(&mut self.left.tops).into_iter().for_each(|top| self.objects.shorten(top, effects));
        if self.objects.go_on_tidying(effects) {
            // What goes with its object is not looked up page by page.
            return;
        }
        let replaced = &mut self.left.replaced;
        let (mut some, mut most) = (Vec::new(), TIDIED_PAGES);
        while some.len() < TIDIED_BATCH
            && most > 0
            && let Some(Run { pages, source }) = replaced.pop()
        {
            let end = Gfn(pages.end().0.min(pages.start().0 + most));
            if end < pages.end() {
                replaced.push(Run { pages: GfnRange::between(end, pages.end()), source });
            }
            let pages = GfnRange::between(pages.start(), end);
            most -= pages.count().0;
            some.push(Run { pages, source });
        }
        if replaced.is_empty() {
            *replaced = Vec::new();
        }
        self.free_unseen(some, effects);
    }

    /// Whether there is nothing to [tidy](Self::tidy).
    pub fn is_tidy(&self) -> bool {
        self.left.tops.is_empty() && self.left.replaced.is_empty() && self.objects.untidy.is_empty()
    }

    /// A new object over what `entry` shows, and shown by the entry at `pages` from now on.
    pub(super) fn stack_top(&mut self, vm: VmId, pages: GfnRange, entry: MapEntry) -> ObjectId {
        let top = self.objects.stack(entry.object.map(|object| Backing { object, origin: entry.origin }));
        let activity = self.vm(vm).activity;
        self.objects.map(top, vm, activity);
        let entry = MapEntry { object: Some(top), origin: PageOrigin(0), needs_copy: false, ..entry };
        self.vm_mut(vm).map.set(pages, entry);
        top
    }

    fn fill_top(&mut self, top: ObjectId, filling: &Filling<'_>, store: StoreId, effects: &mut Effects) {
        let &Filling { taken, private, zeros } = filling;
        // Only an object that is this VM's alone has slots here: what they held is hidden from everybody now.
        if !self.objects.get(top).slots.is_empty() {
            taken.iter().for_each(|&pages| self.objects.vacate(top, in_store(pages), effects));
        }
        self.objects.put_all(top, private.iter().copied().map(in_store), Slot::InFlight(store));
        self.objects.put_zeros(top, zeros.iter().copied().map(in_store), store);
    }

    /// Where windows of children map `of`, the store of a freeze, though it has nothing there: zeros, fewer than `most` of them
    /// in a row, between stretches that `vm` sees in it, in so far as two of `copied` at least are joined so.
    fn bridges(&self, vm: VmId, of: Source, copied: &[GfnRange], most: PageCount) -> Vec<Run> {
        let [first, .., last] = copied else { return Vec::new() };
        let shown = self.stage2.runs(self.vm(vm).root, GfnRange::between(first.start(), last.end()));
        let mut known = Vec::with_capacity(shown.len());
        for run in shown {
            let source = if self.objects.accounts.are_zero(&run) { Source::Anonymous } else { run.source };
            push_run(&mut known, Run { source, ..run });
        }
        let is_open = |run: &Run| match run.source {
            Source::Anonymous => run.pages.count() < most,
            source => source == of,
        };
        let joined = |a: &Run, b: &Run| a.pages.end() == b.pages.start() && is_open(a) && is_open(b);
        let mut bridges = Vec::new();
        for runs in known.chunk_by(joined) {
            let mut stretches = runs.iter().filter(|run| run.source == of).map(|run| run.pages);
            let Some(first) = stretches.next() else { continue };
            let span = GfnRange::between(first.start(), stretches.next_back().unwrap_or(first).end());
            if within(copied, span).nth(1).is_some() {
                let zeros = among(runs, span).filter(|run| run.source != of);
                bridges.extend(zeros.map(|run| Run { source: of, ..run }));
            }
        }
        bridges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::ObjectMapping;
    use crate::ops::{Fault, Placed};
    use crate::space::map::Protection;
    use crate::stage2::Shape;
    use crate::testing::ranges;

    const SPAN: u64 = 2048;

    fn launched() -> (Family, VmId) {
        let mut family = Family::new(Shape::X86_64);
        let vm = family.launch(&[GfnRange::from(0..SPAN)], &[]);
        (family, vm)
    }

    fn freeze(family: &mut Family, vm: VmId, moved: &[(u64, u64)], copied: &[(u64, u64)]) -> StoreId {
        let mut effects = Effects::default();
        let store = family.begin_freeze(vm);
        let [moved, copied] = [moved, copied].map(ranges);
        let harvest = Harvest { moved_private: moved.clone(), moved, copied };
        family.finish_freeze(vm, &harvest, PageCount(512), &mut effects);
        family.check_invariants().unwrap();
        family.tidy(&mut effects);
        family.check_invariants().unwrap();
        store
    }

    fn child_runs(family: &mut Family, vm: VmId) -> Vec<(u64, u64, Option<StoreId>)> {
        let store = |source: Source| source.store().map(|(store, _)| store);
        let runs = family.runs_of_child(vm, 1000);
        runs.iter().map(|run| (run.pages.start().0, run.pages.end().0, store(run.source))).collect()
    }

    /// A parent that wrote single pages all over its memory: its children's windows had two mappings for each.
    #[test]
    fn zeros_between_pages_that_stayed_take_no_mappings_of_their_own() {
        let (mut family, parent) = launched();
        let store = freeze(&mut family, parent, &[], &[(100, 101), (110, 112), (620, 621), (1200, 1201)]);
        let all =
            [(0, 100, None), (100, 621, Some(store)), (621, 1200, None), (1200, 1201, Some(store)), (1201, SPAN, None)];
        assert_eq!(child_runs(&mut family, parent), all);
        let child = family.fork(parent, 1000);
        family.check_invariants().unwrap();
        // Its parent maps none of it; the child waits once for all zeros around.
        assert_eq!(family.fault(child, Gfn(300)), Fault::Zero(ranges(&[(101, 110), (112, 512)])));
        assert_eq!(family.fault(parent, Gfn(300)), Fault::Zero(vec![]));
        // The same pages once more, with the child there: all is in the new store.
        let again = freeze(&mut family, parent, &[], &[(100, 101), (110, 112), (620, 621)]);
        assert_eq!(child_runs(&mut family, parent)[1], (100, 621, Some(again)));
        assert_eq!(family.runs(child)[1].source, Source::Store { store, origin: PageOrigin(0) });
    }

    #[test]
    fn what_is_no_zero_any_more_is_not_bridged() {
        let (mut family, parent) = launched();
        let first = freeze(&mut family, parent, &[], &[(100, 101), (120, 121), (140, 141)]);
        let second = freeze(&mut family, parent, &[(105, 106)], &[(130, 131)]);
        let all = [
            (0, 100, None),
            (100, 105, Some(first)),
            (105, 106, Some(second)),
            (106, 130, Some(first)),
            (130, 131, Some(second)),
            (131, 141, Some(first)),
            (141, SPAN, None),
        ];
        assert_eq!(child_runs(&mut family, parent), all);
        let third = freeze(&mut family, parent, &[], &[(100, 101), (110, 111)]);
        assert_eq!(child_runs(&mut family, parent)[1..3], [(100, 101, Some(third)), (101, 105, Some(first))]);
        let mut effects = Effects::default();
        family.balloon(parent, &ranges(&[(100, 141)]), &mut effects);
        family.check_invariants().unwrap();
        assert_eq!(child_runs(&mut family, parent), [(0, SPAN, None)]);
    }

    /// Stacked spaces only when they contain pages (Lokier 2000), and one object for all freezes between two forks (Dillon 2000):
    /// what a freeze takes nothing of shows what it showed, and an object that nobody else has takes more pages in.
    #[test]
    fn an_object_is_made_where_pages_are_taken_and_the_last_is_somebody_elses() {
        let mut family = Family::new(Shape::X86_64);
        let (file, _) = family.add_file(PageCount(16));
        let vm = family.launch(&[(0..SPAN).into()], &[ObjectMapping { pages: (100..116).into(), object: file }]);
        let shown = |family: &Family| -> Vec<Option<ObjectId>> {
            let entries: Vec<_> = family.vm(vm).map.iter().map(|(_, entry)| entry.object).collect();
            assert_eq!(family.objects.len(), entries.iter().flatten().count(), "there are no others");
            entries
        };
        freeze(&mut family, vm, &[(0, 10)], &[]);
        let first = shown(&family);
        assert!(first[0].is_some() && first[1..] == [Some(file), None], "{first:?}");
        freeze(&mut family, vm, &[(5, 20)], &[(30, 31)]);
        assert_eq!(shown(&family), first);
        freeze(&mut family, vm, &[], &[]);
        assert_eq!(shown(&family), first);
        let child = family.fork(vm, 1000);
        freeze(&mut family, vm, &[(200, 201)], &[]);
        let entries: Vec<_> = family.vm(vm).map.iter().map(|(_, entry)| entry.object).collect();
        assert_eq!(entries[..2], first[..2], "nothing was taken there");
        freeze(&mut family, vm, &[(5, 6)], &[]);
        let after = family.vm(vm).map.get(Gfn(0)).expect("memory").1.object;
        assert_ne!(after, first[0], "its child has that one");
        assert_eq!(family.vm(child).map.get(Gfn(0)).expect("memory").1.object, first[0]);
        // Whose part is protected is still one object.
        family.protect(vm, (0..8).into(), Protection::ReadOnly, &mut Effects::default());
        freeze(&mut family, vm, &[(9, 10)], &[]);
        assert_eq!([0, 9].map(|gfn| family.vm(vm).map.get(Gfn(gfn)).expect("memory").1.object), [after; 2]);
    }

    /// A VM process that is taken over may say that it has moved shared memory out: it would be everybody's no longer.
    #[test]
    fn nothing_of_shared_memory_is_taken_whatever_is_said() {
        let mut family = Family::new(Shape::X86_64);
        let (shared, _) = family.add_shared(PageCount(16));
        let vm = family.launch(&[(0..SPAN).into()], &[ObjectMapping { pages: (100..116).into(), object: shared }]);
        let before = family.vm(vm).map.get(Gfn(100));
        freeze(&mut family, vm, &[(90, 130)], &[(1, 2)]);
        assert_eq!(family.vm(vm).map.get(Gfn(100)), before);
        freeze(&mut family, vm, &[(100, 110)], &[(115, 116)]);
        assert_eq!(family.vm(vm).map.get(Gfn(100)), before);
        assert_eq!(family.in_flight(), PageCount(25), "without those that are shared");
    }

    /// A store goes with its last page. Zeros between those may be mapped from it still.
    #[test]
    fn zeros_are_not_mapped_from_a_store_that_has_gone() {
        let (mut family, parent) = launched();
        let first = freeze(&mut family, parent, &[], &[(100, 101), (120, 121)]);
        while let Some(job) = family.next_job(PageCount(64)) {
            family.written_back(&job, &[(job.pages, Placed::Stored)], &mut Effects::default());
        }
        freeze(&mut family, parent, &[(100, 101), (120, 121)], &[]);
        assert!(!family.objects().accounts.stores.contains_key(&first));
        assert!(child_runs(&mut family, parent).iter().all(|(.., store)| *store != Some(first)));
        family.fork(parent, 1000);
        family.check_invariants().unwrap();
    }

    /// Zeros in a row that a window takes from two stores were supplied by one call, which the kernel refuses for two
    /// mappings: the guest waited for ever.
    #[test]
    fn zeros_of_two_mappings_are_supplied_to_each() {
        let (mut family, parent) = launched();
        freeze(&mut family, parent, &[], &[(110, 111), (125, 126)]);
        freeze(&mut family, parent, &[(125, 140)], &[]);
        while let Some(job) = family.next_job(PageCount(64)) {
            let zero = job.pages.intersect((125..138).into());
            let placed = match zero.is_empty() {
                true => vec![(job.pages, Placed::Stored)],
                false => vec![(zero, Placed::Zero), ((138..140).into(), Placed::Stored)],
            };
            family.written_back(&job, &placed, &mut Effects::default());
        }
        let child = family.fork(parent, 1000);
        assert_eq!(family.fault(child, Gfn(112)), Fault::Zero(ranges(&[(111, 125), (125, 138)])));
    }

    /// A stretch was moved with a copy-up in it, and a short span of an earlier freeze beneath its end: children were to map the
    /// old store there.
    #[test]
    fn a_moved_stretch_ends_the_spans_beneath_it() {
        let (mut family, parent) = launched();
        let old = freeze(&mut family, parent, &[], &[(200, 201), (210, 211)]);
        family.fork(parent, 1000);
        let mut effects = Effects::default();
        let new = family.begin_freeze(parent);
        let harvest = Harvest {
            moved: ranges(&[(100, 260)]),
            copied: ranges(&[(50, 51), (60, 61), (300, 301)]),
            moved_private: ranges(&[(100, 180), (205, 260)]),
        };
        family.finish_freeze(parent, &harvest, PageCount(512), &mut effects);
        family.tidy(&mut effects);
        family.check_invariants().unwrap();
        assert!(child_runs(&mut family, parent).iter().all(|(.., store)| *store != Some(old)));
        assert_eq!(child_runs(&mut family, parent)[1], (50, 301, Some(new)));
    }
}
