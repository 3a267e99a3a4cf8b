//! One connection: how far it has come, what may flow each way, and what its guest is still to be told.

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op, Pair};
use std::collections::VecDeque;

/// Bytes of the guest's that a connection keeps until its socket takes them.
pub const ROOM: u32 = 64 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host wants it, with this tag, and the guest has not answered.
    Requested {
        /// Names the request.
        tag: u64,
        /// Whether its socket is told when the guest has accepted.
        greet: bool,
    },
    /// The guest wants it, and the host has not answered.
    Asked,
    /// It is there.
    Open,
    /// The guest has left it, with bytes that the socket has not taken yet.
    Draining,
}

/// From the guest to the host.
#[derive(Debug, Default)]
pub struct Intake {
    /// What the socket has not taken.
    pub unsent: VecDeque<u8>,
    /// Bytes that came.
    received: u32,
    /// Bytes that went on.
    passed: u32,
    /// The same, as the guest knows.
    told: u32,
}

impl Intake {
    /// Bytes come, if there is room for them.
    pub fn take(&mut self, bytes: &[u8]) -> bool {
        let waiting = self.received.wrapping_sub(self.passed) as usize;
        let fits = waiting + bytes.len() <= ROOM as usize;
        if fits {
            self.unsent.extend(bytes);
            self.received = self.received.wrapping_add(bytes.len() as u32);
        }
        fits
    }

    /// So many bytes went on.
    pub fn pass(&mut self, bytes: usize) {
        let bytes = bytes.min(self.unsent.len());
        self.unsent.drain(..bytes);
        self.passed = self.passed.wrapping_add(bytes as u32);
        if self.unsent.is_empty() {
            // An idle connection costs next to nothing.
            self.unsent = VecDeque::new();
        }
    }

    /// Whether the guest may think that there is much less room than there is.
    fn is_news(&self) -> bool {
        self.passed.wrapping_sub(self.told) >= ROOM / 2
    }
}

/// From the host to the guest: what the guest says that it has room for.
#[derive(Debug, Default)]
pub struct Credit {
    sent: u32,
    room: u32,
    taken: u32,
}

impl Credit {
    /// Bytes that may be sent: none to a guest whose numbers cannot be.
    fn left(&self) -> u32 {
        self.room.saturating_sub(self.sent.wrapping_sub(self.taken))
    }
}

/// What the guest is to be told.
#[derive(Debug, Default)]
struct Due {
    /// That it is wanted, or connected.
    opening: bool,
    /// How much may come.
    credit: bool,
    /// What the host does no more: flags.
    shutdown: u32,
}

/// What neither side does any more.
#[derive(Debug, Default)]
pub struct Ends {
    /// Flags that the guest has given.
    pub guest: u32,
    /// Flags that the guest is given.
    pub host: u32,
    /// The socket was told of the guest's end.
    pub told: bool,
    /// The host's end of the socket is closed.
    pub hung_up: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// How far it has come.
    pub phase: Phase,
    /// From the guest.
    pub intake: Intake,
    credit: Credit,
    due: Due,
    /// Its ends.
    pub ends: Ends,
    /// The socket may have something for the guest.
    pub readable: bool,
    /// It waits for its turn to send a packet.
    pub queued: bool,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing.
    Nothing,
    /// This packet.
    Packet(Header),
    /// So many bytes of its socket.
    Read(u32),
}

impl Connection {
    /// A new one.
    pub fn new(phase: Phase) -> Self {
        let due = Due { opening: matches!(phase, Phase::Requested { .. }), ..Due::default() };
        Self {
            phase,
            intake: Intake::default(),
            credit: Credit::default(),
            due,
            ends: Ends::default(),
            readable: false,
            queued: false,
        }
    }

    /// A packet of the guest's says how much it takes.
    pub fn heard(&mut self, header: &Header) {
        (self.credit.room, self.credit.taken) = (header.room, header.taken);
    }

    /// The host has answered the guest's request.
    pub fn accept(&mut self) {
        (self.phase, self.readable, self.due.opening) = (Phase::Open, true, true);
    }

    /// The guest has answered the host's.
    pub fn accepted(&mut self) {
        (self.phase, self.readable) = (Phase::Open, true);
    }

    /// The guest wants to know how much it may send.
    pub fn tell_credit(&mut self) {
        self.due.credit = true;
    }

    /// The host does no more of this.
    pub fn end(&mut self, flags: u32) {
        if self.ends.host | flags != self.ends.host {
            self.ends.host |= flags;
            self.due.shutdown = self.ends.host;
        }
    }

    /// Whether the guest has heard of it, and is to hear of its end.
    pub fn is_known_to_guest(&self) -> bool {
        match self.phase {
            Phase::Requested { .. } => !self.due.opening,
            Phase::Asked | Phase::Open => true,
            Phase::Draining => false,
        }
    }

    /// Whether something is read from its socket for the guest, as soon as there is something.
    pub fn wants_to_read(&self) -> bool {
        self.phase == Phase::Open && self.ends.host & NO_SEND == 0 && self.ends.guest & NO_RECEIVE == 0
    }

    /// Whether it has something for the guest.
    pub fn has_turn(&self) -> bool {
        let told = self.phase == Phase::Open && (self.due.credit || self.intake.is_news() || self.due.shutdown != 0);
        self.due.opening || told || (self.readable && self.wants_to_read() && self.credit.left() > 0)
    }

    /// What it has for the guest, of which it has told then.
    pub fn take_turn(&mut self, pair: Pair) -> Turn {
        if std::mem::take(&mut self.due.opening) {
            let op = if matches!(self.phase, Phase::Requested { .. }) { Op::Request } else { Op::Response };
            return Turn::Packet(self.header(pair, op));
        }
        if !self.has_turn() {
            return Turn::Nothing;
        }
        if self.due.shutdown != 0 {
            let flags = std::mem::take(&mut self.due.shutdown);
            return Turn::Packet(Header { flags, ..self.header(pair, Op::Shutdown) });
        }
        if self.due.credit || self.intake.is_news() {
            return Turn::Packet(self.header(pair, Op::CreditUpdate));
        }
        Turn::Read(self.credit.left())
    }

    /// The header of so many bytes that go to the guest.
    pub fn send(&mut self, pair: Pair, bytes: u32) -> Header {
        self.credit.sent = self.credit.sent.wrapping_add(bytes);
        Header { len: bytes, ..self.header(pair, Op::Data) }
    }

    /// Every header tells how much may come.
    fn header(&mut self, pair: Pair, op: Op) -> Header {
        self.due.credit = false;
        self.intake.told = self.intake.passed;
        Header { room: ROOM, taken: self.intake.passed, ..Header::to_guest(pair, op) }
    }
}
