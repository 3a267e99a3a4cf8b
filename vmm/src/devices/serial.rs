//! The serial console: a 16550 whose output is collected and whose input waits until the guest takes it.

use super::interrupt::{Interrupt, NoInterrupt};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

/// Ports that a 16550 takes.
pub const PORTS: u16 = 8;
/// Output that nobody fetches is dropped past this, input that the guest does not take as well.
const BACKLOG_MAX: usize = 64 << 10;

/// The console's interrupt, as the UART knows it.
#[derive(Clone, Debug)]
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// A 16550 with room on both sides.
#[derive(Debug)]
pub struct Console {
    uart: Serial<Line, NoEvents, Vec<u8>>,
    /// Input past what the UART's FIFO takes. It is the host's, not the machine's: a fork does not get it.
    backlog: VecDeque<u8>,
}

impl Default for Console {
    /// A console whose guest polls, or waits in a port of its own.
    fn default() -> Self {
        Self::new(Arc::new(NoInterrupt))
    }
}

impl Console {
    /// A console that interrupts the guest.
    pub fn new(interrupt: Arc<dyn Interrupt>) -> Self {
        Self { uart: Serial::new(Line(interrupt), Vec::new()), backlog: VecDeque::new() }
    }

    /// The guest reads a register.
    pub fn read(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        self.refill();
        value
    }

    /// The guest writes a register.
    pub fn write(&mut self, register: u8, value: u8) {
        if self.uart.writer().len() >= BACKLOG_MAX {
            log::debug!("console output dropped: nobody fetches it");
            self.uart.writer_mut().clear();
        }
        // Writing to a Vec and raising an interrupt cannot fail.
        let _ = self.uart.write(register, value);
    }

    /// Bytes for the guest.
    pub fn input(&mut self, bytes: &[u8]) {
        let room = BACKLOG_MAX.saturating_sub(self.backlog.len());
        if bytes.len() > room {
            log::warn!("{} bytes of console input dropped: the guest does not take them", bytes.len() - room);
        }
        self.backlog.extend(&bytes[..bytes.len().min(room)]);
        self.refill();
    }

    fn refill(&mut self) {
        let count = self.uart.fifo_capacity().min(self.backlog.len());
        if count > 0 {
            let next: Vec<u8> = self.backlog.iter().copied().take(count).collect();
            let taken = self.uart.enqueue_raw_bytes(&next).unwrap_or(0);
            self.backlog.drain(..taken);
        }
    }

    /// Whether the guest can read a byte.
    pub fn has_input(&mut self) -> bool {
        const LINE_STATUS: u8 = 5;
        const DATA_READY: u8 = 1;
        self.uart.read(LINE_STATUS) & DATA_READY != 0
    }

    /// Whether the guest wrote something since [`take_output`](Self::take_output).
    pub fn has_output(&self) -> bool {
        !self.uart.writer().is_empty()
    }

    /// What the guest wrote.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(self.uart.writer_mut())
    }

    /// The device as the guest sees it.
    pub fn save(&self) -> State {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart.state();
        let registers = [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ];
        State { registers, in_buffer }
    }

    /// Becomes the saved device.
    ///
    /// # Errors
    /// The state holds more input than the device's FIFO.
    pub fn load(&mut self, state: &State) -> Result<(), String> {
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = state.registers;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let line = self.uart.interrupt_evt().clone();
        self.uart = Serial::from_state(&state, line, NoEvents, Vec::new())
            .map_err(|error| format!("serial console: {error}"))?;
        Ok(())
    }
}

/// A saved console: the registers in the order of vm-superio's state, and the receive FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    registers: [u8; 9],
    in_buffer: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const SCRATCH: u8 = 7;

    #[test]
    fn input_past_the_fifo_waits_its_turn() {
        let mut console = Console::default();
        assert!(!console.has_input());
        let bytes: Vec<u8> = (0..200).collect();
        console.input(&bytes);
        let read: Vec<u8> = (0..200).map(|_| console.read(DATA)).collect();
        assert_eq!(read, bytes);
        assert!(!console.has_input());
    }

    #[test]
    fn output_is_collected_and_bounded() {
        let mut console = Console::default();
        b"hello".iter().for_each(|byte| console.write(DATA, *byte));
        assert!(console.has_output());
        assert_eq!(console.take_output(), b"hello");
        (0..BACKLOG_MAX * 2).for_each(|_| console.write(DATA, b'x'));
        assert!(console.take_output().len() <= BACKLOG_MAX);
    }

    #[test]
    fn a_saved_console_comes_back() {
        let mut console = Console::default();
        console.write(SCRATCH, 0x5a);
        console.input(b"ab");
        let mut copy = Console::default();
        copy.load(&console.save()).unwrap();
        assert_eq!(copy.read(SCRATCH), 0x5a);
        assert_eq!([copy.read(DATA), copy.read(DATA)], *b"ab");
        let full = State { in_buffer: vec![0; 1000], ..console.save() };
        assert!(copy.load(&full).is_err());
    }
}
