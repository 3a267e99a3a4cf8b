//! Processes that do not answer in time end, and with them what they are for. Nobody else waits for them.

use super::answers::{Excuse, Owed, is_late};
use super::process::{ProcessId, Role, VmProcess};
use crate::procfs;
use crate::server::Server;
use std::time::Instant;

/// A process with an excuse is looked at so often in the time that it has to answer.
const LOOKS: u32 = 4;

impl Server {
    /// Some process owes an answer.
    pub fn await_answers(&mut self) {
        self.late_at.get_or_insert_with(|| Instant::now() + self.answer_within);
    }

    /// Ends the processes that are late. When to look again.
    pub fn tend_answers(&mut self, now: Instant) -> Option<Instant> {
        if self.late_at? > now {
            return self.late_at;
        }
        let owed: Vec<(ProcessId, Owed, Instant)> = self
            .processes
            .values()
            .filter_map(|process| process.answers.oldest().map(|(owed, since)| (process.id, owed, since)))
            .collect();
        let within = self.answer_within;
        self.late_at = None;
        for (id, owed, since) in owed {
            let owed_for = now.saturating_duration_since(since);
            let next = match owed_for < within {
                true => since + within,
                false if is_late(owed_for, within, self.excuse(id)) => {
                    self.is_late(id, owed);
                    continue;
                }
                false => now + within / LOOKS,
            };
            self.late_at = Some(self.late_at.map_or(next, |at| at.min(next)));
        }
        self.late_at
    }

    fn excuse(&self, id: ProcessId) -> Excuse {
        let Some(process) = self.processes.get(&id) else { return Excuse::None };
        let waits = |process: &VmProcess| {
            let (family, member) = self.vms.get(process.vm?)?.memory?;
            self.families.get(&family)?.waiting_for_pages().find(|(vm, _)| *vm == member)
        };
        match process.memory.main() {
            // The zygote is what is late.
            None if process.memory.is_unborn() => Excuse::Pages,
            _ if waits(process).is_some() => Excuse::Pages,
            Some(main) if procfs::is_busy(main.as_raw()) => Excuse::Busy,
            _ => Excuse::None,
        }
    }

    fn is_late(&mut self, id: ProcessId, owed: Owed) {
        let Some(process) = self.processes.get(&id) else { return };
        let why = format!("does not answer: its process was told to {owed} {:?} ago", self.answer_within);
        log::warn!("{id:?} {why}");
        match (owed, process.role) {
            (Owed::Freeze(store), Role::Vm(vm)) => self.freeze_is_late(vm, store, &why),
            _ => self.expel(id, &why),
        }
        // Whatever it was for; what it has made is looked for when it has been reaped.
        if let Some(process) = self.processes.get_mut(&id) {
            process.kill();
        }
    }
}
