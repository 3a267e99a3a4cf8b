//! What becomes of processes that do not answer in time.

use crate::procfs;
use crate::server::Server;
use crate::server::ids::ProcessId;
use crate::server::procs::answers::{Excuse, Owed};
use crate::server::procs::process::{Role, VmProcess};
use std::time::Instant;

impl Server {
    /// Ends the processes that are late. When to look again.
    pub fn tend_answers(&mut self, now: Instant) -> Option<Instant> {
        if self.procs.patience.is_time(now) {
            let owed = |process: &VmProcess| process.answers.oldest().map(|(owed, since)| (process.id, owed, since));
            let owed = self.procs.all.values().filter_map(owed);
            let (late, look_at) = self.procs.patience.late(now, owed, |&id| self.excuse(id));
            self.procs.patience.look_again(look_at);
            late.into_iter().for_each(|(id, owed)| self.is_late(id, owed));
        }
        self.procs.patience.next_look()
    }

    fn excuse(&self, id: ProcessId) -> Excuse {
        let Some(process) = self.procs.all.get(&id) else { return Excuse::None };
        let waits = |process: &VmProcess| {
            let (family, member) = self.registry.vms.get(process.vm?)?.memory?;
            self.memory.families.get(&family)?.waiting_for_pages().find(|(vm, _)| *vm == member)
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
        let Some(process) = self.procs.all.get(&id) else { return };
        let why = format!("does not answer: its process was told to {owed} {:?} ago", self.procs.patience.within());
        log::warn!("{id:?} {why}");
        match (owed, process.role) {
            (Owed::Freeze(store), Role::Vm(vm)) => self.freeze_is_late(vm, store, &why),
            _ => self.expel(id, &why),
        }
        // Whatever it was for; what it has made is looked for when it has been reaped.
        if let Some(process) = self.procs.all.get_mut(&id) {
            process.kill();
        }
    }
}
