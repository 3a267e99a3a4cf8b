//! The invariants, numbered as in the design. Run after every step of every model test, and on live servers.

mod accounts;
mod viewers;

use crate::addr::{Gfn, GfnRange, PageCount, PageOrigin};
use crate::family::{Family, VmBooks};
use crate::ids::{Activity, ObjectId, Run, Source, StoreId, SwapSlot, VmId};
use crate::object::{Found, ObjectKind, Slot};
use crate::space::map::AddressMap;
use crate::space::runs::{among, over};
use crate::stage2::{TableId, View, entries};
use crate::swap::Swap;
use rangemap::RangeMap;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

/// 4: no slot of swap is owned twice, and if `swap` can tell, every slot that is in use is owned: `owned` are those of all who
/// use it.
pub fn check_swap(
    owned: impl IntoIterator<Item = (SwapSlot, PageCount)>,
    swap: Option<&dyn Swap>,
    broken: &mut Vec<String>,
) {
    let (owned, twice) = joined_slots(owned);
    broken.extend(twice.into_iter().map(|slots| format!("4: slots {slots:?} of swap are owned twice")));
    if let Some(used) = swap.and_then(Swap::used) {
        let (used, _) = joined_slots(used);
        if used != owned {
            broken.push(format!("4: slots {used:?} of swap are in use, the books own {owned:?}"));
        }
    }
}

/// Slots in order, as few ranges as can be; and those that are in there twice.
fn joined_slots(slots: impl IntoIterator<Item = (SwapSlot, PageCount)>) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let mut slots: Vec<Range<u64>> = slots.into_iter().map(|(first, count)| first.0..first.0 + count.0).collect();
    slots.sort_unstable_by_key(|slots| slots.start);
    let (mut joined, mut twice): (Vec<Range<u64>>, _) = (Vec::new(), Vec::new());
    for slots in slots {
        match joined.last_mut() {
            Some(last) if last.end >= slots.start => {
                if last.end > slots.start {
                    twice.push(slots.start..last.end.min(slots.end));
                }
                last.end = last.end.max(slots.end);
            }
            _ => joined.push(slots),
        }
    }
    (joined, twice)
}

/// So many frames are checked at a time, however many VMs there are: each of them takes a while whatever it sees there.
const FEWEST: PageCount = PageCount(256);

/// What the chains of a VM have, by frames.
type Chains = RangeMap<u64, Found>;

/// What can be checked by itself, at any time: each part takes as long as what it names is large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// 1, 7 and 8 at these frames: what all VMs see there. 3 and 6 of pages that have these numbers.
    Frames(GfnRange),
    /// 3 of how many pages an object has.
    Pages(ObjectId),
    /// The same of a store of which several objects have pages.
    Store(StoreId),
    /// 2, 3, 11 and 12 but for pages: objects, VMs and accounts among each other.
    Links,
    /// 2 of stage-2 tables.
    Tables,
}

impl Family {
    /// Checks everything the books can tell: invariants 1, 2, 3, 5, 6, 7, 11, 12, 4 but for leaks, and 8 as far as the books say
    /// what windows map.
    ///
    /// # Errors
    /// Every one that does not hold, and where.
    pub fn check_invariants(&self) -> Result<(), Vec<String>> {
        let mut broken = Vec::new();
        self.check_part(Part::Frames((0..u64::MAX).into()), &mut broken);
        self.parts_but_frames().for_each(|part| self.check_part(part, &mut broken));
        check_swap(self.swap_slots(), None, &mut broken);
        if broken.is_empty() { Ok(()) } else { Err(broken) }
    }

    /// All that [`check_invariants`](Self::check_invariants) checks but for swap, in parts between which others may be heard: so
    /// many frames at a time, and fewer where there are many VMs, each of which is looked at.
    pub fn check_parts(&self, frames: PageCount) -> Vec<Part> {
        let each = 2 * frames.0 / (self.vms.len() as u64 + 1);
        let frames = PageCount(each.clamp(FEWEST.0.min(frames.0), frames.0));
        let ends = self.vms.values().filter_map(|vm| vm.map.iter().last()).map(|(pages, _)| pages.end().0);
        // Pages keep their numbers where memory is moved down, or has gone.
        let ends = ends.chain(self.objects.iter().map(|(_, object)| object.slots.end()));
        let starts = (0..ends.max().unwrap_or(0)).step_by(frames.0 as usize);
        let parts = starts.map(|start| Part::Frames(GfnRange::new(Gfn(start), frames)));
        parts.chain(self.parts_but_frames()).collect()
    }

    fn parts_but_frames(&self) -> impl Iterator<Item = Part> {
        let objects = self.objects.iter().map(|(id, _)| Part::Pages(id));
        let stores =
            self.objects.accounts.stores.keys().filter(|&&store| self.objects.accounts.owners(store).nth(1).is_some());
        objects.chain(stores.map(|&store| Part::Store(store))).chain([Part::Links, Part::Tables])
    }

    /// Checks a part; one that has gone since it was listed is in order.
    pub fn check_part(&self, part: Part, broken: &mut Vec<String>) {
        match part {
            Part::Frames(frames) => self.check_frames(frames, broken),
            Part::Pages(object) if self.objects.contains(object) => self.check_pages(object, broken),
            Part::Pages(_) => {}
            Part::Store(store) => self.check_shared_store(store, broken),
            Part::Links => {
                self.check_links(broken);
                self.check_accounts(broken);
                self.check_shared(broken);
            }
            Part::Tables => self.check_uses(broken),
        }
    }

    fn check_frames(&self, frames: GfnRange, broken: &mut Vec<String>) {
        let chains: BTreeMap<_, _> = self.vms.iter().map(|(&id, vm)| (id, self.chains(&vm.map, frames))).collect();
        for (&id, vm) in &self.vms {
            let end = vm.map.iter().last().map_or(0, |(pages, _)| pages.end().0);
            let frames = frames.intersect((0..end).into());
            if frames.is_empty() {
                continue;
            }
            let shown = self.stage2.runs(vm.root, frames);
            self.check_sources(id, vm, &chains[&id], &shown, frames, broken);
            self.check_overlay(id, vm, &chains[&id], &shown, frames, broken);
            self.check_shown(id, &chains[&id], frames, broken);
        }
        self.check_viewers(&chains, frames, broken);
        // Pages of these numbers: each has its turn in one part, wherever it is seen.
        self.check_slots(PageOrigin(0).pages(frames), broken);
        self.check_seen(PageOrigin(0).pages(frames), broken);
    }

    /// What the chains behind a map have, frame by frame: object by object, from the top down. This is how the books say what
    /// a VM sees without stage-2, and it has nothing in common with the looks that are compared with it.
    fn chains(&self, map: &AddressMap, frames: GfnRange) -> Chains {
        let mut chains = Chains::new();
        for (bounds, entry) in map.iter() {
            let bounds = bounds.intersect(frames);
            if bounds.is_empty() {
                continue;
            }
            let mut origin = entry.origin;
            for id in self.objects.chain(entry.object) {
                let object = self.objects.get(id);
                for (pages, slot) in object.slots.within(origin.pages(bounds)) {
                    let frames = origin.frames(pages).raw();
                    let new: Vec<_> = chains.gaps(&frames).collect();
                    new.into_iter().for_each(|part| chains.insert(part, Found { object: id, origin, slot }));
                }
                origin = origin + object.backing.map_or(PageOrigin(0), |backing| backing.origin);
            }
        }
        chains
    }

    /// The slots of swap that pages of the family are in.
    pub fn swap_slots(&self) -> impl Iterator<Item = (SwapSlot, PageCount)> {
        let slots = self.objects.iter().flat_map(|(_, object)| object.slots.iter());
        slots.filter_map(|(pages, slot)| Some((slot.swap()?.slot(pages.start()), pages.count())))
    }

    /// 1: what is found by way of stage-2 is what the chains have, but for zeros.
    fn check_shown(&self, id: VmId, chains: &Chains, frames: GfnRange, broken: &mut Vec<String>) {
        let mut shown = Chains::new();
        for (bounds, _) in self.vm(id).map.iter() {
            for segment in self.shown(id, bounds.intersect(frames)) {
                segment.found.into_iter().for_each(|found| shown.insert(segment.pages.raw(), found));
            }
        }
        let chains: Vec<_> = chains.iter().filter(|(_, found)| found.slot != Slot::Zero).collect();
        if !shown.iter().eq(chains.iter().copied()) {
            broken.push(format!("1: {id:?} sees {shown:?} by stage-2, {chains:?} by its chains"));
        }
    }

    /// 1: what stage-2 shows is what the chains say.
    fn check_sources(
        &self,
        id: VmId,
        vm: &VmBooks,
        chains: &Chains,
        runs: &[Run],
        frames: GfnRange,
        broken: &mut Vec<String>,
    ) {
        let told: u64 = runs.iter().map(|run| run.pages.count().0).sum();
        let shown: u64 = vm.map.iter().map(|(pages, _)| pages.intersect(frames).count().0).sum();
        if told != shown {
            broken.push(format!("1: stage-2 of {id:?} tells of {told} pages, its map has {shown}"));
        }
        for &run in runs {
            let there = chains.overlapping(run.pages.raw()).map(|(part, found)| (part.clone(), Some(*found)));
            for (part, found) in there.chain(chains.gaps(&run.pages.raw()).map(|part| (part, None))) {
                let part = Run { pages: run.pages.intersect(part.into()), ..run };
                let right = match (run.source, found) {
                    (Source::Anonymous, found) => found.is_none_or(|found| found.slot == Slot::Zero),
                    (Source::Store { .. }, Some(Found { slot: Slot::Zero, .. })) => {
                        self.objects.accounts.are_zero(&part)
                    }
                    (Source::Store { .. }, None) => false,
                    (Source::Shared { .. }, None) => false,
                    (Source::Store { store, origin } | Source::Shared { store, origin }, Some(found)) => {
                        let shared = self.objects.get(found.object).kind == ObjectKind::Shared;
                        let says_so = matches!(run.source, Source::Shared { .. });
                        found.slot.store() == Some(store) && origin == found.origin && shared == says_so
                    }
                };
                if !right {
                    broken.push(format!("1: stage-2 of {id:?} says {part:?}, its chain {found:?}"));
                }
            }
        }
    }

    /// 8: windows, and those of children, map what stage-2 shows but where a copy is kept, and where a bridge or a zero run
    /// stands for nothing but zeros; in so far as they have been listed, the lists say so.
    fn check_overlay(
        &self,
        id: VmId,
        vm: &VmBooks,
        chains: &Chains,
        shown: &[Run],
        frames: GfnRange,
        broken: &mut Vec<String>,
    ) {
        for (pages, source) in vm.overlay.kept.within(frames) {
            let is_copied = |run: &Run| run.source != source && run.source != Source::Anonymous;
            if !among(shown, pages).all(|run| is_copied(&run)) {
                broken.push(format!("8: {id:?} keeps {pages:?} though it maps what stage-2 shows"));
            }
        }
        let child = vm.child.iter().filter(|window| window.made_for.0 == self.objects.accounts.hollowed);
        let of_child = child.clone().flat_map(|window| among(&window.zeros, frames));
        for run in among(&vm.overlay.zeros, frames).chain(among(&vm.bridges, frames)).chain(of_child) {
            let differs = among(shown, run.pages).all(|there| there.source != run.source);
            if !differs || !chains.overlapping(run.pages.raw()).all(|(_, found)| found.slot == Slot::Zero) {
                broken.push(format!("8: {run:?} over stage-2 of {id:?} stands for something else than zeros"));
            }
        }
        for kept in vm.kept_within(frames).filter(|&kept| among(&vm.overlay.zeros, kept).next().is_some()) {
            broken.push(format!("8: {id:?} has two reasons not to map what stage-2 shows of {kept:?}"));
        }
        let mapped = vm.overlay.mapped(shown, frames);
        if vm.runs.get().is_some_and(|listed| !among(listed, frames).eq(mapped.iter().copied())) {
            broken.push(format!("8: the window of {id:?} is said to map {:?}, it is {mapped:?}", vm.runs));
        }
        for window in child {
            let mapped = over(shown, among(&window.zeros, frames));
            if !among(&window.runs, frames).eq(mapped) {
                broken.push(format!("8: windows of children of {id:?} are said to map {:?}", window.runs));
            }
        }
    }

    /// 2: backing and shadows mirror each other, mappings are exact, nothing is left that nothing needs.
    fn check_links(&self, broken: &mut Vec<String>) {
        let mut mappings: HashMap<ObjectId, BTreeMap<VmId, u32>> = HashMap::new();
        let mut running: HashMap<ObjectId, u32> = HashMap::new();
        for (&id, vm) in &self.vms {
            for object in vm.map.iter().filter_map(|(_, entry)| entry.object) {
                *mappings.entry(object).or_default().entry(id).or_default() += 1;
                *running.entry(object).or_default() += u32::from(vm.activity == Activity::Running);
            }
        }
        for (id, object) in self.objects.iter() {
            if let Some(backing) = object.backing
                && !(self.objects.contains(backing.object) && self.objects.get(backing.object).shadows.contains(&id))
            {
                broken.push(format!("2: {id:?} is not among the shadows of {:?}", backing.object));
            }
            for &shadow in &object.shadows {
                if !self.objects.contains(shadow)
                    || self.objects.get(shadow).backing.is_none_or(|backing| backing.object != id)
                {
                    broken.push(format!("2: {shadow:?} is a shadow of {id:?} that is not stacked on it"));
                }
            }
            let mapped = mappings.remove(&id).unwrap_or_default();
            if mapped != object.mappings {
                broken.push(format!("2: {id:?} lists the entries {:?}, {mapped:?} show it", object.mappings));
            }
            let active = object.shadows.iter().filter(|&&shadow| self.objects.get(shadow).active > 0).count() as u32
                + running.get(&id).copied().unwrap_or(0);
            if active != object.active {
                broken.push(format!("2: {id:?} counts {} active ones that show it, there are {active}", object.active));
            }
            let absorbable =
                object.shadows.len() == 1 && object.shadows.iter().all(|&shadow| self.objects.may_merge(id, shadow));
            if self.is_tidy() && object.mappings.is_empty() && (object.shadows.is_empty() || absorbable) {
                broken.push(format!("2: {id:?} should have been collapsed"));
            }
        }
    }

    /// 12: shared memory is one store of its own, of which every page is there; nothing is stacked on it or beneath it, shared
    /// entries show nothing else, and no others show it. No freeze has it copied, no window keeps or bridges anything there.
    fn check_shared(&self, broken: &mut Vec<String>) {
        for (id, object) in self.objects.iter().filter(|(_, object)| object.kind == ObjectKind::Shared) {
            let stores: BTreeSet<StoreId> = self.objects.stores_of(id).collect();
            let owners = stores.iter().flat_map(|&store| self.objects.accounts.owners(store)).count();
            let is_there = object.slots.iter().all(|(_, slot)| matches!(slot, Slot::Resident(_)));
            let alone = object.backing.is_none() && object.shadows.is_empty();
            if stores.len() != 1 || owners != 1 || !is_there || !alone {
                broken.push(format!("12: shared memory {id:?} is in {stores:?}, of {owners} owners: {object:?}"));
            }
        }
        for (&id, vm) in &self.vms {
            for (pages, entry) in vm.map.iter() {
                let kind = entry.object.map(|object| self.objects.get(object).kind);
                if entry.is_shared() != (kind == Some(ObjectKind::Shared)) || (entry.is_shared() && entry.needs_copy) {
                    broken.push(format!("12: {id:?} has {entry:?} at {pages:?}, which shows {kind:?}"));
                }
            }
            for pages in vm.map.shared() {
                let over = among(&vm.overlay.zeros, pages).chain(among(&vm.bridges, pages)).next();
                if over.is_some() || vm.kept_within(pages).next().is_some() {
                    broken
                        .push(format!("12: the window of {id:?} shows something else than shared memory at {pages:?}"));
                }
            }
        }
    }

    /// 2: the use counts of tables are exact.
    fn check_uses(&self, broken: &mut Vec<String>) {
        let mut uses: HashMap<TableId, u32> = HashMap::new();
        for vm in self.vms.values() {
            *uses.entry(vm.root).or_default() += 1;
        }
        // At the lowest level are leaves alone, and by far the most tables.
        for id in self.stage2.ids().filter(|id| self.stage2.table(*id).level > 1) {
            for (pages, entry) in entries(self.stage2.shape(), self.stage2.table(id)) {
                if let View::Table(below) = entry.view(pages.start()) {
                    *uses.entry(below).or_default() += 1;
                }
            }
        }
        for id in self.stage2.ids() {
            let (told, counted) = (self.stage2.table(id).uses, uses.get(&id).copied().unwrap_or(0));
            if told != counted {
                broken.push(format!("2: {id:?} counts {told} uses, {counted} exist"));
            }
        }
    }
}
