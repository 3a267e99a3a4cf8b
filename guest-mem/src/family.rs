//! A family's books: its objects, its VMs' address spaces, and the stage-2 tables between them.
//!
//! A family is the VMs that descend from one launch: Torvalds' *group* (2004), which exec makes and fork joins, and which
//! lists its address spaces. A page of anonymous memory has the same index in all of them, so the reverse map looks at that
//! one address in each that may have it; of one that was moved, the map entry tells where it is now.
//!
//! Objects and stage-2 tables do not know each other; they meet in the operations of [`ops`](crate::ops), each of which
//! changes the books and collects effects. Nothing here touches memory, waits, or can fail half way.

use crate::addr::page_set::joined;
use crate::addr::{Gfn, GfnRange, PageCount, PageIndex};
use crate::ids::{Activity, ObjectId, Run, Source, StoreId, VmId};
use crate::object::{Objects, Slot};
use crate::ops::Taking;
use crate::space::map::AddressMap;
use crate::space::overlay::{NewWindow, Overlay};
use crate::space::runs::Runs;
use crate::stage2::{MAX_STORES, Shape, Stage2, TableId, View, entries};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

/// One VM's side of the books.
#[derive(Debug)]
pub struct VmBooks {
    pub(crate) map: AddressMap,
    pub(crate) root: TableId,
    /// Where its window maps something else than stage-2 shows.
    pub(crate) overlay: Overlay,
    /// Bridges that windows of children are to have besides: zeros between frozen pages that stayed in its own.
    pub(crate) bridges: Vec<Run>,
    /// What its window maps, listed when somebody asks, until it maps something else.
    pub(crate) runs: OnceCell<Runs>,
    /// What the window of a child maps, until a child would see something else.
    pub(crate) child: Option<NewWindow>,
    /// Mappings that its last child began with, or itself.
    pub(crate) child_runs: usize,
    /// The freeze under way.
    pub(crate) freezing: Option<Freezing>,
    /// What it takes along.
    pub(crate) taking: Taking,
    pub(crate) activity: Activity,
    pub(crate) dedup: Option<DedupProgress>,
}

/// How far a window has deduplicated what stayed since a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DedupProgress {
    /// The store of the freeze.
    pub(crate) store: StoreId,
    /// All before this page is done.
    pub(crate) next: Gfn,
    /// The window has at most so many runs now. To list them anew for each batch would cost more than the batch.
    pub(crate) runs: usize,
}

/// How far a freeze has got, and its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freezing {
    /// The VM is about to be stopped: a guest that waits for a page must get it, or it cannot be stopped.
    Stopping(StoreId),
    /// The VM stands still, and its pages may have been moved out any moment: what the books say of zero pages may be
    /// out of date.
    Standing(StoreId),
}

impl Freezing {
    pub(crate) fn store(self) -> StoreId {
        match self {
            Self::Stopping(store) | Self::Standing(store) => store,
        }
    }
}

/// The VMs that descend from one launch, and all their memory.
#[derive(Debug)]
pub struct Family {
    pub(crate) objects: Objects,
    pub(crate) stage2: Stage2,
    pub(crate) vms: BTreeMap<VmId, VmBooks>,
    pub(crate) left: LeftOver,
    next_vm: u32,
    pub(crate) next_store: u32,
    /// Stores that something named when ids began anew.
    named: BTreeSet<StoreId>,
}

/// What freezes and exits have hidden, perhaps from everybody: to find out takes time, and guests that wait come first.
#[derive(Debug, Default)]
pub(crate) struct LeftOver {
    /// Objects that have been stacked on others.
    pub(crate) tops: Vec<ObjectId>,
    /// What the frozen VMs saw before, and those that are gone.
    pub(crate) replaced: Vec<Run>,
}

/// Something at launch that is not fresh memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectMapping {
    /// Where it stands.
    pub pages: GfnRange,
    /// The file, or the shared memory, whose page 0 stands at the first of `pages`.
    pub object: ObjectId,
}

impl Family {
    /// An empty family whose stage-2 tables have this shape.
    pub fn new(shape: Shape) -> Self {
        let (objects, stage2) = (Objects::default(), Stage2::new(shape));
        Self {
            objects,
            stage2,
            vms: BTreeMap::new(),
            left: LeftOver::default(),
            next_vm: 1,
            next_store: 0,
            named: BTreeSet::new(),
        }
    }

    /// The objects.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The stage-2 tables.
    pub fn stage2(&self) -> &Stage2 {
        &self.stage2
    }

    /// The VMs, oldest first.
    pub fn vms(&self) -> impl Iterator<Item = (VmId, &VmBooks)> {
        self.vms.iter().map(|(&id, vm)| (id, vm))
    }

    /// One VM.
    ///
    /// # Panics
    /// If it is gone: ids come from this family.
    pub fn vm(&self, id: VmId) -> &VmBooks {
        &self.vms[&id]
    }

    /// What the window of `vm` maps at `pages`, cut to them, in order.
    pub fn window_runs(&self, vm: VmId, pages: GfnRange) -> Vec<Run> {
        let vm = self.vm(vm);
        vm.overlay.mapped(&self.stage2.runs(vm.root, pages), pages)
    }

    /// All that the window of `vm` maps, in order. Costs as much as there are runs, once for each change of the window.
    pub fn runs(&self, vm: VmId) -> &Runs {
        let vm = self.vm(vm);
        vm.runs.get_or_init(|| vm.overlay.mapped(&self.stage2_runs(vm), (0..u64::MAX).into()).into())
    }

    /// What the window of `vm` maps at a frame.
    pub(crate) fn window_at(&self, vm: VmId, gfn: Gfn) -> Option<Source> {
        self.window_runs(vm, GfnRange::new(gfn, PageCount(1))).first().map(|run| run.source)
    }

    /// Which page of its store stage-2 shows `vm` at a frame.
    pub(crate) fn page_at(&self, vm: VmId, gfn: Gfn) -> Option<PageIndex> {
        let shown = self.stage2.runs(self.vm(vm).root, GfnRange::one(gfn));
        shown.first().and_then(|run| run.source.page(gfn)).map(|(_, page)| page)
    }

    pub(crate) fn vm_mut(&mut self, id: VmId) -> &mut VmBooks {
        self.vms.get_mut(&id).expect("a VM of this family")
    }

    /// A file object, before the launch that maps it; its store belongs to no family.
    pub fn add_file(&mut self, pages: PageCount) -> (ObjectId, StoreId) {
        let store = self.reserve_store();
        (self.objects.add_file(store, pages), store)
    }

    /// Shared memory, before the first entry that shows it; its store is written by those who map it. It goes with the last of
    /// them.
    pub fn add_shared(&mut self, pages: PageCount) -> (ObjectId, StoreId) {
        let store = self.reserve_store();
        (self.objects.add_shared(store, pages), store)
    }

    /// Says whether a VM needs its memory soon.
    pub fn set_activity(&mut self, id: VmId, activity: Activity) {
        let before = std::mem::replace(&mut self.vm_mut(id).activity, activity);
        if before == activity {
            return;
        }
        let shown: Vec<ObjectId> = self.vm(id).map.iter().filter_map(|(_, entry)| entry.object).collect();
        for object in shown {
            match activity {
                Activity::Running => self.objects.inc_active(object),
                Activity::Idle => self.objects.dec_active(object),
            }
        }
    }

    /// A new VM joins; the objects that it shows list it.
    pub(crate) fn insert_vm(&mut self, vm: VmBooks) -> VmId {
        let mut id = VmId(self.next_vm);
        while self.vms.contains_key(&id) || self.objects.accounts.waits_for(id) {
            id.0 = id.0.wrapping_add(1);
        }
        self.next_vm = id.0.wrapping_add(1);
        for object in vm.map.iter().filter_map(|(_, entry)| entry.object) {
            self.objects.map(object, id, vm.activity);
        }
        self.vms.insert(id, vm);
        id
    }

    /// An id for a store. Ids are given in turn, and begin anew where leaves cannot name higher ones: one that is given again
    /// has not been in use for as long as can be, and whoever is slow has heard that its store is gone.
    pub(crate) fn reserve_store(&mut self) -> StoreId {
        loop {
            if self.next_store >= MAX_STORES {
                self.next_store = 0;
                self.named = self.named_stores();
            }
            let id = StoreId(self.next_store);
            self.next_store += 1;
            if !self.named.contains(&id) {
                return id;
            }
        }
    }

    /// The stores that leaves, windows or the books name, those that are gone included.
    fn named_stores(&self) -> BTreeSet<StoreId> {
        let tables = self.stage2.ids().map(|table| self.stage2.table(table));
        let leaves = tables.flat_map(|table| entries(self.stage2.shape(), table)).filter_map(|(pages, entry)| {
            match entry.view(pages.start()) {
                View::Leaf(source) => Some(source),
                _ => None,
            }
        });
        let overlays =
            self.vms.values().flat_map(|vm| vm.overlay.sources().chain(vm.bridges.iter().map(|run| run.source)));
        let sources = leaves.chain(overlays);
        let sources = sources.chain(self.left.replaced.iter().map(|run| run.source));
        let stores = sources.filter_map(|source| source.store().map(|(store, _)| store));
        let freezing = self.vms.values().filter_map(|vm| vm.freezing.map(Freezing::store));
        let copied = self.objects.iter().filter(|(_, object)| object.copy_ups > 0).flat_map(|(_, o)| o.slots.iter());
        let copied = copied.filter_map(|(_, slot)| match slot {
            Slot::CopyUp(_, Source::Store { store, .. }) => Some(store),
            _ => None,
        });
        stores.chain(copied).chain(self.objects.accounts.stores.keys().copied()).chain(freezing).collect()
    }
}

impl VmBooks {
    /// A VM whose window maps what stage-2 shows.
    pub(crate) fn new(map: AddressMap, root: TableId) -> Self {
        let (overlay, runs) = (Overlay::default(), OnceCell::new());
        let (child_runs, activity) = (0, Activity::Running);
        Self {
            map,
            root,
            overlay,
            bridges: Vec::new(),
            runs,
            child: None,
            child_runs,
            freezing: None,
            taking: Taking::default(),
            activity,
            dedup: None,
        }
    }

    /// Its address space.
    pub fn map(&self) -> &AddressMap {
        &self.map
    }

    /// Frozen pages of which its window has a copy of its own, over what it maps there.
    pub fn kept(&self) -> impl Iterator<Item = GfnRange> {
        self.kept_within((0..u64::MAX).into())
    }

    /// Those among `pages`, cut to them.
    pub(crate) fn kept_within(&self, pages: GfnRange) -> impl Iterator<Item = GfnRange> {
        joined(self.overlay.kept.within(pages).map(|(pages, _)| pages))
    }

    /// Whether it stands still for a freeze whose outcome is not known yet.
    pub fn stands(&self) -> bool {
        matches!(self.freezing, Some(Freezing::Standing(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;
    use crate::effect::Effects;
    use crate::ops::Placed;
    use crate::window::Harvest;

    fn freeze(family: &mut Family, vm: VmId, pages: std::ops::Range<u64>) -> StoreId {
        let store = family.begin_freeze(vm);
        let copied = Harvest { copied: vec![pages.into()], ..Harvest::default() };
        family.finish_freeze(vm, &copied, PageCount(0), &mut Effects::default());
        family.check_invariants().unwrap();
        store
    }

    /// After 2^28 freezes of a family, empty and aborted ones counted, the server panicked.
    #[test]
    fn ids_of_stores_that_nothing_names_are_given_again() {
        let mut family = Family::new(Shape::X86_64);
        let vm = family.launch(&[GfnRange::from(0..64)], &[]);
        let (_, file) = family.add_file(PageCount(1));
        let stores = [freeze(&mut family, vm, 0..8), freeze(&mut family, vm, 4..12)];
        assert_eq!((file.0, stores.map(|store| store.0)), (0, [1, 2]));
        // All zero: the store is gone, and windows map it.
        let moved = family.begin_freeze(vm);
        let pages = vec![(20..24).into()];
        let harvest = Harvest { moved: pages.clone(), moved_private: pages, ..Harvest::default() };
        family.finish_freeze(vm, &harvest, PageCount(0), &mut Effects::default());
        while let Some(job) = family.next_job(PageCount(64)) {
            let placed = if job.store == moved { Placed::Zero } else { Placed::Stored };
            family.written_back(&job, &[(job.pages, placed)], &mut Effects::default());
        }
        family.next_store = MAX_STORES - 2;
        for at in [MAX_STORES - 2, MAX_STORES - 1, 4] {
            assert_eq!(family.begin_freeze(vm), StoreId(at), "of those before, four are in use");
            family.abort_freeze(vm, &mut Effects::default());
        }
        assert_eq!(freeze(&mut family, vm, 0..64), StoreId(5));
        while !family.is_tidy() {
            family.tidy(&mut Effects::default());
        }
        family.next_store = MAX_STORES;
        // The last freeze has hidden all pages; the window still maps the store of the one that was moved.
        assert_eq!([0, 1].map(|_| family.reserve_store().0), [1, 2]);
        assert_eq!([0, 1].map(|_| family.reserve_store().0), [4, 6]);
    }

    #[test]
    fn an_id_is_no_vms_while_another_has_it() {
        let mut family = Family::new(Shape::X86_64);
        let first = family.launch(&[GfnRange::from(0..64)], &[]);
        family.next_vm = u32::MAX;
        let ids = [0, 1, 2].map(|_| family.fork(first, 1000).0);
        assert_eq!((first.0, ids), (1, [u32::MAX, 0, 2]));
        // One that is gone, and whose pages wait in its window.
        family.begin_freeze(VmId(2));
        let pages = vec![GfnRange::new(Gfn(0), PageCount(8))];
        let harvest = Harvest { moved: pages.clone(), moved_private: pages, ..Harvest::default() };
        family.finish_freeze(VmId(2), &harvest, PageCount(0), &mut Effects::default());
        family.fork(VmId(2), 1000);
        family.exit(VmId(2), &mut Effects::default());
        family.next_vm = 2;
        assert_eq!(family.fork(first, 1000).0, 4);
    }
}
