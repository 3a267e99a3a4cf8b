//! `send`, `console`, `logs`, `pause`, `resume`: talking to a guest.

use crate::api::{Answer, Failure};
use crate::server::Server;
use crate::server::clients::connection::Mode;
use crate::server::clients::deadlines::Deadline;
use crate::server::ids::{ClientId, Generation};
use crate::server::registry::run::{RunAction, RunNews};
use crate::wire::{Line, Machine, ToVm};
use std::time::Instant;

/// Longest line for a guest, in bytes.
const LINE_MAX: usize = 4000;

/// What of a log is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPart {
    /// And then what comes.
    pub follow: bool,
    /// Only so many of the last lines that there are.
    pub tail_lines: Option<u64>,
}

impl LogPart {
    /// Nothing of what was.
    const NOTHING: Self = Self { follow: true, tail_lines: Some(0) };
}

impl Server {
    pub fn send(&mut self, client: ClientId, name: &str, text: String, timeout_ms: u64) {
        if text.len() > LINE_MAX || text.contains(['\n', '\r', '\0']) {
            let why = format!("a line for a guest is one line of at most {LINE_MAX} bytes");
            return self.reply(client, Err(Failure::bad_request(why)));
        }
        let (generation, machine) = match self.find_alive(name) {
            Ok(vm) => (vm.generation, vm.shape.machine),
            Err(failure) => return self.reply(client, Err(failure)),
        };
        if machine == Machine::Linux {
            self.type_on_console(generation, format!("{text}\n").into_bytes());
            return self.reply(client, Ok(Answer::Done));
        }
        let tag = self.registry.vms.fresh_tag();
        self.registry.vms.get_mut(generation).expect("found above").sends.insert(tag, client);
        self.tell(generation, &ToVm::Input(Line { tag, text }));
        self.set_deadline(Some(timeout_ms), Deadline::Answer(generation, tag, client));
    }

    pub fn console(&mut self, client: ClientId, name: &str) {
        match self.find_alive(name).map(|vm| vm.generation) {
            // A console shows what comes; the log is asked for by itself.
            Ok(vm) => self.stream(client, vm, (Mode::Console(vm), LogPart::NOTHING)),
            Err(failure) => self.reply(client, Err(failure)),
        }
    }

    pub fn logs(&mut self, client: ClientId, name: &str, part: LogPart) {
        let (generation, alive) = match self.find(name) {
            Ok(vm) => (vm.generation, vm.is_alive()),
            Err(failure) => return self.reply(client, Err(failure)),
        };
        let mode = if part.follow && alive { Mode::Viewer } else { Mode::Closing };
        self.stream(client, generation, (mode, part));
    }

    /// Turns a connection into a view of a console, which begins with what was printed before.
    fn stream(&mut self, client: ClientId, vm: Generation, (mode, part): (Mode, LogPart)) {
        self.reply(client, Ok(Answer::Stream));
        let record = self.registry.vms.get_mut(vm).expect("found above");
        if mode != Mode::Closing {
            record.viewers.push(client);
        }
        let before = record.log.tail(part.tail_lines);
        self.clients.stream(client, mode, &before);
    }

    pub fn type_on_console(&mut self, vm: Generation, bytes: Vec<u8>) {
        self.memory.budget.stir();
        self.tell(vm, &ToVm::Console(bytes));
    }

    pub fn guest_printed(&mut self, generation: Generation, bytes: &[u8]) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        vm.log.push(bytes);
        self.clients.show(&mut vm.viewers, bytes, &mut self.watches);
    }

    pub fn pause(&mut self, client: ClientId, name: &str, pause: bool) {
        let generation = match self.find_started(name) {
            Ok(generation) => generation,
            Err(failure) => return self.reply(client, Err(failure)),
        };
        let wanted = if pause { RunNews::Paused } else { RunNews::Running };
        let vm = self.registry.vms.get_mut(generation).expect("found above");
        match vm.run.ask(client, wanted) {
            RunAction::Answer => self.reply(client, Ok(Answer::Done)),
            RunAction::Pause => self.tell(generation, &ToVm::Pause),
            RunAction::Resume => self.tell(generation, &ToVm::Resume),
            RunAction::Wait => {}
        }
    }

    /// Sends a message to a VM's process.
    pub fn tell(&mut self, vm: Generation, message: &ToVm) {
        let process = self.registry.vms.get(vm).and_then(|vm| vm.process);
        if let Some(process) = process.and_then(|id| self.procs.all.get_mut(&id)) {
            process.send(message, &[]);
        }
    }

    pub fn set_deadline(&mut self, timeout_ms: Option<u64>, deadline: Deadline) {
        self.deadlines.set(Instant::now(), timeout_ms, deadline);
    }

    /// Tells those whose time has run out.
    pub fn pass_deadlines(&mut self, now: Instant) {
        for deadline in self.deadlines.passed(now) {
            match deadline {
                Deadline::Balloon(vm, client) => self.balloon_late(vm, client),
                Deadline::Stats(vm, _) => self.answer_stats_waiters(vm),
                Deadline::Hint(vm, fork) => self.hint_late(vm, fork),
                Deadline::Connect(vm, tag) => self.connection_late(vm, tag),
                Deadline::TimeToLive(vm) => self.time_is_over(vm),
                _ => {}
            }
            let Some(vm) = self.registry.vms.get_mut(deadline.vm()) else { continue };
            let (client, why) = match deadline {
                Deadline::Answer(_, tag, client) if vm.sends.remove(&tag).is_some() => {
                    (client, format!("no answer from the guest of VM {:?} in time", vm.name))
                }
                Deadline::End(_, client) if vm.waiters.contains(&client) => {
                    vm.waiters.retain(|&waiter| waiter != client);
                    (client, format!("VM {:?} has not ended in time", vm.name))
                }
                _ => continue,
            };
            self.reply(client, Err(Failure::timed_out(why)));
        }
    }
}
