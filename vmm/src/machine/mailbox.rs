//! Our side of the pages that the monitor shares with us, and of its doorbell and wait ports.
//!
//! The guest can write anything to these pages at any time: every field is read once, and every length is checked.

use super::state::MailboxState;
use crate::wire::{Identity, Line};
use firmware::abi::{self, BalloonState, ForkState, at, wake};
use guest_mem::sys::Written;
use std::collections::VecDeque;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Guest memory as the VMM writes to it.
pub(super) type Memory = GuestMemoryMmap<Written>;

/// What waits for the monitor, and what it owes.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    lines: VecDeque<Line>,
    state: MailboxState,
    fork_outcome: Option<Result<Vec<String>, String>>,
    news: bool,
    stop: bool,
    sign: Sign,
}

/// Whether the guest has said that it lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sign {
    #[default]
    Awaited,
    /// It may have begun to wait before there was a new event word: its first wait ends at once, and it looks again.
    Nudge,
    Given,
}

/// What a wait of the monitor is completed with.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wakeup {
    bits: u32,
    line: Option<Line>,
    fork_outcome: Option<Result<Vec<String>, String>>,
}

impl Mailbox {
    /// A line for the guest; lines queue.
    pub fn post(&mut self, line: Line) {
        self.lines.push_back(line);
    }

    /// How the fork ended that the guest waits for; nobody listens if it does not.
    pub fn fork_done(&mut self, outcome: Result<Vec<String>, String>) {
        if self.state.fork_pending {
            self.fork_outcome = Some(outcome);
        }
    }

    /// The guest is to power off.
    pub fn stop(&mut self) {
        self.stop = true;
    }

    /// The guest has rung for a fork.
    pub fn fork_asked(&mut self) {
        self.state.fork_pending = true;
    }

    /// The guest has rung for an answer: the tag of the line that it answers, if there is one.
    pub fn answered(&mut self) -> Option<u64> {
        self.state.in_flight.take()
    }

    /// The guest has rung that it lives; whether that is its first sign.
    pub fn alive(&mut self) -> bool {
        std::mem::replace(&mut self.sign, Sign::Given) != Sign::Given
    }

    /// What is under way, for a fork to go on with.
    pub fn save(&self) -> MailboxState {
        self.state
    }

    /// Becomes a child's mailbox: a fork that its guest waits for has ended.
    pub fn load(&mut self, state: MailboxState) {
        self.news = state.fork_pending;
        self.sign = Sign::Nudge;
        self.state = MailboxState { fork_pending: false, ..state };
    }

    /// Whether there is something for a guest that waits.
    pub fn has_news(&self, serial_has_input: bool) -> bool {
        let line = !self.state.fork_pending && !self.lines.is_empty();
        let nudge = self.sign == Sign::Nudge;
        self.fork_outcome.is_some() || self.news || line || serial_has_input || self.stop || nudge
    }

    /// What there is for a guest that waits; `None` lets it wait on.
    ///
    /// A guest that waits has done with the line before, answered or not, unless it waits for a fork.
    pub fn collect(&mut self, serial_has_input: bool) -> Option<Wakeup> {
        let mut wakeup = Wakeup::default();
        if let Some(outcome) = self.fork_outcome.take() {
            self.state.fork_pending = false;
            self.news = true;
            wakeup.fork_outcome = Some(outcome);
        }
        if std::mem::take(&mut self.news) {
            wakeup.bits |= wake::EVENT;
        } else if !self.state.fork_pending
            && let Some(line) = self.lines.pop_front()
        {
            self.state.in_flight = Some(line.tag);
            wakeup.bits |= wake::INBOX;
            wakeup.line = Some(line);
        }
        if serial_has_input {
            wakeup.bits |= wake::SERIAL;
        }
        if std::mem::take(&mut self.stop) {
            wakeup.bits |= wake::STOP;
        }
        let nudge = self.sign == Sign::Nudge;
        if nudge {
            self.sign = Sign::Awaited;
        }
        (nudge || wakeup.bits != 0).then_some(wakeup)
    }
}

impl Wakeup {
    /// Puts what the guest is about to look at into its memory; gives the bits that complete its wait.
    pub fn deliver(self, memory: &Memory) -> Result<u32, GuestMemoryError> {
        if let Some(outcome) = self.fork_outcome {
            let (state, text) = match outcome {
                Ok(names) => (ForkState::Parent, names.join(" ")),
                Err(why) => (ForkState::Failed, why.replace('\n', " ")),
            };
            let text = cut(&text, abi::FORK_TEXT_MAX);
            memory.write_slice(text.as_bytes(), GuestAddress(at::FORK_TEXT))?;
            memory.write_obj(text.len() as u32, GuestAddress(at::FORK_TEXT_LEN))?;
            memory.write_obj(state as u32, GuestAddress(at::FORK_STATE))?;
        }
        if let Some(line) = self.line {
            // The monitor answers "too long" to what does not fit, so it learns the true length.
            let text = cut(&line.text, abi::INBOX_TEXT_MAX);
            memory.write_slice(text.as_bytes(), GuestAddress(at::INBOX_TEXT))?;
            memory.write_obj(line.text.len().min(u32::MAX as usize) as u32, GuestAddress(at::INBOX_LEN))?;
            memory.write_obj(line.tag, GuestAddress(at::INBOX_TAG))?;
        }
        Ok(self.bits)
    }
}

/// The answer in the outbox.
pub(super) fn read_answer(memory: &Memory) -> Result<String, GuestMemoryError> {
    let len: u32 = memory.read_obj(GuestAddress(at::OUTBOX_LEN))?;
    let mut text = vec![0; (len as usize).min(abi::OUTBOX_TEXT_MAX)];
    memory.read_slice(&mut text, GuestAddress(at::OUTBOX_TEXT))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// How many children the guest asks for.
pub(super) fn read_fork_count(memory: &Memory) -> Result<u32, GuestMemoryError> {
    memory.read_obj(GuestAddress(at::FORK_COUNT))
}

/// What the guest asks of the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BalloonRequest {
    /// First page, counted without the devices between.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Pages in the balloon when it is done.
    pub held: u64,
}

/// What the guest asks of the balloon.
pub(super) fn read_balloon(memory: &Memory) -> Result<BalloonRequest, GuestMemoryError> {
    let [first, count, held] = [at::BALLOON_FIRST, at::BALLOON_COUNT, at::BALLOON_HELD].map(GuestAddress);
    Ok(BalloonRequest { first: memory.read_obj(first)?, count: memory.read_obj(count)?, held: memory.read_obj(held)? })
}

/// How that went.
pub(super) fn write_balloon(memory: &Memory, state: BalloonState) -> Result<(), GuestMemoryError> {
    memory.write_obj(state as u32, GuestAddress(at::BALLOON_STATE))
}

/// What a machine is told before it runs.
#[derive(Debug)]
pub(super) struct Greeting<'a> {
    /// Who it is.
    pub identity: &'a Identity,
    /// RAM, in pages.
    pub mem_pages: u64,
    /// TSC ticks per millisecond.
    pub tsc_khz: u64,
    /// Which child of its fork it is.
    pub child: Option<u32>,
}

impl Greeting<'_> {
    /// Fills the event page. The new event word comes last.
    pub fn deliver(&self, memory: &Memory) -> Result<(), GuestMemoryError> {
        let name = cut(&self.identity.name, abi::NAME_MAX);
        memory.write_slice(name.as_bytes(), GuestAddress(at::NAME))?;
        memory.write_obj(name.len() as u32, GuestAddress(at::NAME_LEN))?;
        memory.write_obj(self.identity.generation, GuestAddress(at::GENERATION))?;
        memory.write_obj(self.mem_pages, GuestAddress(at::MEM_PAGES))?;
        memory.write_obj(self.tsc_khz, GuestAddress(at::TSC_KHZ))?;
        if let Some(index) = self.child {
            memory.write_obj(index, GuestAddress(at::FORK_INDEX))?;
            memory.write_obj(ForkState::Child as u32, GuestAddress(at::FORK_STATE))?;
        }
        memory.write_obj(self.identity.generation, GuestAddress(at::EVENT))
    }
}

/// As much of `text` as fits into `max` bytes.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(tag: u64) -> Line {
        Line { tag, text: "mem".into() }
    }

    fn memory() -> Memory {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12)]).unwrap()
    }

    #[test]
    fn lines_come_one_per_wait_and_in_order() {
        let mut mailbox = Mailbox::default();
        assert_eq!(mailbox.collect(false), None);
        mailbox.post(line(7));
        mailbox.post(line(8));
        assert_eq!(mailbox.collect(true).unwrap().bits, wake::INBOX | wake::SERIAL);
        assert_eq!(mailbox.answered(), Some(7));
        assert_eq!(mailbox.answered(), None, "an answer to no line");
        assert_eq!(mailbox.collect(false).unwrap().line, Some(line(8)));
    }

    #[test]
    fn a_guest_that_waits_for_a_fork_gets_no_line_before_its_outcome() {
        let mut mailbox = Mailbox::default();
        mailbox.fork_done(Ok(vec!["nobody-asked".into()]));
        assert_eq!(mailbox.collect(false), None);
        mailbox.fork_asked();
        mailbox.post(line(1));
        assert_eq!(mailbox.collect(false), None);
        mailbox.fork_done(Ok(vec!["a-1".into(), "a-2".into()]));
        let memory = memory();
        assert_eq!(mailbox.collect(false).unwrap().deliver(&memory).unwrap(), wake::EVENT);
        let state: u32 = memory.read_obj(GuestAddress(at::FORK_STATE)).unwrap();
        assert_eq!(state, ForkState::Parent as u32);
        assert_eq!(mailbox.collect(false).unwrap().line, Some(line(1)));
    }

    #[test]
    fn a_child_owes_the_answer_its_parent_owed() {
        let mut parent = Mailbox::default();
        parent.post(line(3));
        parent.collect(false);
        parent.fork_asked();
        let mut child = Mailbox::default();
        child.load(parent.save());
        assert_eq!(child.collect(false).unwrap().bits, wake::EVENT);
        assert_eq!(child.answered(), Some(3));
    }

    #[test]
    fn a_child_that_waits_before_it_gave_a_sign_is_nudged_once() {
        let mut child = Mailbox::default();
        child.load(MailboxState::default());
        assert_eq!(child.collect(false), Some(Wakeup::default()));
        assert_eq!(child.collect(false), None);
        assert!(child.alive());
        assert!(!child.alive());
        let mut quick = Mailbox::default();
        quick.load(MailboxState::default());
        quick.alive();
        assert_eq!(quick.collect(false), None);
    }

    #[test]
    fn a_hostile_length_reads_no_further_than_the_outbox() {
        let memory = memory();
        memory.write_obj(u32::MAX, GuestAddress(at::OUTBOX_LEN)).unwrap();
        assert_eq!(read_answer(&memory).unwrap().len(), abi::OUTBOX_TEXT_MAX);
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
        assert_eq!(cut("", 3), "");
    }
}
