//! All connections of a guest: what packets and sockets do to them. It touches neither memory nor sockets: it is told what
//! happened, and says what is to be done.
//!
//! Rules:
//! * At most [`MOST`] connections. The guest may have asked for [`MOST_ASKED`] that nobody has answered, those counted that it has
//!   given up since: it does not have the host do more by that.
//! * A packet for the guest is made when there is a buffer for it, and not before: nothing waits here but one bit for each thing
//!   to tell, and the resets, of which a guest can cause [`MOST_RESETS`] before its packets stay in its ring.
//! * Resets come before everything else. So a child, which begins with a reset for each connection of its parent, ends these
//!   before it begins any.
//! * What a guest says that cannot be costs it the connection, and nothing else.

use super::connection::{Connection, Intake, Phase, ROOM, Turn};
use super::packet::{GUEST_CID, HOST_CID, Header, NO_RECEIVE, NO_SEND, Op, Pair, STREAM};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Most connections of a guest.
pub const MOST: usize = 1024;
/// Most connections that a guest has asked for and nobody has answered.
pub const MOST_ASKED: usize = 64;
/// A guest for which so many resets wait is not listened to.
pub const MOST_RESETS: usize = 256;
/// The first port of the host's that is given out. Those below are for what has a port of its own.
pub const FIRST_PORT: u32 = 1 << 30;

/// Something has happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The guest has sent a packet.
    Packet(&'a Header, &'a [u8]),
    /// The host wants to be connected to a port of the guest's.
    Connect {
        /// Names the request.
        tag: u64,
        /// The port.
        port: u32,
        /// Whether its socket is told when the guest has accepted.
        greet: bool,
    },
    /// The host has answered what the guest [asked](Action::Ask) for: there is a socket, or none.
    Answer(Pair, bool),
    /// A socket has become ready.
    Ready(Pair, Readiness),
    /// A socket has nothing to read just now.
    Empty(Pair),
    /// A socket has come to its end, as far as reading goes.
    End(Pair),
    /// A socket took so many bytes.
    Wrote(Pair, usize),
    /// A socket takes no bytes any more.
    Broken(Pair),
    /// The guest has reset the device.
    Reset,
}

/// What a socket is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There is something to read, be it the end.
    pub read: bool,
    /// It takes bytes.
    pub write: bool,
    /// Its other end is closed.
    pub hung_up: bool,
}

/// How a request of the host's ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The guest has accepted.
    Accepted,
    /// It has not: nobody listens there.
    Refused,
    /// There are too many connections.
    Full,
}

/// Something is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The socket that came with the event is this connection's.
    Adopt(Pair),
    /// The socket is needed no more, and not watched.
    Close(Pair),
    /// The host is to be told how its request ended.
    Tell(u64, Outcome),
    /// The socket is to be told that the guest has accepted, before anything else.
    Greet(Pair),
    /// The host is to be asked for a socket.
    Ask(Pair),
    /// What the guest has [sent](Muxer::unsent) is to be written.
    Write(Pair),
    /// Nothing more will be written, or read, as these flags of the guest's say.
    Shut(Pair, u32),
    /// The socket is to be watched, once: for its end in any case, and for this.
    Watch(Pair, Readiness),
}

/// What is to be sent next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Nothing,
    /// This packet.
    Packet(Header),
    /// What can be read from a socket, so many bytes at most.
    Read(Pair, usize),
}

/// What a child has to know of its parent's connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Those that are to be reset.
    pub ended: Vec<Pair>,
    /// The host's next port.
    pub next_port: u32,
}

/// The connections of a guest.
#[derive(Debug)]
pub struct Muxer {
    connections: BTreeMap<Pair, Connection>,
    /// Those that have something for the guest, each once.
    turns: VecDeque<Pair>,
    resets: VecDeque<Pair>,
    next_port: u32,
    /// Requests of the guest's that the host has not answered, whether the guest still wants them or not.
    asked: usize,
    actions: Vec<Action>,
}

impl Default for Muxer {
    fn default() -> Self {
        Self {
            connections: BTreeMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            asked: 0,
            actions: Vec::new(),
        }
    }
}

impl Muxer {
    /// Whether the guest's packets are listened to, or stay in their ring.
    pub fn listens(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// Whether there may be something for the guest.
    pub fn has_next(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// What a connection's socket has not taken yet.
    pub fn unsent(&self, pair: Pair) -> &[u8] {
        self.connections.get(&pair).map_or(&[], |connection| connection.intake.unsent.as_slices().0)
    }

    /// Takes note of what has happened. What is to be done then, in this order.
    pub fn on(&mut self, event: Event<'_>) -> Vec<Action> {
        match event {
            Event::Packet(header, bytes) => self.packet(header, bytes),
            Event::Connect { tag, port, greet } => self.connect(tag, port, greet),
            Event::Answer(pair, accepted) => self.answer(pair, accepted),
            Event::Ready(pair, ready) => self.ready(pair, ready),
            Event::Empty(pair) => {
                self.with(pair, |connection| connection.readable = false);
                self.watch(pair);
            }
            Event::End(pair) => self.ended(pair),
            Event::Wrote(pair, bytes) => self.wrote(pair, bytes),
            Event::Broken(pair) => self.broken(pair),
            Event::Reset => self.reset_all(),
        }
        std::mem::take(&mut self.actions)
    }

    /// What is to be sent next, in a buffer that has room for so many bytes behind the header.
    pub fn next(&mut self, room: usize) -> Next {
        if let Some(pair) = self.resets.pop_front() {
            return Next::Packet(Header::to_guest(pair, Op::Reset));
        }
        while let Some(pair) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&pair) else { continue };
            connection.queued = false;
            match connection.take_turn(pair) {
                Turn::Nothing => {}
                Turn::Packet(header) => {
                    self.queue(pair);
                    return Next::Packet(header);
                }
                // It has its next turn when it is known what came of this one.
                Turn::Read(most) => return Next::Read(pair, room.min(most.min(ROOM) as usize)),
            }
        }
        Next::Nothing
    }

    /// So many bytes were read, as [`next`](Self::next) had it: the header to send them with.
    pub fn read(&mut self, pair: Pair, bytes: usize) -> Option<Header> {
        let header = self.connections.get_mut(&pair)?.send(pair, bytes as u32);
        self.queue(pair);
        Some(header)
    }

    /// What a child has to know.
    pub fn save(&self) -> Saved {
        let known = self.connections.iter().filter(|(_, connection)| connection.is_known_to_guest());
        let ended = self.resets.iter().copied().chain(known.map(|(pair, _)| *pair)).collect();
        Saved { ended, next_port: self.next_port }
    }

    /// Begins as a child. There are no connections.
    ///
    /// # Errors
    /// No parent can have had so many.
    pub fn load(&mut self, saved: Saved) -> Result<(), String> {
        let most = MOST + MOST_LOADED;
        if saved.ended.len() > most {
            return Err(format!("{} connections, of at most {most}", saved.ended.len()));
        }
        self.resets = saved.ended.into();
        self.next_port = saved.next_port.max(FIRST_PORT);
        Ok(())
    }

    fn with(&mut self, pair: Pair, change: impl FnOnce(&mut Connection)) {
        if let Some(connection) = self.connections.get_mut(&pair) {
            change(connection);
        }
    }

    /// Gives a connection that has something for the guest its turn.
    fn queue(&mut self, pair: Pair) {
        if let Some(connection) = self.connections.get_mut(&pair)
            && !connection.queued
            && connection.has_turn()
        {
            connection.queued = true;
            self.turns.push_back(pair);
        }
    }

    /// Watches a socket for what its connection waits for.
    fn watch(&mut self, pair: Pair) {
        let Some(connection) = self.connections.get(&pair) else { return };
        let read = connection.wants_to_read() && !connection.readable;
        let write = !connection.intake.unsent.is_empty();
        if connection.phase != Phase::Asked && !connection.ends.hung_up | write {
            self.actions.push(Action::Watch(pair, Readiness { read, write, hung_up: false }));
        }
    }

    fn connect(&mut self, tag: u64, port: u32, greet: bool) {
        if self.connections.len() >= MOST || self.resets.len() >= MOST_LOADED {
            return self.actions.push(Action::Tell(tag, Outcome::Full));
        }
        let pair = loop {
            let pair = Pair { host: self.next_port, guest: port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&pair) {
                break pair;
            }
        };
        self.connections.insert(pair, Connection::new(Phase::Requested { tag, greet }));
        self.actions.push(Action::Adopt(pair));
        self.watch(pair);
        self.queue(pair);
    }

    fn answer(&mut self, pair: Pair, accepted: bool) {
        self.asked = self.asked.saturating_sub(1);
        let Some(connection) = self.connections.get_mut(&pair).filter(|connection| connection.phase == Phase::Asked)
        else {
            return;
        };
        if !accepted {
            return self.abort(pair);
        }
        connection.accept();
        self.actions.push(Action::Adopt(pair));
        self.queue(pair);
    }

    fn packet(&mut self, header: &Header, bytes: &[u8]) {
        // Whoever has a wrong address, or another kind of connection than there is, is nobody that we know.
        if (header.source_cid, header.destination_cid, header.kind) != (GUEST_CID, HOST_CID, STREAM) {
            return;
        }
        let pair = header.pair_of_guest();
        let Some(connection) = self.connections.get_mut(&pair) else { return self.stranger(header, pair) };
        connection.heard(header);
        let (known, phase) = (connection.is_known_to_guest(), connection.phase);
        match (header.op(), phase) {
            (Some(Op::Reset), _) => return self.guest_left(pair),
            (_, Phase::Draining) => self.resets.push_back(pair),
            (Some(Op::Response), Phase::Requested { tag, greet }) if known => {
                connection.accepted();
                self.actions.extend(greet.then_some(Action::Greet(pair)));
                self.actions.push(Action::Tell(tag, Outcome::Accepted));
            }
            (Some(Op::Data), Phase::Open) => return self.data(pair, bytes),
            (Some(Op::Shutdown), Phase::Open) => return self.shutdown(pair, header.flags),
            (Some(Op::CreditUpdate), Phase::Open) => {}
            (Some(Op::CreditRequest), Phase::Open) => connection.tell_credit(),
            _ => return self.abort(pair),
        }
        self.queue(pair);
    }

    /// A packet that belongs to no connection.
    fn stranger(&mut self, header: &Header, pair: Pair) {
        match header.op() {
            Some(Op::Reset) => {}
            Some(Op::Request) if self.connections.len() < MOST && self.asked < MOST_ASKED => {
                let mut connection = Connection::new(Phase::Asked);
                connection.heard(header);
                self.connections.insert(pair, connection);
                self.asked += 1;
                self.actions.push(Action::Ask(pair));
            }
            _ => self.resets.push_back(pair),
        }
    }

    fn data(&mut self, pair: Pair, bytes: &[u8]) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        if connection.ends.guest & NO_SEND != 0 || !connection.intake.take(bytes) {
            return self.abort(pair);
        }
        if connection.ends.host & NO_RECEIVE != 0 {
            // It was on its way when the host left.
            connection.intake.pass(bytes.len());
        } else if !bytes.is_empty() {
            self.actions.push(Action::Write(pair));
        }
        self.queue(pair);
    }

    fn shutdown(&mut self, pair: Pair, flags: u32) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        let news = flags & (NO_SEND | NO_RECEIVE) & !connection.ends.guest;
        connection.ends.guest |= news;
        if news & NO_RECEIVE != 0 && connection.ends.guest & NO_SEND == 0 {
            connection.readable = false;
            self.actions.push(Action::Shut(pair, NO_RECEIVE));
        }
        self.all_written(pair);
        self.queue(pair);
    }

    /// Where the guest sends no more, and the socket has taken all: the host is told.
    fn all_written(&mut self, pair: Pair) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        if !connection.intake.unsent.is_empty() {
            return;
        }
        let left = connection.ends.guest;
        if connection.phase == Phase::Draining {
            self.remove(pair);
        } else if left == NO_SEND | NO_RECEIVE {
            self.abort(pair);
        } else if left & NO_SEND != 0 && !std::mem::replace(&mut connection.ends.told, true) {
            self.actions.push(Action::Shut(pair, NO_SEND));
        }
    }

    /// The guest has reset a connection. Who has said before that nothing more comes, has what it sent delivered.
    fn guest_left(&mut self, pair: Pair) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        match connection.phase {
            Phase::Requested { tag, .. } => {
                self.actions.push(Action::Tell(tag, Outcome::Refused));
                self.remove(pair);
            }
            Phase::Open if connection.ends.guest & NO_SEND != 0 && !connection.intake.unsent.is_empty() => {
                connection.phase = Phase::Draining;
            }
            Phase::Draining => {}
            Phase::Asked | Phase::Open => self.remove(pair),
        }
    }

    fn ready(&mut self, pair: Pair, ready: Readiness) {
        // One that the host has not answered has no socket: that was one of before, with the same ports.
        let connection = self.connections.get_mut(&pair).filter(|connection| connection.phase != Phase::Asked);
        let Some(connection) = connection else { return };
        connection.ends.hung_up |= ready.hung_up;
        connection.readable |= ready.read && connection.wants_to_read();
        let (phase, hung_up) = (connection.phase, ready.hung_up);
        let reads = connection.wants_to_read();
        match phase {
            // Who wanted it has given up.
            Phase::Requested { .. } if hung_up => return self.abort(pair),
            Phase::Draining if hung_up => return self.remove(pair),
            Phase::Open if hung_up && !reads => self.host_left(pair),
            Phase::Open if hung_up => connection.readable = true,
            _ => {}
        }
        let Some(connection) = self.connections.get(&pair) else { return };
        if !connection.intake.unsent.is_empty() {
            self.actions.push(Action::Write(pair));
        } else if !connection.readable {
            self.watch(pair);
        }
        self.queue(pair);
    }

    /// The host sends no more.
    fn ended(&mut self, pair: Pair) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        connection.readable = false;
        connection.end(NO_SEND);
        match connection.ends.hung_up {
            true => self.host_left(pair),
            false => self.watch(pair),
        }
        self.queue(pair);
    }

    /// The host has closed its end: nobody reads what the guest sends.
    fn host_left(&mut self, pair: Pair) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        connection.end(NO_SEND | NO_RECEIVE);
        Self::discard(&mut connection.intake);
        self.all_written(pair);
    }

    fn wrote(&mut self, pair: Pair, bytes: usize) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        connection.intake.pass(bytes);
        match connection.intake.unsent.is_empty() {
            true => self.all_written(pair),
            false => self.watch(pair),
        }
        self.queue(pair);
    }

    fn broken(&mut self, pair: Pair) {
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        Self::discard(&mut connection.intake);
        connection.end(NO_RECEIVE);
        self.all_written(pair);
        self.queue(pair);
    }

    /// Nobody takes these bytes.
    fn discard(intake: &mut Intake) {
        intake.pass(intake.unsent.len());
    }

    /// Ends a connection, and has the guest know, if it knew of it.
    fn abort(&mut self, pair: Pair) {
        if self.connections.get(&pair).is_some_and(Connection::is_known_to_guest) {
            self.resets.push_back(pair);
        }
        if let Some(Phase::Requested { tag, .. }) = self.connections.get(&pair).map(|connection| connection.phase) {
            self.actions.push(Action::Tell(tag, Outcome::Refused));
        }
        self.remove(pair);
    }

    fn remove(&mut self, pair: Pair) {
        let Some(connection) = self.connections.remove(&pair) else { return };
        if connection.queued {
            self.turns.retain(|turn| *turn != pair);
        }
        if connection.phase != Phase::Asked {
            self.actions.push(Action::Close(pair));
        }
    }

    fn reset_all(&mut self) {
        self.resets.clear();
        while let Some(pair) = self.connections.keys().next().copied() {
            self.abort(pair);
        }
        self.resets.clear();
        self.turns.clear();
    }

    /// What must hold between two events.
    #[cfg(test)]
    pub fn check(&self) {
        assert!(self.connections.len() <= MOST);
        assert!(self.asked <= MOST_ASKED);
        assert!(self.resets.len() + self.connections.len() <= MOST + MOST_LOADED);
        let asked = self.connections.values().filter(|connection| connection.phase == Phase::Asked).count();
        assert!(asked <= self.asked, "{asked} of {} requests wait for the host", self.asked);
        let queued = self.connections.iter().filter(|(_, connection)| connection.queued);
        let turns: std::collections::BTreeSet<&Pair> = self.turns.iter().collect();
        assert_eq!(turns.len(), self.turns.len(), "somebody has two turns");
        assert!(queued.map(|(pair, _)| pair).eq(turns), "turns of those who wait for one");
        for connection in self.connections.values() {
            assert!(connection.intake.unsent.len() <= ROOM as usize);
            assert!(connection.queued || !connection.has_turn(), "{connection:?} is forgotten");
            if connection.phase == Phase::Draining {
                assert!(!connection.intake.unsent.is_empty());
            }
        }
    }
}

/// Most resets that wait where those are counted that the host's ends cause.
const MOST_LOADED: usize = MOST + 2 * MOST_RESETS;
