//! What counts, and how much room there is.

use super::decide::{Marks, Room};
use super::{NEAR_BYTES, NEAR_PART, SERVER_BYTES};
use crate::procfs::{self, Usage};
use crate::server::Server;
use crate::server::aside::Holder;
use crate::server::ids::Generation;
use guest_mem::{PAGE_SIZE, PageCount};
use std::collections::BTreeMap;

impl Server {
    /// Stores, compressed pages, and the anonymous memory of VM processes, prepared ones included, as it was seen.
    pub fn accounted_bytes(&self, usage: &BTreeMap<Holder, Usage>) -> u64 {
        let vms = self.registry.vms.iter().filter_map(|vm| vm.process);
        let prepared = self.procs.all.values().filter(|process| process.is_prepared()).map(|process| process.id);
        let live = vms.chain(prepared).filter_map(|id| usage.get(&Holder::Process(id)));
        self.kept_bytes() + self.books_bytes() + live.map(|usage| usage.anonymous).sum::<u64>()
    }

    /// The anonymous memory of prepared processes, as it is now.
    pub(super) fn prepared_bytes(&self) -> u64 {
        let prepared = self.procs.all.values().filter(|process| process.is_prepared());
        prepared.filter_map(|process| procfs::anonymous(process.memory.main()?.as_raw()).ok()).sum()
    }

    /// Stores, files, each content once, shared memory and compressed pages.
    pub(super) fn kept_bytes(&self) -> u64 {
        let compressed = self.memory.swap.borrow().stats().compressed_bytes;
        self.stores_bytes() + self.memory.files.resident().bytes() + self.shared_bytes() + compressed
    }

    /// Shared memory that is there: each page once, whoever has it. None of it can be evicted.
    pub fn shared_bytes(&self) -> u64 {
        self.memory.families.values().map(|manager| manager.shared_resident().bytes()).sum()
    }

    /// What we need beyond compressed pages, and what a server needs anyway.
    pub(super) fn books_bytes(&self) -> u64 {
        let own = procfs::anonymous(std::process::id() as i32).unwrap_or(0);
        own.saturating_sub(self.memory.swap.borrow().stats().compressed_bytes + SERVER_BYTES)
    }

    pub(super) fn stores_bytes(&self) -> u64 {
        self.memory.families.values().map(|manager| manager.family().resident().bytes()).sum()
    }

    /// A VM's live layer has just been moved out: what its process has beside it is known.
    pub fn layer_moved(&mut self, vm: Generation, moved: PageCount) {
        if let Some(bytes) = self.memory_holder(vm).and_then(|pid| procfs::anonymous(pid).ok()) {
            self.memory.budget.layer_moved(vm, bytes, moved);
        }
    }

    pub(super) fn memory_holder(&self, vm: Generation) -> Option<i32> {
        let process = self.registry.vms.get(vm)?.process.and_then(|id| self.procs.all.get(&id))?;
        process.memory.main().or(process.memory.keeper.get()).map(|pid| pid.as_raw())
    }

    /// Whether what a VM has written may be in memory twice for a while, and a third time as far as it is written again.
    pub fn has_room_twice(&self, vm: Generation) -> bool {
        let Some(bytes) = self.memory_holder(vm).and_then(|pid| procfs::anonymous(pid).ok()) else { return false };
        let (Ok(available), Ok(total)) = (crate::host::available_memory(), crate::host::total_memory()) else {
            return false;
        };
        // The others are as they were last seen: to look at all of them would keep them waiting.
        let seen = self.memory.budget.seen.get(&vm).map_or(0, |seen| seen.bytes);
        let fits =
            |limit| self.accounted().saturating_sub(seen) + 3 * bytes <= Marks::of(limit, self.held_bytes()).target;
        self.memory.budget.effective().is_none_or(fits) && 2 * bytes + NEAR_BYTES.max(total / NEAR_PART) <= available
    }

    /// Whether little is left of the budget, or the host is short of memory.
    pub fn is_memory_tight(&self) -> bool {
        Room::of(self.memory.budget.effective(), self.accounted()) != Room::Plenty
    }

    /// Pages for which there is room before something has to go.
    pub fn room_ahead(&self) -> PageCount {
        let room = |limit| Marks::of(limit, self.held_bytes()).target.saturating_sub(self.accounted());
        PageCount(self.memory.budget.effective().map_or(u64::MAX, room) / PAGE_SIZE as u64)
    }

    /// What counts, with what was last seen of VM processes.
    pub(super) fn accounted(&self) -> u64 {
        self.kept_bytes() + self.memory.budget.books + self.memory.budget.live
    }

    /// What no eviction takes, as of the last look: a budget below that cannot be kept.
    pub fn floor(&self) -> u64 {
        self.memory.budget.least + self.memory.budget.books + self.memory.files.resident().bytes() + self.shared_bytes()
    }

    /// The same with compressed pages: what evicting more from stores makes no smaller.
    pub(super) fn held_bytes(&self) -> u64 {
        self.floor() + self.memory.swap.borrow().stats().compressed_bytes
    }
}
