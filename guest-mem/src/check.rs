//! The invariants, numbered as in the design. Run after every step of every model test, and on live servers.

use crate::addr::cluster::clusters;
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::family::{Family, Vm};
use crate::ids::ObjectId;
use crate::ids::SwapSlot;
use crate::ids::{Activity, VmId};
use crate::ids::{Run, Source, StoreId};
use crate::object::{Found, ObjectKind, Slot, shift_down};
use crate::space::map::AddressMap;
use crate::space::runs::{among, over};
use crate::stage2::{TableId, View, entries};
use crate::swap::Swap;
use rangemap::{RangeMap, RangeSet};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;

/// 4: no slot of swap is owned twice, and if `swap` can tell, every slot that is in use is owned: by one of `families`,
/// which are all that use it.
pub fn check_swap<'a>(
    families: impl IntoIterator<Item = &'a Family>,
    swap: Option<&dyn Swap>,
    broken: &mut Vec<String>,
) {
    let mut owned: RangeSet<u64> = RangeSet::new();
    for (first, count) in families.into_iter().flat_map(Family::swap_slots) {
        let slots = first.0..first.0 + count.0;
        if owned.overlaps(&slots) {
            broken.push(format!("4: slots {slots:?} of swap are owned twice"));
        }
        owned.insert(slots);
    }
    if let Some(used) = swap.and_then(Swap::used) {
        let used: RangeSet<u64> = used.into_iter().map(|(first, count)| first.0..first.0 + count.0).collect();
        if used != owned {
            broken.push(format!("4: slots {used:?} of swap are in use, the books own {owned:?}"));
        }
    }
}

/// What the chains of a VM have, by frames.
type Chains = RangeMap<u64, Found>;

impl Family {
    /// Checks everything the books can tell: invariants 1, 2, 3, 5, 6, 7, 11, 12, 4 but for leaks, and 8 as far as the books say
    /// what windows map.
    ///
    /// # Errors
    /// Every one that does not hold, and where.
    pub fn check_invariants(&self) -> Result<(), Vec<String>> {
        let mut broken = Vec::new();
        let chains: BTreeMap<VmId, Chains> = self.vms.iter().map(|(&id, vm)| (id, self.chains(&vm.map))).collect();
        for (&id, vm) in &self.vms {
            let shown = self.stage2_runs(vm);
            self.check_sources(id, vm, &chains[&id], &shown, &mut broken);
            self.check_overlay(id, vm, &chains[&id], &shown, &mut broken);
            self.check_shown(id, &chains[&id], &mut broken);
        }
        self.check_links(&mut broken);
        self.check_uses(&mut broken);
        self.check_accounts(&mut broken);
        self.check_shared(&mut broken);
        check_swap([self], None, &mut broken);
        self.check_viewers(&chains, &mut broken);
        if broken.is_empty() { Ok(()) } else { Err(broken) }
    }

    /// What the chains behind a map have, frame by frame: object by object, from the top down. This is how the books say what
    /// a VM sees without stage-2, and it has nothing in common with the looks that are compared with it.
    fn chains(&self, map: &AddressMap) -> Chains {
        let mut chains = Chains::new();
        for (bounds, entry) in map.iter() {
            let mut origin = entry.origin;
            for id in self.objects.chain(entry.object) {
                let object = self.objects.get(id);
                let own = shift_down(bounds.intersect(GfnRange::between(origin, Gfn(u64::MAX))), origin);
                for (pages, slot) in object.slots.within(own) {
                    let frames = pages.start().0 + origin.0..pages.end().0 + origin.0;
                    let new: Vec<_> = chains.gaps(&frames).collect();
                    new.into_iter().for_each(|part| chains.insert(part, Found { object: id, origin, slot }));
                }
                origin = Gfn(origin.0 + object.backing.map_or(0, |backing| backing.origin));
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
    fn check_shown(&self, id: VmId, chains: &Chains, broken: &mut Vec<String>) {
        let mut shown = Chains::new();
        for (bounds, _) in self.vm(id).map.iter() {
            for segment in self.shown(id, bounds) {
                segment.found.into_iter().for_each(|found| shown.insert(segment.pages.raw(), found));
            }
        }
        let chains: Vec<_> = chains.iter().filter(|(_, found)| found.slot != Slot::Zero).collect();
        if !shown.iter().eq(chains.iter().copied()) {
            broken.push(format!("1: {id:?} sees {shown:?} by stage-2, {chains:?} by its chains"));
        }
    }

    /// 1: what stage-2 shows is what the chains say.
    fn check_sources(&self, id: VmId, vm: &Vm, chains: &Chains, runs: &[Run], broken: &mut Vec<String>) {
        let told: u64 = runs.iter().map(|run| run.pages.count().0).sum();
        let shown: u64 = vm.map.iter().map(|(pages, _)| pages.count().0).sum();
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
    fn check_overlay(&self, id: VmId, vm: &Vm, chains: &Chains, shown: &[Run], broken: &mut Vec<String>) {
        for (pages, source) in vm.overlay.kept.iter() {
            let is_copied = |run: &Run| run.source != source && run.source != Source::Anonymous;
            if !among(shown, pages).all(|run| is_copied(&run)) {
                broken.push(format!("8: {id:?} keeps {pages:?} though it maps what stage-2 shows"));
            }
        }
        let child = vm.child.iter().filter(|window| window.made_for.0 == self.objects.accounts.hollowed);
        let of_child = child.clone().flat_map(|window| window.zeros.iter());
        for run in vm.overlay.zeros.iter().chain(&vm.bridges).chain(of_child) {
            let differs = among(shown, run.pages).all(|there| there.source != run.source);
            if !differs || !chains.overlapping(run.pages.raw()).all(|(_, found)| found.slot == Slot::Zero) {
                broken.push(format!("8: {run:?} over stage-2 of {id:?} stands for something else than zeros"));
            }
        }
        for kept in vm.kept().filter(|&kept| among(&vm.overlay.zeros, kept).next().is_some()) {
            broken.push(format!("8: {id:?} has two reasons not to map what stage-2 shows of {kept:?}"));
        }
        let mapped = vm.overlay.mapped(shown, (0..u64::MAX).into());
        if vm.runs.get().is_some_and(|listed| **listed != mapped) {
            broken.push(format!("8: the window of {id:?} is said to map {:?}, it is {mapped:?}", vm.runs));
        }
        for window in child {
            if *window.runs != over(shown, window.zeros.iter().copied()) {
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
            let absorbable = object.shadows.len() == 1
                && object.kind == ObjectKind::Anonymous
                && object.shadows.iter().all(|&shadow| !self.objects.has_copy_ups(shadow));
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
        for id in self.stage2.ids() {
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

    /// 3 and 11: a page is in one place only, and the stores' accounts say how many are where.
    fn check_accounts(&self, broken: &mut Vec<String>) {
        let mut owners: BTreeMap<StoreId, RangeSet<u64>> = BTreeMap::new();
        let mut counts: BTreeMap<StoreId, [u64; 4]> = BTreeMap::new();
        let mut holders: BTreeMap<StoreId, BTreeMap<ObjectId, u64>> = BTreeMap::new();
        for (id, object) in self.objects.iter() {
            let gaps = object.slots.iter().filter(|(_, slot)| matches!(slot, Slot::CopyUp(..)));
            let gaps: u64 = gaps.map(|(pages, _)| pages.count().0).sum();
            if gaps != object.copy_ups {
                broken.push(format!("3: {id:?} counts {} gaps, and has {gaps}", object.copy_ups));
            }
            for (pages, slot) in object.slots.iter() {
                let Some(store) = slot.store() else { continue };
                let owned = owners.entry(store).or_default();
                if owned.overlaps(&pages.raw()) {
                    broken.push(format!("3: pages {pages:?} of {store:?} belong to {id:?} and to another object"));
                }
                owned.insert(pages.raw());
                let count = counts.entry(store).or_default();
                let held = pages.count().0;
                *holders.entry(store).or_default().entry(id).or_default() += held;
                match slot {
                    Slot::Resident(_) | Slot::Clean(..) => count[0] += held,
                    Slot::CopyUp(..) => count[1] += held,
                    Slot::InFlight(_) => count[2] += held,
                    Slot::Swapped(..) => count[3] += held,
                    Slot::Zero | Slot::Lost(..) => {}
                }
                if object.kind == ObjectKind::Anonymous
                    && slot.resident().is_some()
                    && !self.objects.accounts.queue.has(store, pages)
                {
                    broken
                        .push(format!("3: pages {pages:?} of {store:?} are in memory, and never come up for eviction"));
                }
                if let Slot::Clean(store, _) = slot
                    && !clusters(pages).all(|cluster| self.objects.accounts.clean.contains(&(store, cluster)))
                {
                    broken.push(format!("3: copies in swap of pages {pages:?} of {store:?} would never be given up"));
                }
                if slot.is_pending() && !self.objects.writeback.pending.contains(&id) {
                    broken.push(format!("3: {id:?} has pending pages and is not listed"));
                }
            }
        }
        for id in self.objects.writeback.put_off.difference(&self.objects.writeback.pending) {
            broken.push(format!("3: {id:?} waits for swap, and has nothing pending"));
        }
        let anonymous =
            self.objects.accounts.stores.iter().filter(|(_, account)| account.kind == ObjectKind::Anonymous);
        let resident: u64 = anonymous.clone().map(|(_, account)| account.resident).sum();
        if resident != self.objects.accounts.resident_pages {
            broken.push(format!("3: {resident} pages are in stores, not {}", self.objects.accounts.resident_pages));
        }
        let is_idle =
            |store: &StoreId| !self.objects.accounts.owners(*store).any(|(id, _)| self.objects.get(id).active > 0);
        let idle: BTreeSet<StoreId> = anonymous.map(|(&store, _)| store).filter(is_idle).collect();
        if !self.objects.accounts.queue.idle_is_sound(&idle) {
            broken.push(format!("3: {idle:?} are the stores that only idle VMs see"));
        }
        for (store, account) in &self.objects.accounts.stores {
            let active =
                self.objects.accounts.owners(*store).filter(|(id, _)| self.objects.get(*id).active > 0).count();
            if active as u32 != account.active {
                broken
                    .push(format!("3: {store:?} counts {} active objects, {active} have pages of it", account.active));
            }
            let left = account.scratch.map_or(0, |scratch| scratch.left);
            let told = (
                [account.resident, account.copy_ups, left, account.swapped],
                self.objects.accounts.owners(*store).collect(),
            );
            let counted = (counts.remove(store).unwrap_or_default(), holders.remove(store).unwrap_or_default());
            if told != counted {
                broken.push(format!("3: the account of {store:?} says {told:?}, its slots {counted:?}"));
            }
            if account.scratch.is_some_and(|scratch| scratch.left == 0) {
                broken.push(format!("11: the scratch range of {store:?} is kept for nothing"));
            }
        }
        for store in counts.keys() {
            broken.push(format!("3: {store:?} has pages and no account"));
        }
    }

    /// 6 and 7: every page in a store or in swap is seen by some VM (or waited for by a copy-up), and the reverse map finds who
    /// sees it, neither more nor fewer than a scan of all VMs does.
    fn check_viewers(&self, chains: &BTreeMap<VmId, Chains>, broken: &mut Vec<String>) {
        type Viewers = BTreeMap<(StoreId, VmId), RangeSet<u64>>;
        let (mut scanned, mut found) = (Viewers::new(), Viewers::new());
        let mut seen: BTreeMap<StoreId, RangeSet<u64>> = BTreeMap::new();
        for (&vm, chains) in chains {
            for (frames, Found { origin, slot, .. }) in chains.iter() {
                let Some(store) = slot.store() else { continue };
                let pages = shift_down(frames.clone().into(), *origin).raw();
                seen.entry(store).or_default().insert(pages.clone());
                scanned.entry((store, vm)).or_default().insert(pages);
            }
        }
        let mut awaited: HashMap<ObjectId, RangeSet<u64>> = HashMap::new();
        for (id, object) in self.objects.iter().filter(|(_, object)| object.copy_ups > 0) {
            for (gap, slot) in object.slots.iter() {
                let Slot::CopyUp(_, source) = slot else { continue };
                let sources: Vec<(Found, GfnRange)> = self.objects.copy_up_sources(source, gap).collect();
                for (found, pages) in &sources {
                    awaited.entry(found.object).or_default().insert(pages.raw());
                }
                let below = self.objects.get(id).backing.map(|below| (Some(below.object), Gfn(below.origin)));
                let (below, origin) = below.unwrap_or_default();
                let below = self.objects.resolve(below, origin, gap).into_iter().filter_map(|segment| {
                    segment.found.filter(|found| found.slot != Slot::Zero).map(|f| (f, f.indexes(segment.pages)))
                });
                let below: Vec<(Found, GfnRange)> = below.collect();
                if below != sources {
                    broken.push(format!("3: the gap {gap:?} of {id:?} is over {sources:?}, its chain has {below:?}"));
                }
            }
        }
        for (id, object) in self.objects.iter() {
            for (pages, slot) in object.slots.iter() {
                let Some(store) = slot.store() else { continue };
                let _ = self.viewers(store, pages, |vm, run| {
                    let pages = run.indexes().expect("a run of a store").raw();
                    found.entry((store, vm)).or_default().insert(pages);
                    ControlFlow::Continue(())
                });
                if object.kind == ObjectKind::File || !self.is_tidy() {
                    continue;
                }
                let awaited = awaited.entry(id).or_default();
                for hidden in seen.entry(store).or_default().gaps(&pages.raw()) {
                    awaited.gaps(&hidden).for_each(|part| {
                        broken.push(format!("6: nobody sees pages {part:?} of {store:?}, state {slot:?}"));
                    });
                }
            }
        }
        if found != scanned {
            let differ = |(a, b): &(_, _)| a != b;
            let first = found.iter().zip(&scanned).find(differ);
            broken.push(format!("7: the reverse map and a scan of all VMs differ, first at {first:?}"));
        }
    }
}
