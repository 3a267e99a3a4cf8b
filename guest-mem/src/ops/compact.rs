//! Compaction: what a line of VMs costs does not grow with its generations.
//!
//! Every freeze makes a store, and a store lives for as long as its last page. A line that is frozen again and again has
//! survivors of all its freezes, a few pages in each: stores, descriptors of each child, and mappings of its window, one
//! more with every generation. So a freeze takes survivors of old stores along, into its own, which gets copies of them
//! behind the VM's back: they are [copy-ups](crate::object::Slot::CopyUp). The guest stands still for none of them.
//!
//! * Where its window maps an old store, it maps the freeze's from now on.
//! * Where it keeps private copies, it goes on to show those, and hears of nothing. Only if there are too many stretches of
//!   them does it map the store there as well, over a whole neighbourhood at a time, and keeps nothing: each is a stretch in
//!   the books, and is in memory twice.
//!
//! Nothing is done before there are many small stores; then the smallest half of them goes into one, as in a log-structured
//! merge tree (O'Neil 1996): a page is copied as often as its store doubles, so a logarithmic number of times, and what is
//! large stays where it is. And nothing before a child needs many mappings; then the neighbourhoods go first where a copied
//! page saves most of them, until there are half as many.
//!
//! What others see besides is in memory twice from then on, until they end. So it is taken only when there are twice as many
//! stores or mappings, and then where that costs few pages.
//!
//! The same way [lost](crate::object::Slot::Lost) pages are mended of which the window has a copy: that one is copied.

use crate::addr::extents::{push, without};
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::family::{Family, VmBooks};
use crate::ids::{ObjectId, Run, Source, StoreId, VmId};
use crate::object::{ObjectKind, Segment, Slot, ZERO_CLUSTER};
use crate::space::runs::Runs;
use std::collections::{BTreeMap, BTreeSet};

/// When there is something to compact, and how much of it one freeze does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Small stores that a line may have. A small one has at most half of `pages`.
    pub stores: usize,
    /// Mappings that a child may have.
    pub runs: usize,
    /// Stretches that a window may keep.
    pub kept: usize,
    /// Pages that one freeze takes along.
    pub pages: PageCount,
    /// Mappings that it replaces in the window.
    pub remapped: usize,
}

impl Default for Compaction {
    /// One freeze takes about half a millisecond longer at most, and hardly any does.
    fn default() -> Self {
        Self { stores: 48, runs: 128, kept: 512, pages: PageCount(1024), remapped: 24 }
    }
}

/// What a freeze is to take along of what is not written.
#[derive(Debug, Default)]
pub(crate) struct Taking {
    /// Where the window is to map the freeze's store.
    pub moves: Vec<GfnRange>,
    /// What it keeps, and goes on to keep: in the books alone. All of these lists are sorted, apart.
    pub kept: Vec<GfnRange>,
}

/// What is known of a store of which a VM sees pages, all of which have been written back.
#[derive(Clone, Copy, Debug)]
struct SeenPages {
    /// How many pages it has.
    pages: u64,
    /// Nobody else sees any of them.
    own: bool,
}

/// Stores by what is known of them.
type Stores = BTreeMap<StoreId, SeenPages>;

/// So many objects of a chain are looked at: deeper ones have more than one VM above them.
const LOOKED_AT: usize = 256;

impl Family {
    /// Prepares what the freeze of `vm` that has just begun is to take along: where its window is to map the freeze's store,
    /// and what it keeps of which it hears nothing.
    pub fn compact(&mut self, vm: VmId, limits: Compaction) -> Vec<GfnRange> {
        let taking = self.to_compact(vm, limits);
        let moves = taking.moves.clone();
        self.vm_mut(vm).taking = taking;
        moves
    }

    fn to_compact(&self, vm: VmId, limits: Compaction) -> Taking {
        let books = self.vm(vm);
        let stores = self.stores_seen(vm);
        if books.child_runs > limits.runs {
            let save = books.child_runs - limits.runs / 2;
            let mut moves = self.most_cut(books, &stores, ZERO_CLUSTER, save, limits);
            if moves.is_empty() && books.child_runs > 2 * limits.runs {
                let all = stores.iter().map(|(&store, &seen)| (store, SeenPages { own: true, ..seen })).collect();
                moves = self.most_cut(books, &all, SHARED_MOST, save, limits);
            }
            if !moves.is_empty() {
                return Taking { moves, kept: Vec::new() };
            }
        }
        let kept = books.kept().count();
        if kept > limits.kept {
            let moves = self.most_kept(books, &stores, kept - limits.kept / 2, limits);
            if !moves.is_empty() {
                return Taking { moves, kept: Vec::new() };
            }
        }
        self.of_stores(books, &smallest(&stores, limits), limits.remapped)
    }

    /// Pages of which the window of `vm` has a copy, and nobody else one that can be read.
    pub fn to_mend(&self, vm: VmId) -> Vec<GfnRange> {
        let mut lost = Vec::new();
        if self.objects.accounts.lost > 0 {
            let vm = self.vm(vm);
            for (bounds, entry) in vm.map.iter() {
                for kept in vm.kept_within(bounds) {
                    let segments = self.objects.resolve(entry.object, entry.origin, kept).into_iter();
                    let is_lost = |slot| matches!(slot, Slot::Lost(..));
                    let segments = segments.filter(|segment| segment.found.is_some_and(|found| is_lost(found.slot)));
                    segments.for_each(|segment| push(&mut lost, segment.pages));
                }
            }
        }
        lost
    }

    /// The stores of anonymous memory of which `vm` may see pages, all of which have been written back.
    fn stores_seen(&self, vm: VmId) -> Stores {
        let (mut own, mut seen) = (BTreeSet::new(), BTreeSet::new());
        for top in self.vm(vm).map.objects() {
            let mut all_own = true;
            for id in self.objects.chain(Some(top)).take(LOOKED_AT) {
                let object = self.objects.get(id);
                if object.kind != ObjectKind::Anonymous {
                    break;
                }
                all_own &= object.mappings.keys().all(|&of| of == vm) && object.shadows.is_subset(&own);
                if all_own {
                    own.insert(id);
                }
                seen.insert(id);
            }
        }
        let stores: BTreeSet<StoreId> = seen.iter().flat_map(|&id| self.objects.stores_of(id)).collect();
        stores.into_iter().filter_map(|store| Some((store, self.seen_store(store, &own)?))).collect()
    }

    fn seen_store(&self, store: StoreId, own: &BTreeSet<ObjectId>) -> Option<SeenPages> {
        let account = &self.objects.accounts.stores[&store];
        let mut seen = SeenPages { pages: 0, own: true };
        for (id, pages) in self.objects.accounts.owners(store) {
            seen.pages += pages;
            seen.own &= own.contains(&id);
        }
        (account.scratch.is_none() && account.copy_ups == 0).then_some(seen)
    }

    /// All that `vm` sees of these stores. Its window goes on to keep what it keeps, and maps the freeze's store at `most`
    /// stretches of the others.
    fn of_stores(&self, vm: &VmBooks, stores: &BTreeSet<StoreId>, most: usize) -> Taking {
        let mut taking = Taking::default();
        if stores.is_empty() {
            return taking;
        }
        let (mut mapped, mut last_store) = (0, None);
        let is_chosen = |run: &Run| matches!(run.source, Source::Store { store, .. } if stores.contains(&store));
        for run in self.stage2_runs(vm).into_iter().filter(is_chosen) {
            let kept: Vec<GfnRange> = vm.kept_within(run.pages).collect();
            taking.kept.extend(&kept);
            for part in without(&[run.pages], &kept) {
                let between = taking.moves.last().map(|last| GfnRange::between(last.end(), part.start()));
                let joins = between.is_some_and(|between| self.only_zeros(vm, between));
                mapped += usize::from(!joins || last_store != Some(run.source));
                if mapped > most {
                    break;
                }
                last_store = Some(run.source);
                match taking.moves.last_mut().filter(|_| joins) {
                    Some(last) => *last = GfnRange::between(last.start(), part.end()),
                    None => taking.moves.push(part),
                }
            }
        }
        taking
    }

    /// Whether one mapping may bridge these pages: a few of one entry that are zero, and are not kept.
    fn only_zeros(&self, vm: &VmBooks, pages: GfnRange) -> bool {
        if pages.is_empty() {
            return true;
        }
        let mut entries = vm.map.within(pages);
        let entry = entries.next().filter(|(bounds, _)| *bounds == pages);
        pages.count() < ZERO_CLUSTER
            && vm.kept_within(pages).next().is_none()
            && entry.is_some_and(|(_, entry)| {
                self.objects.resolve(entry.object, entry.origin, pages).iter().all(Segment::is_zero)
            })
    }

    /// The neighbourhoods where the fewest pages for each mapping of a child are to be taken, `each` at most, until `save`
    /// mappings are saved.
    fn most_cut(
        &self,
        vm: &VmBooks,
        stores: &Stores,
        each: PageCount,
        save: usize,
        limits: Compaction,
    ) -> Vec<GfnRange> {
        let mut cut: Vec<(u64, Neighbourhood)> = Vec::new();
        let runs = vm.child.as_ref().map_or_else(|| self.stage2_runs(vm).into(), |window| Runs::clone(&window.runs));
        for (at, cuts) in neighbourhoods(&runs).into_iter().filter(|(_, cuts)| *cuts >= WORTHWHILE) {
            let parts = self.whole(vm, stores, at, |parts| parts.len() > 1);
            let parts = parts.into_iter().filter(|part| part.pages <= each.0 * cuts);
            cut.extend(parts.map(|part| (part.pages * ZERO_CLUSTER.0 / cuts, Neighbourhood { cuts, ..part })));
        }
        cut.sort_by_key(|(pages_each, _)| *pages_each);
        some(cut.into_iter().map(|(_, part)| part), save as u64, limits)
    }

    /// The neighbourhoods where most stretches are kept, until `save` stretches less are.
    fn most_kept(&self, vm: &VmBooks, stores: &Stores, save: usize, limits: Compaction) -> Vec<GfnRange> {
        let mut kept: BTreeMap<u64, u64> = BTreeMap::new();
        vm.kept().for_each(|pages| *kept.entry(pages.start().0 / ZERO_CLUSTER.0).or_default() += 1);
        let mut kept: Vec<(u64, u64)> = kept.into_iter().filter(|(_, count)| *count >= WORTHWHILE).collect();
        kept.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        // Those that turn out to be others' in part do not keep all that come after them waiting.
        let parts = kept.into_iter().take(limits.remapped).flat_map(|(at, _)| {
            let keeps = |parts: &[GfnRange]| parts.iter().any(|&part| vm.kept_within(part).next().is_some());
            self.whole(vm, stores, at, keeps).into_iter().map(|part| {
                let cuts = vm.kept_within(part.span).count() as u64;
                Neighbourhood { cuts, ..part }
            })
        });
        some(parts, save as u64, limits)
    }

    /// The stretches of a neighbourhood in which nothing lies but zeros, what `vm` keeps, and what it alone sees.
    fn whole(
        &self,
        vm: &VmBooks,
        stores: &Stores,
        neighbourhood: u64,
        is_worth: impl Fn(&[GfnRange]) -> bool,
    ) -> Vec<Neighbourhood> {
        let mut found = Vec::new();
        let all = GfnRange::new(Gfn(neighbourhood * ZERO_CLUSTER.0), ZERO_CLUSTER);
        for (bounds, entry) in vm.map.within(all) {
            let mut parts: Vec<GfnRange> = Vec::new();
            let mut end = |parts: &mut Vec<GfnRange>| {
                if is_worth(parts)
                    && let Some((first, last)) = parts.first().zip(parts.last())
                {
                    let span = GfnRange::between(first.start(), last.end());
                    let pages = parts.iter().map(|part| part.count().0).sum();
                    found.push(Neighbourhood { span, pages, cuts: 0 });
                }
                parts.clear();
            };
            for segment in self.objects.resolve(entry.object, entry.origin, bounds) {
                if segment.is_zero() {
                    continue;
                }
                let seen = segment.found.and_then(|found| stores.get(&found.slot.store()?));
                match seen {
                    Some(SeenPages { own: true, .. }) => parts.push(segment.pages),
                    Some(_) => {
                        // What is kept is in memory once more anyway.
                        let mut at = segment.pages.start();
                        for kept in vm.kept_within(segment.pages) {
                            if kept.start() > at {
                                end(&mut parts);
                            }
                            parts.push(kept);
                            at = kept.end();
                        }
                        if at < segment.pages.end() {
                            end(&mut parts);
                        }
                    }
                    None => end(&mut parts),
                }
            }
            end(&mut parts);
        }
        found
    }
}

/// A stretch that one mapping of the freeze's store is to cover.
#[derive(Clone, Copy, Debug)]
struct Neighbourhood {
    span: GfnRange,
    /// Pages in it that are not zero.
    pages: u64,
    /// What it would save.
    cuts: u64,
}

/// As many as it takes to save so much, and as one freeze may take; sorted.
fn some(parts: impl Iterator<Item = Neighbourhood>, save: u64, limits: Compaction) -> Vec<GfnRange> {
    let (mut left, mut saved) = (limits.pages.0, 0);
    let mut chosen: Vec<GfnRange> = Vec::new();
    for part in parts {
        if saved >= save || chosen.len() == limits.remapped || part.pages > left {
            break;
        }
        left -= part.pages;
        saved += part.cuts;
        chosen.push(part.span);
    }
    chosen.sort_unstable_by_key(|pages| pages.start());
    chosen
}

/// How many runs begin within each neighbourhood, where some do. A neighbourhood is what one mapping may bridge.
fn neighbourhoods(runs: &[Run]) -> BTreeMap<u64, u64> {
    let mut cuts = BTreeMap::new();
    for start in runs.iter().map(|run| run.pages.start().0).filter(|start| !start.is_multiple_of(ZERO_CLUSTER.0)) {
        *cuts.entry(start / ZERO_CLUSTER.0).or_default() += 1;
    }
    cuts
}

/// If there are too many small stores, the smallest, half as many as there may be, as far as one freeze may take them.
fn smallest(stores: &Stores, limits: Compaction) -> BTreeSet<StoreId> {
    let small = |own: bool| {
        let small = stores.iter().filter(move |(_, seen)| seen.pages <= limits.pages.0 / 2 && (seen.own || !own));
        small.map(|(&store, seen)| (seen.pages, store)).collect::<Vec<_>>()
    };
    let (own, all) = (small(true), small(false));
    let mut small = match () {
        () if own.len() > limits.stores => own,
        () if all.len() > 2 * limits.stores => all,
        () => return BTreeSet::new(),
    };
    small.sort_unstable();
    let mut left = limits.pages.0;
    let fit = small.into_iter().take(limits.stores.div_ceil(2).max(2)).take_while(|(pages, _)| {
        let rest = left.checked_sub(*pages);
        left = rest.unwrap_or(left);
        rest.is_some()
    });
    fit.map(|(_, store)| store).collect()
}

/// A neighbourhood with fewer cuts is left alone.
const WORTHWHILE: u64 = 3;
/// Pages that others see are taken for the sake of a mapping if they are no more than so many.
const SHARED_MOST: PageCount = PageCount(16);
