//! `balloon`, and pages that guests give back by themselves.
//!
//! The built-in guest is told which pages, line by line: the highest are in the balloon. A Linux guest is told how many,
//! and gets there in its own time, or does not.

use crate::api::{Answer, Balloon, ErrorKind, Failure, MIN_MEMORY};
use crate::server::Server;
use crate::server::clients::deadlines::Deadline;
use crate::server::guest::balloon::{BalloonNext, BalloonOp, Way};
use crate::server::guest::idle::IdleBalloon;
use crate::server::ids::{ClientId, Generation};
use crate::server::registry::phase::Phase;
use crate::server::registry::vm::Vm;
use crate::units::ByteSize;
use crate::wire::{Line, Machine, ToVm};
use guest_mem::{GfnRange, PAGE_SIZE, PageCount};

impl Server {
    pub fn balloon(&mut self, client: ClientId, name: &str, size_bytes: u64, timeout_ms: u64) {
        match self.check_balloon(name, size_bytes) {
            Err(failure) => self.reply(client, Err(failure)),
            Ok((vm, way, target)) => {
                let tag = self.registry.vms.fresh_tag();
                let Some(record) = self.registry.vms.get_mut(vm) else { return };
                (record.asked_balloon, record.idle) = (target, IdleBalloon::AsAsked);
                let actual = record.balloon_pages;
                self.set_deadline(Some(timeout_ms), Deadline::Balloon(vm, client));
                let next = self.memory.balloons.begin(BalloonOp::new(client, vm, target, way), actual, tag);
                self.go_on_ballooning(vm, next);
            }
        }
    }

    fn check_balloon(&self, name: &str, size_bytes: u64) -> Result<(Generation, Way, u64), Failure> {
        let vm = self.find_alive(name)?;
        let (size, memory) = (ByteSize(size_bytes), ByteSize::pages(vm.shape.ram.0));
        if size_bytes < MIN_MEMORY || size > memory || !size_bytes.is_multiple_of(PAGE_SIZE as u64) {
            let why = format!("VM {name:?} cannot have {size} left: from 16M to its {memory}, in multiples of 4K");
            return Err(Failure::bad_request(why));
        }
        if self.memory.balloons.is_under_way(vm.generation) {
            return Err(Failure::new(ErrorKind::Busy, format!("VM {name:?} is on its way to another size")));
        }
        let way = match vm.shape.machine {
            Machine::Monitor => Way::Lines { ram: vm.shape.ram },
            Machine::Linux => Way::Driver,
        };
        Ok((vm.generation, way, vm.shape.ram.0 - PageCount::covering(size_bytes).0))
    }

    /// Does what a guest on its way to a size needs next.
    fn go_on_ballooning(&mut self, vm: Generation, next: BalloonNext) {
        match next {
            BalloonNext::Nothing => {}
            BalloonNext::Say(line) => self.tell(vm, &ToVm::Input(line)),
            BalloonNext::Target(pages) => self.tell(vm, &ToVm::Balloon { pages }),
            BalloonNext::TargetIsThere(pages, client) => {
                self.tell(vm, &ToVm::Balloon { pages });
                self.is_ballooned(vm, client);
            }
            BalloonNext::Done(client) => self.is_ballooned(vm, client),
            BalloonNext::Refused(client, said) => {
                self.deadlines.met(Deadline::Balloon(vm, client));
                self.reply(client, Err(Failure::new(ErrorKind::Guest, format!("the guest says: {said}"))));
            }
        }
    }

    fn is_ballooned(&mut self, vm: Generation, client: ClientId) {
        self.deadlines.met(Deadline::Balloon(vm, client));
        if let Some(record) = self.registry.vms.get(vm) {
            let balloon = balloon_of(record);
            self.reply(client, Ok(Answer::Ballooned(balloon)));
        }
    }

    /// Whether the answer is to a line of ours.
    pub fn balloon_answered(&mut self, vm: Generation, line: &Line) -> bool {
        if !self.memory.balloons.has_said(vm, line.tag) {
            return false;
        }
        let tag = self.registry.vms.fresh_tag();
        let next = self.memory.balloons.answered(vm, &line.text, tag);
        self.go_on_ballooning(vm, next);
        true
    }

    /// The guest is not where it should be, and a client waits no longer. A Linux guest goes on.
    pub fn balloon_late(&mut self, vm: Generation, client: ClientId) {
        if !self.memory.balloons.late(vm, client) {
            return;
        }
        let Some(record) = self.registry.vms.get(vm) else { return };
        let Balloon { size_bytes, balloon_bytes } = balloon_of(record);
        let (size, given) = (ByteSize(size_bytes), ByteSize(balloon_bytes));
        let why = format!("VM {:?} is not there in time: it has {size} left, {given} in the balloon", record.name);
        self.reply(client, Err(Failure::timed_out(why)));
    }

    /// A guest has given pages back, and its window shows nothing there any more.
    pub fn ballooned(&mut self, generation: Generation, pages: &[GfnRange]) {
        let Some((family, member)) = self.registry.vms.get(generation).and_then(|vm| vm.memory) else { return };
        let manager = self.memory.families.get_mut(&family).expect("a VM has a family");
        if manager.family().vm(member).stands() {
            // Ours does one after the other.
            return self
                .end_vm(generation, Phase::Dead("its process gave pages back while it stood for a fork".into()));
        }
        manager.balloon(member, pages).expect("a family knows its VMs");
        // Whoever is taken over may name a page more than once.
        let count = pages.iter().fold(0, |count: u64, pages| count.saturating_add(pages.count().0));
        self.count_hinted(generation, count);
    }

    /// A guest's balloon has another size now.
    pub fn balloon_resized(&mut self, generation: Generation, pages: u64) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        vm.balloon_pages = pages.min(vm.shape.ram.0);
        let next = self.memory.balloons.resized(generation, vm.balloon_pages);
        self.go_on_ballooning(generation, next);
    }
}

fn balloon_of(vm: &Vm) -> Balloon {
    let balloon_bytes = PageCount(vm.balloon_pages).bytes();
    Balloon { size_bytes: vm.shape.ram.bytes() - balloon_bytes, balloon_bytes }
}
