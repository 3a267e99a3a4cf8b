//! The loop: what an event is for, and what is done between rounds.

use crate::server::aside::Finding;
use crate::server::procs::process::{Parcel, Role};
use crate::server::procs::window::Want;
use crate::server::registry::phase::Phase;
use crate::server::registry::vm::Vm;
use crate::server::watch::Origin;
use crate::server::{FamilyManager, Server};
use crate::wire::ToVm;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::os::fd::AsFd;
use std::time::Instant;

impl MutEventSubscriber for Server {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let Some((_, origin)) = self.watches.source(&events) else { return };
        match origin {
            Origin::Listener => self.clients.accept(Instant::now(), &mut self.watches),
            Origin::Signals => self.take_signals(),
            Origin::Client(client) => self.serve_client(client),
            Origin::Door(vm) => self.answer_door(vm),
            Origin::Visitor(visitor) => self.hear_visitor(visitor),
            Origin::Process(process) => self.hear_process(process),
            Origin::Traps(process) if events.event_set().contains(EventSet::ERROR) => self.traps_broken(process),
            Origin::Traps(process) => self.serve_traps(process),
            Origin::Swap => self.swap_moved(),
            Origin::Files => self.file_read(),
            Origin::Aside => self.told_aside(),
            Origin::Zygote => self.hear_zygote(),
            Origin::Home => self.home_changed(),
        }
        self.grant_wants();
    }

    fn init(&mut self, _ops: &mut EventOps) {
        self.clients.listener().listen(&mut self.watches);
        self.watches.add(&self.signals, EventSet::IN, Origin::Signals);
        self.watches.add(self.memory.files.bell(), EventSet::IN, Origin::Files);
        self.watches.add(self.inspect.aside.bell(), EventSet::IN, Origin::Aside);
        // So that it is there when it is needed.
        if let Err(error) = self.start_zygote() {
            log::warn!("start a zygote: {error}");
        }
        if let Some(watch) = self.kept_home.watch() {
            self.watches.add(&watch.as_fd(), EventSet::IN, Origin::Home);
        }
    }
}

impl Server {
    /// What is done when no event waits. How long the loop may wait for the next, in milliseconds.
    pub fn between_rounds(&mut self) -> i32 {
        let now = Instant::now();
        self.host.latency.tend(now);
        let hurried = self.forks.hurry(now);
        if !hurried {
            self.record_names();
        }
        for client in self.clients.take_pending() {
            self.hear(client);
        }
        self.pass_deadlines(now);
        let settling = self.settle(now);
        self.grant_wants();
        self.tend_dedups();
        self.answer_waiting_forks();
        let reclaiming = self.tend_reclaims(now) | self.tend_budget(now);
        self.tend_idle(now);
        self.watch_swap();
        self.memory.swap.borrow_mut().trim();
        self.grant_wants();
        let bringing = self.bring_ahead();
        let filling = self.tend_pool(now, settling || bringing);
        self.tend_lingering();
        self.end_strays(now);
        let late = self.tend_answers(now).into_iter().chain(self.tend_zygote(now)).min();
        self.finish_removals(now);
        self.clients.tend(now, &mut self.watches);
        self.mend_home(now);
        let checking = self.tend_checks(now);
        self.finish_checks();
        let looking = self.tend_looks();
        let (past, budget) = (&mut self.memory.past, &mut self.memory.budget);
        self.memory.families.retain(|&family, manager| {
            let lives = manager.windows() > 0 || manager.has_writeback();
            if !lives {
                *past = *past + manager.counts();
                budget.forget(family);
            }
            lives
        });
        self.procs.pool.retain(|parent| self.registry.vms.get(parent).is_some_and(Vm::is_alive));
        let busy = reclaiming
            || bringing
            || filling
            || looking
            || checking.is_some_and(|at| at <= now)
            || self.clients.has_pending();
        if settling || busy {
            return self.memory.pace.wait(now).filter(|_| !busy).map_or(0, |wait| wait.as_millis() as i32);
        }
        if !hurried {
            self.memory.families.values_mut().for_each(FamilyManager::stock_up);
        }
        let pool = self.procs.pool.next_look();
        let next =
            self.deadlines.next().into_iter().chain(self.memory.retries.values().copied()).chain(pool).chain(checking);
        let next = next.chain(self.memory.reclaims.next_look()).chain(self.memory.budget.next_look(&self.registry.vms));
        let next = next
            .chain(self.registry.removals.next_look(now))
            .chain(late)
            .chain(self.forks.rest_at(now))
            .chain(self.forks.next_look(now))
            .chain(self.procs.children.next_look(now))
            .chain(self.clients.next_look())
            .chain(self.kept_home.next_look());
        let next = next.chain(self.next_idle_look()).chain(self.host.latency.until()).min();
        next.map_or(-1, |at| at.saturating_duration_since(now).as_millis().min(60_000) as i32 + 1)
    }

    /// Does what windows asked for.
    pub fn grant_wants(&mut self) {
        loop {
            let Some((id, want)) = self.wants.borrow_mut().pop_front() else { return };
            let Some(process) = self.procs.all.get_mut(&id) else { continue };
            match want {
                Want::DropScratch(store) => {
                    // Its memory is less from now on.
                    self.memory.budget.stir();
                    process.send(&ToVm::DropScratch(store), &[]);
                }
                Want::LeaveScratch(store, pages) => {
                    process.send(&ToVm::LeaveScratch { store, pages }, &[]);
                }
                Want::Protect(pages, protection) => {
                    let message = ToVm::Protect { pages, protection };
                    process.send_when_ready(Parcel { message, descriptors: Vec::new() });
                }
                Want::Room => self.watch_process(id),
                Want::Answer => self.procs.patience.begin(Instant::now()),
                Want::Release => self.end_process(id),
                Want::Fail(why) => {
                    if let Role::Vm(generation) = process.role {
                        self.end_vm(generation, Phase::Dead(why));
                    }
                }
            }
        }
    }

    /// Something that was asked aside has been found out.
    fn told_aside(&mut self) {
        for (ticket, finding) in self.inspect.aside.answers() {
            match finding {
                Finding::Usage(usage) => self.usage_came(ticket, usage),
                Finding::Layers(layers) => self.layers_came(ticket, layers),
                Finding::Window(mappings, live) => self.window_seen(ticket, mappings, live),
                Finding::Extents(extents) => self.extents_came(ticket, extents),
            }
        }
    }
}
