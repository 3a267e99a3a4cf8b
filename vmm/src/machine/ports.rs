//! What a vCPU's port accesses do.

use super::floor::Floor;
use super::mailbox::{Memory, read_answer, read_balloon, read_fork_count, write_balloon};
use super::now_ns;
use crate::boot::acpi;
use crate::devices::serial;
use crate::layout::devices::{RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS};
use crate::layout::frames_of_pages;
use crate::wire::{Ending, FromVm, Line, Machine};
use firmware::abi::{BalloonState, COM1, DOORBELL, Doorbell, WAIT};
use std::sync::Arc;
use vm_memory::GuestMemoryError;

/// The ports of a machine, as one of its vCPUs sees them.
#[derive(Clone, Debug)]
pub(super) struct Ports {
    floor: Arc<Floor>,
    memory: Memory,
    machine: Machine,
}

/// How a read went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// It is answered, and the vCPU goes on.
    Done,
    /// The guest waits, and is told "nothing yet": the vCPU is to stop.
    Stopping,
}

const COM1_LAST: u16 = COM1 + serial::PORTS - 1;

impl Ports {
    /// The ports of the machine that meets on `floor` and has this memory.
    pub fn new(floor: Arc<Floor>, memory: Memory, machine: Machine) -> Self {
        Self { floor, memory, machine }
    }

    /// vCPU `number` reads a port. A port that is nobody's reads as all ones.
    pub fn read(&self, number: usize, port: u16, data: &mut [u8]) -> Result<Read, GuestMemoryError> {
        data.fill(0xff);
        match (port, data.len()) {
            (WAIT, 4) if self.machine == Machine::Monitor => {
                // Nothing yet, if the vCPU is to stop: the guest asks again.
                let wakeup = self.floor.await_wakeup(number);
                let Some(wakeup) = wakeup else {
                    data.fill(0);
                    return Ok(Read::Stopping);
                };
                data.copy_from_slice(&wakeup.deliver(&self.memory)?.to_le_bytes());
            }
            (COM1..=COM1_LAST, _) => {
                let mut shared = self.floor.lock();
                let register = (port - COM1) as u8;
                data.iter_mut().for_each(|byte| *byte = shared.console.read(register));
            }
            (SLEEP_STATUS, 1) if self.machine == Machine::Linux => data.fill(0),
            _ => log::debug!("{} bytes read from port {port:#x}, which is nobody's", data.len()),
        }
        Ok(Read::Done)
    }

    /// A vCPU writes a port. What is written to a port that is nobody's is lost.
    pub fn write(&self, port: u16, data: &[u8]) -> Result<(), GuestMemoryError> {
        match (port, data) {
            (DOORBELL, [a, b, c, d]) if self.machine == Machine::Monitor => {
                let value = u32::from_le_bytes([*a, *b, *c, *d]);
                match Doorbell::from_u32(value) {
                    Some(doorbell) => self.ring(doorbell)?,
                    None => log::debug!("the guest rings {value:#x}, which means nothing"),
                }
            }
            (COM1..=COM1_LAST, _) => self.write_console((port - COM1) as u8, data),
            (SLEEP_CONTROL, [value]) if self.machine == Machine::Linux => {
                if *value == acpi::POWER_OFF {
                    self.floor.end(FromVm::Ended(Ending::Off));
                }
            }
            (RESET, [RESET_VALUE]) if self.machine == Machine::Linux => {
                let panic = self.floor.lock().panic.reason();
                self.floor.end(FromVm::Ended(panic.map_or(Ending::Reboot, Ending::Dead)));
            }
            _ => log::debug!("{} bytes written to port {port:#x}, which is nobody's", data.len()),
        }
        Ok(())
    }

    fn write_console(&self, register: u8, data: &[u8]) {
        const DATA: u8 = 0;
        let mut shared = self.floor.lock();
        shared.write_console(register, data);
        if self.machine == Machine::Linux && register == DATA {
            let ended = shared.panic.printed(data);
            let reason = shared.panic.reason().filter(|_| ended);
            drop(shared);
            if let Some(why) = reason {
                self.floor.die(why);
            }
        }
    }

    fn ring(&self, doorbell: Doorbell) -> Result<(), GuestMemoryError> {
        match doorbell {
            Doorbell::Answer => {
                let text = read_answer(&self.memory)?;
                let mut shared = self.floor.lock();
                match shared.mailbox.answered() {
                    Some(tag) => self.floor.tell(shared, FromVm::Answer(Line { tag, text })),
                    None => log::debug!("the guest answers no line"),
                }
            }
            Doorbell::Alive => {
                let at_ns = now_ns();
                let mut shared = self.floor.lock();
                if shared.mailbox.alive() {
                    self.floor.tell(shared, FromVm::FirstSign { at_ns });
                }
            }
            Doorbell::Fork => {
                let count = read_fork_count(&self.memory)?;
                let mut shared = self.floor.lock();
                shared.mailbox.fork_asked();
                self.floor.tell(shared, FromVm::Fork { count });
            }
            Doorbell::Inflate => self.inflate()?,
            Doorbell::Deflate => {
                let pages = read_balloon(&self.memory)?.held;
                write_balloon(&self.memory, BalloonState::Done)?;
                self.floor.tell(self.floor.lock(), FromVm::BalloonSize { pages });
            }
            Doorbell::Touched => log::debug!("the guest touches pages, and nobody has asked"),
            Doorbell::Halt => self.floor.end(FromVm::Ended(Ending::Off)),
        }
        Ok(())
    }

    /// The guest gives pages back: they are gone, and the server knows, before it goes on.
    fn inflate(&self) -> Result<(), GuestMemoryError> {
        let request = read_balloon(&self.memory)?;
        let asked = frames_of_pages(request.first, request.count);
        let pages = asked.map_or(0, |frames| {
            let given = self.floor.give_back(frames);
            given.iter().map(|range| range.count().0).sum()
        });
        if pages != request.count {
            return write_balloon(&self.memory, BalloonState::Failed);
        }
        write_balloon(&self.memory, BalloonState::Done)?;
        self.floor.tell(self.floor.lock(), FromVm::BalloonSize { pages: request.held });
        Ok(())
    }
}
