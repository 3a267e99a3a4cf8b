//! What is to be done to keep a budget: pure functions of what was seen.

use crate::api::MIN_MEMORY;
use crate::server::ids::Generation;
use std::time::Duration;

/// How often to look while something grows, at most and at least.
pub(super) const BUSY_LOOK: Duration = Duration::from_millis(10);
pub(super) const GROWING_LOOK: Duration = Duration::from_millis(100);
/// How often to look while nothing does.
pub(super) const QUIET_LOOK: Duration = Duration::from_secs(1);
/// A look may take this part of the time between looks.
const LOOK_SHARE: u32 = 20;
/// A VM that has not run for this long is idle…
pub(super) const IDLE_AFTER: Duration = Duration::from_secs(2);
/// What may come and go between two looks: guests write hundreds of megabytes in a second, and what moves to swap is there
/// twice for a moment.
const SURPRISE: u64 = 24 << 20;
/// By the time that those who grow stand still, they have grown for this long.
const STOPPING: Duration = Duration::from_millis(40);
/// A live layer that is worth a freeze: of a VM that runs, and of one that is idle.
const WORTH_A_FREEZE: u64 = 1 << 20;
const WORTH_WHEN_IDLE: u64 = 128 << 10;
/// Live layers taken at a time.
const FREEZES: usize = 2;
/// The part of a budget that stores keep at least, where what cannot go leaves them less: VMs none of whose pages stay spend
/// their time bringing back the same ones.
const STORES_LEAST: u64 = 16;
/// Where pages come back as fast as they go, so many VMs of as many as run go on: the others stand still, by turns.
const ON_TURN: usize = 4;
/// A VM that grows by less in a second is let grow.
pub(super) const SLOW: u64 = 1 << 20;
/// Stalls for want of memory, in percent of the time, that make the host short of memory.
const PRESSURE: f64 = 10.0;

/// What a VM has, and does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VmFigures {
    pub(super) vm: Generation,
    /// Anonymous memory of its process beyond what a process has.
    pub(super) live: u64,
    /// By how much that grows in a second.
    pub(super) growth: u64,
    /// How long it has not run.
    pub(super) idle: Duration,
    /// A freeze of it can begin.
    pub(super) can_freeze: bool,
    /// It can be made to stand still.
    pub(super) can_hold: bool,
    /// How long it has run since it last stood still.
    pub(super) on: Duration,
}

/// All that counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Figures {
    /// Stores, compressed tier and VM processes together.
    pub(super) accounted: u64,
    /// Stores alone.
    pub(super) stores: u64,
    /// What no eviction takes: VM processes without their guests' pages, compressed pages, files, shared memory, and our books.
    pub(super) floor: u64,
    /// More came back since the last look than there is in stores.
    pub(super) thrashes: bool,
    /// On its way out of memory already.
    pub(super) leaving: u64,
    pub(super) vms: Vec<VmFigures>,
    /// Nothing in stores can be evicted.
    pub(super) stores_empty: bool,
    /// Swap takes no more.
    pub(super) swap_full: bool,
    /// Live layers that are being taken.
    pub(super) freezing: usize,
    /// They were to go when VMs were last looked at.
    pub(super) layers_go: bool,
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Decision {
    /// Bytes to evict from stores.
    pub(super) evict: u64,
    /// VMs whose live layers are to be taken.
    pub(super) freeze: Vec<Generation>,
    /// VMs that are to stand still.
    pub(super) hold: Vec<Generation>,
    /// Those that stand still may run.
    pub(super) release: bool,
}

/// A budget's marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marks {
    pub(super) target: u64,
    pub(super) brake: u64,
    /// The budget, or what comes nearest to it.
    pub(super) limit: u64,
    /// Stores that have less than this have what guests are at work on: live layers go before it.
    pub(super) stores: u64,
}

impl Marks {
    /// Those of a budget of `limit` bytes, of which `floor` cannot go. Where hardly anything is left beside that, the budget
    /// cannot be kept.
    pub(super) fn of(limit: u64, floor: u64) -> Self {
        let reserve = (limit / 16).max(SURPRISE.min(limit / 8)).min(256 << 20);
        let least = floor + limit / STORES_LEAST;
        let target = (limit - reserve).max(least);
        Self { target, brake: target + reserve / 2, limit: limit.max(target + reserve), stores: limit / 8 }
    }
}

impl VmFigures {
    /// How long it has been idle; nothing for a VM that runs.
    pub(super) fn idle_time(&self) -> Duration {
        if self.idle >= IDLE_AFTER { self.idle } else { Duration::ZERO }
    }

    pub(super) fn is_worth_it(&self) -> bool {
        self.live >= if self.idle >= IDLE_AFTER { WORTH_WHEN_IDLE } else { WORTH_A_FREEZE }
    }
}

pub(super) fn decide(limit: u64, figures: &Figures) -> Decision {
    let marks = Marks::of(limit, figures.floor);
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
    if figures.accounted > marks.brake || soon > marks.limit {
        let growing = figures.vms.iter().filter(|vm| vm.can_hold && vm.growth >= SLOW);
        decision.hold = growing.map(|vm| vm.vm).collect();
    }
    if figures.thrashes && marks.limit > limit {
        decision.hold.extend(turns(&figures.vms));
    }
    decision
}

/// Which VMs are to stand still so that the others keep the pages that they work on: those that have run the longest, so many
/// at each look that hardly [some](ON_TURN) run at a time.
fn turns(vms: &[VmFigures]) -> Vec<Generation> {
    let mut running: Vec<&VmFigures> =
        vms.iter().filter(|vm| vm.can_hold && vm.idle < IDLE_AFTER && vm.growth < SLOW).collect();
    running.sort_by_key(|vm| std::cmp::Reverse((vm.on, vm.vm)));
    let most = running.len().saturating_sub(ON_TURN).min(running.len().div_ceil(ON_TURN));
    running.iter().take(most).map(|vm| vm.vm).collect()
}

/// What is left of the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// A quarter, or more, or there is no budget.
    Plenty,
    /// So many bytes.
    Bytes(u64),
}

impl Room {
    pub(super) fn of(limit: Option<u64>, accounted: u64) -> Self {
        match limit {
            Some(limit) if accounted > limit / 4 * 3 => Self::Bytes(limit.saturating_sub(accounted)),
            _ => Self::Plenty,
        }
    }
}

/// When to look again, if a VM grows by `growth` bytes in a second and there is room for `room` more.
pub(super) fn interval(growth: u64, room: Room, took: Duration) -> Duration {
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
pub(super) fn shortage(pressure: Option<f64>, available: u64, total: u64, accounted: u64) -> Option<u64> {
    // In a small control group as well, guests may write for a moment before they are seen to.
    let least = (total / 32).max(SURPRISE.min(total / 4)).min(1 << 30);
    let missing = least.saturating_sub(available);
    let stalls = pressure.is_some_and(|percent| percent >= PRESSURE);
    let give = missing.max(if stalls { accounted / 16 } else { 0 });
    (give > 0 && accounted > MIN_MEMORY).then(|| accounted.saturating_sub(give).max(MIN_MEMORY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::memory::budget::seen::Seen;
    use std::time::Instant;

    const MIB: u64 = 1 << 20;

    fn vm(number: u64, live: u64) -> VmFigures {
        VmFigures {
            vm: Generation(number),
            live: live * MIB,
            growth: 0,
            idle: Duration::ZERO,
            can_freeze: true,
            can_hold: true,
            on: Duration::MAX,
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

    /// Under a budget that their processes alone took, sixty VMs brought in millions of pages in less than a minute, and
    /// kept none of them.
    #[test]
    fn a_budget_that_cannot_be_kept_leaves_something_to_work_on() {
        let all = Figures { stores: 6 * MIB, floor: 85 * MIB, ..figures(91, &[vm(1, 0)]) };
        assert_eq!(decide(96 * MIB, &all), Decision { release: true, ..Decision::default() });
        let more = Figures { stores: 8 * MIB, ..Figures { accounted: 93 * MIB, ..all.clone() } };
        assert_eq!(decide(96 * MIB, &more).evict, 2 * MIB);
        // One that can be kept is kept, whatever else counts.
        let less = Figures { floor: 60 * MIB, ..all };
        assert_eq!(decide(96 * MIB, &less).evict, 7 * MIB);
    }

    /// All get on, a few at a time: who has run the longest stands still first.
    #[test]
    fn where_pages_come_back_as_fast_as_they_go_vms_run_by_turns() {
        let vms: Vec<VmFigures> = (0..16).map(|n| VmFigures { on: Duration::from_millis(n), ..vm(n, 0) }).collect();
        let mut all = Figures { stores: 7 * MIB, floor: 85 * MIB, thrashes: true, ..figures(92, &vms) };
        assert_eq!(decide(96 * MIB, &all).hold, [15, 14, 13, 12].map(Generation));
        all.vms.truncate(ON_TURN);
        assert_eq!(decide(96 * MIB, &all).hold, [], "few enough");
        all.vms = vms.clone();
        all.vms.iter_mut().for_each(|vm| vm.idle = IDLE_AFTER);
        assert_eq!(decide(96 * MIB, &all).hold, [], "they stand still as it is");
        all.vms = vms;
        all.floor = 0;
        assert_eq!(decide(96 * MIB, &all).hold, [], "a budget that can be kept");
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
