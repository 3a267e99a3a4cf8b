//! What clients ask for, and who does it.

use super::talk::LogPart;
use crate::api::{Answer, ErrorKind, Failure, Reply, Request};
use crate::server::Server;
use crate::server::clients::Errand;
use crate::server::ids::ClientId;
use crate::server::inspect::look::Wanted;
use crate::server::registry::phase::Phase;
use crate::server::registry::removals::EndCause;
use crate::server::registry::vm::Vm;

impl Server {
    pub fn serve_client(&mut self, id: ClientId) {
        self.clients.stirred(id);
        self.hear(id);
    }

    /// Does what a client has to say, as far as it may say it now.
    pub fn hear(&mut self, id: ClientId) {
        while let Some(errand) = self.clients.hear(id, &mut self.watches) {
            match errand {
                Errand::Request(request) => self.carry_out(id, request),
                Errand::Type(vm, bytes) => self.type_on_console(vm, bytes),
            }
        }
    }

    /// Answers the request that a client waits for.
    pub fn reply(&mut self, id: ClientId, reply: Reply) {
        self.clients.reply(id, reply, &mut self.watches);
    }

    pub fn carry_out(&mut self, client: ClientId, request: Request) {
        log::debug!("{client:?}: {request:?}");
        self.memory.budget.stir();
        match request {
            Request::Launch(_) if self.stopping.is_some() => {
                self.reply(client, Err(Failure::new(ErrorKind::ShuttingDown, "the server is shutting down")));
            }
            Request::Launch(launch) => self.launch(client, launch),
            Request::Fork(fork) => self.fork(client, fork),
            Request::Send { name, text, timeout_ms } => self.send(client, &name, text, timeout_ms),
            Request::Console { name } => self.console(client, &name),
            Request::Logs { name, follow, tail_lines } => self.logs(client, &name, LogPart { follow, tail_lines }),
            Request::Connect { name, port, timeout_ms } => self.connect(client, &name, port, timeout_ms),
            Request::List => {
                let answer = Answer::Vms(self.list());
                self.reply(client, Ok(answer));
            }
            Request::Tree => self.begin_look(client, Wanted::Tree),
            Request::Stats { name: Some(name) } => self.stats_of(client, &name),
            Request::Stats { name: None } => self.begin_look(client, Wanted::Stats(None)),
            Request::Inspect { name } => self.begin_look(client, Wanted::Inspect(name)),
            Request::Pause { name } => self.pause(client, &name, true),
            Request::Resume { name } => self.pause(client, &name, false),
            Request::Stop { name } => {
                let answer = self.stop(&name).map(|()| Answer::Done);
                self.reply(client, answer);
            }
            Request::Kill { name } => self.kill(client, &name),
            Request::Wait { name, timeout_ms } => self.wait(client, &name, timeout_ms),
            Request::Balloon { name, size_bytes, timeout_ms } => self.balloon(client, &name, size_bytes, timeout_ms),
            Request::Remove { all: true, .. } => self.remove_all(client),
            Request::Remove { names, all: false } => self.remove(client, &names),
            Request::Reclaim { name, size_bytes } => self.reclaim(client, name.as_deref(), size_bytes),
            Request::Budget { set } => {
                let answer = self.set_budget(set).map(Answer::Budget);
                self.reply(client, answer);
            }
            Request::Check => self.check(client),
            Request::Shutdown => self.shut_down(EndCause::Client(client)),
        }
    }

    /// The VM of a name, for a verb that takes any.
    pub fn find(&self, name: &str) -> Result<&Vm, Failure> {
        let missing = || Failure::new(ErrorKind::NoSuchVm, format!("there is no VM {name:?}")).about(name);
        self.registry.vms.find(name).ok_or_else(missing)
    }

    /// The VM of a name, for a verb that takes one that has not ended.
    pub fn find_alive(&self, name: &str) -> Result<&Vm, Failure> {
        let vm = self.find(name)?;
        let ended = |how: &str| Err(Failure::new(ErrorKind::NotRunning, format!("VM {name:?} is {how}")).about(name));
        match &vm.phase {
            Phase::Off | Phase::Rebooted => ended("off"),
            Phase::Dead(reason) => ended(&format!("dead: {reason}")),
            _ => Ok(vm),
        }
    }
}
