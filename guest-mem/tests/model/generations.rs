//! Lines of VMs that are frozen again and again: what they cost does not grow with their generations.

use super::fakes::{Call, Gaps};
use super::world::{Layout, World};
use guest_mem::VmId;
use guest_mem::addr::{Gfn, GfnRange, PageCount};
use guest_mem::ops::Compaction;
use guest_mem::stage2::Shape;
use std::collections::{BTreeSet, VecDeque};

const PAGES: u64 = 1024;
const LIMITS: Compaction = Compaction { stores: 12, runs: 40, kept: 64, pages: PageCount(512), remapped: 24 };

/// Which VM is frozen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// Always the same: its children are removed.
    Parent,
    /// The last child: its parent is removed.
    Child,
}

/// When the other one is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Removed {
    AtOnce,
    /// After the next freeze, when it sees all that is older.
    Later,
}

/// Which pages a generation writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    /// The next one.
    Next,
    /// Every third page, all the way round.
    Apart,
    /// Four, anywhere.
    Scattered,
}

struct Story {
    world: World,
    vm: VmId,
    line: Line,
    removed: Removed,
    /// Those that are to be removed.
    others: VecDeque<VmId>,
    written: u64,
    copied: u64,
    /// Pages that were taken out of windows.
    stood_for: u64,
    most: Most,
}

/// The most that there has been at a time.
#[derive(Clone, Copy, Debug, Default)]
struct Most {
    stores: usize,
    /// Mappings of a child.
    runs: usize,
    /// Stretches that the window of who was frozen keeps.
    kept: usize,
}

impl Story {
    fn new(line: Line, removed: Removed) -> Self {
        let shape = Shape { bits: 2, levels: 5, leaf_levels: 4 };
        let layout = Layout { shape, compaction: LIMITS, ..Layout::flat(PAGES) };
        let world = World::new(&layout);
        let vm = world.ids()[0];
        Self {
            world,
            vm,
            line,
            removed,
            others: VecDeque::new(),
            written: 0,
            copied: 0,
            stood_for: 0,
            most: Most::default(),
        }
    }

    /// One generation more. How many stores the family has then, and mappings the child.
    fn generation(&mut self, pages: &[u64]) -> (usize, usize) {
        pages.iter().for_each(|&page| self.world.write(self.vm, Gfn(page)));
        self.written += pages.len() as u64;
        let store = self.world.freeze(self.vm, Gaps::Stay);
        let child = self.world.fork_frozen(self.vm);
        let family = self.world.manager.family();
        let (runs, kept) = (family.runs(child).len(), family.vm(self.vm).kept().count());
        self.others.push_back(match self.line {
            Line::Parent => child,
            Line::Child => std::mem::replace(&mut self.vm, child),
        });
        if self.removed == Removed::AtOnce || self.others.len() > 1 {
            self.world.exit(self.others.pop_front().expect("just put in"));
        }
        self.world.write_back_all();
        let copied = self.world.copied(store);
        self.stood_for += copied.pages - copied.copy_ups;
        self.copied += copied.pages;
        let stores = self.world.manager.family().totals().stores as usize;
        let Most { stores: most_stores, runs: most_runs, kept: most_kept } = self.most;
        self.most = Most { stores: most_stores.max(stores), runs: most_runs.max(runs), kept: most_kept.max(kept) };
        (stores, runs)
    }

    fn check(&mut self) {
        self.world.check();
        self.world.verify();
    }
}

fn live(line: Line, removed: Removed, written: Written, generations: u64) -> Story {
    let mut story = Story::new(line, removed);
    let mut random = 1_u64;
    for generation in 0..generations {
        let pages: Vec<u64> = match written {
            Written::Next => vec![generation % PAGES],
            Written::Apart => vec![generation * 3 % PAGES],
            Written::Scattered => {
                let mut next = || {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (random >> 33) % PAGES
                };
                BTreeSet::from([next(), next(), next(), next()]).into_iter().collect()
            }
        };
        story.generation(&pages);
        if generation % 64 == 0 {
            story.check();
        }
    }
    story.check();
    assert_eq!(story.stood_for, story.written, "a guest stands still for what it has written, and for nothing else");
    story
}

/// A store, a mapping and two descriptors more with every fork, for ever.
#[test]
fn generations_leave_few_stores_and_mappings_and_are_copied_a_few_times() {
    for line in [Line::Parent, Line::Child] {
        for written in [Written::Next, Written::Apart, Written::Scattered] {
            let story = live(line, Removed::AtOnce, written, 600);
            let Most { stores, runs, kept } = story.most;
            let each = story.copied as f64 / story.written as f64;
            println!(
                "{line:?}, {written:?}: at most {stores} stores, {runs} mappings, {kept} kept, {each:.1} copies of a page"
            );
            // Small ones, and large ones, of which there is room for so many.
            let large = PAGES / (LIMITS.pages.0 / 2);
            assert!(stores as u64 <= LIMITS.stores as u64 + large + 2, "{line:?}, {written:?}: {stores} stores");
            assert!(runs <= LIMITS.runs + 8, "{line:?}, {written:?}: {runs} mappings");
            assert!(kept <= LIMITS.kept + 8, "{line:?}, {written:?}: {kept} stretches are kept");
            // Written once, and then as often as a store doubles; scattered pages besides for the sake of the mappings.
            let most = if written == Written::Scattered { 64.0 } else { 11.0 };
            assert!(each <= most, "{line:?}, {written:?}: {each:.1} copies of a page");
            story.world.end();
        }
    }
}

/// With somebody else there who saw all of it, at each freeze, nothing was ever compacted.
#[test]
fn generations_that_overlap_leave_few_stores_and_mappings() {
    for line in [Line::Parent, Line::Child] {
        for written in [Written::Next, Written::Apart] {
            let story = live(line, Removed::Later, written, 600);
            println!("{line:?}, {written:?}: {:?} of {} written", story.most, story.written);
            // Twice as many as of a line that is alone, and those that only the other one sees any more.
            let Most { stores, runs, kept } = story.most;
            assert!(stores <= 4 * LIMITS.stores, "{line:?}, {written:?}: {stores} stores");
            assert!(runs <= 2 * LIMITS.runs + 8, "{line:?}, {written:?}: {runs} mappings");
            assert!(kept <= LIMITS.kept + 8, "{line:?}, {written:?}: {kept} stretches are kept");
            story.world.end();
        }
    }
}

/// What others see is not copied for the line's sake: it would be in memory twice.
#[test]
fn what_others_see_stays_where_it_is() {
    let mut story = Story::new(Line::Parent, Removed::AtOnce);
    for page in 0..LIMITS.stores as u64 {
        story.generation(&[page]);
    }
    let lasting = story.world.fork(story.vm, Gaps::Stay);
    let before = story.copied;
    for page in 0..LIMITS.stores as u64 {
        story.generation(&[500 + page]);
    }
    assert_eq!(story.copied - before, LIMITS.stores as u64, "each page that was written, once");
    story.check();
    story.world.exit(lasting);
    let stores = |story: &mut Story, page| story.generation(&[page]).0;
    let (before, after) = (stores(&mut story, 900), (902..910).map(|page| stores(&mut story, page)).min());
    assert!(after.is_some_and(|after| after <= before / 2 + 2), "{before} stores, then {after:?}");
    story.check();
    story.world.end();
}

/// A line that goes on from a child that was evicted, ballooned and written in the middle of what is taken along.
#[test]
fn what_is_taken_along_may_be_in_swap_or_given_back_or_written_again() {
    for line in [Line::Parent, Line::Child] {
        let mut story = Story::new(line, Removed::AtOnce);
        for generation in 0..200_u64 {
            story.generation(&[generation * 5 % PAGES, generation * 7 % PAGES]);
            match generation % 8 {
                0 => story.world.evict_all(),
                3 => story.world.balloon(story.vm, GfnRange::new(Gfn(generation * 5 % (PAGES - 16)), PageCount(9))),
                5 => story.world.clear(story.vm, Gfn(generation * 5 % PAGES)),
                _ => {}
            }
            if generation % 16 == 15 {
                story.check();
            }
        }
        assert!(story.most.stores <= 3 * LIMITS.stores, "{line:?}: {} stores", story.most.stores);
        story.check();
        story.world.end();
    }
}

/// The copy of a launched VM's process, which had the frozen pages until they were written back, was killed. The VM itself lost
/// nothing, and every child that it had from then on died at the first touch of one of them.
#[test]
fn a_parent_that_lost_nothing_has_children_that_lose_nothing() {
    let mut world = World::new(&Layout::flat(64));
    let vm = world.ids()[0];
    (0..40).for_each(|page| world.write(vm, Gfn(page)));
    let first = world.fork(vm, Gaps::Stay);
    (0..4).for_each(|page| world.write(vm, Gfn(page)));
    world.lose_scratch(vm);
    // Nobody has asked for one of them yet.
    let second = world.fork(vm, Gaps::Stay);
    world.write_back_all();
    world.reap();
    assert!(world.ids().contains(&second), "the second child has lost memory");
    world.verify();
    world.check();
    assert!(!world.ids().contains(&first) || world.manager.family().to_mend(vm).is_empty());
    // And so they stay.
    let third = world.fork(second, Gaps::None);
    world.verify();
    assert!(world.ids().contains(&third));
    world.end();
}

/// The same for pages that swap has lost.
#[test]
fn what_swap_has_lost_and_a_window_keeps_is_mended() {
    let mut world = World::new(&Layout::flat(64));
    let vm = world.ids()[0];
    (0..16).for_each(|page| world.write(vm, Gfn(page)));
    let first = world.fork(vm, Gaps::Stay);
    world.write_back_all();
    world.evict_all();
    world.ledger.fail(Call::GetSwap, 0);
    world.expect_losses();
    world.read(first, Gfn(3));
    world.reap();
    assert!(!world.ids().contains(&first), "it has lost a page");
    let second = world.fork(vm, Gaps::Stay);
    world.write_back_all();
    world.verify();
    assert!(world.ids().contains(&second));
    world.check();
    world.end();
}
