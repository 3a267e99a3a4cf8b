//! Looking after the [balloons of idle VMs](crate::server::guest::idle).

use crate::server::Server;
use crate::server::guest::idle::{Act, AutoBalloon, IdleConfig, Known, next};
use crate::server::ids::Generation;
use crate::server::registry::phase::Phase;
use crate::server::registry::vm::Vm;
use crate::wire::{Machine, ToVm};
use std::time::{Duration, Instant};

/// How often VMs are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The policy, and when it looks again.
#[derive(Debug)]
pub struct IdlePolicy {
    config: IdleConfig,
    next: Instant,
}

impl IdlePolicy {
    /// A policy that has not looked yet.
    pub fn new(config: IdleConfig) -> Self {
        Self { config, next: Instant::now() }
    }
}

impl Server {
    /// When idle VMs are to be looked at again.
    pub fn next_idle_look(&self) -> Option<Instant> {
        let any = self.memory.idle.config.when != AutoBalloon::Off && self.registry.vms.any_linux();
        any.then_some(self.memory.idle.next)
    }

    /// Looks after the balloons of idle VMs.
    pub fn tend_idle(&mut self, now: Instant) {
        let IdleConfig { when, after } = self.memory.idle.config;
        if when == AutoBalloon::Off || now < self.memory.idle.next || self.stopping.is_some() {
            return;
        }
        self.memory.idle.next = now + LOOK;
        let wanted = match when {
            AutoBalloon::Idle => true,
            _ => self.is_memory_tight(),
        };
        let known: Vec<(Generation, Known)> =
            self.registry.vms.iter().filter_map(|vm| Some((vm.generation, self.known(vm, wanted)?))).collect();
        for (generation, known) in known {
            let (balloon, act) = next(&known, after, now);
            let vm = self.registry.vms.get_mut(generation).expect("listed above");
            if vm.idle != balloon {
                log::debug!("balloon of {:?}: {balloon:?}, {act:?}", vm.name);
            }
            vm.idle = balloon;
            match act {
                Act::Nothing => {}
                Act::Ask => self.tell(generation, &ToVm::AskStats),
                Act::Target(pages) => self.tell(generation, &ToVm::Balloon { pages }),
            }
        }
    }

    /// What is known of a VM that can be looked after now.
    fn known(&self, vm: &Vm, wanted: bool) -> Option<Known> {
        let free =
            vm.shape.machine == Machine::Linux && vm.can_tell() && vm.phase == Phase::Live && vm.freezes.is_idle();
        if !free || self.memory.balloons.is_under_way(vm.generation) {
            return None;
        }
        Some(Known {
            balloon: vm.idle,
            ran_at: self.memory.budget.busy_at(vm.generation)?,
            wanted,
            ram: vm.shape.ram.0,
            actual: vm.balloon_pages,
            asked: vm.asked_balloon,
            available: vm.guest_memory.and_then(|said| said.available()),
        })
    }
}
