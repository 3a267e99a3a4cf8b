//! `reclaim`, and the ways in which memory gets to swap: eviction of frozen pages, and freezes of what VMs have written.
//!
//! All of it goes in small pieces between rounds of the loop, so that a trap is never far from being served.

use super::request::{InFlight, Next, ReclaimRequest};
use crate::api::{Answer, ErrorKind, Failure};
use crate::server::aside::Ticket;
use crate::server::freeze::queue::Purpose;
use crate::server::ids::{ClientId, FamilyId, Generation};
use crate::server::registry::phase::Phase;
use crate::server::registry::vm::Vm;
use crate::server::{FamilyManager, Server};
use crate::wire::{Frozen, Take, ToVm};
use guest_mem::{Along, Destination, PageCount, StoreId};
use rangemap::RangeSet;
use std::io;
use std::time::{Duration, Instant};

/// Pages evicted at a time.
const BATCH: PageCount = PageCount(64);
/// How long a round of eviction may take.
const SLICE: Duration = Duration::from_millis(3);
/// Swap that is behind, or full, is tried again after this time, if it has not told of itself before.
const SWAP_RETRY: Duration = Duration::from_millis(100);

/// Why an eviction came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvictedPages {
    /// All that was wanted is done, or its time is over.
    Some,
    /// There is nothing in stores any more.
    All,
    /// The disk is behind.
    Behind,
    /// Swap takes no more.
    Full,
    /// Nor would it if there were room.
    Failing,
}

/// A VM's live layer on its way to swap.
#[derive(Debug)]
struct Settling {
    vm: Generation,
    family: FamilyId,
    store: StoreId,
    moved: PageCount,
}

/// What is under way.
#[derive(Debug, Default)]
pub struct Reclaims {
    asked: Vec<ReclaimRequest>,
    settling: Vec<Settling>,
    /// Swap is not asked to take more before then.
    rest_until: Option<Instant>,
}

impl Reclaims {
    /// The disk has done something: swap may take more.
    pub fn swap_moved(&mut self) {
        self.rest_until = None;
    }

    /// When there is something to do though nothing has happened.
    pub fn next_look(&self) -> Option<Instant> {
        self.rest_until.filter(|_| !self.asked.is_empty())
    }

    /// Live layers that are on their way to swap.
    pub fn settling(&self) -> usize {
        self.settling.len()
    }

    /// Whether swap is asked to take more.
    pub fn may_put(&self, now: Instant) -> bool {
        self.rest_until.is_none_or(|until| until <= now)
    }
}

impl Server {
    pub fn reclaim(&mut self, client: ClientId, name: Option<&str>, bytes: u64) {
        let only = match name.map(|name| self.find_alive(name).map(|vm| vm.memory.map(|(family, _)| family))) {
            None => None,
            Some(Err(failure)) => return self.reply(client, Err(failure)),
            Some(Ok(None)) => {
                let why = format!("VM {:?} has not started yet", name.unwrap_or_default());
                return self.reply(client, Err(Failure::new(ErrorKind::Busy, why)));
            }
            Some(Ok(family)) => family,
        };
        if !self.host.features.userfaultfd {
            return self.reply(client, Err(Failure::new(ErrorKind::Unsupported, NO_TRAPS)));
        }
        let families = self.memory.families.keys().copied().filter(|family| only.is_none_or(|only| only == *family));
        self.memory.reclaims.asked.push(ReclaimRequest::new(client, only, bytes, families.collect()));
    }

    /// Goes on with the oldest request that has something to do. Whether there is more to do at once.
    pub fn tend_reclaims(&mut self, now: Instant) -> bool {
        self.finish_settling();
        let mut asked = std::mem::take(&mut self.memory.reclaims.asked);
        let mut going = Going::Waits;
        asked.retain_mut(|request| {
            if going != Going::Waits || !self.memory.reclaims.may_put(now) {
                return true;
            }
            going = self.go_on_reclaiming(request, now);
            if going == Going::Done {
                self.reply(request.client, Ok(Answer::Reclaimed(request.answer())));
            }
            going != Going::Done
        });
        self.memory.reclaims.asked = asked;
        going != Going::Waits && !self.memory.reclaims.asked.is_empty()
    }

    fn go_on_reclaiming(&mut self, request: &mut ReclaimRequest, now: Instant) -> Going {
        match request.next(|vm| self.is_taking_live_layer(vm)) {
            Next::Evict(family, limit) => {
                let (pages, end) = self.evict(family, limit, now);
                match request.evicted(pages, end, self.in_flight(family)) {
                    true => return Going::On,
                    false => return Going::Waits,
                }
            }
            Next::AskWho => request.could_give(self.may_give_layers(request.only)),
            Next::AskSizes(vms) => {
                request.asked(self.ask_live_layers(&vms));
                return Going::Waits;
            }
            Next::Freeze(vm) => {
                if self.freeze_to_swap(vm) {
                    request.takes(vm);
                    return Going::Waits;
                }
            }
            Next::Wait => return Going::Waits,
            Next::Done => return Going::Done,
        }
        Going::On
    }

    fn in_flight(&self, family: FamilyId) -> InFlight {
        match self.memory.families.get(&family).is_some_and(|manager| manager.family().in_flight().0 > 0) {
            true => InFlight::Some,
            false => InFlight::None,
        }
    }

    /// VMs whose live layers could be taken, of one family where that is said.
    fn may_give_layers(&self, only: Option<FamilyId>) -> impl Iterator<Item = Generation> {
        let mine = move |vm: &&Vm| {
            let mine = vm.memory.is_some_and(|(family, _)| only.is_none_or(|only| only == family));
            mine && self.may_freeze(vm.generation)
        };
        self.registry.vms.iter().filter(mine).map(|vm| vm.generation)
    }

    /// It has been found out how large some live layers are.
    pub fn sizes_came(&mut self, ticket: Ticket, layers: Vec<(Generation, RangeSet<u64>)>) {
        let vms = &self.registry.vms;
        let size = |(vm, live): (Generation, RangeSet<u64>)| {
            let pages = live.iter().map(|part| part.end - part.start).sum();
            Some((vms.get(vm)?.run.is_paused(), pages, vm))
        };
        if let Some(request) = self.memory.reclaims.asked.iter_mut().find(|request| request.has_asked(ticket)) {
            request.sizes_came(layers.into_iter().filter_map(size));
        }
    }

    /// Evicts frozen pages of a family for a moment.
    pub fn evict(&mut self, family: FamilyId, limit: PageCount, now: Instant) -> (PageCount, EvictedPages) {
        let Some(manager) = self.memory.families.get_mut(&family) else { return (PageCount(0), EvictedPages::All) };
        let (pages, end) = evict_for(manager, limit, Instant::now() + SLICE);
        if end == EvictedPages::Full && self.reclaim_swap_cache(family) {
            return (pages, EvictedPages::Some);
        }
        if matches!(end, EvictedPages::Behind | EvictedPages::Full | EvictedPages::Failing) {
            self.memory.reclaims.rest_until = Some(now + SWAP_RETRY);
        }
        (pages, end)
    }

    /// Swap is full, and `short` has given up all that it has there of what it has in memory too: so do the others, one
    /// after the other. Whether there was something.
    fn reclaim_swap_cache(&mut self, short: FamilyId) -> bool {
        let mut others = self.memory.families.iter_mut().filter(|(family, _)| **family != short);
        others.any(|(_, manager)| manager.reclaim_swap_cache(BATCH).0 > 0)
    }

    /// Whether a VM can be frozen now, and is not.
    pub fn may_freeze(&self, vm: Generation) -> bool {
        self.registry
            .vms
            .get(vm)
            .is_some_and(|vm| vm.phase == Phase::Live && vm.freezes.is_idle() && vm.memory.is_some())
    }

    /// Moves a VM's live layer out, to settle into swap. Whether that has begun.
    pub fn freeze_to_swap(&mut self, generation: Generation) -> bool {
        if !self.may_freeze(generation) {
            return false;
        }
        let vm = self.registry.vms.get_mut(generation).expect("looked at above");
        let (Some((family, member)), Some(process)) = (vm.memory, vm.process) else { return false };
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        match manager.begin_freeze(member, Destination::Swap) {
            Ok(store) => {
                let file = manager.store(store).expect("just made");
                let (max_runs, take) = (self.host.max_runs, Take::Remap);
                let message = ToVm::Freeze { store, max_runs, take, along: Along::default(), first: Vec::new() };
                self.procs.all.get_mut(&process).expect("a VM's process").send(&message, &[file.read_only()]);
                vm.freezes.push(Purpose::Swap);
                let moved = PageCount(0);
                self.memory.reclaims.settling.push(Settling { vm: generation, family, store, moved });
                self.freeze_begins(generation, store);
                true
            }
            Err(error) => {
                log::warn!("take memory of VM {:?}: {error}", vm.name);
                false
            }
        }
    }

    /// Whether a VM's live layer is on its way to swap.
    fn is_taking_live_layer(&self, vm: Generation) -> bool {
        self.memory.reclaims.settling.iter().any(|settling| settling.vm == vm)
    }

    /// A freeze for swap has taken a live layer.
    pub fn taken_for_swap(&mut self, generation: Generation, frozen: &Frozen) {
        let Some((family, _)) = self.registry.vms.get(generation).and_then(|vm| vm.memory) else { return };
        let moved = frozen.harvest.count();
        let mine = |settling: &&mut Settling| (settling.family, settling.store) == (family, frozen.store);
        self.memory.reclaims.settling.iter_mut().filter(mine).for_each(|settling| settling.moved = moved);
        self.layer_moved(generation, moved);
    }

    /// A freeze for swap has changed nothing.
    pub fn no_freeze_for_swap(&mut self, generation: Generation, store: StoreId, why: &str) {
        let Some(vm) = self.registry.vms.get(generation) else { return };
        log::warn!("take memory of VM {:?}: {why}", vm.name);
        if let Some((family, _)) = vm.memory {
            self.memory.reclaims.settling.retain(|settling| (settling.family, settling.store) != (family, store));
        }
    }

    /// Takes note of live layers that are where they belong.
    fn finish_settling(&mut self) {
        let (families, vms) = (&self.memory.families, &self.registry.vms);
        let is_over = |settling: &mut Settling| {
            let standing = vms.get(settling.vm).is_some_and(|vm| vm.freezes.taking() == Some(settling.store));
            !standing && families.get(&settling.family).is_none_or(|manager| manager.is_written_back(settling.store))
        };
        let over: Vec<Settling> = self.memory.reclaims.settling.extract_if(.., is_over).collect();
        for settling in over {
            let manager = self.memory.families.get(&settling.family);
            let stayed = manager.map_or(PageCount(0), |manager| manager.family().resident_in(settling.store));
            self.memory.budget.layer_taken(settling.vm);
            if let Some(request) = self.memory.reclaims.asked.iter_mut().find(|request| request.is_taking(settling.vm))
            {
                let swapped = PageCount(settling.moved.0.saturating_sub(stayed.0));
                request.took(swapped, (stayed.0 > 0 && manager.is_some()).then_some(settling.family));
            }
        }
    }
}

/// What became of a request in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Going {
    On,
    Waits,
    Done,
}

/// Why nothing can be evicted.
pub const NO_TRAPS: &str =
    "nothing can be taken out of memory on this host: it has no userfaultfd (see `offshoot doctor`)";

fn evict_for(manager: &mut FamilyManager, limit: PageCount, deadline: Instant) -> (PageCount, EvictedPages) {
    let mut pages = PageCount(0);
    while pages < limit && Instant::now() < deadline {
        let done = manager.evict_some(PageCount(BATCH.0.min(limit.0 - pages.0)));
        pages.0 += done.pages.0;
        match done.stopped {
            Some(guest_mem::manager::Error::PutSwap { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                return (pages, EvictedPages::Behind);
            }
            Some(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                log::info!("{error}: {cause}");
                return (pages, if error.is_full() { EvictedPages::Full } else { EvictedPages::Failing });
            }
            None if done.pages.0 == 0 => return (pages, EvictedPages::All),
            None => {}
        }
    }
    (pages, EvictedPages::Some)
}
