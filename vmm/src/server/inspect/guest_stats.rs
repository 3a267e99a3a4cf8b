//! What guests say of their memory: their balloon drivers tell when they are asked to.
//!
//! Nobody is asked but for a reason: it wakes an idle guest, and has it write. `stats NAME` asks and waits for a moment;
//! `stats` of all shows what was said last.

use crate::server::Server;
use crate::server::clients::deadlines::Deadline;
use crate::server::guest::stats::GuestMemory;
use crate::server::ids::{ClientId, Generation};
use crate::server::inspect::look::Wanted;
use crate::wire::ToVm;
use std::time::Instant;

/// How long `stats` waits for a guest.
const PATIENCE_MS: u64 = 1000;

impl Server {
    /// `stats` of one VM, whose guest is asked first if it can answer.
    pub fn stats_of(&mut self, client: ClientId, name: &str) {
        let asked = self.find(name).ok().filter(|vm| vm.can_tell()).map(|vm| vm.generation);
        match asked {
            Some(vm) => {
                self.inspect.stats_waiters.push((client, vm));
                self.set_deadline(Some(PATIENCE_MS), Deadline::Stats(vm, client));
                self.tell(vm, &ToVm::AskStats);
            }
            None => self.begin_look(client, Wanted::Stats(Some(name.into()))),
        }
    }

    /// A guest has told how it is off for memory.
    pub fn guest_told(&mut self, generation: Generation, figures: &[(u16, u64)]) {
        if let Some(vm) = self.registry.vms.get_mut(generation) {
            vm.guest_memory = Some(GuestMemory::new(figures, Instant::now()));
        }
        self.answer_stats_waiters(generation);
    }

    /// Those who asked for a guest's figures wait no longer.
    pub fn answer_stats_waiters(&mut self, generation: Generation) {
        let waiting: Vec<_> = self.inspect.stats_waiters.extract_if(.., |(_, vm)| *vm == generation).collect();
        let Some(name) = self.registry.vms.get(generation).map(|vm| vm.name.clone()) else { return };
        for (client, _) in waiting {
            self.deadlines.met(Deadline::Stats(generation, client));
            self.begin_look(client, Wanted::Stats(Some(name.clone())));
        }
    }
}
