//! The transport and a device, with a well-behaved guest and with hostile ones.

use super::device::Memory;
use super::*;
use crate::devices::interrupt::Interrupt;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(super) const DESCRIPTORS: u64 = 0x1000;
pub(super) const AVAILABLE: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;
pub(super) const BUFFER: u64 = 0x8000;
const RAM: usize = 0x1_0000;
const SIZE: u16 = 64;

#[derive(Debug, Default)]
pub(super) struct Count(pub AtomicUsize);

impl Interrupt for Count {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn rng() -> (Transport, Memory, Arc<Count>) {
    let memory: Memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let count = Arc::new(Count::default());
    let device = Rng::new(File::open("/dev/urandom").unwrap());
    (Transport::new(Box::new(device), count.clone(), memory.clone()), memory, count)
}

pub(super) fn read(transport: &Transport, register: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(register, &mut data);
    u32::from_le_bytes(data)
}

pub(super) fn write(transport: &mut Transport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

/// What a driver does to begin with the first queue.
fn set_up(transport: &mut Transport) {
    set_up_queue(transport, 0);
}

/// What a driver does to begin, for one queue.
pub(super) fn set_up_queue(transport: &mut Transport, queue: u32) {
    for status in [0, 1, 3] {
        write(transport, 0x70, status);
    }
    for select in [0, 1] {
        write(transport, 0x14, select);
        let features = read(transport, 0x10);
        write(transport, 0x24, select);
        write(transport, 0x20, features);
    }
    write(transport, 0x70, 11);
    assert_eq!(read(transport, 0x70), 11, "the features are accepted");
    write(transport, 0x30, queue);
    write(transport, 0x38, SIZE.into());
    for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
        write(transport, register, address as u32);
        write(transport, register + 4, 0);
    }
    write(transport, 0x44, 1);
    write(transport, 0x70, 15);
}

pub(super) fn describe(memory: &Memory, index: u16, (address, len): (u64, u32), flags: u16, next: u16) {
    let at = DESCRIPTORS + 16 * u64::from(index);
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

pub(super) fn offer(memory: &Memory, index: u16, head: u16) {
    memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(index % SIZE))).unwrap();
    memory.write_obj(index + 1, GuestAddress(AVAILABLE + 2)).unwrap();
}

pub(super) const WRITE: u16 = 2;

#[test]
fn a_driver_gets_random_numbers() {
    let (mut transport, memory, interrupts) = rng();
    assert_eq!(read(&transport, 0), u32::from_le_bytes(*b"virt"));
    assert_eq!((read(&transport, 4), read(&transport, 8)), (2, 4));
    set_up(&mut transport);
    describe(&memory, 0, (BUFFER, 64), WRITE, 0);
    offer(&memory, 0, 0);
    write(&mut transport, 0x50, 0);
    let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    let len: u32 = memory.read_obj(GuestAddress(USED + 8)).unwrap();
    assert_eq!((used, len, interrupts.0.load(Ordering::Relaxed), read(&transport, 0x60)), (1, 64, 1, 1));
    let mut bytes = [0; 64];
    memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
    assert_ne!(bytes, [0; 64]);
    write(&mut transport, 0x64, 1);
    assert_eq!(read(&transport, 0x60), 0);
}

#[test]
fn a_saved_device_goes_on_where_it_stood() {
    let (mut transport, memory, _) = rng();
    set_up(&mut transport);
    describe(&memory, 0, (BUFFER, 8), WRITE, 0);
    offer(&memory, 0, 0);
    write(&mut transport, 0x50, 0);
    let saved = transport.save();
    let count = Arc::new(Count::default());
    let device = Rng::new(File::open("/dev/urandom").unwrap());
    let mut copy = Transport::new(Box::new(device), count.clone(), memory.clone());
    copy.load(&saved).unwrap();
    assert_eq!(copy.save(), saved);
    offer(&memory, 1, 0);
    write(&mut copy, 0x50, 0);
    let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    assert_eq!((used, count.0.load(Ordering::Relaxed)), (2, 1));
    assert!(copy.load(&State::default()).is_err(), "a device without queues");
}

#[test]
fn a_buffer_outside_of_memory_breaks_the_device_until_it_is_reset() {
    let (mut transport, memory, interrupts) = rng();
    set_up(&mut transport);
    describe(&memory, 0, (u64::MAX - 3, 64), WRITE, 0);
    offer(&memory, 0, 0);
    write(&mut transport, 0x50, 0);
    assert_eq!((read(&transport, 0x70) & 64, interrupts.0.load(Ordering::Relaxed)), (64, 1));
    write(&mut transport, 0x50, 0);
    assert_eq!(interrupts.0.load(Ordering::Relaxed), 1, "it does nothing any more");
    write(&mut transport, 0x70, 0);
    set_up(&mut transport);
}

#[test]
fn absurd_lengths_and_loops_come_to_an_end() {
    let (mut transport, memory, _) = rng();
    set_up(&mut transport);
    const NEXT: u16 = 1;
    describe(&memory, 0, (BUFFER, u32::MAX), WRITE | NEXT, 1);
    describe(&memory, 1, (BUFFER, u32::MAX), WRITE | NEXT, 0);
    offer(&memory, 0, 0);
    write(&mut transport, 0x50, 0);
}

/// xorshift: the same bytes in every run.
pub(super) struct Noise(pub u64);

impl Noise {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn any_bytes_in_the_rings_and_any_registers_hurt_nobody() {
    for seed in 1..200 {
        let (mut transport, memory, _) = rng();
        let mut noise = Noise(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        set_up(&mut transport);
        for _ in 0..200 {
            match noise.next() % 4 {
                0 => {
                    let at = [DESCRIPTORS, AVAILABLE, USED][noise.next() as usize % 3] + noise.next() % 0x400;
                    memory.write_obj(noise.next(), GuestAddress(at)).unwrap();
                }
                1 => {
                    let register = noise.next() % 0x140;
                    // Mostly small values: those are what gets somewhere.
                    let value = noise.next() as u32 >> (noise.next() % 32);
                    write(&mut transport, register & !3, value);
                }
                2 => write(&mut transport, 0x50, 0),
                _ => {
                    let mut data = vec![0; noise.next() as usize % 9];
                    transport.read(noise.next() % 0x2000, &mut data);
                    transport.write(noise.next() % 0x2000, &data);
                }
            }
        }
        let saved = transport.save();
        let mut copy = rng().0;
        copy.load(&saved).unwrap();
        write(&mut copy, 0x50, 0);
    }
}
