//! Processes that have ended: what they were for ends, and what they have left behind.

use crate::machine::isolate;
use crate::procfs;
use crate::server::Server;
use crate::server::ids::ProcessId;
use crate::server::procs::process::{Role, VmProcess};
use crate::server::procs::zygote::Still;
use crate::wire::Isolation;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::rc::Rc;
use std::time::Instant;

impl Server {
    /// Takes note of every child process that has ended.
    pub fn reap(&mut self) {
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => (pid, format!("ended with status {status}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("was killed by {signal}")),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if self.procs.zygote.reaped(pid) {
                self.renew_zygote(Still::Reaped, &how);
                continue;
            }
            let Some(id) = self.procs.children.reaped(pid) else {
                self.procs.zygote.reaped_unknown(pid);
                continue;
            };
            let Some(process) = self.procs.all.get(&id) else { continue };
            if process.memory.main() == Some(pid) {
                self.main_ended(id, &how);
            } else {
                process.memory.reaped(pid);
            }
            self.forget_process_if_gone(id);
        }
    }

    fn main_ended(&mut self, id: ProcessId, how: &str) {
        self.procs.all[&id].memory.is_no_more();
        self.procs.children.may_have_strays(Instant::now());
        // Its last words may say more than how it ended.
        match self.serve_process(id) {
            true => self.main_is_silent(id, how),
            false => self.procs.all.get_mut(&id).expect("looked at by the caller").ended = Some(how.to_owned()),
        }
    }

    /// A process has ended, and all that it said has been heard.
    pub fn main_is_silent(&mut self, id: ProcessId, how: &str) {
        if self.procs.all.get(&id).is_some_and(|process| process.memory.falls_silent()) {
            self.pages_came();
        }
        self.expel(id, &format!("its process {how}"));
    }

    /// A process has ended, or is to, and what it was for with it.
    pub fn expel(&mut self, id: ProcessId, why: &str) {
        let Some(process) = self.procs.all.get(&id) else { return };
        let shape = process.shape;
        match process.role {
            Role::Vm(generation) => return self.start_failed(generation, why),
            Role::Ending => return,
            Role::Pooled => self.procs.pool.lost(shape, id),
            Role::Preparing if process.ready => self.procs.pool.ended(shape),
            Role::Preparing => self.procs.pool.failed(shape),
        }
        log::error!("a prepared VM process is gone: {why}");
        self.end_process(id);
    }

    /// Ends children of ours whose VM process has ended, and which it has not told of as what outlives it.
    pub fn end_strays(&mut self, now: Instant) {
        if !self.procs.children.is_time_for_strays(now) {
            return;
        }
        for child in procfs::children().unwrap_or_default() {
            let known = self.procs.children.knows(child) || self.procs.zygote.is(child);
            if !known && self.is_stray(child) {
                log::warn!("process {child} is ended: the VM process that has left it behind is gone");
                let _ = kill(child, Signal::SIGKILL);
            }
        }
    }

    /// Whether the VM process that has made this child of ours is gone: each has a user of its own, or a user namespace.
    fn is_stray(&self, child: Pid) -> bool {
        match self.host.isolation {
            Isolation::OwnUser => {
                let of = procfs::user(child.as_raw()).ok().and_then(isolate::process_of_user);
                of.is_some_and(|main| !self.procs.children.knows(main))
            }
            Isolation::UserNamespace => {
                let of = procfs::user_namespace(child.as_raw()).ok();
                let namespace = |pid: Pid| procfs::user_namespace(pid.as_raw()).ok();
                // Of one that has just been made it is the zygote's still.
                let others = [Some(Pid::this()), self.procs.zygote.pid()].map(|pid| pid.and_then(namespace));
                let living = self.procs.all.values().map(VmProcess::user_namespace);
                of.is_some() && !living.chain(others).any(|namespace| namespace == of)
            }
            Isolation::Off => false,
        }
    }

    /// Looks after processes that have ended and whose memory has not.
    pub fn tend_lingering(&mut self) {
        for id in self.procs.children.lingering() {
            if let Some(process) = self.procs.all.get(&id) {
                process.memory.dismiss_traps();
            }
            self.forget_process_if_gone(id);
        }
    }

    pub fn forget_process_if_gone(&mut self, id: ProcessId) {
        let Some(memory) = self.procs.all.get(&id).map(|process| &process.memory) else { return };
        if !memory.is_unattended() || self.procs.all[&id].ended.is_some() {
            return;
        }
        if !memory.is_gone() {
            self.procs.children.linger(id);
            return;
        }
        self.procs.children.is_gone(id);
        let process = self.procs.all.remove(&id).expect("looked at above");
        if let Some(token) = process.trap_token {
            self.watches.remove(token, Rc::clone(&process.memory));
        }
        if let Some(token) = process.link_token.or(process.link_ended) {
            self.watches.remove(token, process);
        }
    }
}
