//! The balloon, with a well-behaved guest and with hostile ones.

use super::device::Memory;
use super::tests::{AVAILABLE, BUFFER, Count, DESCRIPTORS, Noise, USED, WRITE};
use super::tests::{describe, offer, read, set_up_queue, write};
use super::*;
use guest_mem::GfnRange;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const REPORTING: u32 = 2;
const RAM: usize = 0x10_0000;

/// What the sink was given, and told.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<(Vec<GfnRange>, Vec<u64>)>>);

impl Sink for Seen {
    fn give_back(&self, pages: Vec<GfnRange>) {
        self.0.lock().unwrap().0.extend(pages);
    }

    fn resized(&self, pages: u64) {
        self.0.lock().unwrap().1.push(pages);
    }
}

struct Rig {
    transport: Transport,
    memory: Memory,
    interrupts: Arc<Count>,
    target: Arc<Target>,
    seen: Seen,
}

impl Rig {
    fn new(queue: u32) -> Self {
        let memory: Memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let (interrupts, target, seen) = (Arc::new(Count::default()), Arc::<Target>::default(), Seen::default());
        let device = Balloon::new(Box::new(seen.clone()), Arc::clone(&target));
        let mut transport = Transport::new(Box::new(device), interrupts.clone(), memory.clone());
        set_up_queue(&mut transport, queue);
        seen.0.lock().unwrap().1.clear();
        Self { transport, memory, interrupts, target, seen }
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
        self.seen.0.lock().unwrap().0.clone()
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
    rig.target.set(300);
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
    assert_eq!(bytes, [1, 0, 0, 0, 0, 0]);
    write(&mut rig.transport, 0x70, 0);
    assert_eq!(rig.seen.0.lock().unwrap().1, [100, 300, 0]);
    rig.target.set(u64::MAX);
    assert_eq!(read(&rig.transport, 0x100), u32::MAX);
}

#[test]
fn a_fork_has_its_parents_balloon() {
    let mut rig = Rig::new(INFLATE);
    rig.target.set(300);
    write(&mut rig.transport, 0x104, 200);
    let saved = rig.transport.save();
    let mut copy = Rig::new(INFLATE);
    copy.transport.load(&saved).unwrap();
    assert_eq!(copy.transport.save(), saved);
    assert_eq!((read(&copy.transport, 0x100), read(&copy.transport, 0x104)), (300, 200));
    assert!(copy.seen.0.lock().unwrap().1.is_empty());
    copy.target.set(7);
    assert_eq!(read(&rig.transport, 0x100), 300);
    let no_balloon = State { device: vec![1; 3], ..saved };
    assert!(copy.transport.load(&no_balloon).is_err());
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
        let queue = seed as u32 % 3;
        let mut rig = Rig::new(queue);
        let mut noise = Noise(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        for _ in 0..200 {
            match noise.next() % 4 {
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
