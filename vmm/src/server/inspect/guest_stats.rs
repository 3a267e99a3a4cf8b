//! What guests say of their memory: their balloon drivers tell when they are asked to.
//!
//! Nobody is asked but for a reason: it wakes an idle guest, and has it write. `stats NAME` asks and waits for a moment;
//! `stats` of all shows what was said last.

use crate::api::GuestStats;
use crate::server::Server;
use crate::server::clients::deadlines::Deadline;
use crate::server::ids::{ClientId, Generation};
use crate::server::inspect::look::Wanted;
use crate::server::registry::vm::Vm;
use crate::wire::ToVm;
use std::time::Instant;

/// How long `stats` waits for a guest.
const PATIENCE_MS: u64 = 1000;

/// What a guest has said, and when.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory {
    /// Without its age.
    said: GuestStats,
    at: Instant,
}

impl GuestMemory {
    /// What figures with tags of the specification say. Tags that nobody knows are for later drivers.
    fn new(figures: &[(u16, u64)], at: Instant) -> Self {
        let mut said = GuestStats::default();
        for &(tag, value) in figures {
            let place = match tag {
                0 => &mut said.swap_in_bytes,
                1 => &mut said.swap_out_bytes,
                2 => &mut said.major_faults,
                3 => &mut said.minor_faults,
                4 => &mut said.free_memory_bytes,
                5 => &mut said.total_memory_bytes,
                6 => &mut said.available_memory_bytes,
                7 => &mut said.disk_caches_bytes,
                8 => &mut said.hugetlb_allocations,
                9 => &mut said.hugetlb_failures,
                10 => &mut said.oom_kills,
                11 => &mut said.alloc_stalls,
                12 => &mut said.async_scan_bytes,
                13 => &mut said.direct_scan_bytes,
                14 => &mut said.async_reclaim_bytes,
                15 => &mut said.direct_reclaim_bytes,
                _ => continue,
            };
            *place = Some(value);
        }
        Self { said, at }
    }

    /// Memory that the guest could do without, and when it said so. Drivers before Linux 4.6 tell of free memory only.
    pub fn available(&self) -> Option<(u64, Instant)> {
        self.said.available_memory_bytes.or(self.said.free_memory_bytes).map(|bytes| (bytes, self.at))
    }

    /// What was said, and how long ago.
    pub fn shown(&self) -> GuestStats {
        GuestStats { age_ms: self.at.elapsed().as_millis() as u64, ..self.said }
    }
}

impl Server {
    /// `stats` of one VM, whose guest is asked first if it can answer.
    pub fn stats_of(&mut self, client: ClientId, name: &str) {
        let asked = self.find(name).ok().filter(|vm| can_tell(vm)).map(|vm| vm.generation);
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

/// Whether a guest's driver would answer: it has told of itself once, and its vCPUs run.
pub fn can_tell(vm: &Vm) -> bool {
    vm.is_alive() && !vm.stands() && vm.guest_memory.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_their_names() {
        let figures: Vec<(u16, u64)> = (0..20).chain([u16::MAX]).map(|tag| (tag, 100 + u64::from(tag))).collect();
        let said = GuestMemory::new(&figures, Instant::now()).shown();
        assert_eq!(
            (said.swap_in_bytes, said.free_memory_bytes, said.total_memory_bytes),
            (Some(100), Some(104), Some(105))
        );
        assert_eq!((said.available_memory_bytes, said.direct_reclaim_bytes), (Some(106), Some(115)));
        assert_eq!(GuestMemory::new(&[], Instant::now()).said, GuestStats::default());
    }
}
