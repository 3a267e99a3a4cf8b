//! `check`: the invariants, on the live server.
//!
//! The books check themselves ([`Family::check_invariants`](guest_mem::family::Family::check_invariants)). Here they
//! are held against the world: stores against the extents of their memfds, windows against `/proc/PID/maps` and the
//! pagemap, and every VM process is asked to try to write to a store.

use super::Server;
use super::clients::ClientId;
use super::vm::{FamilyId, Generation, Vm};
use crate::api::{Answer, CheckReport};
use crate::procfs::{self, Mapping};
use crate::wire::ToVm;
use guest_mem::check::check_swap;
use guest_mem::family::Family;
use guest_mem::{Gfn, GfnRange, PAGE_SHIFT, Run, Source};
use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Checks under way.
#[derive(Debug, Default)]
pub struct Checks(Vec<Check>);

#[derive(Debug)]
struct Check {
    client: ClientId,
    report: CheckReport,
    /// What is still to be looked at: a part in a round, since others wait meanwhile.
    left: VecDeque<Part>,
    /// VM processes that have still to tell how their attempts went.
    awaited: BTreeSet<Generation>,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    Books(FamilyId),
    Stores(FamilyId),
    Swap,
    /// What a VM's window shows, and its live layer; at this time, and how often again if something is broken.
    Window(Generation, Instant, u32),
    Isolation,
}

/// A guest gives pages back when it likes: the window shows it a moment before we hear of it. What is broken is still so
/// after so many looks, and everything was heard between them.
const LOOKS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(1);

impl Server {
    pub(super) fn check(&mut self, client: ClientId) {
        let report = CheckReport::default();
        let books = self.families.keys().flat_map(|&family| [Part::Books(family), Part::Stores(family)]);
        let windows = self.vms.iter().map(|vm| Part::Window(vm.generation, Instant::now(), LOOKS));
        let left = books.chain([Part::Swap]).chain(windows).chain([Part::Isolation]).collect();
        self.checks.0.push(Check { client, report, left, awaited: BTreeSet::new() });
    }

    /// Goes on with a part of each check. When there is more to do.
    pub(super) fn tend_checks(&mut self, now: Instant) -> Option<Instant> {
        let mut checks = std::mem::take(&mut self.checks.0);
        for Check { report, left, awaited, .. } in &mut checks {
            match left.pop_front() {
                None => {}
                Some(Part::Books(family)) => {
                    let books = self.families.get(&family).map(|manager| manager.family().check_invariants());
                    report.broken.extend(books.and_then(Result::err).into_iter().flatten());
                }
                Some(Part::Stores(family)) => {
                    if let Some(manager) = self.families.get(&family) {
                        manager.check_stores(&mut report.broken);
                    }
                }
                Some(Part::Swap) => self.check_swap(report),
                Some(part @ Part::Window(_, at, _)) if at > now => left.push_front(part),
                Some(Part::Window(generation, _, looks)) => {
                    let one = self.check_window(generation);
                    if !one.broken.is_empty() && looks > 1 {
                        left.push_front(Part::Window(generation, now + PAUSE, looks - 1));
                    } else {
                        report.vms += one.vms;
                        report.mappings += one.mappings;
                        report.pages += one.pages;
                        report.broken.extend(one.broken);
                    }
                }
                Some(Part::Isolation) => *awaited = self.probe_isolation(),
            }
        }
        checks.append(&mut self.checks.0);
        self.checks.0 = checks;
        let next = self.checks.0.iter().filter_map(|check| match check.left.front()? {
            Part::Window(_, at, _) => Some(*at),
            _ => Some(now),
        });
        next.min()
    }

    /// 4: no slot of swap is owned twice, and those in use are those that are owned.
    fn check_swap(&self, report: &mut CheckReport) {
        let families: Vec<&Family> = self.families.values().map(|manager| manager.family()).collect();
        check_swap(families.iter().copied(), Some(&*self.swap.borrow()), &mut report.broken);
        let owned: u64 = families.iter().flat_map(|family| family.swap_slots()).map(|(_, count)| count.0).sum();
        let used = self.swap.borrow().stats().slots_used;
        if owned != used {
            report.broken.push(format!("4: {used} slots of swap are in use, the books own {owned}"));
        }
    }

    /// 8, 9 and 10: what a VM process really maps.
    fn check_window(&self, generation: Generation) -> CheckReport {
        let mut report = CheckReport::default();
        let steady = |vm: &&Vm| vm.is_alive() && vm.forks.is_empty() && vm.reclaiming.is_none();
        let Some(vm) = self.vms.get(generation).filter(steady) else { return report };
        report.vms = 1;
        let Some((family, member)) = vm.memory else { return report };
        let Some(process) = vm.process.and_then(|id| self.processes.get(&id)) else { return report };
        let Some(pid) = process.memory.main.get().filter(|_| process.ready && process.waiting.is_empty()) else {
            return report;
        };
        let manager = &self.families[&family];
        let runs = manager.family().runs(member);
        if runs.len() > self.max_runs as usize {
            report.broken.push(format!("8: the window of {:?} has {} runs", vm.name, runs.len()));
        }
        let base = process.memory.base.get();
        let bounds = base..base + runs.last().map_or(0, |run| run.pages.end().gpa());
        // One that was killed a moment ago has none, and will be reaped.
        let Ok(mappings) = procfs::mappings(pid.as_raw(), &bounds) else { return report };
        report.mappings += mappings.len() as u64;
        report.pages += self.live_layer(vm).iter().map(|part| part.end - part.start).sum::<u64>();
        for run in runs.iter() {
            let inode = match run.source {
                Source::Anonymous => Some(0),
                Source::Store { store, .. } => {
                    manager.store(store).map(|s| s.inode()).or_else(|| manager.file(store).map(|f| f.inode()))
                }
            };
            if let Err(what) = check_run(run, inode, &mappings, base) {
                report.broken.push(format!("8: the window of {:?} at {:?}: {what}", vm.name, run.pages));
            }
        }
        if let Some(shared) = mappings.iter().find(|mapping| !mapping.private) {
            report.broken.push(format!("10: {:?} has a shared mapping at {:#x}", vm.name, shared.addresses.start));
        }
        report
    }

    /// 10: asks every VM process to try to write to a store of its own family.
    fn probe_isolation(&mut self) -> BTreeSet<Generation> {
        let mut awaited = BTreeSet::new();
        for vm in self.vms.iter().filter(|vm| vm.is_alive()) {
            let (Some((family, member)), Some(id)) = (vm.memory, vm.process) else { continue };
            let manager = &self.families[&family];
            let store = manager.family().runs(member).iter().find_map(|run| match run.source {
                Source::Store { store, .. } => manager.store(store),
                Source::Anonymous => None,
            });
            let Some(process) = self.processes.get_mut(&id).filter(|p| p.ready && p.waiting.is_empty()) else {
                continue;
            };
            if let Some(store) = store {
                process.send(&ToVm::Probe, &[store.read_only()]);
                awaited.insert(vm.generation);
            }
        }
        awaited
    }

    /// A VM process tells how its attempt went.
    pub(super) fn probed(&mut self, generation: Generation, ways: Vec<String>) {
        let name = self.vms.get(generation).map_or("?", |vm| vm.name.as_str());
        let isolated = self.isolation != crate::wire::Isolation::Off;
        for check in &mut self.checks.0 {
            if check.awaited.remove(&generation) && isolated {
                check.report.broken.extend(ways.iter().map(|way| format!("10: {name:?} can write to a store: {way}")));
            }
        }
    }

    /// A VM that has ended tells nothing more.
    pub(super) fn check_lost_vm(&mut self, generation: Generation) {
        for check in &mut self.checks.0 {
            check.awaited.remove(&generation);
        }
    }

    /// Answers the checks that have heard from everybody.
    pub(super) fn finish_checks(&mut self) {
        let done: Vec<Check> = self.checks.0.extract_if(.., Check::is_done).collect();
        for check in done {
            self.reply(check.client, Ok(Answer::Checked(check.report)));
        }
    }
}

impl Check {
    fn is_done(&mut self) -> bool {
        self.left.is_empty() && self.awaited.is_empty()
    }
}

/// Whether mappings show a run: the file that it should be (any, where the store is gone because all of it is zero), at
/// the right offset, private, without holes.
fn check_run(run: &Run, inode: Option<u64>, mappings: &[Mapping], base: u64) -> Result<(), String> {
    let mut at = run.pages.start();
    for mapping in mappings {
        let pages = GfnRange::between(frame(mapping.addresses.start, base), frame(mapping.addresses.end, base));
        let part = pages.intersect(run.pages);
        if part.is_empty() {
            continue;
        }
        if part.start() > at {
            return Err(format!("nothing is mapped at {at}"));
        }
        if !mapping.private || !mapping.writable {
            return Err(format!("the mapping at {} is not private and writable", part.start()));
        }
        if inode.is_some_and(|inode| inode != mapping.inode) {
            return Err(format!("inode {} is mapped, {inode:?} should be", mapping.inode));
        }
        if let Source::Store { origin, .. } = run.source {
            let index = (mapping.offset >> PAGE_SHIFT) + (part.start().0 - pages.start().0);
            if index != part.start().0 - origin.0 {
                return Err(format!("page {index:#x} of the store is mapped at {}", part.start()));
            }
        }
        at = part.end();
    }
    if at < run.pages.end() { Err(format!("nothing is mapped at {at}")) } else { Ok(()) }
}

fn frame(address: u64, base: u64) -> Gfn {
    Gfn(address.saturating_sub(base) >> PAGE_SHIFT)
}
