//! The device with rings in guest memory and real sockets: a driver that divides its packets as it likes, and one that writes
//! whatever comes to its mind.

use super::muxer::{FIRST_PORT, MOST};
use super::packet::{HOST_CID, NO_SEND, STREAM};
use super::*;
use agent::frame;
use agent::message::{Ack, FromAgent, Hello, ToAgent};
use std::collections::{BTreeSet, VecDeque};
use std::io::ErrorKind;
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Descriptors of a ring.
const SIZE: u16 = 16;
const RAM: usize = 4 << 20;
/// What the driver sends.
const SENT: u64 = 1 << 20;
/// Where it receives: so much for each descriptor.
const RECEIVED: u64 = 2 << 20;
const RECEIVED_EACH: u64 = 64 << 10;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Cases of the driver that writes whatever comes to its mind.
const CASES: u64 = 1_000_000;
/// Where its numbers begin.
const SEED: u64 = 16;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Connected(u64, Outcome),
    Ask(Pair),
    Noticed(Noticed),
}

/// What the device has told the host.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<Vec<Said>>>);

impl Told {
    fn take(&self) -> Vec<Said> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Host for Told {
    fn connected(&self, tag: u64, outcome: Outcome) {
        self.0.lock().unwrap().push(Said::Connected(tag, outcome));
    }

    fn ask(&self, pair: Pair) {
        self.0.lock().unwrap().push(Said::Ask(pair));
    }

    fn noticed(&self, noticed: Noticed) {
        self.0.lock().unwrap().push(Said::Noticed(noticed));
    }
}

/// Where a ring has its descriptors (0), what is available (1), and what was used (2).
fn at(queue: usize, part: u64) -> u64 {
    0x1_0000 * (queue as u64 + 1) + 0x1000 * part
}

/// A device, its guest's driver and its main thread.
struct Machine {
    device: Vsock,
    told: Told,
    outside: Arc<Outside>,
    memory: Memory,
    queues: Vec<Queue>,
    /// Of both rings: what was made available, and what was seen used.
    available: [u16; 2],
    seen: [u16; 2],
}

impl Machine {
    fn new() -> Self {
        let memory: Memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let (told, outside) = (Told::default(), Arc::new(Outside::new().unwrap()));
        let device = Vsock::new(Box::new(told.clone()), Arc::clone(&outside));
        let mut machine = Self { device, told, outside, memory, queues: Vec::new(), available: [0; 2], seen: [0; 2] };
        machine.set_up();
        machine
    }

    /// What a driver does to begin.
    fn set_up(&mut self) {
        self.queues = QUEUE_SIZES.iter().map(|size| Queue::new(*size).unwrap()).collect();
        for (number, queue) in self.queues.iter_mut().enumerate().take(2) {
            queue.set_size(SIZE);
            queue.set_desc_table_address(Some(at(number, 0) as u32), Some(0));
            queue.set_avail_ring_address(Some(at(number, 1) as u32), Some(0));
            queue.set_used_ring_address(Some(at(number, 2) as u32), Some(0));
            queue.set_ready(true);
            (1..3).for_each(|part| self.memory.write_obj(0_u32, GuestAddress(at(number, part))).unwrap());
        }
        (self.available, self.seen) = ([0; 2], [0; 2]);
    }

    /// The fork of it: the same memory, rings and saved state, and no socket.
    fn fork(&self) -> Self {
        let mut child = Self::new();
        let mut bytes = vec![0; RAM];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        child.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        for (queue, parent) in child.queues.iter_mut().zip(&self.queues) {
            queue.set_next_avail(parent.next_avail());
            queue.set_next_used(parent.next_used());
        }
        (child.available, child.seen) = (self.available, self.seen);
        child.device.load(&self.device.save()).unwrap();
        child
    }

    fn describe(&self, queue: usize, index: u16, (address, len): (u64, u32), flags: u16) {
        let to = GuestAddress(at(queue, 0) + 16 * u64::from(index % SIZE));
        let next = (index + 1) % SIZE;
        let low = u128::from(address) | u128::from(len) << 64;
        self.memory.write_obj(low | u128::from(flags) << 96 | u128::from(next) << 112, to).unwrap();
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let slot = self.available[queue] % SIZE;
        self.memory.write_obj(head % SIZE, GuestAddress(at(queue, 1) + 4 + 2 * u64::from(slot))).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory.write_obj(self.available[queue], GuestAddress(at(queue, 1) + 2)).unwrap();
    }

    /// Sends bytes, in descriptors of these lengths; the last takes what is left.
    fn send_raw(&mut self, bytes: &[u8], pieces: &[usize]) {
        self.memory.write_slice(bytes, GuestAddress(SENT)).unwrap();
        let mut from = 0;
        let ends = pieces.iter().scan(0, |end, piece| {
            *end += piece;
            Some(*end)
        });
        let ends: Vec<usize> = ends.take_while(|end| *end < bytes.len()).chain([bytes.len()]).collect();
        assert!(ends.len() <= SIZE.into());
        for (index, end) in ends.iter().enumerate() {
            let flags = if index + 1 < ends.len() { NEXT } else { 0 };
            self.describe(1, index as u16, (SENT + from as u64, (end - from) as u32), flags);
            from = *end;
        }
        self.offer(1, 0);
    }

    fn send(&mut self, header: Header, bytes: &[u8], pieces: &[usize]) {
        let header = Header { len: bytes.len() as u32, ..header };
        self.send_raw(&[&header.to_bytes(), bytes].concat(), pieces);
        self.notify().unwrap();
    }

    /// Offers so many buffers for packets, each in two descriptors: the header is divided where `split` says.
    fn offer_buffers(&mut self, count: u16, split: u32, room: u32) {
        for index in 0..count {
            let first = self.available[0].wrapping_add(index).wrapping_mul(2) % SIZE;
            let address = RECEIVED + RECEIVED_EACH * u64::from(first);
            self.describe(0, first, (address, split), WRITE | NEXT);
            self.describe(0, first + 1, (address + u64::from(split), HEADER_LEN as u32 + room - split), WRITE);
        }
        for _ in 0..count {
            self.offer(0, self.available[0].wrapping_mul(2));
        }
    }

    fn notify(&mut self) -> Result<bool, Broken> {
        self.device.notified(1, &mut self.queues, &self.memory)
    }

    /// The main thread looks at sockets, and a vCPU at what it has found.
    fn look(&mut self) {
        self.outside.look();
        self.device.attend(&mut self.queues, &self.memory).unwrap();
    }

    /// Takes packets that came since.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used: u16 = self.memory.read_obj(GuestAddress(at(0, 2) + 2)).unwrap();
        let mut packets = Vec::new();
        while self.seen[0] != used {
            let element = at(0, 2) + 4 + 8 * u64::from(self.seen[0] % SIZE);
            let [head, len]: [u32; 2] = [0, 4].map(|at| self.memory.read_obj(GuestAddress(element + at)).unwrap());
            let mut bytes = vec![0; len as usize];
            let from = RECEIVED + RECEIVED_EACH * u64::from(head);
            self.memory.read_slice(&mut bytes, GuestAddress(from)).unwrap();
            let header = Header::from_bytes(bytes.first_chunk().expect("a whole header"));
            assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
            packets.push((header, bytes.split_off(HEADER_LEN)));
            self.seen[0] = self.seen[0].wrapping_add(1);
        }
        packets
    }

    /// Gives the device buffers until it has nothing more to say.
    fn all_received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let free = SIZE / 2 - self.available[0].wrapping_sub(self.seen[0]);
            self.offer_buffers(free, 20, 4096);
            self.look();
            match &mut self.received() {
                none if none.is_empty() => return all,
                some => all.append(some),
            }
        }
    }

    /// A connection of the host's, whose socket waits unless it is told not to: the device never trusts that it does not.
    fn connect(&mut self, tag: u64, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        assert!(self.outside.connect(Wanted { tag, port, greet: false, socket: theirs.into() }));
        ours
    }

    /// The same, once the guest has accepted it.
    fn connected(&mut self, tag: u64, port: u32) -> (UnixStream, Pair) {
        let stream = self.connect(tag, port);
        let requests = self.all_received();
        let [(request, _)] = &requests[..] else { panic!("{requests:?}") };
        let pair = Pair { host: request.source_port, guest: request.destination_port };
        assert_eq!((request.op(), pair.guest), (Some(Op::Request), port));
        self.send(from_guest(pair, Op::Response), &[], &[]);
        assert_eq!(self.told.take(), [Said::Connected(tag, Outcome::Accepted)]);
        (stream, pair)
    }
}

fn from_guest(pair: Pair, op: Op) -> Header {
    let (source_port, destination_port) = (pair.guest, pair.host);
    let to = Header::to_guest(pair, op);
    Header { source_cid: GUEST_CID, destination_cid: HOST_CID, source_port, destination_port, room: 4096, ..to }
}

fn ops(packets: &[(Header, Vec<u8>)]) -> Vec<Op> {
    packets.iter().map(|(header, _)| header.op().expect("the device's own are right")).collect()
}

fn is_at_its_end(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Ok(0))
}

/// All that is there now.
fn there(mut stream: &UnixStream) -> Vec<u8> {
    let (mut all, mut some) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = stream.read(&mut some) {
        all.extend_from_slice(&some[..count]);
    }
    all
}

#[test]
fn packets_are_divided_as_the_driver_likes() {
    let mut machine = Machine::new();
    let (mut stream, pair) = machine.connected(1, 52);
    let bytes: Vec<u8> = (0..9000_u32).map(|at| (at * 7 + at / 251) as u8).collect();
    for pieces in [&[][..], &[44], &[1, 2, 3, 4, 5, 6, 7, 8, 9], &[43, 2, 1, 4000], &[8, 0, 36, 0, 1]] {
        machine.send(from_guest(pair, Op::Data), &bytes, pieces);
        assert!(there(&stream) == bytes, "in pieces of {pieces:?}");
    }
    // The other way, as far as the guest has room.
    stream.write_all(&bytes).unwrap();
    let mut came = Vec::new();
    for _ in 0..3 {
        came.extend(machine.all_received().into_iter().filter(|(header, _)| header.op() == Some(Op::Data)));
        let taken: usize = came.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(taken <= 4096 * 3);
        machine.send(Header { taken: taken as u32, ..from_guest(pair, Op::CreditUpdate) }, &[], &[]);
    }
    assert!(came.into_iter().flat_map(|(_, bytes)| bytes).eq(bytes));
    machine.device.muxer.check();
}

#[test]
fn a_guest_of_which_nothing_is_taken_runs_out_of_credit_and_keeps_nobody() {
    let mut machine = Machine::new();
    let (stream, pair) = machine.connected(1, 52);
    let bytes = vec![7; 8 << 10];
    let (began, mut sent) = (Instant::now(), 0);
    // The socket's own room, and then the connection's.
    while ops(&machine.all_received()).iter().all(|op| *op != Op::Reset) {
        machine.send(from_guest(pair, Op::Data), &bytes, &[]);
        sent += bytes.len();
        assert!(sent < 4 << 20, "it has never enough");
    }
    assert!(began.elapsed() < Duration::from_secs(5), "a socket kept the device waiting");
    assert!(sent > ROOM as usize);
    // What was taken, arrives; then it ends.
    assert!(there(&stream).len() <= sent - bytes.len());
    assert!(is_at_its_end(&stream));
    assert!(machine.device.sockets.is_empty());
}

#[test]
fn what_waits_for_a_socket_arrives_when_that_takes_it() {
    let mut machine = Machine::new();
    let (stream, pair) = machine.connected(1, 52);
    let chunk: Vec<u8> = (0..=255).cycle().take(8 << 10).collect();
    let mut sent = 0;
    while machine.device.muxer.unsent(pair).is_empty() {
        machine.send(from_guest(pair, Op::Data), &chunk, &[]);
        sent += chunk.len();
    }
    machine.send(Header { flags: NO_SEND, ..from_guest(pair, Op::Shutdown) }, &[], &[]);
    let mut came = 0;
    for _ in 0..10_000 {
        came += there(&stream).iter().zip((0..=255).cycle().skip(came % 256)).map(|(a, b)| assert_eq!(*a, b)).count();
        machine.look();
    }
    assert_eq!(came, sent);
    assert!(is_at_its_end(&stream), "the guest has sent its last");
}

#[test]
fn each_way_ends_by_itself() {
    let mut machine = Machine::new();
    let (mut stream, pair) = machine.connected(1, 52);
    machine.send(Header { flags: NO_SEND, ..from_guest(pair, Op::Shutdown) }, &[], &[]);
    assert!(is_at_its_end(&stream));
    stream.write_all(b"still").unwrap();
    machine.look();
    let came = machine.all_received();
    assert_eq!((ops(&came), &came[0].1[..]), (vec![Op::Data], &b"still"[..]));
    drop(stream);
    machine.look();
    let came = machine.all_received();
    let last = came.last().expect("both ways have ended").0;
    assert_eq!((last.op(), last.flags), (Some(Op::Shutdown), NO_SEND | NO_RECEIVE));
    machine.send(from_guest(pair, Op::Reset), &[], &[]);
    assert!(machine.device.sockets.is_empty());

    let (stream, pair) = machine.connected(2, 52);
    stream.shutdown(Half::Write).unwrap();
    machine.look();
    let came = machine.all_received();
    assert_eq!((ops(&came), came[0].0.flags), (vec![Op::Shutdown], NO_SEND));
    machine.send(from_guest(pair, Op::Data), b"still", &[]);
    assert_eq!(there(&stream), b"still");
    drop(stream);
    machine.look();
    let came = machine.all_received();
    assert_eq!((ops(&came), came[0].0.flags), (vec![Op::Shutdown], NO_SEND | NO_RECEIVE));
    machine.send(from_guest(pair, Op::Reset), &[], &[]);
    assert!(machine.device.sockets.is_empty());
    machine.device.muxer.check();
}

#[test]
fn a_guest_connects_and_is_refused() {
    let mut machine = Machine::new();
    let (wanted, refused) = (Pair { host: 9, guest: 1000 }, Pair { host: 9, guest: 1001 });
    machine.send(from_guest(wanted, Op::Request), &[], &[]);
    machine.send(from_guest(refused, Op::Request), &[], &[]);
    assert_eq!(machine.told.take(), [Said::Ask(wanted), Said::Ask(refused)]);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(b"hello").unwrap();
    machine.outside.answer(refused, None);
    machine.outside.answer(wanted, Some(theirs.into()));
    let came = machine.all_received();
    assert_eq!(ops(&came), [Op::Reset, Op::Response, Op::Data]);
    assert_eq!((came[0].0.destination_port, came[1].0.destination_port), (1001, 1000));
    assert_eq!(came[2].1, b"hello");
}

#[test]
fn a_host_that_gives_up_is_heard_before_and_after_the_guest_has_heard_of_it() {
    let mut machine = Machine::new();
    drop(machine.connect(1, 52));
    assert_eq!(machine.all_received(), [], "there was no driver yet");
    let late = machine.connect(2, 52);
    let pair = Pair { host: FIRST_PORT, guest: 52 };
    assert_eq!(ops(&machine.all_received()), [Op::Request]);
    drop(late);
    machine.look();
    assert_eq!(machine.told.take(), [Said::Connected(2, Outcome::Refused)]);
    machine.send(from_guest(pair, Op::Response), &[], &[]);
    assert_eq!(ops(&machine.all_received()), [Op::Reset, Op::Reset], "and again where the guest crosses it");
}

/// Writes what makes no sense, with the header of a packet at hand. A program's end, where one is needed for it.
type Nonsense = fn(&mut Machine, &[u8]) -> Option<UnixStream>;

#[test]
fn rings_that_make_no_sense_end_all_connections_until_the_driver_begins_again() {
    let header = |machine: &Machine, len| {
        let (pair, _) = machine.device.sockets.first_key_value().expect("a connection");
        Header { len, ..from_guest(*pair, Op::Data) }.to_bytes()
    };
    let broken: [Nonsense; 5] = [
        |machine, header| {
            machine.send_raw(&header[..43], &[]);
            None
        },
        // Bytes that are not there.
        |machine, header| {
            machine.send_raw(&[header, &[0; 99]].concat(), &[44]);
            None
        },
        // Not in memory.
        |machine, header| {
            machine.send_raw(header, &[]);
            machine.describe(1, 0, (RAM as u64 - 43, 44), 0);
            None
        },
        // A loop.
        |machine, header| {
            machine.send_raw(header, &[]);
            machine.describe(1, SIZE - 1, (SENT, 0), NEXT);
            (0..SIZE - 1).for_each(|index| machine.describe(1, index, (SENT, 0), NEXT));
            None
        },
        // A buffer without room for a byte.
        |machine, _| {
            machine.describe(0, 0, (RECEIVED, HEADER_LEN as u32), WRITE);
            machine.offer(0, 0);
            Some(machine.connect(9, 1))
        },
    ];
    for (number, break_it) in broken.into_iter().enumerate() {
        let mut machine = Machine::new();
        let (stream, _) = machine.connected(1, 52);
        // Buffers that the driver has offered so far are used, so that the next is the one that it offers.
        machine.set_up();
        let header = header(&machine, 100);
        let _kept = break_it(&mut machine, &header);
        assert_eq!(machine.notify(), Err(Broken), "case {number}");
        assert!(is_at_its_end(&stream), "case {number}");
        assert!(machine.device.sockets.is_empty(), "case {number}");
        machine.set_up();
        machine.told.take();
        machine.connected(3, 53);
        machine.device.muxer.check();
    }
}

#[test]
fn a_reset_of_the_device_ends_what_there_is() {
    let mut machine = Machine::new();
    let (open, _) = machine.connected(1, 52);
    let asked = machine.connect(2, 53);
    machine.look();
    machine.device.reset();
    assert_eq!(machine.told.take(), [Said::Connected(2, Outcome::Refused)]);
    assert!(is_at_its_end(&open) && is_at_its_end(&asked));
    machine.set_up();
    machine.connected(3, 52);
}

#[test]
fn a_child_resets_first_and_its_parent_goes_on() {
    let mut parent = Machine::new();
    let open: Vec<_> = (0..40).map(|tag| parent.connected(tag, 52)).collect();
    // Bytes on their way in both directions, and a request in the ring that nobody has looked at.
    let (mut stream, pair) = (&open[0].0, open[0].1);
    stream.write_all(b"down").unwrap();
    let request = Pair { host: 9, guest: 1000 };
    parent.send_raw(&from_guest(request, Op::Request).to_bytes(), &[11, 22]);
    let mut child = parent.fork();

    let _new = child.connect(77, 52);
    // Without buffers they wait, and keep their order.
    child.look();
    child.send(from_guest(pair, Op::Data), b"of before", &[]);
    assert_eq!(child.told.take(), [Said::Ask(request)], "the child carries it out for itself");
    let came = child.all_received();
    let (last, resets) = came.split_last().unwrap();
    assert!(ops(resets).iter().all(|op| *op == Op::Reset));
    let mut ended: Vec<u32> = resets.iter().map(|(header, _)| header.source_port).collect();
    ended.sort_unstable();
    let mut had: Vec<u32> = open.iter().map(|(_, pair)| pair.host).chain([pair.host]).collect();
    had.sort_unstable();
    assert_eq!(ended, had, "each once, and the one on which the guest sent, again");
    assert_eq!((last.0.op(), last.0.source_port), (Some(Op::Request), FIRST_PORT + 40));
    assert!(child.device.sockets.len() == 1);

    parent.notify().unwrap();
    assert_eq!(parent.told.take(), [Said::Ask(request)], "and so does the parent");
    parent.look();
    assert_eq!(parent.all_received().into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>(), b"down");
    for (stream, pair) in &open {
        parent.send(from_guest(*pair, Op::Data), b"up", &[]);
        assert_eq!(there(stream), b"up");
    }
    // A child of the child, before that has got rid of its resets, knows them all.
    let grandchild = parent.fork().fork();
    assert_eq!(grandchild.device.muxer.save().ended.len(), open.len() + 1, "what the guest asked for as well");
}

/// Behind the resets, and with no socket: what the agent is told, and hears.
#[test]
fn a_child_tells_its_agent_which_it_is() {
    let mut parent = Machine::new();
    let (_open, inherited) = parent.connected(1, 52);
    let mut child = parent.fork();
    let (name, entropy) = ("a-1".to_owned(), [7; 32]);
    child.outside.notify(Child { name: name.clone(), generation: 9, entropy });
    let came = child.all_received();
    let [(reset, _), (request, _)] = &came[..] else { panic!("{came:?}") };
    assert_eq!((reset.op(), reset.source_port), (Some(Op::Reset), inherited.host));
    assert_eq!((request.op(), request.destination_port), (Some(Op::Request), agent::PORT));
    let pair = Pair { host: request.source_port, guest: request.destination_port };
    child.send(from_guest(pair, Op::Response), &[], &[]);
    let said: Vec<u8> = child.all_received().into_iter().flat_map(|(_, bytes)| bytes).collect();
    let mut said = &said[..];
    let hello: Option<ToAgent> = frame::read(&mut said).unwrap();
    assert_eq!(hello, Some(ToAgent::Hello(Hello { protocol: agent::PROTOCOL, generation: 9 })));
    let Some(ToAgent::Forked(forked)) = frame::read(&mut said).unwrap() else { panic!("no notice") };
    assert_eq!((forked.name, forked.entropy), (name.into_bytes(), entropy));

    let mut answer = Vec::new();
    frame::write(&mut answer, &FromAgent::Hello(Hello { protocol: agent::PROTOCOL, generation: 0 })).unwrap();
    frame::write(&mut answer, &FromAgent::Ack(Ack { generation: 9, reseeded: true, trouble: Vec::new() })).unwrap();
    let (first, rest) = answer.split_at(7);
    child.send(from_guest(pair, Op::Data), first, &[]);
    assert_eq!(child.told.take(), []);
    child.send(from_guest(pair, Op::Data), rest, &[]);
    let acked = Noticed::Acked { reseeded: true, trouble: String::new() };
    assert_eq!(child.told.take(), [Said::Noticed(acked)]);
    let ended = child.all_received();
    assert_eq!(ops(&ended).last(), Some(&Op::Shutdown), "the host's end is closed: {ended:?}");
    child.send(Header { flags: NO_SEND | NO_RECEIVE, ..from_guest(pair, Op::Shutdown) }, &[], &[]);
    assert_eq!(child.told.take(), [], "it is told once");
    child.device.muxer.check();

    // A guest without an agent refuses.
    let mut alone = parent.fork();
    alone.outside.notify(Child { name: "a-2".into(), generation: 10, entropy });
    let came = alone.all_received();
    let pair = Pair { host: came[1].0.source_port, guest: agent::PORT };
    alone.send(from_guest(pair, Op::Reset), &[], &[]);
    assert_eq!(alone.told.take(), [Said::Noticed(Noticed::NoAgent)]);

    // So does a driver that begins anew.
    let mut anew = parent.fork();
    anew.outside.notify(Child { name: "a-3".into(), generation: 11, entropy });
    let _ = anew.all_received();
    anew.device.reset();
    assert_eq!(anew.told.take(), [Said::Noticed(Noticed::NoAgent)]);
}

/// Numbers that are the same in each run of a seed.
struct Noise(u64);

impl Noise {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A guest that writes anything into its rings, a host that does anything with its ends, and forks in the midst of it.
struct Wild {
    machine: Machine,
    noise: Noise,
    /// Ends of the host's.
    ends: VecDeque<UnixStream>,
    /// Requests of the host's that have not been answered.
    waiting: BTreeSet<u64>,
    /// Pairs that there are, mostly.
    pairs: VecDeque<Pair>,
}

impl Wild {
    fn pair(&mut self) -> Pair {
        match self.pairs.len() as u64 {
            some @ 1.. if self.noise.below(8) != 0 => self.pairs[self.noise.below(some) as usize],
            _ => Pair { host: self.noise.below(100) as u32, guest: self.noise.below(8) as u32 },
        }
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        self.ends.push_back(stream);
        if self.ends.len() > 64 {
            self.ends.pop_front();
        }
    }

    fn packet(&mut self) {
        let (pair, noise) = (self.pair(), &mut self.noise);
        let bytes = vec![7; [0, 1, 100, 4096, 65_536][noise.below(5) as usize]];
        let op = [1, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7, 9][noise.below(12) as usize];
        let lie = noise.below(64) == 0;
        let header = Header {
            op,
            len: if lie { noise.below(1 << 32) as u32 } else { bytes.len() as u32 },
            flags: noise.below(4) as u32,
            room: [0, 1, 4096, ROOM, u32::MAX][noise.below(5) as usize],
            taken: if noise.below(4) == 0 { noise.below(1 << 32) as u32 } else { 0 },
            kind: if noise.below(64) == 0 { 2 } else { STREAM },
            ..from_guest(pair, Op::Data)
        };
        let pieces: [usize; 4] = std::array::from_fn(|_| noise.below(60) as usize);
        let long = &[&header.to_bytes()[..], &bytes].concat();
        let sent = if noise.below(200) == 0 { &long[..noise.below(44) as usize] } else { long };
        self.machine.send_raw(sent, &pieces);
    }

    fn host(&mut self) {
        let Some(index) = (self.ends.len() as u64).checked_sub(1).map(|last| self.noise.below(last + 1)) else {
            return;
        };
        let mut stream = &self.ends[index as usize];
        match self.noise.below(16) {
            0 => drop(self.ends.remove(index as usize)),
            1 => drop(stream.shutdown([Half::Read, Half::Write][self.noise.below(2) as usize])),
            2..=8 => match stream.write(&[3; 5000][..self.noise.below(5000) as usize]) {
                Err(error) if error.kind() == ErrorKind::InvalidInput => panic!("{error}"),
                _ => {}
            },
            _ => drop(stream.read(&mut [0; 8192])),
        }
    }

    fn scribble(&mut self) {
        let (queue, part) = (self.noise.below(2) as usize, self.noise.below(3));
        let to = GuestAddress(at(queue, part) + self.noise.below(0x120));
        let value = [0, 1, u64::MAX, self.noise.below(1 << 32) << 20][self.noise.below(4) as usize];
        self.machine.memory.write_obj(value, to).unwrap();
    }

    /// What the device has told, and a rule or two.
    fn hear(&mut self) {
        for said in self.machine.told.take() {
            match said {
                Said::Connected(tag, _) => assert!(self.waiting.remove(&tag), "{tag} is told twice"),
                Said::Noticed(_) => panic!("nobody was to be told"),
                Said::Ask(pair) if self.noise.below(3) == 0 => self.machine.outside.answer(pair, None),
                Said::Ask(pair) => {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    self.keep(ours);
                    self.pairs.push_back(pair);
                    self.machine.outside.answer(pair, Some(theirs.into()));
                }
            }
        }
        let newest = self.machine.device.sockets.last_key_value().map(|(pair, _)| *pair);
        self.pairs.extend(newest.filter(|pair| self.pairs.back() != Some(pair)));
        while self.pairs.len() > 16 {
            self.pairs.pop_front();
        }
    }

    fn case(&mut self, case: u64) {
        match self.noise.below(64) {
            0..=23 => {
                self.packet();
                self.pass(true);
            }
            24..=39 => {
                let free = self.noise.below(9) as u16;
                self.machine.offer_buffers(free, 1 + self.noise.below(44) as u32, 1 + self.noise.below(9000) as u32);
                self.pass(true);
            }
            40..=55 => self.host(),
            56 => {
                let port = self.noise.below(8) as u32;
                let (ours, theirs) = UnixStream::pair().unwrap();
                let greet = self.noise.below(2) == 0;
                if self.machine.outside.connect(Wanted { tag: case, port, greet, socket: theirs.into() }) {
                    self.waiting.insert(case);
                }
                self.keep(ours);
            }
            57 if self.noise.below(8) == 0 => self.scribble(),
            58 if self.noise.below(500) == 0 => {
                // The child goes on in its parent's place, whose sockets end with it.
                let saved = self.machine.device.save();
                self.machine.device.reset();
                self.hear();
                self.machine.device =
                    Vsock::new(Box::new(self.machine.told.clone()), Arc::clone(&self.machine.outside));
                self.machine.device.load(&saved).unwrap();
            }
            _ => self.pass(false),
        }
    }

    /// A vCPU comes by, with the guest's notice or with an errand.
    fn pass(&mut self, notice: bool) {
        self.machine.outside.look();
        let machine = &mut self.machine;
        let done = match notice {
            true => machine.device.notified(0, &mut machine.queues, &machine.memory),
            false => machine.device.attend(&mut machine.queues, &machine.memory),
        };
        if done.is_err() || self.noise.below(5000) == 0 {
            assert!(done.is_ok() || machine.device.sockets.is_empty());
            machine.device.reset();
            machine.set_up();
        }
        self.hear();
    }
}

/// Nothing that a driver or a program writes makes the device panic, wait, or forget a socket or a request.
#[test]
fn random_rings_and_sockets_hurt_nobody() {
    let began = Instant::now();
    let mut wild = Wild {
        machine: Machine::new(),
        noise: Noise(SEED),
        ends: VecDeque::new(),
        waiting: BTreeSet::new(),
        pairs: VecDeque::new(),
    };
    let mut most = 0;
    for case in 0..CASES {
        // What a failure happened at: the numbers are the same in each run.
        let _told = AtPanic(case);
        wild.case(case);
        most = most.max(wild.machine.device.sockets.len());
        if case % 64 == 0 {
            wild.machine.device.muxer.check();
            assert!(wild.machine.device.sockets.len() <= MOST);
        }
    }
    assert!(most > 20, "at most {most} connections at a time: that tries little");
    wild.machine.device.reset();
    wild.machine.device.hear();
    wild.machine.device.reset();
    wild.hear();
    assert!(wild.machine.device.sockets.is_empty());
    for end in &wild.ends {
        drop(there(end));
        assert!(is_at_its_end(end), "the device has the other end of {end:?} still");
    }
    println!("{CASES} cases in {:?}, at most {most} connections; {} unheard", began.elapsed(), wild.waiting.len());
}

/// Tells at which case a test panicked.
struct AtPanic(u64);

impl Drop for AtPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in case {} of seed {SEED}", self.0);
        }
    }
}
