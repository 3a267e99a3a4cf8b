//! The memory budget: what counts, when to reclaim, and whose memory.
//!
//! Guests grow without telling: copy-on-write is the kernel's. So the anonymous memory of VM processes is read, the more
//! often the faster it grows. The decisions are pure functions of [`Figures`]; reading these and carrying the decisions
//! out is at the end of the file.
//!
//! ```text
//!   0 ──────────────────────── target ─────── brake ────── limit
//!       nothing is done          │  reclaim:      │  and VMs that grow
//!                                │  frozen pages, │  stand still for
//!                                │  live layers   │  moments
//! ```

use super::Server;
use super::process::Role;
use super::reclaim::{Evicted, NO_TRAPS};
use super::vm::{FamilyId, Generation, Hold, Phase, Vms};
use crate::api::{BudgetSetting, Failure, MIN_MEMORY};
use crate::procfs;
use crate::wire::ToVm;
use guest_mem::family::Pace;
use guest_mem::{PAGE_SIZE, PageCount};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How often to look while something grows, at most and at least.
const BUSY_LOOK: Duration = Duration::from_millis(10);
const GROWING_LOOK: Duration = Duration::from_millis(100);
/// How often to look while nothing does.
const QUIET_LOOK: Duration = Duration::from_secs(1);
/// How often to look at VMs while there is nothing to keep: then only the host is looked at more often.
const CALM_LOOK: Duration = Duration::from_secs(5);
/// Where less than this is left of the host's memory, in parts of it or in bytes, it may be gone in a moment.
const NEAR_PART: u64 = 8;
const NEAR_BYTES: u64 = 256 << 20;
/// What has grown is taken to have grown within this time, if we have not looked for longer.
const BURST: Duration = Duration::from_millis(20);
/// A look may take this part of the time between looks.
const LOOK_SHARE: u32 = 20;
/// …and this part of it when something may have begun to grow.
const STIRRED_SHARE: u32 = 3;
/// A VM that has not run for this long is idle…
const IDLE_AFTER: Duration = Duration::from_secs(2);
/// …which is told from processor time, read this often. One tick is no sign of life.
const TICKS_EVERY: Duration = Duration::from_millis(900);
/// A guest that has nothing to do looks at its clocks all the same: less than this part of one processor, in percent, is
/// nothing to do, and takes no memory to speak of.
const BUSY_PERCENT: u64 = 5;
/// What may come and go between two looks: guests write hundreds of megabytes in a second, and what moves to swap is there
/// twice for a moment.
const SURPRISE: u64 = 24 << 20;
/// By the time that those who grow stand still, they have grown for this long.
const STOPPING: Duration = Duration::from_millis(40);
/// What a server has of its own without VMs. What it needs beyond that, and beyond compressed pages, counts: its books of
/// what is in swap, above all.
const SERVER_BYTES: u64 = 4 << 20;
/// What a VM process has of its own, until its live layer was taken once and we know.
const PROCESS_BYTES: u64 = 1 << 20;
/// A live layer that is worth a freeze: of a VM that runs, and of one that is idle.
const WORTH_A_FREEZE: u64 = 1 << 20;
const WORTH_WHEN_IDLE: u64 = 128 << 10;
/// Live layers taken at a time.
const FREEZES: usize = 2;
/// A VM that grows by less in a second is let grow.
const SLOW: u64 = 1 << 20;
/// How long a VM stands still at most, and how long it runs at least in between.
const HOLD_MOST: Duration = Duration::from_millis(300);
const RUN_LEAST: Duration = Duration::from_millis(20);
/// Stalls for want of memory, in percent of the time, that make the host short of memory.
const PRESSURE: f64 = 10.0;
/// How long a shortage of the host is remembered.
const SHORTAGE: Duration = Duration::from_secs(10);

/// What a VM has, and does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct VmFigures {
    vm: Generation,
    /// Anonymous memory of its process beyond what a process has.
    live: u64,
    /// By how much that grows in a second.
    growth: u64,
    /// How long it has not run.
    idle: Duration,
    /// A freeze of it can begin.
    can_freeze: bool,
    /// It can be made to stand still.
    can_hold: bool,
}

/// All that counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Figures {
    /// Stores, compressed tier and VM processes together.
    accounted: u64,
    /// Stores alone.
    stores: u64,
    /// On its way out of memory already.
    leaving: u64,
    vms: Vec<VmFigures>,
    /// Nothing in stores can be evicted.
    stores_empty: bool,
    /// Swap takes no more.
    swap_full: bool,
    /// Live layers that are being taken.
    freezing: usize,
    /// They were to go when VMs were last looked at.
    layers_go: bool,
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Decision {
    /// Bytes to evict from stores.
    evict: u64,
    /// VMs whose live layers are to be taken.
    freeze: Vec<Generation>,
    /// VMs that are to stand still.
    hold: Vec<Generation>,
    /// Those that stand still may run.
    release: bool,
}

/// A budget's marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Marks {
    target: u64,
    brake: u64,
    /// Stores that have less than this have what guests are at work on: live layers go before it.
    stores: u64,
}

impl Marks {
    fn of(limit: u64) -> Self {
        let reserve = (limit / 16).max(SURPRISE.min(limit / 8)).min(256 << 20);
        Self { target: limit - reserve, brake: limit - reserve / 2, stores: limit / 8 }
    }
}

impl VmFigures {
    /// How long it has been idle; nothing for a VM that runs.
    fn idle_time(&self) -> Duration {
        if self.idle >= IDLE_AFTER { self.idle } else { Duration::ZERO }
    }

    fn is_worth_it(&self) -> bool {
        self.live >= if self.idle >= IDLE_AFTER { WORTH_WHEN_IDLE } else { WORTH_A_FREEZE }
    }
}

fn decide(limit: u64, figures: &Figures) -> Decision {
    let marks = Marks::of(limit);
    let over = figures.accounted.saturating_sub(marks.target);
    if over == 0 {
        return Decision { release: true, ..Decision::default() };
    }
    let mut decision = Decision::default();
    if figures.swap_full {
        // Standing still would not help either.
        decision.release = true;
        return decision;
    }
    let stores_are_low = figures.stores_empty || figures.stores < marks.stores;
    let short = over.saturating_sub(figures.leaving);
    if stores_are_low && short > 0 {
        let mut worth: Vec<&VmFigures> = figures.vms.iter().filter(|vm| vm.can_freeze && vm.is_worth_it()).collect();
        worth.sort_by_key(|vm| std::cmp::Reverse((vm.idle_time(), vm.live)));
        decision.freeze = worth.iter().take(FREEZES.saturating_sub(figures.freezing)).map(|vm| vm.vm).collect();
    }
    if !figures.stores_empty {
        // Where live layers are on their way, guests keep what they are at work on, as long as there is time.
        let layers_go = figures.layers_go || figures.freezing > 0 || !decision.freeze.is_empty();
        let layers_go = layers_go && figures.accounted <= marks.brake;
        let spare = if layers_go { figures.stores.saturating_sub(marks.stores) } else { u64::MAX };
        decision.evict = over.min(spare);
    }
    let growth: u64 = figures.vms.iter().filter(|vm| vm.growth >= SLOW).map(|vm| vm.growth).sum();
    let soon = figures.accounted.saturating_add((growth as f64 * STOPPING.as_secs_f64()) as u64);
    if figures.accounted > marks.brake || soon > limit {
        let growing = figures.vms.iter().filter(|vm| vm.can_hold && vm.growth >= SLOW);
        decision.hold = growing.map(|vm| vm.vm).collect();
    }
    decision
}

/// What is left of the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    /// A quarter, or more, or there is no budget.
    Plenty,
    /// So many bytes.
    Bytes(u64),
}

impl Room {
    fn of(limit: Option<u64>, accounted: u64) -> Self {
        match limit {
            Some(limit) if accounted > limit / 4 * 3 => Self::Bytes(limit.saturating_sub(accounted)),
            _ => Self::Plenty,
        }
    }
}

/// When to look again, if a VM grows by `growth` bytes in a second and there is room for `room` more.
fn interval(growth: u64, room: Room, took: Duration) -> Duration {
    let next = match (growth, room) {
        (0, Room::Plenty) => QUIET_LOOK,
        (0, Room::Bytes(_)) => GROWING_LOOK,
        (_, Room::Plenty) => GROWING_LOOK,
        // When half of the room may be gone.
        (growth, Room::Bytes(room)) => {
            Duration::from_secs_f64(room as f64 / 2.0 / growth as f64).clamp(BUSY_LOOK, GROWING_LOOK)
        }
    };
    next.max(took * LOOK_SHARE)
}

/// What the host's shortage leaves us, if it is short.
fn shortage(pressure: Option<f64>, available: u64, total: u64, accounted: u64) -> Option<u64> {
    // In a small control group as well, guests may write for a moment before they are seen to.
    let least = (total / 32).max(SURPRISE.min(total / 4)).min(1 << 30);
    let missing = least.saturating_sub(available);
    let stalls = pressure.is_some_and(|percent| percent >= PRESSURE);
    let give = missing.max(if stalls { accounted / 16 } else { 0 });
    (give > 0 && accounted > MIN_MEMORY).then(|| accounted.saturating_sub(give).max(MIN_MEMORY))
}

/// What was last seen of a VM.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: Instant,
    bytes: u64,
    growth: u64,
    /// What its process has beside its live layer.
    least: u64,
    ticks: u64,
    ticks_at: Instant,
    ran_at: Instant,
    /// When it last had something to do.
    busy_at: Instant,
    /// Since when it stands still, or when it was let go.
    held: Option<Instant>,
    released: Option<Instant>,
    /// Its live layer has just been taken.
    taken: bool,
}

impl Seen {
    fn new(now: Instant, bytes: u64) -> Self {
        Self {
            at: now,
            bytes,
            growth: 0,
            least: PROCESS_BYTES.min(bytes),
            ticks: 0,
            ticks_at: now,
            ran_at: now,
            busy_at: now,
            held: None,
            released: None,
            taken: false,
        }
    }

    fn saw(&mut self, now: Instant, bytes: u64) {
        // After a quiet time we cannot know that it has not grown in the last moments only.
        let since = now.saturating_duration_since(self.at).clamp(Duration::from_millis(1), BURST);
        let growth = (bytes.saturating_sub(self.bytes) as f64 / since.as_secs_f64()) as u64;
        // What stood still for a moment goes on as before.
        self.growth = growth.max(if self.held.is_some() { self.growth } else { self.growth / 2 });
        (self.at, self.bytes) = (now, bytes);
        self.taken = false;
        self.least = self.least.min(bytes);
    }

    fn ran(&mut self, now: Instant, ticks: u64) {
        let since = now.saturating_duration_since(self.ticks_at);
        let no_sign = (since.as_millis() / TICKS_EVERY.as_millis()).max(1) as u64;
        if ticks > self.ticks + no_sign {
            self.ran_at = now;
        }
        // A tick is 10 ms.
        let passed = since.as_millis() as u64 / 10;
        if ticks > self.ticks + 1 + passed * BUSY_PERCENT / 100 {
            self.busy_at = now;
        }
        (self.ticks, self.ticks_at) = (ticks, now);
    }
}

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
    /// What our books took then.
    books: u64,
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
            books: 0,
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
    pub(super) fn set_budget(&mut self, set: Option<BudgetSetting>) -> Result<Option<u64>, Failure> {
        match set {
            None => {}
            Some(BudgetSetting::Bytes(bytes)) if bytes < MIN_MEMORY => {
                return Err(Failure::bad_input(format!("a budget of {bytes} bytes: at least 16M")));
            }
            Some(BudgetSetting::Bytes(_)) if !self.features.userfaultfd => return Err(Failure::failed(NO_TRAPS)),
            Some(BudgetSetting::Bytes(bytes)) => self.budget.limit = Some(bytes),
            Some(BudgetSetting::None) => self.budget.limit = None,
        }
        self.budget.next = Instant::now();
        Ok(self.budget.limit)
    }

    /// Stores, compressed pages, and the anonymous memory of VM processes, prepared ones included, as it is now.
    pub(super) fn accounted_bytes(&self) -> u64 {
        let pids = self.vms.iter().filter_map(|vm| self.memory_holder(vm.generation));
        let live: u64 = pids.filter_map(|pid| procfs::anonymous(pid).ok()).sum();
        self.kept_bytes() + self.books_bytes() + live + self.prepared_bytes()
    }

    /// The anonymous memory of prepared processes, as it is now.
    fn prepared_bytes(&self) -> u64 {
        let prepared = self.processes.values().filter(|process| process.role == Role::Pooled);
        prepared.filter_map(|process| procfs::anonymous(process.memory.main.get()?.as_raw()).ok()).sum()
    }

    /// Stores and compressed pages.
    fn kept_bytes(&self) -> u64 {
        self.stores_bytes() + self.swap.borrow().stats().compressed_bytes
    }

    /// What we need beyond compressed pages, and what a server needs anyway.
    fn books_bytes(&self) -> u64 {
        let own = procfs::anonymous(std::process::id() as i32).unwrap_or(0);
        own.saturating_sub(self.swap.borrow().stats().compressed_bytes + SERVER_BYTES)
    }

    fn stores_bytes(&self) -> u64 {
        self.families.values().map(|manager| manager.family().resident().bytes()).sum()
    }

    /// A VM's live layer has just been moved out: what its process has beside it is known.
    pub(super) fn layer_moved(&mut self, vm: Generation, moved: PageCount) {
        if let Some(bytes) = self.memory_holder(vm).and_then(|pid| procfs::anonymous(pid).ok()) {
            self.budget.layer_moved(vm, bytes, moved);
        }
    }

    fn memory_holder(&self, vm: Generation) -> Option<i32> {
        let process = self.vms.get(vm)?.process.and_then(|id| self.processes.get(&id))?;
        process.memory.main.get().or(process.memory.keeper.get()).map(|pid| pid.as_raw())
    }

    /// Keeps the budget. Whether there is more to do at once.
    pub(super) fn tend_budget(&mut self, now: Instant) -> bool {
        if !self.features.userfaultfd || self.stopping.is_some() {
            return false;
        }
        self.look_at_host(now);
        let looks = now >= self.budget.next;
        if looks {
            self.look(now);
        }
        let Some(limit) = self.budget.effective() else {
            self.budget.tight = false;
            self.release_all();
            return false;
        };
        // What VMs do is known as of the last look: in between, there are only stores to think of, however many VMs.
        let vms = if looks { self.vm_figures(now) } else { Vec::new() };
        let figures = self.figures(now, vms);
        self.budget.tight = figures.accounted > Marks::of(limit).target;
        let decision = decide(limit, &figures);
        if looks {
            self.budget.layers_go = !decision.freeze.is_empty();
        }
        if decision.release {
            self.release_all();
        }
        self.release_tired(now);
        for vm in decision.hold {
            self.hold(vm, now);
        }
        for vm in decision.freeze {
            self.freeze_to_swap(vm, false);
        }
        decision.evict > 0 && self.evict_in_turn(decision.evict, now)
    }

    /// Reads what cannot be known otherwise.
    fn look(&mut self, now: Instant) {
        let begun = Instant::now();
        let alive: Vec<(Generation, bool)> = self
            .vms
            .iter()
            .filter(|vm| vm.is_alive() && vm.memory.is_some())
            .map(|vm| (vm.generation, vm.paused))
            .collect();
        let is_alive: BTreeSet<Generation> = alive.iter().map(|(vm, _)| *vm).collect();
        self.budget.seen.retain(|vm, _| is_alive.contains(vm));
        self.budget.held.retain(|vm| self.vms.get(*vm).is_some_and(|vm| vm.hold != Hold::Free));
        for (vm, paused) in alive {
            let Some(pid) = self.memory_holder(vm) else { continue };
            let Ok(bytes) = procfs::anonymous(pid) else { continue };
            let seen = self.budget.seen.entry(vm).or_insert_with(|| Seen::new(now, bytes));
            seen.saw(now, bytes);
            if (seen.ticks == 0 || now >= seen.ticks_at + TICKS_EVERY)
                && let Ok(ticks) = procfs::run_ticks(pid)
            {
                seen.ran(now, ticks);
            }
            let idle = paused || now.saturating_duration_since(seen.ran_at) >= IDLE_AFTER;
            self.set_pace(vm, if idle { Pace::Idle } else { Pace::Running });
        }
        self.budget.live = self.budget.seen.values().map(|seen| seen.bytes).sum::<u64>() + self.prepared_bytes();
        self.budget.books = self.books_bytes();
        let bound = self.budget.effective().map_or(u64::MAX, |limit| limit / 4);
        self.swap.borrow_mut().bound(bound);
        let growth = self.budget.seen.values().map(|seen| seen.growth).filter(|growth| *growth >= SLOW).sum();
        let room = Room::of(self.budget.effective(), self.accounted());
        let took = begun.elapsed();
        self.budget.rest_until = now + took * STIRRED_SHARE;
        self.budget.next = now
            + match self.budget.effective() {
                Some(_) => interval(growth, room, took),
                None => CALM_LOOK,
            };
    }

    fn set_pace(&mut self, vm: Generation, pace: Pace) {
        if let Some((family, member)) = self.vms.get(vm).and_then(|vm| vm.memory) {
            self.families.get_mut(&family).expect("a VM has a family").set_pace(member, pace);
        }
    }

    /// A guest waits for a page. What was thought idle may be about to lose what it needs now.
    pub(super) fn has_trapped(&mut self, vm: Generation) {
        self.budget.stir();
        if self.budget.woke(vm) && self.vms.get(vm).is_some_and(|vm| !vm.paused) {
            self.set_pace(vm, Pace::Running);
        }
    }

    fn look_at_host(&mut self, now: Instant) {
        let budget = &mut self.budget;
        budget.shortage.take_if(|(_, until)| *until <= now);
        if now < budget.host_next || self.vms.iter().all(|vm| !vm.is_alive()) {
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
            self.budget.shortage = Some((limit, now + SHORTAGE));
        }
    }

    /// Whether little is left of the budget, or the host is short of memory.
    pub(super) fn is_memory_tight(&self) -> bool {
        Room::of(self.budget.effective(), self.accounted()) != Room::Plenty
    }

    /// What counts, with what was last seen of VM processes.
    fn accounted(&self) -> u64 {
        self.kept_bytes() + self.budget.books + self.budget.live
    }

    /// What VMs have, and do, as of the last look.
    fn vm_figures(&self, now: Instant) -> Vec<VmFigures> {
        let figures = |(&vm, seen): (&Generation, &Seen)| {
            let record = self.vms.get(vm)?;
            let free = record.hold == Hold::Free && record.phase == Phase::Live && record.forks.is_empty();
            let rested = seen.released.is_none_or(|at| now >= at + RUN_LEAST);
            Some(VmFigures {
                vm,
                live: seen.bytes.saturating_sub(seen.least),
                growth: seen.growth,
                idle: if record.paused { Duration::MAX } else { now.saturating_duration_since(seen.ran_at) },
                can_freeze: self.may_freeze(vm) && !seen.taken,
                can_hold: free && !record.paused && record.pausers.is_empty() && rested,
            })
        };
        self.budget.seen.iter().filter_map(figures).collect()
    }

    fn figures(&self, now: Instant, vms: Vec<VmFigures>) -> Figures {
        let empty = |(id, manager): (&FamilyId, &super::FamilyManager)| {
            self.budget.empty.get(id).is_some_and(|left| manager.family().resident() <= *left)
        };
        Figures {
            accounted: self.accounted(),
            stores: self.stores_bytes(),
            leaving: self.families.values().map(|manager| manager.family().unsettled().bytes()).sum(),
            vms,
            stores_empty: self.families.iter().all(empty),
            swap_full: self.budget.full_until.is_some_and(|until| now < until),
            freezing: self.reclaims.settling(),
            layers_go: self.budget.layers_go,
        }
    }

    /// Evicts a little, one family after the other. Whether there is more to do at once.
    fn evict_in_turn(&mut self, bytes: u64, now: Instant) -> bool {
        if !self.reclaims.may_put(now) {
            self.budget.next = self.budget.next.min(now + GROWING_LOOK);
            return false;
        }
        let turn = self.budget.turn;
        let after = self.families.range((std::ops::Bound::Excluded(turn), std::ops::Bound::Unbounded)).next();
        let Some((&family, _)) = after.or_else(|| self.families.iter().next()) else { return false };
        self.budget.turn = family;
        let limit = PageCount(bytes.div_ceil(PAGE_SIZE as u64));
        let (_, end) = self.evict(family, limit, now);
        let left = self.families[&family].family().resident();
        match end {
            Evicted::Some => drop(self.budget.empty.remove(&family)),
            Evicted::All => drop(self.budget.empty.insert(family, left)),
            Evicted::Behind => return false,
            Evicted::Full | Evicted::Failing => {
                self.budget.full_until = Some(now + QUIET_LOOK);
                return false;
            }
        }
        true
    }

    /// Has a VM stand still, without telling.
    fn hold(&mut self, generation: Generation, now: Instant) {
        if let (Some(vm), Some(seen)) = (self.vms.get_mut(generation), self.budget.seen.get_mut(&generation)) {
            vm.hold = Hold::Stopping;
            seen.held = Some(now);
            self.budget.held.insert(generation);
            self.tell(generation, &ToVm::Pause);
        }
    }

    /// Lets a VM run on.
    pub(super) fn release(&mut self, generation: Generation) {
        let Some(vm) = self.vms.get_mut(generation).filter(|vm| vm.hold == Hold::Held) else { return };
        vm.hold = Hold::Releasing;
        if let Some(seen) = self.budget.seen.get_mut(&generation) {
            (seen.held, seen.released) = (None, Some(Instant::now()));
        }
        self.tell(generation, &ToVm::Resume);
    }

    fn release_all(&mut self) {
        let held: Vec<Generation> = self.budget.held.iter().copied().collect();
        held.into_iter().for_each(|vm| self.release(vm));
    }

    /// Nobody stands still for long.
    fn release_tired(&mut self, now: Instant) {
        let since = |vm: &Generation| self.budget.seen.get(vm).and_then(|seen| seen.held);
        let tired = |vm: &Generation| since(vm).is_some_and(|at| now >= at + HOLD_MOST);
        let tired: Vec<Generation> = self.budget.held.iter().copied().filter(tired).collect();
        tired.into_iter().for_each(|vm| self.release(vm));
    }

    /// A VM runs again.
    pub(super) fn released(&mut self, generation: Generation) {
        self.budget.held.remove(&generation);
        let Some(vm) = self.vms.get_mut(generation) else { return };
        vm.hold = Hold::Free;
        for client in std::mem::take(&mut vm.late_pausers) {
            vm.pausers.push_back(client);
        }
        if !vm.pausers.is_empty() {
            self.tell(generation, &ToVm::Pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn vm(number: u64, live: u64) -> VmFigures {
        VmFigures {
            vm: Generation(number),
            live: live * MIB,
            growth: 0,
            idle: Duration::ZERO,
            can_freeze: true,
            can_hold: true,
        }
    }

    fn figures(accounted: u64, vms: &[VmFigures]) -> Figures {
        Figures { accounted: accounted * MIB, vms: vms.to_vec(), ..Figures::default() }
    }

    #[test]
    fn below_the_target_nothing_is_done() {
        let growing = VmFigures { growth: 100 * MIB, ..vm(1, 50) };
        let nothing = Decision { release: true, ..Decision::default() };
        assert_eq!(decide(160 * MIB, &figures(140, &[growing])), nothing);
    }

    #[test]
    fn frozen_pages_go_first_then_idle_layers_then_large_ones() {
        let idle = VmFigures { idle: Duration::from_secs(3), ..vm(1, 2) };
        let idler = VmFigures { idle: Duration::from_secs(9), ..vm(2, 2) };
        let vms = [vm(3, 60), idle, vm(4, 70), idler, VmFigures { can_freeze: false, ..vm(5, 99) }, vm(6, 0)];
        let mut all = Figures { stores: 30 * MIB, ..figures(144, &vms) };
        let decision = decide(160 * MIB, &all);
        assert_eq!((decision.evict, decision.freeze.len(), decision.hold.len()), (4 * MIB, 0, 0));
        all.stores_empty = true;
        assert_eq!(decide(160 * MIB, &all).freeze, [2, 1].map(Generation));
        all.vms.retain(|vm| vm.idle.is_zero());
        assert_eq!(decide(160 * MIB, &all).freeze, [4, 3].map(Generation));
        all.freezing = 1;
        assert_eq!(decide(160 * MIB, &all).freeze, [Generation(4)]);
        // What is on its way out is enough.
        all.leaving = 4 * MIB;
        assert_eq!(decide(160 * MIB, &all), Decision::default());
    }

    /// What is in stores came back because somebody works on it: idle machines' own pages go before the last of it.
    #[test]
    fn live_layers_go_before_the_last_of_stores() {
        let idle = VmFigures { live: 200 << 10, idle: Duration::from_secs(3), ..vm(1, 0) };
        let busy = VmFigures { live: 200 << 10, ..vm(2, 0) };
        let mut all = Figures { stores: 21 * MIB, ..figures(144, &[idle, busy]) };
        assert_eq!(decide(160 * MIB, &all), Decision { evict: 4 * MIB, ..Decision::default() });
        all.stores = 19 * MIB;
        assert_eq!(decide(160 * MIB, &all), Decision { freeze: vec![Generation(1)], ..Decision::default() });
        (all.stores, all.vms) = (19 * MIB, vec![busy]);
        assert_eq!(decide(160 * MIB, &all), Decision { evict: 4 * MIB, ..Decision::default() });
        all.freezing = 1;
        assert_eq!(decide(160 * MIB, &all), Decision::default());
    }

    #[test]
    fn near_the_limit_those_that_grow_stand_still() {
        let fast = VmFigures { growth: 100 * MIB, ..vm(1, 9) };
        let held = VmFigures { can_hold: false, ..fast };
        let mut all = figures(152, &[fast, VmFigures { vm: Generation(2), ..held }, vm(3, 90)]);
        assert_eq!(decide(160 * MIB, &all).hold, [Generation(1)]);
        all.accounted = 144 * MIB;
        assert_eq!(decide(160 * MIB, &all).hold, []);
        (all.accounted, all.swap_full) = (200 * MIB, true);
        assert_eq!(decide(160 * MIB, &all), Decision { release: true, ..Decision::default() });
    }

    #[test]
    fn the_faster_it_grows_the_sooner_the_next_look() {
        let at =
            |growth, used| interval(growth * MIB, Room::of(Some(400 * MIB), used * MIB), Duration::ZERO).as_millis();
        assert_eq!((at(0, 100), at(0, 390), at(100, 400), at(100, 390), at(1, 390)), (1000, 100, 10, 50, 100));
        assert_eq!(interval(100 * MIB, Room::Bytes(0), Duration::from_millis(2)).as_millis(), 40);
        assert_eq!(interval(0, Room::of(None, MIB), Duration::ZERO), QUIET_LOOK);
    }

    #[test]
    fn a_short_host_lowers_the_budget() {
        let none = |pressure, available| shortage(pressure, available, 8192 * MIB, 1600 * MIB).map(|bytes| bytes / MIB);
        assert_eq!((none(None, 4000 * MIB), none(Some(2.0), 4000 * MIB)), (None, None));
        assert_eq!((none(Some(40.0), 4000 * MIB), none(None, 156 * MIB)), (Some(1500), Some(1500)));
        assert_eq!(shortage(Some(90.0), 0, 8192 * MIB, 10 * MIB), None);
        assert_eq!(shortage(None, 0, 8192 * MIB, 100 * MIB), Some(MIN_MEMORY));
    }

    #[test]
    fn growth_and_idleness_are_seen() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut seen = Seen::new(start, 3 * MIB);
        seen.saw(at(20), 4 * MIB);
        assert_eq!(seen.growth / MIB, 50);
        seen.saw(at(100), 6 * MIB);
        assert_eq!((seen.growth / MIB, seen.bytes - seen.least), (100, 5 * MIB));
        seen.held = Some(at(100));
        seen.saw(at(200), 6 * MIB);
        assert_eq!(seen.growth / MIB, 100);
        seen.held = None;
        seen.saw(at(300), 2 * MIB);
        assert_eq!((seen.growth / MIB, seen.bytes - seen.least), (50, MIB));
        seen.ran(at(1000), 50);
        seen.ran(at(2000), 51);
        assert_eq!((seen.ran_at, seen.busy_at), (at(1000), at(1000)));
        seen.ran(at(3000), 56);
        assert_eq!((seen.ran_at, seen.busy_at), (at(3000), at(1000)));
        seen.ran(at(4000), 63);
        assert_eq!(seen.busy_at, at(4000));
    }
}
