//! Clients: who is connected, what they ask, and that they are told.

pub mod connection;
pub mod talk;

use crate::api::{Answer, ErrorKind, Failure, Greeting, Line, PROTOCOL, Reply, Request};
use crate::clock::monotonic_ns;
use crate::server::Server;
use crate::server::inspect::look::Wanted;
use crate::server::main_loop::Origin;
use crate::server::registry::end::EndCause;
use crate::server::registry::vm::{Phase, Vm};
use connection::{Client, ClientId, Heard};
use event_manager::EventSet;
use nix::sys::resource::{Resource, getrlimit};
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};
use talk::LogPart;

/// How long no client is waited for where there is no descriptor for one.
const DEAF: Duration = Duration::from_secs(1);

/// A descriptor that is kept for telling a client that there are none left.
pub fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// How many clients there may be: a quarter of what may be open, so that VMs find the rest.
pub fn most_clients() -> usize {
    let open = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    usize::try_from(open / 4).unwrap_or(usize::MAX).max(16)
}

impl Server {
    pub fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) && self.turn_away() => {
                    continue;
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                    return self.rest_from_clients(&error);
                }
                Err(_) => return,
            };
            let id = ClientId(self.fresh_id());
            let Ok(mut client) = Client::new(stream) else { continue };
            if !client.is_ours() {
                log::warn!("somebody else's connection is refused");
                continue;
            }
            if self.clients.len() >= self.most_clients {
                self.refuse(client);
                continue;
            }
            client.say(&Line::<Greeting, Failure>::Ok(Greeting {
                protocol: PROTOCOL,
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id() as i32,
                lost: std::mem::take(&mut self.lost),
            }));
            client.token = Some(self.watches.add(client.stream(), EventSet::IN, Origin::Client(id)));
            self.clients.insert(id, client);
        }
    }

    /// Tells a client that there are too many, with the descriptor that is kept for it. Whether one was told.
    fn turn_away(&mut self) -> bool {
        if self.spare.take().is_none() {
            return false;
        }
        let stream = self.listener.accept();
        let told = match stream.and_then(|(stream, _)| Client::new(stream)) {
            Ok(client) if client.is_ours() => {
                self.refuse(client);
                true
            }
            client => client.is_ok(),
        };
        self.spare = spare();
        told
    }

    fn refuse(&mut self, mut client: Client) {
        let now = Instant::now();
        if self.refused_at.is_none_or(|at| now - at > DEAF) {
            log::error!("too many connections: {} are open", self.clients.len());
            self.refused_at = Some(now);
        }
        let why = Failure::new(ErrorKind::Limit, "the server has too many connections");
        client.say(&Line::<Greeting, Failure>::Error(why));
    }

    /// A client waits, and there is no descriptor for it: it would be heard of in every round.
    pub fn rest_from_clients(&mut self, error: &io::Error) {
        log::error!("clients wait: {error}");
        self.deaf_until = Some(Instant::now() + DEAF);
        if let Some(token) = self.listener_token {
            self.watches.modify(token, EventSet::empty());
        }
    }

    pub fn listen_again(&mut self, now: Instant) {
        if let (Some(_), Some(token)) = (self.deaf_until.take_if(|until| *until <= now), self.listener_token) {
            self.watches.modify(token, EventSet::IN);
        }
    }

    pub fn serve_client(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.flush();
        client.read();
        self.hear(id);
    }

    /// Does what a client has to say, as far as it may say it now.
    pub fn hear(&mut self, id: ClientId) {
        while let Some(client) = self.clients.get_mut(&id) {
            match client.hear() {
                Heard::Nothing => {
                    self.rewatch(id);
                    return;
                }
                Heard::Gone => return self.drop_client(id),
                Heard::Typed(vm, bytes) => self.type_on_console(vm, bytes),
                Heard::Request(Err(why)) => self.reply(id, Err(Failure::bad_request(why))),
                Heard::Request(Ok(request)) => {
                    client.asked_ns = monotonic_ns();
                    client.subject = request.vm().map(str::to_owned);
                    self.carry_out(id, request);
                }
            }
        }
    }

    pub fn rewatch(&mut self, id: ClientId) {
        let Some(client) = self.clients.get(&id) else { return };
        let mut events = EventSet::empty();
        events.set(EventSet::IN, client.wants_input());
        events.set(EventSet::OUT, client.has_output());
        if let Some(token) = client.token {
            self.watches.modify(token, events);
        }
    }

    pub fn drop_client(&mut self, id: ClientId) {
        if let Some(client) = self.clients.remove(&id)
            && let Some(token) = client.token
        {
            self.watches.remove(token, client);
        }
    }

    /// Answers the request that a client waits for. Its next one is heard between rounds.
    pub fn reply(&mut self, id: ClientId, reply: Reply) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.reply(reply);
            self.rewatch(id);
            self.replied.push(id);
        }
    }

    pub fn carry_out(&mut self, client: ClientId, request: Request) {
        log::debug!("{client:?}: {request:?}");
        self.budget.stir();
        match request {
            Request::Launch(_) if self.stopping.is_some() => {
                self.reply(client, Err(Failure::new(ErrorKind::ShuttingDown, "the server is shutting down")));
            }
            Request::Launch(launch) => self.launch(client, launch),
            Request::Fork(fork) => self.fork(client, fork),
            Request::Send { name, text, timeout_ms } => self.send(client, &name, text, timeout_ms),
            Request::Console { name } => self.console(client, &name),
            Request::Logs { name, follow, tail_lines } => self.logs(client, &name, LogPart { follow, tail_lines }),
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
        self.vms.find(name).ok_or_else(missing)
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
