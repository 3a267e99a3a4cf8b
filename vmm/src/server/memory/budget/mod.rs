//! The memory budget: what counts, when to reclaim, and whose memory.
//!
//! Guests grow without telling: copy-on-write is the kernel's. So the anonymous memory of VM processes is read, the more
//! often the faster it grows. The decisions are pure functions of [`Figures`], in `decide`; reading these and carrying
//! the decisions out is here.
//!
//! ```text
//!   0 ──────────────────────── target ─────── brake ────── limit
//!       nothing is done          │  reclaim:      │  and VMs that grow
//!                                │  frozen pages, │  stand still for
//!                                │  live layers   │  moments
//! ```

mod accounts;
mod decide;
mod seen;
mod throttle;

use self::decide::{
    BUSY_LOOK, Figures, GROWING_LOOK, IDLE_AFTER, Marks, QUIET_LOOK, Room, SLOW, VmFigures, decide, interval, shortage,
};
use self::seen::{Seen, TICKS_EVERY};
use crate::api::{BudgetReport, BudgetSetting, ErrorKind, Failure, MIN_MEMORY};
use crate::procfs;
use crate::server::Server;
use crate::server::ids::{FamilyId, Generation};
use crate::server::memory::reclaim::{EvictedPages, NO_TRAPS};
use crate::server::registry::phase::Phase;
use crate::server::registry::vm::Vms;
use crate::units::ByteSize;
use guest_mem::ids::Activity;
use guest_mem::{PAGE_SIZE, PageCount};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How often to look at VMs while there is nothing to keep: then only the host is looked at more often.
const CALM_LOOK: Duration = Duration::from_secs(5);
/// Where less than this is left of the host's memory, in parts of it or in bytes, it may be gone in a moment.
const NEAR_PART: u64 = 8;
const NEAR_BYTES: u64 = 256 << 20;
/// …and this part of it when something may have begun to grow.
const STIRRED_SHARE: u32 = 3;
/// What a server has of its own without VMs. What it needs beyond that, and beyond compressed pages, counts: its books of
/// what is in swap, above all.
const SERVER_BYTES: u64 = 4 << 20;
/// How long a VM runs at least after it has stood still.
const RUN_LEAST: Duration = Duration::from_millis(20);
/// How long a shortage of the host is remembered.
const SHORTAGE: Duration = Duration::from_secs(10);

/// The budget of a server.
#[derive(Debug)]
pub struct Budget {
    limit: Option<u64>,
    /// What a shortage of the host leaves us, and until when.
    shortage: Option<(u64, Instant)>,
    /// When to look at the host again.
    host_next: Instant,
    seen: BTreeMap<Generation, Seen>,
    next: Instant,
    /// Not to look before: looking takes time as well.
    rest_until: Instant,
    /// Families that have nothing in stores, with what they had there.
    empty: BTreeMap<FamilyId, PageCount>,
    full_until: Option<Instant>,
    /// The family that gives next.
    turn: FamilyId,
    /// What VM processes, and prepared ones, had when we last looked.
    live: u64,
    /// Of that, what VM processes have beside their guests' pages.
    least: u64,
    /// What our books took then.
    books: u64,
    /// Pages that had come back by then soon after they went.
    came: u64,
    /// More came back between the last two looks than there is in stores.
    thrashes: bool,
    /// VMs that stand still for us, or are about to.
    held: BTreeSet<Generation>,
    /// Live layers were to go when we last decided.
    layers_go: bool,
    /// There is too little for what would only be handy.
    tight: bool,
}

impl Budget {
    /// A budget of so many bytes, or none.
    pub fn new(limit: Option<u64>) -> Self {
        Self {
            limit,
            shortage: None,
            host_next: Instant::now(),
            seen: BTreeMap::new(),
            next: Instant::now(),
            rest_until: Instant::now(),
            empty: BTreeMap::new(),
            full_until: None,
            turn: FamilyId(0),
            live: 0,
            least: 0,
            books: 0,
            came: 0,
            thrashes: false,
            held: BTreeSet::new(),
            layers_go: false,
            tight: false,
        }
    }

    /// What was set.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// What holds now.
    fn effective(&self) -> Option<u64> {
        self.limit.into_iter().chain(self.shortage.map(|(limit, _)| limit)).min()
    }

    /// When to look again.
    pub fn next_look(&self, vms: &Vms) -> Option<Instant> {
        vms.iter().any(|vm| vm.is_alive()).then_some(self.next.min(self.host_next))
    }

    /// Whether something has to go: what is only handy goes first.
    pub fn is_tight(&self) -> bool {
        self.tight
    }

    /// A family is gone.
    pub fn forget(&mut self, family: FamilyId) {
        self.empty.remove(&family);
    }

    /// Something may begin to grow.
    pub fn stir(&mut self) {
        if self.effective().is_some() {
            self.next = self.next.min((Instant::now() + BUSY_LOOK).max(self.rest_until));
        }
    }

    /// When a VM last had something to do, as far as we have looked.
    pub fn busy_at(&self, vm: Generation) -> Option<Instant> {
        self.seen.get(&vm).map(|seen| seen.busy_at)
    }

    /// A VM touched a page that was not there: it runs. Whether it was thought idle.
    fn woke(&mut self, vm: Generation) -> bool {
        let Some(seen) = self.seen.get_mut(&vm) else { return false };
        let now = Instant::now();
        let was_idle = now.saturating_duration_since(seen.ran_at) >= IDLE_AFTER;
        seen.ran_at = now;
        was_idle
    }

    /// A VM's process had `bytes` when all of its live layer, so many of them, had just been moved out.
    pub fn layer_moved(&mut self, vm: Generation, bytes: u64, moved: PageCount) {
        if let Some(seen) = self.seen.get_mut(&vm) {
            seen.least = bytes.saturating_sub(moved.bytes());
        }
    }

    /// A live layer was taken.
    pub fn layer_taken(&mut self, vm: Generation) {
        if let Some(seen) = self.seen.get_mut(&vm) {
            seen.taken = true;
        }
        self.stir();
    }
}

impl Server {
    /// Sets the budget, where that is asked for. What it is then.
    pub fn set_budget(&mut self, set: Option<BudgetSetting>) -> Result<BudgetReport, Failure> {
        match set {
            None => {}
            Some(BudgetSetting::Bytes(bytes)) if bytes < MIN_MEMORY => {
                return Err(Failure::bad_request(format!("a budget of {}: at least 16M", ByteSize(bytes))));
            }
            Some(BudgetSetting::Bytes(_)) if !self.host.features.userfaultfd => {
                return Err(Failure::new(ErrorKind::Unsupported, NO_TRAPS));
            }
            Some(BudgetSetting::Bytes(bytes)) => self.memory.budget.limit = Some(bytes),
            Some(BudgetSetting::None) => self.memory.budget.limit = None,
        }
        let now = Instant::now();
        self.memory.budget.next = now;
        // What there is of a floor was seen a while ago, where there was no budget to keep.
        self.look(now);
        Ok(BudgetReport { budget_bytes: self.memory.budget.limit, floor_bytes: self.floor() })
    }

    /// Keeps the budget. Whether there is more to do at once.
    pub fn tend_budget(&mut self, now: Instant) -> bool {
        if !self.host.features.userfaultfd || self.stopping.is_some() {
            return false;
        }
        self.look_at_host(now);
        let looks = now >= self.memory.budget.next;
        if looks {
            self.look(now);
        }
        let Some(limit) = self.memory.budget.effective() else {
            self.memory.budget.tight = false;
            self.release_all();
            return false;
        };
        // What VMs do is known as of the last look: in between, there are only stores to think of, however many VMs.
        let vms = if looks { self.vm_figures(now) } else { Vec::new() };
        let figures = self.figures(now, vms);
        self.memory.budget.tight = figures.accounted > Marks::of(limit, self.held_bytes()).target;
        let decision = decide(limit, &figures);
        if looks {
            self.memory.budget.layers_go = !decision.freeze.is_empty();
        }
        if decision.release {
            self.release_all();
        }
        self.release_tired(now);
        for vm in decision.hold {
            self.hold(vm, now);
        }
        for vm in decision.freeze {
            self.freeze_to_swap(vm);
        }
        decision.evict > 0 && self.evict_in_turn(decision.evict, now)
    }

    /// Reads what cannot be known otherwise.
    fn look(&mut self, now: Instant) {
        let begun = Instant::now();
        let alive: Vec<(Generation, bool)> = self
            .registry
            .vms
            .iter()
            .filter(|vm| vm.is_alive() && vm.memory.is_some())
            .map(|vm| (vm.generation, vm.run.is_paused()))
            .collect();
        let is_alive: BTreeSet<Generation> = alive.iter().map(|(vm, _)| *vm).collect();
        self.memory.budget.seen.retain(|vm, _| is_alive.contains(vm));
        self.memory.budget.held.retain(|vm| self.registry.vms.get(*vm).is_some_and(|vm| !vm.run.is_free()));
        for (vm, paused) in alive {
            let Some(pid) = self.memory_holder(vm) else { continue };
            let Ok(bytes) = procfs::anonymous(pid) else { continue };
            let seen = self.memory.budget.seen.entry(vm).or_insert_with(|| Seen::new(now, bytes));
            seen.saw(now, bytes);
            if (seen.ticks == 0 || now >= seen.ticks_at + TICKS_EVERY)
                && let Ok(ticks) = procfs::run_ticks(pid)
            {
                seen.ran(now, ticks);
            }
            let idle = paused || now.saturating_duration_since(seen.ran_at) >= IDLE_AFTER;
            self.set_activity(vm, if idle { Activity::Idle } else { Activity::Running });
        }
        let prepared = self.prepared_bytes();
        self.memory.budget.live = self.memory.budget.seen.values().map(|seen| seen.bytes).sum::<u64>() + prepared;
        // Prepared ones can go.
        self.memory.budget.least = self.memory.budget.seen.values().map(|seen| seen.least).sum();
        self.memory.budget.books = self.books_bytes();
        let came: u64 = self.memory.families.values().map(|manager| manager.counts().refaults).sum::<u64>()
            + self.memory.past.refaults;
        let since = PageCount(came.saturating_sub(self.memory.budget.came)).bytes();
        self.memory.budget.thrashes = since > self.stores_bytes().max(PAGE_SIZE as u64);
        self.memory.budget.came = came;
        // A part of what can go at all, or pages would never have room beside it.
        let bound = self.memory.budget.effective().map_or(u64::MAX, |limit| limit.saturating_sub(self.floor()) / 4);
        self.memory.swap.borrow_mut().bound(bound);
        let growth = self.memory.budget.seen.values().map(|seen| seen.growth).filter(|growth| *growth >= SLOW).sum();
        let room = Room::of(self.memory.budget.effective(), self.accounted());
        let took = begun.elapsed();
        self.memory.budget.rest_until = now + took * STIRRED_SHARE;
        self.memory.budget.next = now
            + match self.memory.budget.effective() {
                Some(_) => interval(growth, room, took),
                None => CALM_LOOK,
            };
    }

    fn set_activity(&mut self, vm: Generation, activity: Activity) {
        if let Some((family, member)) = self.registry.vms.get(vm).and_then(|vm| vm.memory) {
            let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
            manager.set_activity(member, activity).expect("a family knows its VMs");
        }
    }

    /// A guest waits for a page. What was thought idle may be about to lose what it needs now.
    pub fn has_trapped(&mut self, vm: Generation) {
        self.memory.budget.stir();
        if self.memory.budget.woke(vm) && self.registry.vms.get(vm).is_some_and(|vm| !vm.run.is_paused()) {
            self.set_activity(vm, Activity::Running);
        }
    }

    fn look_at_host(&mut self, now: Instant) {
        let budget = &mut self.memory.budget;
        budget.shortage.take_if(|(_, until)| *until <= now);
        if now < budget.host_next || self.registry.vms.iter().all(|vm| !vm.is_alive()) {
            return;
        }
        budget.host_next = now + QUIET_LOOK;
        let (Ok(available), Ok(total)) = (crate::host::available_memory(), crate::host::total_memory()) else { return };
        if available < NEAR_BYTES.max(total / NEAR_PART) {
            budget.host_next = now + GROWING_LOOK;
        }
        let pressure = crate::host::memory_pressure();
        if shortage(pressure, available, total, u64::MAX).is_none() {
            return;
        }
        if now >= budget.rest_until && budget.effective().is_none() {
            // What was last seen is of a time when it did not matter.
            self.look(now);
        }
        let accounted = self.accounted();
        if let Some(limit) = shortage(pressure, available, total, accounted) {
            log::info!("the host is short of memory: {accounted} bytes are to become {limit}");
            self.memory.budget.shortage = Some((limit, now + SHORTAGE));
        }
    }

    /// What VMs have, and do, as of the last look.
    fn vm_figures(&self, now: Instant) -> Vec<VmFigures> {
        let figures = |(&vm, seen): (&Generation, &Seen)| {
            let record = self.registry.vms.get(vm)?;
            let free = record.run.is_free() && record.phase == Phase::Live && record.freezes.is_idle();
            let rested = seen.released.is_none_or(|at| now >= at + RUN_LEAST);
            Some(VmFigures {
                vm,
                live: seen.bytes.saturating_sub(seen.least),
                growth: seen.growth,
                idle: if record.run.is_paused() { Duration::MAX } else { now.saturating_duration_since(seen.ran_at) },
                can_freeze: self.may_freeze(vm) && !seen.taken,
                can_hold: free && !record.run.is_paused() && !record.run.is_awaited() && rested,
                on: seen.released.map_or(Duration::MAX, |at| now.saturating_duration_since(at)),
            })
        };
        self.memory.budget.seen.iter().filter_map(figures).collect()
    }

    fn figures(&self, now: Instant, vms: Vec<VmFigures>) -> Figures {
        let empty = |(id, manager): (&FamilyId, &crate::server::FamilyManager)| {
            self.memory.budget.empty.get(id).is_some_and(|left| manager.family().resident() <= *left)
        };
        Figures {
            accounted: self.accounted(),
            stores: self.stores_bytes(),
            floor: self.held_bytes(),
            thrashes: self.memory.budget.thrashes,
            leaving: self.memory.families.values().map(|manager| manager.family().in_flight().bytes()).sum(),
            vms,
            stores_empty: self.memory.families.iter().all(empty),
            swap_full: self.memory.budget.full_until.is_some_and(|until| now < until),
            freezing: self.memory.reclaims.settling(),
            layers_go: self.memory.budget.layers_go,
        }
    }

    /// Evicts a little, one family after the other. Whether there is more to do at once.
    fn evict_in_turn(&mut self, bytes: u64, now: Instant) -> bool {
        if !self.memory.reclaims.may_put(now) {
            self.memory.budget.next = self.memory.budget.next.min(now + GROWING_LOOK);
            return false;
        }
        let turn = self.memory.budget.turn;
        let after = self.memory.families.range((std::ops::Bound::Excluded(turn), std::ops::Bound::Unbounded)).next();
        let Some((&family, _)) = after.or_else(|| self.memory.families.iter().next()) else { return false };
        self.memory.budget.turn = family;
        let limit = PageCount(bytes.div_ceil(PAGE_SIZE as u64));
        let (_, end) = self.evict(family, limit, now);
        let left = self.memory.families[&family].family().resident();
        match end {
            EvictedPages::Some => drop(self.memory.budget.empty.remove(&family)),
            EvictedPages::All => drop(self.memory.budget.empty.insert(family, left)),
            EvictedPages::Behind => return false,
            EvictedPages::Full | EvictedPages::Failing => {
                self.memory.budget.full_until = Some(now + QUIET_LOOK);
                return false;
            }
        }
        true
    }
}
