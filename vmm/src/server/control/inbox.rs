//! What VM processes say, and what becomes of them.

use crate::api::Answer;
use crate::machine::isolate;
use crate::procfs;
use crate::server::Server;
use crate::server::freeze::Said;
use crate::server::ids::{Generation, ProcessId};
use crate::server::procs::process::Role;
use crate::server::registry::phase::{Phase, Sign, SignAction};
use crate::server::registry::run::{RunChange, RunNews};
use crate::server::watch::Origin;
use crate::wire::{self, Ending, FromVm, Isolation, Line};
use event_manager::EventSet;
use guest_mem::sys::Userfaultfd;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

/// What is heard of one process in a round: whoever says more, takes longer, and nobody else does.
const ROUND_PACKETS: usize = 8;
const ROUND_BYTES: u64 = 256 << 10;

/// What a VM process says that it has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// It lives, and is that process's.
    Lives,
    /// It has ended.
    Ended,
}

impl Server {
    /// Sends what is queued, and watches for more room where that is not all.
    pub fn watch_process(&mut self, id: ProcessId) {
        let Some(process) = self.procs.all.get_mut(&id) else { return };
        let pending = process.link.flush().unwrap_or(false);
        if let Some(token) = process.link_token {
            self.watches.modify(token, if pending { EventSet::IN | EventSet::OUT } else { EventSet::IN });
        }
    }

    /// Hears a VM process, and does what has waited for that.
    pub fn hear_process(&mut self, id: ProcessId) {
        if !self.serve_process(id) {
            return;
        }
        let Some(process) = self.procs.all.get_mut(&id) else { return };
        let traps = !process.traps.is_empty();
        if let Some(how) = process.ended.take() {
            self.main_is_silent(id, &how);
            self.forget_process_if_gone(id);
        } else if traps {
            self.serve_traps(id);
        }
    }

    /// Reads what a VM process has said, as far as that is one process's share of a round. Whether it was all.
    pub fn serve_process(&mut self, id: ProcessId) -> bool {
        self.watch_process(id);
        let Some(process) = self.procs.all.get(&id) else { return true };
        let most = process.link.received() + ROUND_BYTES;
        for _ in 0..ROUND_PACKETS {
            let process = self.procs.all.get_mut(&id).filter(|process| process.link_ended.is_none());
            let Some(process) = process else { return true };
            if process.link.received() >= most {
                return false;
            }
            match process.link.recv::<wire::Said>() {
                Ok(None) => return true,
                Ok(Some((wire::Said(said), mut fds))) => {
                    process.messages += said.len() as u64;
                    let heard =
                        said.into_iter().try_for_each(|message| self.heard(id, message, std::mem::take(&mut fds)));
                    if let Err(error) = heard {
                        self.link_ended(id, &error);
                        return true;
                    }
                }
                Err(error) => {
                    self.link_ended(id, &error);
                    return true;
                }
            }
        }
        false
    }

    /// The socket has come to its end. What the process left is dealt with when it is reaped.
    fn link_ended(&mut self, id: ProcessId, error: &io::Error) {
        let Some(process) = self.procs.all.get_mut(&id) else { return };
        process.kill();
        if let Some(token) = process.link_token.take() {
            // The descriptor stays with the process until that is gone.
            self.watches.modify(token, EventSet::empty());
            process.link_ended = Some(token);
        }
        if error.kind() != io::ErrorKind::UnexpectedEof {
            self.expel(id, &format!("its process said what makes no sense: {error}"));
        }
    }

    /// Does what a process's message is for.
    ///
    /// # Errors
    /// `InvalidData`: ours never say such a thing.
    fn heard(&mut self, id: ProcessId, message: FromVm, fds: Vec<OwnedFd>) -> io::Result<()> {
        let Some(process) = self.procs.all.get_mut(&id) else { return Ok(()) };
        process.answers.heard(&message, process.shape.machine, Instant::now());
        let message = match message.plain() {
            FromVm::Log(line) => {
                process.log(&line, Instant::now());
                return Ok(());
            }
            message => message,
        };
        let Some(process) = self.procs.all.get(&id) else { return Ok(()) };
        if process.ready == message.comes_first() || !message.is_valid(&process.bounds) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "out of turn, or of pages that are not there"));
        }
        if let FromVm::Frozen(frozen) = &message
            && let Some(copy) = frozen.copy
        {
            self.note_copy(id, Pid::from_raw(copy))?;
        }
        let Some(process) = self.procs.all.get(&id) else { return Ok(()) };
        match (message, process.role) {
            (FromVm::Ready { keeper, window_base }, _) => self.prepared(id, keeper, window_base, fds)?,
            (FromVm::PrepareFailed(why), _) => self.prepare_failed(id, &why),
            (FromVm::Expecting, Role::Preparing) => self.offer(id),
            (FromVm::StartFailed(why), Role::Preparing) => {
                log::error!("a prepared process cannot become what it is to expect: {why}");
                let shape = self.procs.all[&id].shape;
                self.procs.pool.ended(shape);
                // The next would fare no better.
                self.procs.pool.forget_favourites(shape);
                self.end_process(id);
            }
            (FromVm::Copied { store }, _) => self.copied(id, store),
            (message, Role::Vm(generation)) => self.vm_says(generation, message),
            (message, role) => log::debug!("{id:?}, {role:?}, says {message:?}"),
        }
        Ok(())
    }

    /// A process names `copy` as the one that has what it froze.
    ///
    /// # Errors
    /// `InvalidData`: that is somebody else's, or no freeze is under way for which it was to make one.
    fn note_copy(&mut self, id: ProcessId, copy: Pid) -> io::Result<()> {
        let memory = Rc::clone(&self.procs.all[&id].memory);
        if self.claimed(id, copy, || memory.has_lifeline(copy))? == Claim::Lives {
            memory.note_copy(copy);
            self.procs.children.adopt(copy, id);
        }
        Ok(())
    }

    /// What there is to a process's claim that it has made `pid`, and that we are the parent of it. Whoever is taken over may
    /// name any process, be it one that a sibling has made and not told of yet: `proven` says whether it is this one's, beside
    /// its user.
    ///
    /// # Errors
    /// `InvalidData`: it is not, or another process has been told of it.
    fn claimed(&self, id: ProcessId, pid: Pid, proven: impl Fn() -> bool) -> io::Result<Claim> {
        let known = self.procs.children.knows(pid) || self.procs.zygote.is(pid);
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let lives = || matches!(waitid(Id::Pid(pid), look), Ok(WaitStatus::StillAlive));
        if known || pid.as_raw() <= 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a process that is somebody else's"));
        }
        // A child that lives, and which nobody but us reaps, has its number for as long as we look at it.
        let theirs = || lives() && self.is_user_of(id, pid) && proven();
        match theirs() {
            true => Ok(Claim::Lives),
            // Killed before we heard of it: it is not looked at again, whosever it was.
            false if !lives() => Ok(Claim::Ended),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "a process that it has not made")),
        }
    }

    /// Whether a child of ours runs as the user that this VM process was given, where it was given one.
    fn is_user_of(&self, id: ProcessId, child: Pid) -> bool {
        let user = || procfs::user(child.as_raw()).ok().and_then(isolate::process_of_user);
        let born = self.procs.all[&id].memory.born();
        self.host.isolation != Isolation::OwnUser || (born.is_some() && user() == born)
    }

    fn prepared(&mut self, id: ProcessId, keeper: i32, window_base: u64, fds: Vec<OwnedFd>) -> io::Result<()> {
        let keeper = Pid::from_raw(keeper);
        let lives = self.claimed(id, keeper, || true)? == Claim::Lives;
        let keeper = lives.then_some(keeper);
        let process = self.procs.all.get_mut(&id).expect("it has just spoken");
        let memory = Rc::clone(&process.memory);
        memory.keeper.set(keeper);
        keeper.into_iter().for_each(|keeper| self.procs.children.adopt(keeper, id));
        memory.base.set(window_base);
        process.ready = true;
        if let Err(error) = memory.open_image() {
            // It may just have ended.
            log::error!("memory of {id:?}: {error}");
        }
        let process = self.procs.all.get_mut(&id).expect("it has just spoken");
        process.namespace = memory.main().and_then(|main| procfs::user_namespace(main.as_raw()).ok());
        if let Some(fd) = fds.into_iter().next() {
            let traps = memory.traps.get_or_init(|| Userfaultfd::from_fd(fd));
            process.trap_token = Some(self.watches.add(traps, EventSet::IN, Origin::Traps(id)));
        }
        match process.role {
            Role::Vm(_) => process.send_waiting(),
            Role::Preparing => self.offer(id),
            Role::Pooled | Role::Ending => self.end_process(id),
        }
        Ok(())
    }

    /// A process is prepared, and has ready what it expects.
    fn offer(&mut self, id: ProcessId) {
        let process = self.procs.all.get_mut(&id).expect("it has just spoken");
        process.role = Role::Pooled;
        let (shape, expects) = (process.shape, process.expectation.parent);
        if !self.procs.pool.put(shape, id, expects) {
            self.end_process(id);
        }
    }

    fn prepare_failed(&mut self, id: ProcessId, why: &str) {
        let process = self.procs.all.get_mut(&id).expect("it has just spoken");
        log::error!("a VM process could not be prepared: {why}");
        process.ready = true;
        let (role, shape) = (process.role, process.shape);
        self.end_process(id);
        match role {
            Role::Vm(generation) => self.start_failed(generation, why),
            Role::Preparing => self.procs.pool.failed(shape),
            Role::Pooled | Role::Ending => {}
        }
    }

    fn vm_says(&mut self, generation: Generation, message: FromVm) {
        if self.registry.vms.get(generation).is_none() {
            return;
        }
        match message {
            FromVm::Ready { .. }
            | FromVm::PrepareFailed(_)
            | FromVm::Expecting
            | FromVm::Copied { .. }
            | FromVm::Log(_) => {}
            FromVm::Running { at_ns } => self.runs_or_stands(generation, RunNews::Running, Sign::Runs { at_ns }),
            FromVm::Paused => self.runs_or_stands(generation, RunNews::Paused, Sign::Stands),
            FromVm::FirstSign { at_ns } => self.gives_sign(generation, Sign::First { at_ns }),
            FromVm::StartFailed(why) => self.start_failed(generation, &why),
            FromVm::Standing => self.freeze_says(generation, Said::Standing),
            FromVm::Ballooned(pages) => self.ballooned(generation, &pages),
            FromVm::BalloonSize { pages } => self.balloon_resized(generation, pages),
            FromVm::Wrote { pages, last } => self.child_wrote(generation, &pages, last),
            FromVm::GuestStats(figures) => self.guest_told(generation, &figures),
            FromVm::Hinted => self.hinted(generation),
            FromVm::Frozen(frozen) => self.freeze_says(generation, Said::Frozen(frozen)),
            FromVm::Saved { store, state, still } => self.freeze_says(generation, Said::Saved { store, state, still }),
            FromVm::WentOn { store, pause_ns } => self.freeze_says(generation, Said::WentOn { store, pause_ns }),
            FromVm::Deduped { store, pages } => self.deduped(generation, store, &pages),
            FromVm::FreezeFailed(why) => self.freeze_says(generation, Said::Failed(why)),
            FromVm::Answer(line) => self.guest_answered(generation, line),
            FromVm::Console(bytes) => self.guest_printed(generation, &bytes),
            FromVm::Fork { count } => self.fork_from_inside(generation, count),
            FromVm::Ended(Ending::Off) => self.end_vm(generation, Phase::Off),
            FromVm::Ended(Ending::Reboot) => self.end_vm(generation, Phase::Rebooted),
            FromVm::Ended(Ending::Dead(why)) => self.end_vm(generation, Phase::Dead(why)),
            FromVm::Connected { tag, outcome } => self.connection_came(generation, tag, outcome),
            FromVm::Connect { tag, port } => self.guest_connects(generation, tag, port),
            FromVm::Noticed(noticed) => self.child_noticed(generation, noticed),
            FromVm::Probed(ways) => self.probed(generation, ways),
        }
    }

    /// Its vCPUs run, or stand.
    fn runs_or_stands(&mut self, generation: Generation, news: RunNews, sign: Sign) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        match vm.run.says(news) {
            RunChange::Held => {}
            RunChange::Released(then) => self.released(generation, then),
            RunChange::Told(clients) => {
                self.gives_sign(generation, sign);
                clients.into_iter().for_each(|client| self.reply(client, Ok(Answer::Done)));
            }
        }
    }

    fn gives_sign(&mut self, generation: Generation, sign: Sign) {
        let Some(vm) = self.registry.vms.get_mut(generation) else { return };
        match vm.phase.on(sign, vm.shape.machine) {
            SignAction::Nothing | SignAction::Launched(None) => {}
            SignAction::Launched(Some(client)) => {
                if let Some(vm) = self.registry.vms.get(generation) {
                    let summary = self.summary(vm);
                    self.reply(client, Ok(Answer::Launched(summary)));
                }
            }
            SignAction::ChildReady(fork, at_ns) => self.child_ready(fork, generation, at_ns),
            SignAction::ChildAlive(fork, at_ns) => self.child_alive(fork, generation, at_ns),
        }
    }

    fn guest_answered(&mut self, generation: Generation, line: Line) {
        if self.balloon_answered(generation, &line) {
            return;
        }
        let vm = self.registry.vms.get_mut(generation).expect("it has just spoken");
        match vm.sends.remove(&line.tag) {
            Some(client) => {
                self.deadlines.line_answered(generation, line.tag);
                self.reply(client, Ok(Answer::Said(line.text)));
            }
            None => self.guest_printed(generation, format!("{}\n", line.text).as_bytes()),
        }
    }
}
