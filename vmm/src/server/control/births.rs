//! How VM processes come to be: the zygote is asked for them, and tells of them in its own time.

use crate::server::Server;
use crate::server::ids::ProcessId;
use crate::server::procs::process::{Role, VmProcess};
use crate::server::procs::zygote::{Birth, Still};
use crate::server::watch::Origin;
use crate::wire::{Bounds, MachineShape, ToVm};
use event_manager::EventSet;
use std::io;
use std::rc::Rc;
use std::time::Instant;

/// How often a process is asked for: a zygote that could not be relied on is replaced.
const TRIES: u32 = 3;

impl Server {
    /// Has a process made that prepares itself for a VM of this shape.
    ///
    /// # Errors
    /// Descriptors are short, or there is no zygote.
    pub fn spawn_process(&mut self, shape: MachineShape) -> io::Result<ProcessId> {
        let id = self.procs.fresh_id();
        let bounds = Rc::new(Bounds::of(shape, self.host.max_runs));
        let prepare = self.prepare_message(shape);
        let (process, theirs) = VmProcess::unborn(id, (shape, bounds), &prepare, Rc::clone(&self.wants))?;
        self.start_zygote()?;
        self.procs.all.insert(id, process);
        let asked = self.procs.zygote.ask_for(id, &theirs, Instant::now());
        if let Err(error) = asked {
            self.renew_zygote(Still::There, &error.to_string());
            if let Err(error) = self.order_with_new_socket(id, shape) {
                self.procs.all.remove(&id);
                return Err(error);
            }
        }
        self.watch_zygote();
        Ok(id)
    }

    fn prepare_message(&self, shape: MachineShape) -> ToVm {
        ToVm::Prepare {
            shape,
            isolation: self.host.isolation,
            features: self.host.features,
            cage: self.host.cage.clone(),
            server: std::process::id() as i32,
            niceness: self.host.niceness,
        }
    }

    /// Starts the zygote, if it does not run, and listens to it.
    ///
    /// # Errors
    /// No process, or no descriptors.
    pub fn start_zygote(&mut self) -> io::Result<()> {
        self.procs.zygote.start(|link| self.watches.add(link, EventSet::IN, Origin::Zygote))
    }

    /// Sends what is queued for the zygote, and waits for more room where that is not all.
    fn watch_zygote(&mut self) {
        if let Some((token, left)) = self.procs.zygote.flush() {
            let events = if left { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            self.watches.modify(token, events);
        }
    }

    /// The zygote has told of processes.
    pub fn hear_zygote(&mut self) {
        self.watch_zygote();
        loop {
            match self.procs.zygote.hear(Instant::now()) {
                Ok(None) => return,
                Ok(Some((id, birth))) => self.born(id, birth),
                Err(error) => return self.renew_zygote(Still::There, &error.to_string()),
            }
        }
    }

    /// A zygote that does not answer is replaced. When to look again.
    pub fn tend_zygote(&mut self, now: Instant) -> Option<Instant> {
        let late = self.procs.zygote.late_at(self.procs.patience.within())?;
        if late > now {
            return Some(late);
        }
        self.renew_zygote(Still::There, "it does not answer");
        self.procs.zygote.late_at(self.procs.patience.within())
    }

    /// The zygote is gone, or is to go: another takes its place, and makes what this one has not.
    pub fn renew_zygote(&mut self, still: Still, why: &str) {
        if let Some(pid) = self.procs.zygote.pid() {
            log::warn!("zygote {pid}: {why}; a new one takes its place");
        }
        let again = self.drop_zygote(still);
        self.order_again(again);
    }

    /// What the zygote has not made is not made.
    pub fn end_zygote(&mut self) {
        for id in self.drop_zygote(Still::There) {
            self.born(id, Birth::Failed("the server is shutting down".into()));
        }
    }

    fn drop_zygote(&mut self, still: Still) -> Vec<ProcessId> {
        let (asked, running) = self.procs.zygote.end(still);
        if let Some(running) = running {
            self.watches.remove(running.token(), running);
        }
        asked.into()
    }

    /// Asks anew for processes that were not made. Whoever may have been made with the old socket finds its end.
    fn order_again(&mut self, all: Vec<ProcessId>) {
        for id in all {
            let Some(process) = self.procs.all.get_mut(&id) else { continue };
            process.tries += 1;
            let (tries, shape, role) = (process.tries, process.shape, process.role);
            let made = match role {
                Role::Ending => Err(io::Error::other("nobody needs it any more")),
                _ if tries >= TRIES => Err(io::Error::other("no zygote makes it")),
                _ => self.order_with_new_socket(id, shape),
            };
            if let Err(error) = made {
                self.born(id, Birth::Failed(error.to_string()));
            }
        }
    }

    fn order_with_new_socket(&mut self, id: ProcessId, shape: MachineShape) -> io::Result<()> {
        let prepare = self.prepare_message(shape);
        let Some(process) = self.procs.all.get_mut(&id) else { return Ok(()) };
        let theirs = process.begin_anew(&prepare)?;
        self.start_zygote()?;
        self.procs.zygote.ask_for(id, &theirs, Instant::now())?;
        self.watch_zygote();
        Ok(())
    }

    /// A process has been made, or not.
    fn born(&mut self, id: ProcessId, birth: Birth) {
        let Some(process) = self.procs.all.get_mut(&id) else { return };
        match birth {
            Birth::Lives(pid) => {
                process.memory.is_born(pid);
                process.link_token = Some(self.watches.add(&process.link, EventSet::IN, Origin::Process(id)));
                self.procs.children.adopt(pid, id);
            }
            Birth::Ended => self.is_not_there(id, "its process ended at once"),
            Birth::Failed(why) => {
                let (role, shape) = (process.role, process.shape);
                if role == Role::Preparing {
                    log::warn!("prepare a VM process for the pool: {why}");
                    self.procs.pool.rest(shape, Instant::now());
                    process.role = Role::Ending;
                }
                self.is_not_there(id, &format!("start a VM process: {why}"));
            }
        }
    }

    /// There is no process, and what it was for ends.
    fn is_not_there(&mut self, id: ProcessId, why: &str) {
        if let Some(process) = self.procs.all.get_mut(&id) {
            process.memory.is_no_more();
            process.answers.forget();
        }
        self.expel(id, why);
        self.forget_process_if_gone(id);
    }
}
