//! Streams between programs of the guest and programs of the host: virtio's socket device.
//!
//! | file | has |
//! | --- | --- |
//! | `packet` | a packet's header |
//! | `connection` | one connection: its phase, credit, and what is to be told |
//! | `muxer` | all of them: what packets and sockets do to them, without either |
//! | `notice` | what a child's device says to the agent of its guest |
//! | `outside` | where the main thread and the device meet |
//!
//! A connection has a Unix socket on the host's side, one end of which is here; who has the other end is the server's affair. The
//! main thread watches the sockets, each once, and sends an errand; bytes are moved by the vCPU that accesses the device or does
//! the errand, between two runs. A socket never keeps it waiting: what it does not take is kept, 64 KiB of it at most, and the
//! guest has no credit for more.
//!
//! At a fork sockets stay with the parent. The child begins with a list of its parent's connections, and resets each of them
//! before it does anything else; what its guest sends on one meanwhile is answered in the same way. A request of the guest's that
//! is in the ring at that moment is carried out by both, each for itself.

mod connection;
mod muxer;
mod notice;
mod outside;
mod packet;
#[cfg(test)]
mod rings;
#[cfg(test)]
mod tests;

pub use muxer::Outcome;
pub use notice::{Child, Noticed};
pub use outside::{Outside, Wanted};
pub use packet::Pair;

use super::device::{Broken, Device, Memory};
use connection::ROOM;
use muxer::{Action, Event, Muxer, Next, Readiness, Saved};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, sendmsg, shutdown};
use notice::{AGENT_PORT, Notice};
use outside::News;
use packet::{GUEST_CID, HEADER_LEN, Header, NO_RECEIVE, Op};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

const ID: u32 = 19;
/// Packets to the guest, packets from it, and events, of which there are none.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// What the connection is called that carries the notice. No server counts so far.
const NOTICE: u64 = u64::MAX;
/// How often packets of both ways are looked for in one access: who has more tells again.
const ROUNDS: usize = 4;

/// Whom the device tells.
pub trait Host: Debug + Send {
    /// How a request of the host's ended.
    fn connected(&self, tag: u64, outcome: Outcome);

    /// The guest wants to be connected to this port of the host's. The answer comes by [`Outside::answer`].
    fn ask(&self, pair: Pair);

    /// What came of the notice that the guest is a child.
    fn noticed(&self, noticed: Noticed);
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    host: Box<dyn Host>,
    outside: Arc<Outside>,
    muxer: Muxer,
    sockets: BTreeMap<Pair, OwnedFd>,
    /// What the guest's agent is told, on which connection, until that is over.
    notice: Option<(Option<Pair>, Notice)>,
    /// What is on its way to the guest.
    buffer: Vec<u8>,
}

impl Vsock {
    /// A device without connections.
    pub fn new(host: Box<dyn Host>, outside: Arc<Outside>) -> Self {
        Self { host, outside, muxer: Muxer::default(), sockets: BTreeMap::new(), notice: None, buffer: Vec::new() }
    }

    /// Takes note of what has happened, and does what follows. `socket` is the one that comes with the event.
    fn happened(&mut self, event: Event<'_>, mut socket: Option<OwnedFd>) {
        let mut actions = self.muxer.on(event);
        // What is written may have consequences.
        while !actions.is_empty() {
            let done = std::mem::take(&mut actions);
            for action in done {
                if let Some(event) = self.carry_out(action, &mut socket) {
                    actions.extend(self.muxer.on(event));
                }
            }
        }
    }

    fn carry_out(&mut self, action: Action, new: &mut Option<OwnedFd>) -> Option<Event<'static>> {
        match action {
            Action::Tell(NOTICE, Outcome::Accepted) => {}
            Action::Tell(NOTICE, _) => self.no_agent(),
            Action::Tell(tag, outcome) => self.host.connected(tag, outcome),
            Action::Ask(pair) => self.host.ask(pair),
            Action::Greet(pair) => {
                // It is the first thing that is written there, so there is room.
                let line = format!("OK {}\n", pair.host);
                self.send(pair, line.as_bytes()).ok()?;
            }
            Action::Adopt(pair) => {
                let Some(socket) = new.take() else {
                    if let Some((on, _)) = &mut self.notice {
                        *on = Some(pair);
                    }
                    return None;
                };
                if let Err(error) = self.outside.begin(pair, socket.as_fd()) {
                    log::error!("watch a socket: {error}");
                }
                self.sockets.insert(pair, socket);
            }
            Action::Close(pair) if self.is_notice(pair) => self.no_agent(),
            Action::Close(pair) => {
                if let Some(socket) = self.sockets.remove(&pair) {
                    self.outside.end(socket.as_fd());
                }
            }
            Action::Write(pair) if self.is_notice(pair) => return self.hear_agent(pair),
            Action::Write(pair) => return self.write(pair),
            Action::Shut(pair, flags) => {
                let how = if flags & NO_RECEIVE != 0 { Shutdown::Read } else { Shutdown::Write };
                // Where the other end is closed already, there is nobody to be told.
                let _ = self.sockets.get(&pair).map(|socket| shutdown(socket.as_raw_fd(), how));
            }
            Action::Watch(pair, wanted) => {
                let socket = self.sockets.get(&pair)?;
                if let Err(error) = self.outside.watch(pair, socket.as_fd(), wanted) {
                    log::error!("watch a socket: {error}");
                }
            }
        }
        None
    }

    /// Whether this connection carries the notice.
    fn is_notice(&self, pair: Pair) -> bool {
        self.notice.as_ref().is_some_and(|(on, _)| *on == Some(pair))
    }

    /// The connection that carries the notice has ended before that was acked, or was never made.
    fn no_agent(&mut self) {
        if self.notice.take().is_some() {
            self.host.noticed(Noticed::NoAgent);
        }
    }

    /// The agent says something on the connection that carries the notice. When it is over, nobody is at its host's end.
    fn hear_agent(&mut self, pair: Pair) -> Option<Event<'static>> {
        let (bytes, (_, notice)) = (self.muxer.unsent(pair), self.notice.as_mut()?);
        let Some(noticed) = notice.hear(bytes) else { return Some(Event::Wrote(pair, bytes.len())) };
        self.notice = None;
        self.host.noticed(noticed);
        Some(Event::Ready(pair, Readiness { read: true, write: false, hung_up: true }))
    }

    /// Writes what the guest sent, as far as the socket takes it.
    fn write(&self, pair: Pair) -> Option<Event<'static>> {
        let bytes = self.muxer.unsent(pair);
        if bytes.is_empty() {
            return None;
        }
        Some(match self.send(pair, bytes) {
            Ok(written) => Event::Wrote(pair, written),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Event::Wrote(pair, 0),
            Err(_) => Event::Broken(pair),
        })
    }

    fn send(&self, pair: Pair, bytes: &[u8]) -> nix::Result<usize> {
        let socket = self.sockets.get(&pair).ok_or(Errno::ENOTCONN)?;
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &[], flags, None)
    }

    /// Does what the server asked for, and what sockets are ready for.
    fn hear(&mut self) {
        for news in self.outside.take() {
            match news {
                // Who asked for it may have given up while there was no driver.
                News::Connect(Wanted { socket, .. }) if is_at_end(&socket) => {}
                News::Connect(Wanted { tag, port, greet, socket }) => {
                    self.happened(Event::Connect { tag, port, greet }, Some(socket));
                }
                News::Notice(child) => {
                    self.notice = Some((None, Notice::new(child)));
                    self.happened(Event::Connect { tag: NOTICE, port: AGENT_PORT, greet: false }, None);
                }
                News::Answer(pair, socket) => self.happened(Event::Answer(pair, socket.is_some()), socket),
                News::Ready(pair, ready) => self.happened(Event::Ready(pair, ready), None),
            }
        }
    }

    /// Moves packets both ways, as far as there are any, and room for them. Whether the guest wants to know.
    fn serve(&mut self, queues: &mut [Queue], memory: &Memory) -> Result<bool, Broken> {
        let [to_guest, from_guest, _] = queues else { return Err(Broken) };
        let mut told = false;
        for _ in 0..ROUNDS {
            let taken = from_guest.ready() && self.take_packets(from_guest, memory)?;
            let given = to_guest.ready() && self.give_packets(to_guest, memory)?;
            for (queue, used) in [(&mut *to_guest, given), (&mut *from_guest, taken)] {
                told |= used && queue.needs_notification(memory).map_err(|_| Broken)?;
            }
            if !taken && !given {
                break;
            }
        }
        Ok(told)
    }

    /// Takes packets of the guest's. Whether there were any.
    fn take_packets(&mut self, queue: &mut Queue, memory: &Memory) -> Result<bool, Broken> {
        let mut used = false;
        // Not more than there can be: a guest that goes on adding does not keep us here.
        for _ in 0..queue.size() {
            if !self.muxer.listens() {
                break;
            }
            let Some(chain) = queue.pop_descriptor_chain(memory) else { break };
            let head = chain.head_index();
            let mut packet = chain.reader(memory).map_err(|_| Broken)?;
            let mut header = [0; HEADER_LEN];
            packet.read_exact(&mut header).map_err(|_| Broken)?;
            let header = Header::from_bytes(&header);
            let mut bytes = Vec::new();
            if header.op() == Some(Op::Data) && header.len <= ROOM {
                bytes.resize(header.len as usize, 0);
                packet.read_exact(&mut bytes).map_err(|_| Broken)?;
            }
            let too_long = Header { op: u16::MAX, ..header };
            let header = if header.len > ROOM { &too_long } else { &header };
            self.happened(Event::Packet(header, &bytes), None);
            queue.add_used(memory, head, 0).map_err(|_| Broken)?;
            used = true;
        }
        Ok(used)
    }

    /// Fills the guest's buffers with packets. Whether there were any.
    fn give_packets(&mut self, queue: &mut Queue, memory: &Memory) -> Result<bool, Broken> {
        let mut used = false;
        for _ in 0..queue.size() {
            if !self.muxer.has_next() {
                break;
            }
            let Some(chain) = queue.pop_descriptor_chain(memory) else { break };
            let head = chain.head_index();
            let mut packet = chain.writer(memory).map_err(|_| Broken)?;
            // A buffer without room for a byte would have us come again and again.
            let room = packet.available_bytes().checked_sub(HEADER_LEN).filter(|room| *room > 0).ok_or(Broken)?;
            let Some(header) = self.next_packet(room) else {
                queue.go_to_previous_position();
                break;
            };
            packet.write_all(&header.to_bytes()).and_then(|()| packet.write_all(&self.buffer)).map_err(|_| Broken)?;
            let len = (HEADER_LEN + self.buffer.len()) as u32;
            queue.add_used(memory, head, len).map_err(|_| Broken)?;
            used = true;
        }
        Ok(used)
    }

    /// The next packet for the guest, whose bytes are in the buffer.
    fn next_packet(&mut self, room: usize) -> Option<Header> {
        self.buffer.clear();
        loop {
            match self.muxer.next(room) {
                Next::Nothing => return None,
                Next::Packet(header) => return Some(header),
                Next::Read(pair, most) if self.is_notice(pair) => {
                    let said = self.notice.as_mut().map(|(_, notice)| notice.say(most)).unwrap_or_default();
                    self.buffer.extend_from_slice(&said);
                    match said.len() {
                        0 => self.happened(Event::Empty(pair), None),
                        count => return self.muxer.read(pair, count),
                    }
                }
                Next::Read(pair, most) => {
                    self.buffer.resize(most, 0);
                    let received =
                        |socket: &OwnedFd| recv(socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT);
                    let got = self.sockets.get(&pair).map_or(Ok(0), received);
                    self.buffer.truncate(*got.as_ref().unwrap_or(&0));
                    match got {
                        Ok(0) => self.happened(Event::End(pair), None),
                        Ok(count) => return self.muxer.read(pair, count),
                        Err(Errno::EAGAIN | Errno::EINTR) => self.happened(Event::Empty(pair), None),
                        // It was closed with something in it that nobody had read.
                        Err(_) => self.happened(Event::End(pair), None),
                    }
                }
            }
        }
    }
}

/// Whether whoever has the other end has closed it. What it may have written already stays.
fn is_at_end(socket: &OwnedFd) -> bool {
    matches!(recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT), Ok(0))
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = GUEST_CID.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at).copied()).unwrap_or(0);
        }
    }

    fn notified(&mut self, _index: usize, queues: &mut [Queue], memory: &Memory) -> Result<bool, Broken> {
        self.attend(queues, memory)
    }

    fn attend(&mut self, queues: &mut [Queue], memory: &Memory) -> Result<bool, Broken> {
        self.hear();
        // A guest whose rings make no sense gets nothing more, and nobody waits for it.
        self.serve(queues, memory).inspect_err(|_| self.reset())
    }

    fn reset(&mut self) {
        self.happened(Event::Reset, None);
    }

    fn save(&self) -> Vec<u8> {
        postcard::to_stdvec(&self.muxer.save()).expect("numbers can be written down")
    }

    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        let saved: Saved =
            postcard::from_bytes(saved).map_err(|e| format!("{} bytes are no connections: {e}", saved.len()))?;
        self.muxer.load(saved)
    }
}
