//! `balloon`, and pages that guests give back by themselves.
//!
//! The built-in guest is told which pages, line by line: the highest are in the balloon. A Linux guest is told how many,
//! and gets there in its own time, or does not.

use crate::api::{Answer, Balloon, ErrorKind, Failure, MIN_MEMORY};
use crate::server::Server;
use crate::server::clients::deadlines::Deadline;
use crate::server::ids::{ClientId, Generation};
use crate::server::memory::idle::IdleBalloon;
use crate::server::registry::vm::{Phase, Vm};
use crate::units::ByteSize;
use crate::wire::{Line, Machine, ToVm};
use firmware::abi::FIRST_FREE_PAGE;
use guest_mem::{GfnRange, PAGE_SIZE, PageCount};
use std::collections::VecDeque;

/// A guest on its way to a size.
#[derive(Debug)]
pub struct BalloonOp {
    client: ClientId,
    vm: Generation,
    /// Pages that are to be in the balloon.
    target: u64,
    /// What the built-in guest has still to be told.
    lines: VecDeque<String>,
    /// The line that it has not answered.
    tag: u64,
}

impl Server {
    pub fn balloon(&mut self, client: ClientId, name: &str, size_bytes: u64, timeout_ms: u64) {
        match self.check_balloon(name, size_bytes) {
            Err(failure) => self.reply(client, Err(failure)),
            Ok((vm, machine, target)) => {
                let lines = match machine {
                    Machine::Monitor => self.balloon_lines(vm, target),
                    Machine::Linux => VecDeque::new(),
                };
                if let Some(vm) = self.registry.vms.get_mut(vm) {
                    (vm.asked_balloon, vm.idle) = (target, IdleBalloon::AsAsked);
                }
                self.memory.balloons.push(BalloonOp { client, vm, target, lines, tag: 0 });
                self.set_deadline(Some(timeout_ms), Deadline::Balloon(vm, client));
                match machine {
                    Machine::Monitor => self.say_next_line(vm),
                    Machine::Linux => {
                        self.tell(vm, &ToVm::Balloon { pages: target });
                        self.finish_balloon_if_there(vm);
                    }
                }
            }
        }
    }

    fn check_balloon(&self, name: &str, size_bytes: u64) -> Result<(Generation, Machine, u64), Failure> {
        let vm = self.find_alive(name)?;
        let (size, memory) = (ByteSize(size_bytes), ByteSize::pages(vm.shape.ram.0));
        if size_bytes < MIN_MEMORY || size > memory || !size_bytes.is_multiple_of(PAGE_SIZE as u64) {
            let why = format!("VM {name:?} cannot have {size} left: from 16M to its {memory}, in multiples of 4K");
            return Err(Failure::bad_request(why));
        }
        if self.is_ballooning(vm.generation) {
            return Err(Failure::new(ErrorKind::Busy, format!("VM {name:?} is on its way to another size")));
        }
        Ok((vm.generation, vm.shape.machine, vm.shape.ram.0 - PageCount::covering(size_bytes).0))
    }

    /// Whatever is in the balloon now: in the end it is the highest pages.
    fn balloon_lines(&self, vm: Generation, target: u64) -> VecDeque<String> {
        let pages = self.registry.vms.get(vm).map_or(0, |vm| vm.shape.ram.0);
        let first = pages - target;
        let below = first - FIRST_FREE_PAGE;
        [format!("deflate {FIRST_FREE_PAGE} {below}"), format!("inflate {first} {target}")].into()
    }

    fn say_next_line(&mut self, vm: Generation) {
        let tag = self.registry.vms.fresh_tag();
        let Some(op) = self.memory.balloons.iter_mut().find(|op| op.vm == vm) else { return };
        match op.lines.pop_front() {
            Some(text) => {
                op.tag = tag;
                self.tell(vm, &ToVm::Input(Line { tag, text }));
            }
            None => self.finish_balloon(vm),
        }
    }

    /// Whether the answer is to a line of ours.
    pub fn balloon_answered(&mut self, vm: Generation, line: &Line) -> bool {
        let Some(at) = self.memory.balloons.iter().position(|op| op.vm == vm && op.tag == line.tag) else {
            return false;
        };
        if line.text.split(' ').next() == Some("ok") {
            self.say_next_line(vm);
        } else {
            let op = self.memory.balloons.remove(at);
            self.deadlines.met(Deadline::Balloon(vm, op.client));
            self.reply(op.client, Err(Failure::new(ErrorKind::Guest, format!("the guest says: {}", line.text))));
        }
        true
    }

    fn finish_balloon_if_there(&mut self, vm: Generation) {
        let Some(record) = self.registry.vms.get(vm).filter(|record| record.shape.machine == Machine::Linux) else {
            return;
        };
        if self.memory.balloons.iter().any(|op| op.vm == vm && op.target == record.balloon_pages) {
            self.finish_balloon(vm);
        }
    }

    fn finish_balloon(&mut self, vm: Generation) {
        let Some(at) = self.memory.balloons.iter().position(|op| op.vm == vm) else { return };
        let client = self.memory.balloons.remove(at).client;
        self.deadlines.met(Deadline::Balloon(vm, client));
        if let Some(record) = self.registry.vms.get(vm) {
            let balloon = balloon_of(record);
            self.reply(client, Ok(Answer::Ballooned(balloon)));
        }
    }

    /// The guest is not where it should be, and a client waits no longer. A Linux guest goes on.
    pub fn balloon_late(&mut self, vm: Generation, client: ClientId) {
        let Some(at) = self.memory.balloons.iter().position(|op| op.vm == vm && op.client == client) else { return };
        self.memory.balloons.remove(at);
        let Some(record) = self.registry.vms.get(vm) else { return };
        let Balloon { size_bytes, balloon_bytes } = balloon_of(record);
        let (size, given) = (ByteSize(size_bytes), ByteSize(balloon_bytes));
        let why = format!("VM {:?} is not there in time: it has {size} left, {given} in the balloon", record.name);
        self.reply(client, Err(Failure::timed_out(why)));
    }

    /// Whether a VM is on its way to a size that somebody waits for.
    pub fn is_ballooning(&self, vm: Generation) -> bool {
        self.memory.balloons.iter().any(|op| op.vm == vm)
    }

    /// Who waits for a VM's size; nobody does any more.
    pub fn balloon_ops_of(&mut self, vm: Generation) -> Vec<ClientId> {
        self.memory.balloons.extract_if(.., |op| op.vm == vm).map(|op| op.client).collect()
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
        let vm = self.registry.vms.get_mut(generation).expect("it has just spoken");
        vm.balloon_pages = pages.min(vm.shape.ram.0);
        self.finish_balloon_if_there(generation);
    }
}

fn balloon_of(vm: &Vm) -> Balloon {
    let balloon_bytes = PageCount(vm.balloon_pages).bytes();
    Balloon { size_bytes: vm.shape.ram.bytes() - balloon_bytes, balloon_bytes }
}
