//! The monitor on a machine that is a few vectors.
#![allow(unsafe_code)] // The shared pages start as zeroes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

use firmware::abi::{BalloonPage, BalloonState, Doorbell, EventPage, FIRST_FREE_PAGE, ForkState, Inbox, Outbox, wake};
use firmware::machine::{Machine, Page};
use firmware::monitor::Monitor;
use firmware::pattern::word;

const PAGES: u64 = FIRST_FREE_PAGE + 8;

/// What the VMM does while the monitor waits.
enum Step {
    /// Completes the wait with these bits.
    Wake(u32),
    /// Puts a line in the inbox.
    Line(u64, &'static str),
    /// Types on the serial port.
    Type(&'static str),
    /// Makes this VM another one.
    Event(u64),
    /// Ends a fork.
    Forked(ForkState, u32, &'static str),
}
use Step::*;

struct Fake {
    event_page: EventPage,
    inbox: Inbox,
    outbox: Outbox,
    balloon: BalloonPage,
    /// How the VMM takes the balloon's requests.
    balloons: BalloonState,
    ram: Vec<Page>,
    steps: RefCell<VecDeque<Step>>,
    typed: RefCell<VecDeque<u8>>,
    screen: RefCell<String>,
    rung: RefCell<Vec<Doorbell>>,
    answers: RefCell<Vec<(u64, String)>>,
    tsc: Cell<u64>,
}

fn set(text: &[AtomicU8], len: &AtomicU32, value: &str) {
    text.iter().zip(value.bytes()).for_each(|(to, byte)| to.store(byte, Relaxed));
    len.store(value.len() as u32, Relaxed);
}

impl Fake {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        // SAFETY: integers and atomics of them, for which zero is a value.
        let (event_page, inbox, outbox, balloon): (EventPage, Inbox, Outbox, BalloonPage) =
            unsafe { std::mem::zeroed() };
        event_page.event.store(1, Relaxed);
        event_page.generation.store(3, Relaxed);
        event_page.mem_pages.store(PAGES, Relaxed);
        event_page.tsc_khz.store(1000, Relaxed);
        set(&event_page.name, &event_page.name_len, "base");
        Self {
            event_page,
            inbox,
            outbox,
            balloon,
            balloons: BalloonState::Done,
            ram: (0..PAGES).map(|_| [const { std::sync::atomic::AtomicU64::new(0) }; 512]).collect(),
            steps: RefCell::new(steps.into_iter().collect()),
            typed: RefCell::default(),
            screen: RefCell::default(),
            rung: RefCell::default(),
            answers: RefCell::default(),
            tsc: Cell::new(0),
        }
    }

    /// Runs the monitor to its end, which must ring `Halt`, and returns its answers.
    fn run(&self) -> Vec<(u64, String)> {
        Monitor::new(self).run();
        assert_eq!(self.rung.borrow().last(), Some(&Doorbell::Halt));
        self.answers.take()
    }
}

impl Machine for Fake {
    fn event_page(&self) -> &EventPage {
        &self.event_page
    }
    fn inbox(&self) -> &Inbox {
        &self.inbox
    }
    fn outbox(&self) -> &Outbox {
        &self.outbox
    }
    fn balloon_page(&self) -> &BalloonPage {
        &self.balloon
    }
    fn page(&self, page: u64) -> &Page {
        &self.ram[page as usize]
    }
    fn wait(&self) -> u32 {
        match self.steps.borrow_mut().pop_front() {
            None => wake::STOP,
            Some(Wake(bits)) => bits,
            Some(Line(tag, line)) => {
                self.inbox.tag.store(tag, Relaxed);
                set(&self.inbox.text, &self.inbox.len, line);
                wake::INBOX
            }
            Some(Type(text)) => {
                self.typed.borrow_mut().extend(text.bytes());
                wake::SERIAL
            }
            Some(Event(event)) => {
                self.event_page.event.store(event, Relaxed);
                0
            }
            Some(Forked(state, index, text)) => {
                set(&self.event_page.fork_text, &self.event_page.fork_text_len, text);
                self.event_page.fork_index.store(index, Relaxed);
                self.event_page.fork_state.store(state as u32, Relaxed);
                wake::EVENT
            }
        }
    }
    fn ring(&self, doorbell: Doorbell) {
        self.rung.borrow_mut().push(doorbell);
        if matches!(doorbell, Doorbell::Inflate | Doorbell::Deflate) {
            self.balloon.state.store(self.balloons as u32, Relaxed);
        }
        if doorbell == Doorbell::Inflate && self.balloons == BalloonState::Done {
            let first = self.balloon.first.load(Relaxed) as usize;
            let pages = &self.ram[first..first + self.balloon.count.load(Relaxed) as usize];
            pages.iter().flatten().for_each(|word| word.store(0, Relaxed));
        }
        if doorbell == Doorbell::Answer {
            let len = self.outbox.len.load(Relaxed) as usize;
            let text = self.outbox.text[..len].iter().map(|byte| byte.load(Relaxed)).collect();
            let answer = (self.outbox.tag.load(Relaxed), String::from_utf8(text).unwrap());
            self.answers.borrow_mut().push(answer);
        }
    }
    fn serial_read(&self) -> Option<u8> {
        self.typed.borrow_mut().pop_front()
    }
    fn serial_write(&self, byte: u8) {
        self.screen.borrow_mut().push(char::from(byte));
    }
    fn tsc(&self) -> u64 {
        self.tsc.set(self.tsc.get() + 7);
        self.tsc.get()
    }
}

/// Gives each line to one monitor, and checks its answer.
#[track_caller]
fn talk(lines: &[(&'static str, &str)]) {
    let fake = Fake::new(lines.iter().enumerate().map(|(tag, (line, _))| Line(tag as u64, line)));
    let answers = fake.run();
    assert_eq!(answers.len(), lines.len());
    for ((line, want), (index, (tag, answer))) in lines.iter().zip(answers.iter().enumerate()) {
        assert_eq!((index as u64, *want), (*tag, answer.as_str()), "{line}");
    }
}

#[test]
fn answers_are_as_documented() {
    talk(&[
        ("id", "ok name=base generation=3"),
        ("mem", "ok first=64 pages=72"),
        ("fill 64 8 5", "ok filled=8"),
        ("verify 64 8 5", "ok verified=8"),
        ("verify-touch 65 7 5", "ok verified=7"),
        ("zero 64 1", "ok zeroed=1"),
        ("sum 64 1", "ok sum=0"),
        ("touch 64 1 9", "ok touched=1"),
        ("verify-touch 64 1 9", "ok verified=1"),
        ("gap 1", "ok max_gap_us=7"),
        ("spin 1000", "ok"),
        ("frobnicate\x1b 1", "err unknown command frobnicate\\u{1b}"),
        ("fill 64", "err usage: fill PAGE COUNT SEED"),
        ("", "err no command"),
        ("halt", "ok"),
    ]);
}

#[test]
fn pages_go_into_the_balloon_and_come_back_empty() {
    talk(&[
        ("fill 64 8 5", "ok filled=8"),
        ("inflate 66 3", "ok ballooned=3"),
        ("inflate 66 3", "ok ballooned=3"),
        ("inflate 64 3", "ok ballooned=5"),
        ("mem", "ok first=64 pages=72 ballooned=5"),
        ("fill 60 2 5", "err page=60 count=2 is outside 64..72"),
        ("fill 64 8 5", "err page=64 is in the balloon: deflate it first"),
        ("touch 69 3 5", "ok touched=3"),
        ("zero 68 1", "err page=68 is in the balloon: deflate it first"),
        ("sum 64 5", "ok sum=0"),
        ("verify 69 3 5", "ok verified=3"),
        ("deflate 65 2", "ok ballooned=3"),
        ("fill 65 2 6", "ok filled=2"),
        ("verify 65 2 6", "ok verified=2"),
        ("deflate 64 8", "ok ballooned=0"),
        ("inflate 63 1", "err page=63 count=1 is outside 64..72"),
        ("inflate 72 1", "err page=72 count=1 is outside 64..72"),
        ("inflate 72 0", "ok ballooned=0"),
        ("deflate 0 1", "err page=0 count=1 is outside 64..72"),
        ("inflate 18446744073709551615 2", "err page=18446744073709551615 count=2 is outside 64..72"),
    ]);
}

#[test]
fn what_the_vmm_does_not_take_is_not_in_the_balloon() {
    for (balloons, answer) in [
        (BalloonState::Failed, "err page=64 count=1 could not be given back"),
        (BalloonState::Pending, "err unsupported"),
    ] {
        let fake = Fake { balloons, ..Fake::new([Line(1, "inflate 64 1"), Line(2, "mem")]) };
        let answers = fake.run();
        assert_eq!((answers[0].1.as_str(), answers[1].1.as_str()), (answer, "ok first=64 pages=72"));
    }
}

#[test]
fn help_names_every_command() {
    let answers = Fake::new([Line(1, "help")]).run();
    assert!(answers[0].1.starts_with("ok help, id, mem, fill PAGE COUNT SEED, "), "{answers:?}");
    assert!(answers[0].1.ends_with(", spin N, halt"), "{answers:?}");
}

#[test]
fn sums_and_mismatches_follow_the_pattern() {
    let fake = Fake::new([Line(1, "fill 70 1 5"), Line(2, "sum 70 1"), Line(3, "verify 70 1 6")]);
    let answers = fake.run();
    let sum = (0..512).fold(0u64, |sum, index| sum.wrapping_add(word(5, 70, index)));
    assert_eq!(answers[1].1, format!("ok sum={sum}"));
    let (want, got) = (word(6, 70, 0), word(5, 70, 0));
    assert_eq!(answers[2].1, format!("err mismatch page=70 word=0 want={want} got={got}"));
}

#[test]
fn what_is_outside_is_not_written() {
    let fake = Fake::new([
        Line(1, "fill 63 2 5"),
        Line(2, "zero 71 2"),
        Line(3, "touch 18446744073709551615 2 5"),
        Line(4, "sum 0 73"),
        Line(5, "sum 0 72"),
    ]);
    let answers = fake.run();
    assert_eq!(answers[0].1, "err page=63 count=2 is outside 64..72");
    assert_eq!(answers[1].1, "err page=71 count=2 is outside 64..72");
    assert_eq!(answers[2].1, "err page=18446744073709551615 count=2 is outside 64..72");
    assert_eq!(answers[3].1, "err page=0 count=73 is outside 0..72");
    assert_eq!(answers[4].1, "ok sum=0");
}

#[test]
fn a_new_event_word_is_noticed_at_once_and_once() {
    let fake = Fake::new([Wake(0), Event(2), Wake(wake::EVENT), Line(1, "halt")]);
    fake.run();
    use Doorbell::*;
    assert_eq!(*fake.rung.borrow(), [Alive, Alive, Answer, Halt]);
}

#[test]
fn fork_is_seen_from_three_sides() {
    for (result, answer) in [
        (Forked(ForkState::Parent, 0, "a b-1 c"), "ok parent child=a child=b-1 child=c"),
        (Forked(ForkState::Child, 2, ""), "ok child index=2"),
        (Forked(ForkState::Failed, 0, "no\nroom"), "err no?room"),
    ] {
        let fake = Fake::new([Line(7, "fork 3"), Wake(0), Event(9), result]);
        assert_eq!(fake.run(), [(7, answer.to_string())]);
        assert_eq!(fake.event_page.fork_count.load(Relaxed), 3);
        use Doorbell::*;
        assert_eq!(*fake.rung.borrow(), [Alive, Fork, Alive, Answer, Halt]);
    }
}

#[test]
fn a_line_that_comes_during_a_fork_waits() {
    let fake = Fake::new([Type("fork\r"), Line(5, "mem"), Forked(ForkState::Parent, 0, "a")]);
    assert_eq!(fake.run(), [(5, "ok first=64 pages=72".to_string())]);
    assert!(fake.screen.borrow().contains("ok parent child=a\r\n> "));
}

#[test]
fn a_stop_ends_a_fork_that_never_ends() {
    let fake = Fake::new([Line(1, "fork")]);
    assert_eq!(fake.run(), [(1, "ok".to_string())]);
}

#[test]
fn the_serial_port_is_a_console() {
    let fake = Fake::new([Type("ix\x7fd\r\n"), Type("\r"), Type("halt\n never read")]);
    assert_eq!(fake.run(), []);
    assert_eq!(*fake.screen.borrow(), "> ix\x08 \x08d\r\nok name=base generation=3\r\n> \r\n> halt\r\nok\r\n");
}

#[test]
fn absurd_lengths_hurt_nobody() {
    let fake = Fake::new([Line(1, "id"), Line(2, "fork"), Forked(ForkState::Failed, 0, "")]);
    fake.event_page.name_len.store(u32::MAX, Relaxed);
    let answers = fake.run();
    assert!(answers[0].1.starts_with("ok name=base????"));
    let fake = Fake::new([Wake(wake::INBOX)]);
    fake.inbox.len.store(u32::MAX, Relaxed);
    assert_eq!(fake.run(), [(0, "err line too long".to_string())]);
}
