//! The monitor: waits for lines and answers them.

use core::fmt::{self, Write};
use core::ops::ControlFlow;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::abi::{Doorbell, ForkState, Outbox, wake};
use crate::answer::{Answer, Failure};
use crate::command::Command;
use crate::console::{Console, Edit};
use crate::machine::Machine;

/// Longest line that can be a command, in bytes.
pub const LINE_MAX: usize = 256;

const PROMPT: &str = "> ";

/// The monitor of one machine. It ends with [`run`](Self::run), when the VM is to be powered off.
pub struct Monitor<'m, M> {
    pub(crate) machine: &'m M,
    /// The event word the VMM knows we have seen.
    seen: u64,
    /// Wake bits that came while we waited for something else.
    pending: u32,
}

impl<'m, M: Machine> Monitor<'m, M> {
    /// A monitor that has seen no event yet.
    pub fn new(machine: &'m M) -> Self {
        Self { machine, seen: 0, pending: 0 }
    }

    /// Answers lines until one says `halt`, or the VMM stops the machine; then rings [`Doorbell::Halt`].
    pub fn run(&mut self) {
        let mut console = Console::new();
        self.notice();
        self.print(PROMPT);
        loop {
            let bits = match core::mem::take(&mut self.pending) {
                0 => self.wait(|bits| bits & !wake::EVENT != 0),
                bits => bits,
            };
            let stop = bits & wake::STOP != 0
                || bits & wake::INBOX != 0 && self.read_inbox().is_break()
                || bits & wake::SERIAL != 0 && self.read_serial(&mut console).is_break();
            if stop {
                self.machine.ring(Doorbell::Halt);
                return;
            }
        }
    }

    /// Says at once that this VM lives, if its event word is new. Long loops call this for every page.
    #[inline(always)]
    pub(crate) fn notice(&mut self) {
        let event = self.machine.event_page().event.load(Acquire);
        if event != self.seen {
            self.machine.ring(Doorbell::Alive);
            self.seen = event;
        }
    }

    /// Has the VMM fork this VM, and waits for the result in whichever VM we find ourselves. Any wake is a reason to
    /// look for it: a child, whose wait is completed with nothing, needs no second one.
    pub(crate) fn fork(&mut self, count: u32) -> Result<Answer<'m>, Failure<'m>> {
        let page = self.machine.event_page();
        page.fork_count.store(count, Relaxed);
        page.fork_state.store(ForkState::Pending as u32, Release);
        self.machine.ring(Doorbell::Fork);
        loop {
            match ForkState::from_u32(page.fork_state.load(Acquire)) {
                Some(ForkState::Parent) => return Ok(Answer::Parent(page)),
                Some(ForkState::Child) => return Ok(Answer::Child(page.fork_index.load(Relaxed))),
                Some(ForkState::Failed) => return Err(Failure::Fork(page)),
                Some(ForkState::Pending) | None => self.pending |= self.wait(|_| true) & !wake::EVENT,
            }
            if self.pending & wake::STOP != 0 {
                return Ok(Answer::Halt);
            }
        }
    }

    /// Waits until `done` likes the wake bits, and returns them.
    ///
    /// The event word we have seen stays in a register here: neither a wait that is completed with nothing nor a new
    /// event word writes memory, so a fork that stays idle has no private page.
    #[inline(always)]
    fn wait(&mut self, done: impl Fn(u32) -> bool) -> u32 {
        let mut seen = self.seen;
        let bits = loop {
            let bits = self.machine.wait();
            let event = self.machine.event_page().event.load(Acquire);
            if event != seen {
                self.machine.ring(Doorbell::Alive);
                seen = event;
            }
            if done(bits) {
                break bits;
            }
        };
        self.seen = seen;
        bits
    }

    fn read_inbox(&mut self) -> ControlFlow<()> {
        let inbox = self.machine.inbox();
        let tag = inbox.tag.load(Acquire);
        let len = inbox.len.load(Relaxed) as usize;
        let mut line = [0; LINE_MAX];
        for (to, from) in line.iter_mut().zip(&inbox.text) {
            *to = from.load(Relaxed);
        }
        let reply = match line.get(..len) {
            Some(line) => self.reply(line),
            None => Err(Failure::TooLong),
        };
        let mut text = OutboxText { outbox: self.machine.outbox(), len: 0 };
        let flow = say(&mut text, &reply);
        text.send(tag);
        self.machine.ring(Doorbell::Answer);
        flow
    }

    fn read_serial(&mut self, console: &mut Console) -> ControlFlow<()> {
        while let Some(byte) = self.machine.serial_read() {
            match console.push(byte) {
                Edit::Echo(byte) => self.machine.serial_write(byte),
                Edit::Erase => self.print("\x08 \x08"),
                Edit::Ignore => {}
                Edit::Enter => {
                    self.print("\r\n");
                    if !console.line().is_empty() {
                        let reply = self.reply(console.line());
                        let flow = say(&mut SerialText(self.machine), &reply);
                        self.print("\r\n");
                        flow?;
                        console.clear();
                    }
                    self.print(PROMPT);
                }
            }
        }
        ControlFlow::Continue(())
    }

    fn reply<'l>(&mut self, line: &'l [u8]) -> Result<Answer<'m>, Failure<'l>>
    where
        'm: 'l,
    {
        self.execute(Command::parse(line).map_err(Failure::Parse)?)
    }

    fn print(&self, text: &str) {
        text.bytes().for_each(|byte| self.machine.serial_write(byte));
    }
}

/// Writes the line that answers a command; breaks if it was the last one.
fn say(out: &mut impl Write, reply: &Result<Answer<'_>, Failure<'_>>) -> ControlFlow<()> {
    let written = match reply {
        Ok(answer) => write!(out, "{answer}"),
        Err(failure) => write!(out, "{failure}"),
    };
    match (written, reply) {
        (_, Ok(Answer::Halt)) => ControlFlow::Break(()),
        // Writers fail when they are full: the answer is cut short.
        (Ok(()) | Err(fmt::Error), _) => ControlFlow::Continue(()),
    }
}

/// An answer on its way into the outbox.
struct OutboxText<'m> {
    outbox: &'m Outbox,
    len: usize,
}

impl OutboxText<'_> {
    fn send(self, tag: u64) {
        self.outbox.len.store(self.len as u32, Relaxed);
        self.outbox.tag.store(tag, Release);
    }
}

impl Write for OutboxText<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &self.outbox.text[self.len..];
        room.iter().zip(text.bytes()).for_each(|(to, byte)| to.store(byte, Relaxed));
        self.len += text.len().min(room.len());
        if text.len() > room.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

/// Text that goes to a machine's serial port.
pub struct SerialText<'m, M>(pub &'m M);

impl<M: Machine> Write for SerialText<'_, M> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| self.0.serial_write(byte));
        Ok(())
    }
}
