//! Compaction: what a line of VMs costs does not grow with its generations.
//!
//! Every freeze makes a store, and a store lives for as long as its last page. A line that is frozen again and again has
//! survivors of all its freezes, a few pages in each: stores, descriptors of each child, and mappings of its window, one
//! more with every generation. So a freeze takes survivors of old stores along, into its own. It may, where nobody but
//! the frozen VM sees them: what others see would be in memory twice.
//!
//! * Pages that the window keeps as private copies are copied once more, as if the guest had written them.
//! * Where it maps an old store, it maps the freeze's from now on, which gets copies of the old pages behind the VM's back:
//!   they are [gaps](crate::object::Slot::Gap).
//!
//! Nothing is done before there are many small stores; then the smallest half of them goes into one, as in a log-structured
//! merge tree (O'Neil 1996): a page is copied as often as its store doubles, so a logarithmic number of times, and what is
//! large stays where it is. And nothing before a child needs many mappings; then the neighbourhoods go first where a copied
//! page saves most of them, until there are half as many.
//!
//! The same way [lost](crate::object::Slot::Lost) pages are mended of which the window has a copy.

use crate::addr::{GfnRange, PageCount};
use crate::family::{Family, Vm, VmId};
use crate::object::{Kind, ObjectId, Slot, ZERO_CLUSTER};
use crate::ranges::{push, without};
use crate::window::StoreId;
use std::collections::{BTreeMap, BTreeSet};

/// When there is something to compact, and how much of it one freeze does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Small stores that a line may have. A small one has at most half of `pages`.
    pub stores: usize,
    /// Mappings that a child may have.
    pub runs: usize,
    /// Pages that one freeze takes along.
    pub pages: PageCount,
    /// Mappings that it replaces in the window.
    pub remapped: usize,
}

impl Default for Compaction {
    /// One freeze takes about half a millisecond longer at most, and hardly any does.
    fn default() -> Self {
        Self { stores: 48, runs: 256, pages: PageCount(1024), remapped: 48 }
    }
}

/// A stretch of pages that a line has to itself.
#[derive(Clone, Copy, Debug)]
struct Own {
    pages: GfnRange,
    store: StoreId,
}

impl Family {
    /// Pages that the freeze of `vm` which is about to begin is to take along, written or not; sorted, apart.
    pub fn to_compact(&self, vm: VmId, limits: Compaction) -> Vec<GfnRange> {
        let books = self.vm(vm);
        let objects = self.own_objects(vm);
        let stores = self.own_stores(&objects);
        let mut small: Vec<(u64, StoreId)> = stores.iter().map(|(&store, &pages)| (pages, store)).collect();
        small.retain(|(pages, _)| *pages <= limits.pages.0 / 2);
        let crowded = small.len() > limits.stores;
        if !crowded && books.child_runs <= limits.runs {
            return Vec::new();
        }
        let mut own: Vec<Own> = Vec::new();
        for &object in &objects {
            let slots = self.objects.get(object).slots.iter();
            own.extend(slots.filter_map(|(pages, slot)| Some(Own { pages, store: slot.store()? })));
        }
        own.retain(|part| stores.contains_key(&part.store));
        own.sort_unstable_by_key(|part| part.pages.start());
        let save = books.child_runs.saturating_sub(limits.runs / 2);
        let mut chosen = if books.child_runs > limits.runs { most_cut(&own, save, limits.pages) } else { Vec::new() };
        if chosen.is_empty() && crowded {
            let smallest = smallest(small, limits);
            own.retain(|part| smallest.contains(&part.store));
            chosen = own;
        }
        self.stretches(books, &chosen, limits.remapped)
    }

    /// Pages of which the window of `vm` has a copy, and nobody else one that can be read.
    pub fn to_mend(&self, vm: VmId) -> Vec<GfnRange> {
        let mut lost = Vec::new();
        if self.objects.lost > 0 {
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

    /// The objects of whose pages nobody else sees any.
    fn own_objects(&self, vm: VmId) -> BTreeSet<ObjectId> {
        let mut own = BTreeSet::new();
        for top in self.vm(vm).map.objects() {
            for id in self.objects.chain(Some(top)) {
                let object = self.objects.get(id);
                let is_own = object.kind == Kind::Anonymous
                    && object.mappings.keys().all(|&of| of == vm)
                    && object.shadows.is_subset(&own);
                if !is_own {
                    break;
                }
                own.insert(id);
            }
        }
        own
    }

    /// The stores that have pages of these objects alone, all of which have settled, and how many.
    fn own_stores(&self, objects: &BTreeSet<ObjectId>) -> BTreeMap<StoreId, u64> {
        let stores: BTreeSet<StoreId> = objects.iter().flat_map(|&id| self.objects.stores_of(id)).collect();
        let pages = |store: &StoreId| {
            let account = &self.objects.stores[store];
            let settled = account.scratch.is_none() && account.gaps == 0;
            let mut owners = self.objects.owners(*store);
            settled.then(|| owners.try_fold(0, |sum, (id, pages)| objects.contains(&id).then_some(sum + pages)))?
        };
        stores.into_iter().filter_map(|store| Some((store, pages(&store)?))).collect()
    }

    /// What a window is to do for pages (sorted, apart): copy those that it keeps, and map the freeze's store at the others, at
    /// `most` of them, in stretches over the zeros between.
    fn stretches(&self, vm: &Vm, all: &[Own], most: usize) -> Vec<GfnRange> {
        let (mut stretches, mut remapped): (Vec<GfnRange>, Vec<GfnRange>) = (Vec::new(), Vec::new());
        let (mut mapped, mut last_store) = (0, None);
        for &Own { pages, store } in all {
            let kept: Vec<GfnRange> = vm.kept_within(pages).collect();
            stretches.extend(&kept);
            for part in without(&[pages], &kept) {
                let between = remapped.last().map(|last| GfnRange::between(last.end(), part.start()));
                let joins = between.is_some_and(|between| self.only_zeros(vm, between));
                mapped += usize::from(!joins || last_store != Some(store));
                if mapped > most {
                    break;
                }
                last_store = Some(store);
                match remapped.last_mut().filter(|_| joins) {
                    Some(last) => *last = GfnRange::between(last.start(), part.end()),
                    None => remapped.push(part),
                }
            }
        }
        stretches.extend(remapped);
        stretches.sort_unstable_by_key(|pages| pages.start());
        stretches
    }

    /// Whether one mapping may bridge these pages: a few of one entry that are zero, and are not kept.
    fn only_zeros(&self, vm: &Vm, pages: GfnRange) -> bool {
        if pages.is_empty() {
            return true;
        }
        let mut entries = vm.map.within(pages);
        let entry = entries.next().filter(|(bounds, _)| *bounds == pages);
        pages.count() < ZERO_CLUSTER
            && vm.kept_within(pages).next().is_none()
            && entry.is_some_and(|(_, entry)| {
                self.objects.resolve(entry.object, entry.origin, pages).iter().all(|segment| segment.is_zero())
            })
    }
}

/// The smallest stores, half as many as there may be, as far as one freeze may take them.
fn smallest(mut small: Vec<(u64, StoreId)>, limits: Compaction) -> BTreeSet<StoreId> {
    small.sort_unstable();
    let mut left = limits.pages.0;
    let fit = small.into_iter().take(limits.stores.div_ceil(2).max(2)).take_while(|(pages, _)| {
        let rest = left.checked_sub(*pages);
        left = rest.unwrap_or(left);
        rest.is_some()
    });
    fit.map(|(_, store)| store).collect()
}

/// The pages of those neighbourhoods where the fewest pages for each mapping are to be taken, at most `limit`, until `save`
/// mappings are saved. A neighbourhood is what one mapping may bridge.
fn most_cut(own: &[Own], save: usize, limit: PageCount) -> Vec<Own> {
    let neighbourhood = |part: &Own| part.pages.start().0 / ZERO_CLUSTER.0;
    let mut cut: Vec<(u64, u64, &[Own])> = Vec::new();
    for parts in own.chunk_by(|a, b| neighbourhood(a) == neighbourhood(b)) {
        let cuts = parts.windows(2).filter(|pair| pair[0].store != pair[1].store).count() as u64;
        let pages: u64 = parts.iter().map(|part| part.pages.count().0).sum();
        if cuts >= WORTHWHILE {
            cut.push((pages, cuts, parts));
        }
    }
    cut.sort_by_key(|(pages, cuts, _)| pages * WORTHWHILE * ZERO_CLUSTER.0 / cuts);
    let (mut left, mut saved) = (limit.0, 0);
    let mut chosen: Vec<Own> = Vec::new();
    for (pages, cuts, parts) in cut {
        if saved >= save as u64 || pages > left {
            break;
        }
        left -= pages;
        saved += cuts;
        chosen.extend(parts);
    }
    chosen.sort_unstable_by_key(|part| part.pages.start());
    chosen
}

/// A neighbourhood with fewer cuts is left alone.
const WORTHWHILE: u64 = 3;
