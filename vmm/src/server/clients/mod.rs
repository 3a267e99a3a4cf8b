//! Clients: who is connected, what they ask, and that they are told.

pub mod connection;
pub mod connects;
pub mod deadlines;
pub mod doors;
pub mod latencies;
pub mod listener;
#[cfg(test)]
mod tests;

use crate::api::{Answer, Failure, Greeting, Line, PROTOCOL, Reply, Request};
use crate::clock::monotonic_ns;
use crate::server::ids::{ClientId, Generation};
use crate::server::watch::{Origin, Watches};
use connection::{Client, Heard, Mode};
use connects::Connects;
use doors::Doors;
use event_manager::EventSet;
use latencies::{Latencies, Outcome};
use listener::{Accept, Listener};
use nix::sys::resource::{Resource, getrlimit};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Instant;

/// How many clients there may be: a quarter of what may be open, so that VMs find the rest.
pub fn most_clients() -> usize {
    let open = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    usize::try_from(open / 4).unwrap_or(usize::MAX).max(16)
}

/// What a client wants done.
#[derive(Debug)]
pub enum Errand {
    /// A request, which is to be answered.
    Request(Request),
    /// To type on this VM's console.
    Type(Generation, Vec<u8>),
}

/// All clients, and where they come from. Changes of what is watched are noted in the `watches` that come along.
#[derive(Debug)]
pub struct Clients<L = UnixListener> {
    listener: Listener<L>,
    connected: BTreeMap<ClientId, Client>,
    most: usize,
    next: ClientId,
    /// Those that may have something to say though nothing comes: they got an answer, and may have asked the next thing
    /// already.
    pending: Vec<ClientId>,
    /// How long they waited for answers.
    pub latencies: Latencies,
    /// VMs that an earlier server has lost, as the first client is told.
    lost: Vec<String>,
    /// What they are to be connected to.
    pub connects: Connects,
    /// Where other programs come from that want to be.
    pub doors: Doors,
}

impl<L: Accept> Clients<L> {
    /// Nobody yet, and no more than `most` ever.
    pub fn new(socket: L, most: usize, lost: Vec<String>) -> Self {
        let (connected, next, pending) = (BTreeMap::new(), ClientId(1), Vec::new());
        let (connects, doors, latencies) = (Connects::default(), Doors::default(), Latencies::default());
        Self { listener: Listener::new(socket), connected, most, next, pending, latencies, lost, connects, doors }
    }

    /// Where they come from.
    pub fn listener(&mut self) -> &mut Listener<L> {
        &mut self.listener
    }

    /// Does what it is time for.
    pub fn tend(&mut self, now: Instant, watches: &mut Watches<Origin>) {
        self.listener.tend(now, watches);
        self.doors.tend(now, watches);
    }

    /// When there is something to do though nothing happens.
    pub fn next_look(&self) -> Option<Instant> {
        self.listener.next_look().into_iter().chain(self.doors.next_look()).min()
    }

    /// Takes in all who have come.
    pub fn accept(&mut self, now: Instant, watches: &mut Watches<Origin>) {
        while let Some(mut client) = self.listener.next((self.connected.len(), self.most), now, watches) {
            let id = self.next;
            self.next.0 += 1;
            client.say(&Line::<Greeting, Failure>::Ok(Greeting {
                protocol: PROTOCOL,
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id() as i32,
                lost: std::mem::take(&mut self.lost),
            }));
            client.token = Some(watches.add(client.stream(), EventSet::IN, Origin::Client(id)));
            self.connected.insert(id, client);
        }
    }

    /// Something has happened to a connection: it takes more, or has something to say.
    pub fn stirred(&mut self, id: ClientId) {
        if let Some(client) = self.connected.get_mut(&id) {
            client.flush();
            client.read();
        }
    }

    /// The next thing that a client wants, as far as it may say it now. One that is gone is forgotten.
    pub fn hear(&mut self, id: ClientId, watches: &mut Watches<Origin>) -> Option<Errand> {
        loop {
            let client = self.connected.get_mut(&id)?;
            match client.hear() {
                Heard::Nothing => {
                    self.rewatch(id, watches);
                    return None;
                }
                Heard::Gone => {
                    self.drop_client(id, watches);
                    return None;
                }
                Heard::Typed(vm, bytes) => return Some(Errand::Type(vm, bytes)),
                Heard::Request(Err(why)) => self.reply(id, Err(Failure::bad_request(why)), watches),
                Heard::Request(Ok(request)) => {
                    client.asked_ns = monotonic_ns();
                    client.subject = request.vm().map(str::to_owned);
                    client.asked = Some(request.kind());
                    return Some(Errand::Request(request));
                }
            }
        }
    }

    /// Those who may have something to say though nothing has come, each once.
    pub fn take_pending(&mut self) -> Vec<ClientId> {
        std::mem::take(&mut self.pending)
    }

    /// Whether there are any.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Answers the request that a client waits for. Its next one is heard between rounds.
    pub fn reply(&mut self, id: ClientId, reply: Reply, watches: &mut Watches<Origin>) {
        if let Some(client) = self.connected.get_mut(&id) {
            // A line that was no request is of no kind.
            if let Some(kind) = client.asked.take() {
                let outcome = if reply.is_ok() { Outcome::Done } else { Outcome::Failed };
                self.latencies.add(kind, monotonic_ns().saturating_sub(client.asked_ns), outcome);
            }
            client.reply(reply);
            self.rewatch(id, watches);
            self.pending.push(id);
        }
    }

    /// The same, with a descriptor that goes to the client.
    pub fn reply_with(&mut self, id: ClientId, answer: Answer, descriptor: OwnedFd, watches: &mut Watches<Origin>) {
        if let Some(client) = self.connected.get_mut(&id) {
            client.enclose(descriptor);
        }
        self.reply(id, Ok(answer), watches);
    }

    /// Makes of a connection, which has been answered, a view of a console, and shows what was printed `before`.
    pub fn stream(&mut self, id: ClientId, mode: Mode, before: &[u8]) {
        if let Some(client) = self.connected.get_mut(&id) {
            client.mode = mode;
            client.write(before);
        }
    }

    /// Shows those who view a console what was printed. Those who are gone are none any more; one that leaves too much unread
    /// is about to be.
    pub fn show(&mut self, viewers: &mut Vec<ClientId>, bytes: &[u8], watches: &mut Watches<Origin>) {
        viewers.retain(|viewer| {
            let Some(client) = self.connected.get_mut(viewer) else { return false };
            client.write(bytes);
            if client.mode == Mode::Closing {
                self.pending.push(*viewer);
            }
            self.rewatch(*viewer, watches);
            true
        });
    }

    /// Nothing more comes of what a client views: it ends when it has read all.
    pub fn close(&mut self, id: ClientId) {
        if let Some(client) = self.connected.get_mut(&id) {
            client.mode = Mode::Closing;
        }
        self.pending.push(id);
    }

    /// When a client asked what it waits for; `CLOCK_MONOTONIC` nanoseconds.
    pub fn asked_ns(&self, id: ClientId) -> u64 {
        self.connected.get(&id).map_or_else(monotonic_ns, |client| client.asked_ns)
    }

    /// Whether a client has read all that it was told, or is gone.
    pub fn has_read_all(&self, id: ClientId) -> bool {
        self.connected.get(&id).is_none_or(|client| !client.has_output())
    }

    fn rewatch(&self, id: ClientId, watches: &mut Watches<Origin>) {
        let Some(client) = self.connected.get(&id) else { return };
        let mut events = EventSet::empty();
        events.set(EventSet::IN, client.wants_input());
        events.set(EventSet::OUT, client.has_output());
        if let Some(token) = client.token {
            watches.modify(token, events);
        }
    }

    fn drop_client(&mut self, id: ClientId, watches: &mut Watches<Origin>) {
        if let Some(client) = self.connected.remove(&id)
            && let Some(token) = client.token
        {
            watches.remove(token, client);
        }
    }
}
