//! The balloon, with a well-behaved guest and with hostile ones.

use super::device::Memory;
use super::tests::{AVAILABLE, BUFFER, Count, DESCRIPTORS, Noise, USED, WRITE};
use super::tests::{describe, offer, read, set_up_queue, write};
use super::*;
use guest_mem::GfnRange;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATISTICS: u32 = 2;
const HINTING: u32 = 3;
const REPORTING: u32 = 4;
const RAM: usize = 0x10_0000;

/// What the sink was given, and told.
#[derive(Debug, Default)]
struct Told {
    pages: Vec<GfnRange>,
    sizes: Vec<u64>,
    figures: Vec<Vec<(u16, u64)>>,
    hinted: usize,
}

#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<Told>>);

impl Sink for Seen {
    fn give_back(&self, pages: Vec<GfnRange>) {
        self.0.lock().unwrap().pages.extend(pages);
    }

    fn resized(&self, pages: u64) {
        self.0.lock().unwrap().sizes.push(pages);
    }

    fn statistics(&self, figures: Vec<(u16, u64)>) {
        self.0.lock().unwrap().figures.push(figures);
    }

    fn hinted(&self) {
        self.0.lock().unwrap().hinted += 1;
    }
}

struct Rig {
    transport: Transport,
    memory: Memory,
    interrupts: Arc<Count>,
    requests: Arc<Requests>,
    seen: Seen,
}

impl Rig {
    fn new(queue: u32) -> Self {
        let memory: Memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let (interrupts, requests, seen) = (Arc::new(Count::default()), Arc::<Requests>::default(), Seen::default());
        let device = Balloon::new(Box::new(seen.clone()), Arc::clone(&requests));
        let mut transport = Transport::new(Box::new(device), interrupts.clone(), memory.clone());
        set_up_queue(&mut transport, queue);
        seen.0.lock().unwrap().sizes.clear();
        Self { transport, memory, interrupts, requests, seen }
    }

    /// Offers the numbers of these pages, in two buffers.
    fn offer_numbers(&self, numbers: &[u32]) {
        let (first, second) = numbers.split_at(numbers.len() / 2);
        for (index, (part, address)) in [(first, BUFFER), (second, BUFFER + 0x1000)].into_iter().enumerate() {
            let bytes: Vec<u8> = part.iter().flat_map(|number| number.to_le_bytes()).collect();
            self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
            describe(&self.memory, index as u16, (address, bytes.len() as u32), 1 - index as u16, 1);
        }
        offer(&self.memory, 0, 0);
    }

    fn notify(&mut self, queue: u32) {
        write(&mut self.transport, 0x50, queue);
    }

    fn given(&self) -> Vec<GfnRange> {
        self.told().pages.clone()
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.seen.0.lock().unwrap()
    }

    fn interrupts(&self) -> usize {
        self.interrupts.0.load(Ordering::Relaxed)
    }

    /// Offers a buffer with these bytes for the `index`th time, as descriptor `head`.
    fn offer_bytes(&mut self, queue: u32, (index, head): (u16, u16), bytes: &[u8]) {
        let address = BUFFER + 0x400 * u64::from(head);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        describe(&self.memory, head, (address, bytes.len() as u32), 0, 0);
        offer(&self.memory, index, head);
        self.notify(queue);
    }

    /// Hints at free pages.
    fn offer_pages(&mut self, index: u16, address: u64, len: u32) {
        describe(&self.memory, 9, (address, len), WRITE, 0);
        offer(&self.memory, index, 9);
        self.notify(HINTING);
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn needs_reset(&self) -> bool {
        read(&self.transport, 0x70) & 64 != 0
    }
}

#[test]
fn inflated_pages_are_given_back_in_stretches() {
    let mut rig = Rig::new(INFLATE);
    assert_eq!(read(&rig.transport, 8), 5);
    rig.offer_numbers(&[9, 200, 8, 10, 9, 201, 40]);
    rig.notify(INFLATE);
    assert_eq!(rig.given(), [8..11, 40..41, 200..202].map(GfnRange::from));
    assert_eq!((rig.used(), rig.interrupts.0.load(Ordering::Relaxed)), (1, 1));
}

#[test]
fn deflated_pages_are_the_guests_without_ado() {
    let mut rig = Rig::new(DEFLATE);
    rig.offer_numbers(&[9, u32::MAX]);
    rig.notify(DEFLATE);
    assert_eq!((rig.given(), rig.used(), rig.needs_reset()), (vec![], 1, false));
}

#[test]
fn reported_pages_are_given_back_whole() {
    let mut rig = Rig::new(REPORTING);
    describe(&rig.memory, 0, (0x4_0000, 0x1_0000), WRITE | 1, 1);
    describe(&rig.memory, 1, (0x6_0800, 0x2000), WRITE | 1, 2);
    describe(&rig.memory, 2, (0x7_0800, 0x800), WRITE, 0);
    offer(&rig.memory, 0, 0);
    rig.notify(REPORTING);
    assert_eq!(rig.given(), [0x40..0x50, 0x61..0x62].map(GfnRange::from));
    assert_eq!(rig.used(), 1);
}

#[test]
fn a_new_target_is_an_interrupt_and_the_guest_says_how_far_it_is() {
    let mut rig = Rig::new(INFLATE);
    rig.requests.set_target(300);
    rig.transport.config_change().announce();
    assert_eq!((read(&rig.transport, 0x60), read(&rig.transport, 0x100)), (2, 300));
    write(&mut rig.transport, 0x64, 2);
    assert_eq!((read(&rig.transport, 0x60), rig.interrupts.0.load(Ordering::Relaxed)), (0, 1));
    for pages in [100, 300, 300] {
        write(&mut rig.transport, 0x104, pages);
    }
    assert_eq!(read(&rig.transport, 0x104), 300);
    let mut bytes = [9; 6];
    rig.transport.read(0x105, &mut bytes);
    assert_eq!(bytes, [1, 0, 0, 1, 0, 0]);
    write(&mut rig.transport, 0x70, 0);
    assert_eq!(rig.told().sizes, [100, 300, 0]);
    rig.requests.set_target(u64::MAX);
    assert_eq!(read(&rig.transport, 0x100), u32::MAX);
}

#[test]
fn a_fork_has_its_parents_balloon() {
    let mut rig = Rig::new(INFLATE);
    rig.requests.set_target(300);
    write(&mut rig.transport, 0x104, 200);
    let saved = rig.transport.save();
    let mut copy = Rig::new(INFLATE);
    copy.transport.load(&saved).unwrap();
    assert_eq!(copy.transport.save(), saved);
    assert_eq!((read(&copy.transport, 0x100), read(&copy.transport, 0x104)), (300, 200));
    assert!(copy.told().sizes.is_empty());
    copy.requests.set_target(7);
    assert_eq!(read(&rig.transport, 0x100), 300);
    let no_balloon = State { device: vec![1; 3], ..saved };
    assert!(copy.transport.load(&no_balloon).is_err());
}

fn figures(all: &[(u16, u64)]) -> Vec<u8> {
    all.iter().flat_map(|(tag, value)| tag.to_le_bytes().into_iter().chain(value.to_le_bytes())).collect()
}

#[test]
fn a_guest_tells_how_it_is_off_when_it_is_asked() {
    let mut rig = Rig::new(STATISTICS);
    rig.requests.ask_statistics();
    rig.transport.attend();
    assert_eq!((rig.used(), rig.interrupts()), (0, 0), "it has not given its buffer yet");
    rig.offer_bytes(STATISTICS, (0, 0), &figures(&[(4, 1 << 40), (5, 7)]));
    assert_eq!(rig.told().figures, [[(4, 1 << 40), (5, 7)]]);
    assert_eq!((rig.used(), rig.interrupts()), (0, 0), "the buffer is kept");
    rig.transport.attend();
    assert_eq!(rig.used(), 0, "nobody has asked since");
    for round in 1..4 {
        rig.requests.ask_statistics();
        rig.transport.attend();
        rig.requests.ask_statistics();
        rig.transport.attend();
        assert_eq!((rig.used(), rig.interrupts()), (round, round.into()));
        rig.offer_bytes(STATISTICS, (round, 0), &figures(&[(6, round.into())]));
        assert_eq!(rig.told().figures.last().unwrap(), &[(6, round.into())]);
    }
}

/// Asked, and answered on both sides of the fork; and not asked.
#[test]
fn a_request_for_statistics_is_open_in_a_fork_too() {
    for asked in [false, true] {
        let mut rig = Rig::new(STATISTICS);
        rig.offer_bytes(STATISTICS, (0, 0), &figures(&[(4, 1)]));
        if asked {
            rig.requests.ask_statistics();
            rig.transport.attend();
        }
        let mut copy = Rig::new(STATISTICS);
        copy.memory.write_obj(rig.used(), GuestAddress(USED + 2)).unwrap();
        copy.transport.load(&rig.transport.save()).unwrap();
        for side in [&mut rig, &mut copy] {
            if !asked {
                side.requests.ask_statistics();
                side.transport.attend();
            }
            assert_eq!(side.used(), 1);
            side.offer_bytes(STATISTICS, (1, 0), &figures(&[(4, 2)]));
            assert_eq!(side.told().figures.last().unwrap(), &[(4, 2)]);
        }
    }
}

#[test]
fn statistics_that_make_no_sense_break_the_device() {
    for bytes in [vec![0; 9], vec![0; 65 * 10]] {
        let mut rig = Rig::new(STATISTICS);
        rig.offer_bytes(STATISTICS, (0, 0), &bytes);
        assert!(rig.needs_reset() && rig.told().figures.is_empty());
    }
    // A guest that gives one buffer after the other gets all but the last back.
    let mut rig = Rig::new(STATISTICS);
    for index in 0..5 {
        rig.offer_bytes(STATISTICS, (index, index), &figures(&[(1, 1)]));
    }
    assert_eq!((rig.used(), rig.needs_reset()), (4, false));
    write(&mut rig.transport, 0x70, 0);
    rig.memory.write_obj(0_u16, GuestAddress(AVAILABLE + 2)).unwrap();
    set_up_queue(&mut rig.transport, STATISTICS);
    rig.requests.ask_statistics();
    rig.transport.attend();
    assert_eq!(rig.used(), 4, "a driver that is new has given no buffer");
}

/// Linux offers its buffer before it says that it is ready.
#[test]
fn what_was_offered_early_is_seen() {
    let mut rig = Rig::new(STATISTICS);
    write(&mut rig.transport, 0x70, 0);
    let bytes = figures(&[(4, 9)]);
    rig.memory.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
    describe(&rig.memory, 0, (BUFFER, bytes.len() as u32), 0, 0);
    offer(&rig.memory, 0, 0);
    set_up_queue(&mut rig.transport, STATISTICS);
    assert_eq!(rig.told().figures, [[(4, 9)]]);
}

/// A driver that wants no statistics and no hinting has its reporting where they would be.
#[test]
fn queues_that_are_not_wanted_have_no_number() {
    let mut rig = Rig::new(REPORTING);
    for (register, value) in
        [(0x70, 0), (0x70, 3), (0x24, 0), (0x20, 1 << 5), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 2)]
    {
        write(&mut rig.transport, register, value);
    }
    for (register, value) in [(0x38, 64), (0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED), (0x44, 1), (0x70, 15)] {
        write(&mut rig.transport, register, value as u32);
    }
    describe(&rig.memory, 0, (0x4_0000, 0x1_0000), WRITE, 0);
    offer(&rig.memory, 0, 0);
    rig.notify(2);
    assert_eq!(rig.given(), [GfnRange::from(0x40..0x50)]);
}

#[test]
fn free_pages_are_given_back_while_they_are_asked_for() {
    let command = |rig: &Rig| read(&rig.transport, 0x108);
    let mut rig = Rig::new(HINTING);
    assert_eq!(command(&rig), 1);
    rig.offer_pages(0, 0x4_0000, 0x1_0000);
    assert!(rig.given().is_empty(), "nobody has asked");
    let mut last = 1;
    for round in 0..2 {
        rig.requests.begin_hinting();
        rig.transport.config_change().announce();
        let number = command(&rig);
        assert!(number > 1 && number != last);
        last = number;
        let index = 1 + 5 * round;
        rig.offer_pages(index, 0x4_0000, 0x1_0000);
        assert!(rig.given().is_empty(), "it has not said what it answers");
        rig.offer_bytes(HINTING, (index + 1, 0), &number.to_le_bytes());
        rig.offer_pages(index + 2, 0x4_0000, 0x1_0000);
        rig.offer_pages(index + 3, 0x5_0000, 0x1_0000);
        assert_eq!(std::mem::take(&mut rig.told().pages), [0x40..0x50, 0x50..0x60].map(GfnRange::from));
        assert_eq!(rig.told().hinted, usize::from(round));
        rig.offer_bytes(HINTING, (index + 4, 0), &0_u32.to_le_bytes());
        assert_eq!((rig.told().hinted, rig.used()), (usize::from(round) + 1, index + 5));
        rig.requests.end_hinting();
        assert!(rig.requests.take_ended_hinting() && !rig.requests.take_ended_hinting());
        rig.requests.end_hinting();
        assert!(!rig.requests.take_ended_hinting());
        assert_eq!(command(&rig), 1);
    }
    rig.offer_pages(11, 0x4_0000, 0x1_0000);
    assert!(rig.given().is_empty());
}

/// The fork comes while the guest is still telling: for both sides that is over, and a next one has another number.
#[test]
fn a_fork_ends_hinting() {
    let mut rig = Rig::new(HINTING);
    rig.requests.begin_hinting();
    let number = read(&rig.transport, 0x108);
    rig.offer_bytes(HINTING, (0, 0), &number.to_le_bytes());
    rig.requests.end_hinting();
    let mut copy = Rig::new(HINTING);
    copy.transport.load(&rig.transport.save()).unwrap();
    for side in [&mut rig, &mut copy] {
        assert!(side.requests.take_ended_hinting(), "both guests are to look");
        assert_eq!(read(&side.transport, 0x108), 1);
        side.offer_pages(1, 0x4_0000, 0x1_0000);
        side.offer_bytes(HINTING, (2, 0), &0_u32.to_le_bytes());
        assert!(side.given().is_empty());
        assert_eq!(side.told().hinted, 0);
        side.requests.begin_hinting();
        let next = read(&side.transport, 0x108);
        assert_ne!(next, number);
        side.offer_bytes(HINTING, (3, 0), &number.to_le_bytes());
        side.offer_pages(4, 0x4_0000, 0x1_0000);
        assert!(side.given().is_empty(), "that was an answer to something else");
    }
}

#[test]
fn what_is_no_memory_breaks_the_device_and_gives_nothing_back() {
    let mut rig = Rig::new(INFLATE);
    rig.offer_numbers(&[9, (RAM >> 12) as u32]);
    rig.notify(INFLATE);
    assert_eq!((rig.given(), rig.needs_reset()), (vec![], true));
    for (address, len) in [(RAM as u64 - 0x1000, 0x2000), (u64::MAX - 0xfff, 0x1000), (0, u32::MAX)] {
        let mut rig = Rig::new(REPORTING);
        describe(&rig.memory, 0, (address, len), WRITE, 0);
        offer(&rig.memory, 0, 0);
        rig.notify(REPORTING);
        assert_eq!((rig.given(), rig.needs_reset()), (vec![], true));
    }
    for len in [u32::MAX, 6] {
        let mut rig = Rig::new(INFLATE);
        describe(&rig.memory, 0, (BUFFER, len), 0, 0);
        offer(&rig.memory, 0, 0);
        rig.notify(INFLATE);
        assert!(rig.needs_reset(), "{len} bytes of page numbers");
    }
}

#[test]
fn any_bytes_in_the_rings_and_any_registers_hurt_nobody() {
    for seed in 1..300 {
        let queue = seed as u32 % 5;
        let mut rig = Rig::new(queue);
        let mut noise = Noise(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        for _ in 0..200 {
            match noise.next() % 5 {
                4 => {
                    match noise.next() % 3 {
                        0 => rig.requests.begin_hinting(),
                        1 => rig.requests.end_hinting(),
                        _ => rig.requests.ask_statistics(),
                    }
                    rig.transport.attend();
                }
                0 => {
                    let at = [DESCRIPTORS, AVAILABLE, USED][noise.next() as usize % 3] + noise.next() % 0x400;
                    let value = noise.next() >> (noise.next() % 64);
                    rig.memory.write_obj(value, GuestAddress(at)).unwrap();
                }
                1 => {
                    let register = noise.next() % 0x140;
                    let value = noise.next() as u32 >> (noise.next() % 32);
                    write(&mut rig.transport, register & !3, value);
                }
                2 => rig.notify(queue),
                _ => {
                    let mut data = vec![0; noise.next() as usize % 9];
                    rig.transport.read(noise.next() % 0x2000, &mut data);
                    rig.transport.write(noise.next() % 0x2000, &data);
                }
            }
        }
        let end = RAM as u64 >> 12;
        assert!(rig.given().iter().all(|pages| !pages.is_empty() && pages.end().0 <= end));
        let saved = rig.transport.save();
        let mut copy = Rig::new(queue);
        copy.transport.load(&saved).unwrap();
        copy.notify(queue);
    }
}
