//! The stores, held against the books.

use super::Manager;
use crate::addr::PageRange;
use crate::addr::extents::{push, without};
use crate::ids::StoreId;
use crate::store::{Store, StoreFactory};
use crate::window::Window;

impl<S: StoreFactory, W: Window> Manager<S, W> {
    /// Holds the stores against the books: a page is in its store exactly if its slot says so (invariants 3 and 6). Which
    /// pages of shared memory are there is up to those who write it.
    pub fn check_stores(&self, broken: &mut Vec<String>) {
        for (&id, store) in self.stores.iter().filter(|(id, _)| !self.shared.contains(id)) {
            match store.extents() {
                Err(error) => broken.push(format!("3: {id:?} cannot tell what it has: {error}")),
                Ok(extents) => self.hold_against_books(id, &extents, &[], broken),
            }
        }
    }

    /// The stores whose pages the books know: all but shared memory.
    pub fn stores(&self) -> impl Iterator<Item = StoreId> {
        self.stores.keys().copied().filter(|id| !self.shared.contains(id))
    }

    /// Somebody begins to list what is in a store, which may take a while: what comes and goes meanwhile is noted for
    /// [`check_store`](Self::check_store).
    pub fn watch_store(&mut self, id: StoreId) {
        self.watched.insert(id, Vec::new());
    }

    /// Holds what was listed since [`watch_store`](Self::watch_store) against the books, but for pages that have come or gone
    /// since. Of a store that has gone there is nothing to say.
    pub fn check_store(&mut self, id: StoreId, extents: &[PageRange], broken: &mut Vec<String>) {
        let Some(touched) = self.watched.remove(&id) else { return };
        if self.stores.contains_key(&id) {
            self.hold_against_books(id, extents, &sorted(touched), broken);
        }
    }

    /// These pages come into a store, or go.
    pub(super) fn touches(&mut self, store: StoreId, pages: PageRange) {
        if let Some(touched) = self.watched.get_mut(&store) {
            push(touched, pages);
        }
    }

    fn hold_against_books(&self, id: StoreId, extents: &[PageRange], touched: &[PageRange], broken: &mut Vec<String>) {
        let hidden = sorted(self.hidden.get(&id).cloned().unwrap_or_default());
        let there = sorted(without(&without(extents, &hidden), touched));
        let told = sorted(without(&sorted(self.family.objects().resident_in(id)), touched));
        if there != told {
            broken.push(format!("3: {id:?} has pages {there:?}, the books say {told:?}"));
        }
    }
}

/// The same pages in order, and as few ranges as can be.
fn sorted(mut ranges: Vec<PageRange>) -> Vec<PageRange> {
    ranges.sort_unstable_by_key(|range| range.start());
    let mut joined: Vec<PageRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end() >= range.start() => {
                *last = PageRange::between(last.start(), last.end().max(range.end()));
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{GfnRange, PageCount};
    use crate::ops::Destination;
    use crate::stage2::Shape;
    use crate::store::memfd::MemfdStores;
    use crate::testing::Ones;
    use crate::window::Harvest;

    /// Pages of a store are written back, and others are freed, while a thread lists what it has.
    #[test]
    fn what_comes_and_goes_while_a_store_is_listed_is_not_held_against_it() {
        let ram = GfnRange::from(0..1024);
        let mut manager = Manager::new(Shape::X86_64, PageCount(1024), MemfdStores::new(None));
        let vm = manager.launch(&[ram], &[], &[], Ones).unwrap();
        let store = manager.begin_freeze(vm, Destination::Store).unwrap();
        let harvest = Harvest { moved: vec![ram], moved_private: vec![ram], ..Harvest::default() };
        manager.finish_freeze(vm, &harvest).unwrap();
        let listed = |manager: &Manager<MemfdStores, Ones>| manager.store(store).unwrap().extents().unwrap();
        let judged = |manager: &mut Manager<MemfdStores, Ones>, extents: &[PageRange]| {
            let mut broken = Vec::new();
            manager.check_store(store, extents, &mut broken);
            broken
        };
        manager.write_back(PageCount(64)).unwrap();
        manager.watch_store(store);
        let extents = listed(&manager);
        manager.write_back(PageCount(64)).unwrap();
        manager.balloon(vm, &[(10..20).into()]).unwrap();
        assert!(manager.hidden() > PageCount(0));
        while manager.write_back(PageCount(64)).unwrap() {}
        assert_eq!(manager.hidden(), PageCount(0));
        assert_eq!(judged(&mut manager, &extents), Vec::<String>::new());
        // Nothing comes or goes any more.
        manager.watch_store(store);
        assert_eq!(judged(&mut manager, &extents).len(), 1);
        manager.watch_store(store);
        let extents = listed(&manager);
        assert_eq!(judged(&mut manager, &extents), Vec::<String>::new());
        manager.watch_store(store);
        manager.exit(vm).unwrap();
        assert_eq!(judged(&mut manager, &[]), Vec::<String>::new(), "it has gone");
    }

    #[test]
    fn ranges_are_joined() {
        let ranges = [4..6, 0..2, 2..3, 5..8].map(PageRange::from);
        assert_eq!(sorted(ranges.to_vec()), [0..3, 4..8].map(PageRange::from));
    }
}
