//! The one place that carries out what the books want done. What takes long is done bit by bit, in the rounds that follow.

use super::Manager;
use crate::addr::{Gfn, PageCount, PageIndex, PageRange};
use crate::effect::{Effect, Effects};
use crate::ids::{StoreId, SwapSlot};
use crate::object::Loss;
use crate::store::{Store, StoreFactory};
use crate::swap::Swap;
use crate::window::{Failure, Window};

/// Pages of stores freed at a time, where nobody waits for it.
const FREED_BATCH: PageCount = PageCount(512);
/// Slots of swap given back at a time.
const SLOTS_BATCH: PageCount = PageCount(2048);

impl<S: StoreFactory, W: Window> Manager<S, W> {
    pub(super) fn carry_out(&mut self, effects: Effects) {
        for effect in effects.0 {
            match effect {
                Effect::Punch(store, pages) => self.punch(store, pages),
                Effect::FreeSwap(first, count) => self.factory.swap().free(first, count),
                Effect::DropStore(store) => {
                    // Windows of others may hold on to it beneath copies of their own, and must not to its pages.
                    if !self.hidden.contains_key(&store) || self.family.vms.is_empty() {
                        self.drop_store(store);
                    }
                }
                Effect::DropScratch(holder, store) => {
                    self.left.remove(&store);
                    self.window_do(holder, |window| window.drop_scratch(store));
                    if self.family.window_is_done(holder) {
                        self.windows.remove(&holder);
                    }
                }
                Effect::Zero(vm, pages) => {
                    let waited = self.waiters.take(vm, pages);
                    self.window_do(vm, |window| {
                        window.zero(pages);
                        if waited {
                            window.wake(pages);
                        }
                    });
                }
                Effect::DropWindow(vm) => {
                    self.windows.remove(&vm);
                }
                Effect::Fail(vm, pages) => self.window_do(vm, |window| window.fail(lost(pages.start(), Loss::Process))),
            }
        }
    }

    /// Carries out what cannot wait: pages are freed bit by bit, but for those that go with their store, and so are slots of
    /// swap where they are many.
    pub(super) fn carry_out_in_time(&mut self, effects: Effects) {
        let (mut rest, mut slots) = (Effects::default(), PageCount(0));
        for effect in effects.0 {
            match effect {
                // What is there of shared memory is not known, but to its store.
                Effect::Punch(store, pages) if self.shared.contains(&store) => self.punch(store, pages),
                Effect::Punch(store, pages) => self.hidden.entry(store).or_default().push(pages),
                Effect::FreeSwap(first, count) if slots >= SLOTS_BATCH => self.unneeded.push((first, count)),
                effect => {
                    if let Effect::FreeSwap(_, count) = effect {
                        slots.0 += count.0;
                    }
                    rest.push(effect);
                }
            }
        }
        self.carry_out(rest);
    }

    /// Finds out about some of what freezes have hidden whether anybody sees it.
    pub(super) fn tidy(&mut self) {
        let mut effects = Effects::default();
        self.family.tidy(&mut effects);
        self.carry_out_in_time(effects);
    }

    /// Frees some pages that are hidden from everybody, in stores and in swap. Whether more are left.
    pub(super) fn free_hidden(&mut self) -> bool {
        self.give_slots_back(SLOTS_BATCH);
        if !self.family.is_tidy() {
            self.tidy();
        }
        let mut most = FREED_BATCH.0;
        while most > 0
            && let Some(mut entry) = self.hidden.first_entry()
        {
            let store = *entry.key();
            let Some(pages) = entry.get_mut().pop() else {
                entry.remove();
                if !self.family.objects().accounts.stores.contains_key(&store) {
                    self.drop_store(store);
                }
                continue;
            };
            let part = PageRange::between(pages.start(), pages.end().min(PageIndex(pages.start().0 + most)));
            if part.end() < pages.end() {
                entry.get_mut().push(PageRange::between(part.end(), pages.end()));
            }
            most -= part.count().0;
            self.punch(store, part);
        }
        !self.hidden.is_empty() || !self.unneeded.is_empty() || !self.family.is_tidy()
    }

    pub(super) fn drop_store(&mut self, store: StoreId) {
        self.hidden.remove(&store);
        self.to_swap.remove(&store);
        self.watched.remove(&store);
        self.stores.remove(&store);
        self.shared.remove(&store);
        self.copied.remove(&store);
        self.files.remove(&store);
    }

    pub(super) fn punch(&mut self, store: StoreId, pages: PageRange) {
        self.touches(store, pages);
        if let Some(store) = self.stores.get_mut(&store) {
            store.punch(pages.start(), pages.count());
        }
    }

    /// Pages in stores that are about to be freed.
    pub fn hidden(&self) -> PageCount {
        PageCount(self.hidden.values().flatten().map(|pages| pages.count().0).sum())
    }
}

/// Why a guest that needs a page which is lost must not go on.
pub(super) fn lost(gfn: Gfn, loss: Loss) -> Failure {
    match loss {
        Loss::Process => Failure::LostWithProcess(gfn),
        Loss::Swap => Failure::LostInSwap(gfn),
    }
}

/// What the family has in swap goes with it.
impl<S: StoreFactory, W> Drop for Manager<S, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Books that may not be in order give nothing back.
            return;
        }
        let slots: Vec<(SwapSlot, PageCount)> = self.family.swap_slots().chain(self.unneeded.drain(..)).collect();
        slots.into_iter().for_each(|(first, count)| self.factory.swap().free(first, count));
    }
}
