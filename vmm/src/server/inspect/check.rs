//! `check`: the invariants, on the live server.
//!
//! The books check themselves, part by part ([`Family::check_part`](guest_mem::family::Family::check_part)). Here they
//! are held against the world: stores against the extents of their memfds, windows against `/proc/PID/maps` and the
//! pagemap, and every VM process is asked to try to write to a store.

use super::windows::{check_run, frame};
use crate::api::{Answer, CheckReport};
use crate::procfs::{self, Mapping};
use crate::server::aside::{Finding, LiveLayer, Ticket};
use crate::server::ids::{ClientId, FamilyId, Generation};
use crate::server::registry::vm::Vm;
use crate::server::{FamilyManager, Server};
use crate::wire::ToVm;
use guest_mem::check::{Part as BooksPart, check_swap};
use guest_mem::space::runs::Runs;
use guest_mem::store::memfd;
use guest_mem::{GfnRange, PageCount, PageRange, Protection, Source, StoreId};
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::time::{Duration, Instant};

/// Checks under way; the first that has something left to look at has its turn.
#[derive(Debug, Default)]
pub struct Checks(Vec<Check>);

#[derive(Debug)]
struct Check {
    client: ClientId,
    report: CheckReport,
    /// What is still to be looked at: a part in a round, since others wait meanwhile.
    left: VecDeque<CheckPart>,
    /// What the first of these parts has asked aside.
    asked: Option<Ticket>,
    /// VM processes that have still to tell how their attempts went.
    awaited: BTreeSet<Generation>,
    /// They are not waited for any longer.
    until: Option<Instant>,
}

#[derive(Clone, Debug)]
enum CheckPart {
    /// What the books say.
    Books(FamilyId, BooksPart),
    /// What a store has: the kernel lists it.
    Store(FamilyId, StoreId),
    Swap,
    Window(CheckedWindow),
    Isolation,
}

/// What a VM's window shows, and its live layer.
#[derive(Clone, Debug)]
struct CheckedWindow {
    vm: Generation,
    /// Not to be looked at before.
    at: Instant,
    /// How often again if something is broken.
    looks: u32,
    /// What the books said when the kernel was asked.
    told: Option<Runs>,
}

/// Frames of a family that are checked at a time: 64 MiB.
const FRAMES: PageCount = PageCount(1 << 14);

/// A guest gives pages back when it likes: the window shows it a moment before we hear of it. What is broken is still so
/// after so many looks, and everything was heard between them.
const LOOKS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(1);

impl Server {
    pub fn check(&mut self, client: ClientId) {
        let report = CheckReport::default();
        let mut left = VecDeque::new();
        for (&family, manager) in &self.memory.families {
            left.extend(manager.family().check_parts(FRAMES).into_iter().map(|part| CheckPart::Books(family, part)));
            left.extend(manager.stores().map(|store| CheckPart::Store(family, store)));
        }
        left.push_back(CheckPart::Swap);
        let window = |vm: &Vm| CheckedWindow { vm: vm.generation, at: Instant::now(), looks: LOOKS, told: None };
        left.extend(self.registry.vms.iter().map(|vm| CheckPart::Window(window(vm))));
        left.push_back(CheckPart::Isolation);
        self.inspect.checks.0.push(Check { client, report, left, asked: None, awaited: BTreeSet::new(), until: None });
    }

    /// Goes on with a part of a check. When there is more to do, unless something is to be heard first.
    pub fn tend_checks(&mut self, now: Instant) -> Option<Instant> {
        let mut checks = std::mem::take(&mut self.inspect.checks.0);
        if let Some(check) = checks.iter_mut().find(|check| !check.left.is_empty()) {
            self.go_on_checking(check, now);
        }
        checks.append(&mut self.inspect.checks.0);
        self.inspect.checks.0 = checks;
        let late = self.give_up_late(now);
        let next = self.inspect.checks.0.iter().find(|check| !check.left.is_empty()).and_then(|next| {
            match next.left.front()? {
                _ if next.asked.is_some() => None,
                CheckPart::Window(window) => Some(window.at),
                _ => Some(now),
            }
        });
        next.into_iter().chain(late).min()
    }

    /// Checks wait no longer for processes that do not answer. When the next one would.
    fn give_up_late(&mut self, now: Instant) -> Option<Instant> {
        for check in self.inspect.checks.0.iter_mut().filter(|check| check.until.is_some_and(|until| until <= now)) {
            check.until = None;
            for vm in std::mem::take(&mut check.awaited) {
                let name = self.registry.vms.get(vm).map_or("?", |vm| vm.name.as_str());
                check.report.broken.push(format!("10: {name:?} does not say whether it can write to a store"));
            }
        }
        self.inspect.checks.0.iter().filter_map(|check| check.until).min()
    }

    fn go_on_checking(&mut self, check: &mut Check, now: Instant) {
        let Check { report, left, asked, awaited, until, .. } = check;
        let Some(part) = left.front_mut().filter(|_| asked.is_none()) else { return };
        match part {
            CheckPart::Books(family, part) => {
                if let Some(manager) = self.memory.families.get(family) {
                    manager.family().check_part(*part, &mut report.broken);
                }
            }
            CheckPart::Store(family, store) => *asked = self.ask_extents(*family, *store),
            CheckPart::Swap => self.check_swap(report),
            CheckPart::Window(window) if window.at > now => return,
            CheckPart::Window(window) => match self.ask_mappings(window.vm) {
                Some((ticket, told)) => (*asked, window.told) = (Some(ticket), Some(told)),
                None => report.vms += u64::from(self.steady(window.vm).is_some()),
            },
            CheckPart::Isolation => {
                (*awaited, *until) = (self.probe_isolation(), Some(now + self.procs.patience.within()))
            }
        }
        if asked.is_none() {
            left.pop_front();
        }
    }

    /// Takes out the part that asked this.
    fn take_asked(&mut self, ticket: Ticket) -> Option<CheckPart> {
        let check = self.inspect.checks.0.iter_mut().find(|check| check.asked == Some(ticket))?;
        check.asked = None;
        check.left.pop_front()
    }

    /// The check that has its turn. One that has had an answer has something left: isolation is looked at last.
    fn current_check(&mut self) -> Option<&mut Check> {
        self.inspect.checks.0.iter_mut().find(|check| !check.left.is_empty())
    }

    /// 3 and 6: has what is in a store listed.
    fn ask_extents(&mut self, family: FamilyId, store: StoreId) -> Option<Ticket> {
        let manager = self.memory.families.get_mut(&family)?;
        let file = manager.store(store)?.read_only().try_clone_to_owned().ok()?;
        manager.watch_store(store);
        Some(self.inspect.aside.ask(move || Finding::Extents(memfd::extents(file))))
    }

    /// What is in a store has been listed.
    pub fn extents_came(&mut self, ticket: Ticket, extents: io::Result<Vec<PageRange>>) {
        let Some(CheckPart::Store(family, store)) = self.take_asked(ticket) else { return };
        let mut broken = Vec::new();
        match (self.memory.families.get_mut(&family), extents) {
            (None, _) => {}
            (Some(manager), Ok(extents)) => manager.check_store(store, &extents, &mut broken),
            (Some(_), Err(error)) => broken.push(format!("3: {store:?} cannot tell what it has: {error}")),
        }
        if let Some(check) = self.current_check() {
            check.report.broken.extend(broken);
        }
    }

    /// 4: no slot of swap is owned twice, and those in use are those that are owned.
    fn check_swap(&self, report: &mut CheckReport) {
        let owned = || self.memory.families.values().flat_map(FamilyManager::swap_slots);
        check_swap(owned(), Some(&*self.memory.swap.borrow()), &mut report.broken);
        let owned: u64 = owned().map(|(_, count)| count.0).sum();
        let used = self.memory.swap.borrow().stats().slots_used;
        if owned != used {
            report.broken.push(format!("4: {used} slots of swap are in use, the books own {owned}"));
        }
    }

    /// A VM whose window can be checked now: nothing is under way that changes it.
    fn steady(&self, vm: Generation) -> Option<&Vm> {
        self.registry.vms.get(vm).filter(|vm| vm.is_alive() && vm.freezes.is_idle())
    }

    /// Has what a VM process maps listed, and tells what it should.
    fn ask_mappings(&mut self, generation: Generation) -> Option<(Ticket, Runs)> {
        let vm = self.steady(generation)?;
        let (family, member) = vm.memory?;
        let process = self.procs.all.get(&vm.process?)?;
        let pid = process.memory.main().filter(|_| process.ready && process.waiting.is_empty())?;
        let told = self.memory.families[&family].family().runs(member).clone();
        let base = process.memory.base.get();
        let bounds = base..base + told.last().map_or(0, |run| run.pages.end().gpa());
        let (maps, layer) = (procfs::maps(pid.as_raw()), self.live_layer(vm));
        let ticket = self.inspect.aside.ask(move || {
            let live = layer.map(LiveLayer::read).unwrap_or_default();
            let mappings = maps.and_then(|maps| procfs::mappings(maps, &bounds));
            Finding::Window(mappings, live.iter().map(|part| part.end - part.start).sum())
        });
        Some((ticket, told))
    }

    /// What a VM process maps has been listed.
    pub fn window_seen(&mut self, ticket: Ticket, mappings: io::Result<Vec<Mapping>>, live: u64) {
        let Some(CheckPart::Window(window)) = self.take_asked(ticket) else { return };
        let again = CheckedWindow { at: Instant::now() + PAUSE, ..window.clone() };
        let Some(vm) = self.steady(window.vm) else { return };
        let told = vm.memory.map(|(family, member)| self.memory.families[&family].family().runs(member).clone());
        let one = match (&told, mappings) {
            (Some(told), Ok(mappings)) => self.check_window(vm, told, &mappings, live),
            // One that was killed a moment ago has none, and will be reaped.
            _ => CheckReport { vms: 1, ..CheckReport::default() },
        };
        let again = match (one.broken.is_empty(), told == window.told) {
            (true, _) => None,
            // Its window has changed meanwhile.
            (false, false) => Some(again),
            (false, true) => (window.looks > 1).then(|| CheckedWindow { looks: window.looks - 1, ..again }),
        };
        let Some(check) = self.current_check() else { return };
        match again {
            Some(again) => check.left.push_front(CheckPart::Window(again)),
            None => {
                check.report.vms += one.vms;
                check.report.mappings += one.mappings;
                check.report.pages += one.pages;
                check.report.broken.extend(one.broken);
            }
        }
    }

    /// 8, 9 and 10: what a VM process really maps is what the books tell.
    fn check_window(&self, vm: &Vm, told: &Runs, mappings: &[Mapping], live: u64) -> CheckReport {
        let mut report = CheckReport { vms: 1, ..CheckReport::default() };
        let Some((family, process)) = vm.memory.map(|(family, _)| family).zip(vm.process) else { return report };
        let Some(process) = self.procs.all.get(&process) else { return report };
        let manager = &self.memory.families[&family];
        if told.len() > self.host.max_runs as usize {
            report.broken.push(format!("8: the window of {:?} has {} runs", vm.name, told.len()));
        }
        let base = process.memory.base.get();
        let map = vm.memory.map(|(_, member)| manager.family().vm(member).map());
        let read_only =
            map.into_iter().flat_map(|map| map.protected(Protection::ReadOnly)).map(GfnRange::raw).collect();
        report.mappings += mappings.len() as u64;
        report.pages += live;
        for run in told.iter() {
            let inode = match run.source {
                Source::Anonymous => Some(0),
                Source::Store { store, .. } | Source::Shared { store, .. } => {
                    manager.store(store).map(|s| s.inode()).or_else(|| manager.file(store).map(|f| f.inode()))
                }
            };
            if let Err(what) = check_run(run, inode, &read_only, (mappings, base)) {
                report.broken.push(format!("8: the window of {:?} at {:?}: {what}", vm.name, run.pages));
            }
        }
        // Runs of shared memory have been compared with what is mapped there.
        let may_share = |mapping: &Mapping| {
            let at = GfnRange::between(frame(mapping.addresses.start, base), frame(mapping.addresses.end, base));
            let shared = told.iter().filter(|run| matches!(run.source, Source::Shared { .. }));
            shared.map(|run| run.pages.intersect(at)).any(|part| part == at)
        };
        if let Some(shared) = mappings.iter().find(|mapping| !mapping.private && !may_share(mapping)) {
            report.broken.push(format!("10: {:?} has a shared mapping at {:#x}", vm.name, shared.addresses.start));
        }
        report
    }

    /// 10: asks every VM process to try to write to a store of its own family.
    fn probe_isolation(&mut self) -> BTreeSet<Generation> {
        let mut awaited = BTreeSet::new();
        for vm in self.registry.vms.iter().filter(|vm| vm.is_alive()) {
            let (Some((family, member)), Some(id)) = (vm.memory, vm.process) else { continue };
            let manager = &self.memory.families[&family];
            let store = manager.family().runs(member).iter().find_map(|run| match run.source {
                Source::Store { store, .. } => manager.store(store),
                Source::Anonymous | Source::Shared { .. } => None,
            });
            let Some(process) = self.procs.all.get_mut(&id).filter(|p| p.ready && p.waiting.is_empty()) else {
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
    pub fn probed(&mut self, generation: Generation, ways: Vec<String>) {
        let name = self.registry.vms.get(generation).map_or("?", |vm| vm.name.as_str());
        let isolated = self.host.isolation != crate::wire::Isolation::Off;
        for check in &mut self.inspect.checks.0 {
            if check.awaited.remove(&generation) && isolated {
                check.report.broken.extend(ways.iter().map(|way| format!("10: {name:?} can write to a store: {way}")));
            }
        }
    }

    /// A VM that has ended tells nothing more.
    pub fn check_lost_vm(&mut self, generation: Generation) {
        for check in &mut self.inspect.checks.0 {
            check.awaited.remove(&generation);
        }
    }

    /// Answers the checks that have heard from everybody.
    pub fn finish_checks(&mut self) {
        let done: Vec<Check> = self.inspect.checks.0.extract_if(.., Check::is_done).collect();
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
