//! What a VM process owes an answer to, and since when.
//!
//! Only what the process itself has to say counts, and what its guest does by itself at once. A guest's answer to a line, or a
//! balloon's way to its size, takes the guest's time, and whoever waits for it has a time of its own.

use crate::wire::{FromVm, Machine, Origin, ToVm};
use guest_mem::StoreId;
use std::fmt;
use std::time::{Duration, Instant};

/// What is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// That it is prepared.
    Preparation,
    /// That it has ready what it expects.
    Expectation,
    /// That its guest runs, or stands as asked.
    Start,
    /// The built-in guest's first sign of life, once it runs.
    FirstSign,
    /// That the vCPUs stand, or run.
    RunState,
    /// The next that is to be said of this freeze.
    Freeze(StoreId),
    /// Which pages have left its window.
    Dedup,
}

impl Owed {
    /// What a process owes that is told this.
    fn by(message: &ToVm) -> Option<Self> {
        match message {
            ToVm::Prepare { .. } => Some(Self::Preparation),
            ToVm::Expect(_) => Some(Self::Expectation),
            // A fork's answer waits for the state of its parent.
            ToVm::Start(start) if matches!(start.origin, Origin::Fork { .. }) => None,
            ToVm::Start(_) | ToVm::Load(_) | ToVm::LoadExpected => Some(Self::Start),
            ToVm::Pause | ToVm::Resume => Some(Self::RunState),
            ToVm::Freeze { store, .. } => Some(Self::Freeze(*store)),
            ToVm::Dedup { .. } => Some(Self::Dedup),
            // `check` has a patience of its own.
            ToVm::Probe
            | ToVm::LeaveScratch { .. }
            | ToVm::DropScratch(_)
            | ToVm::Protect { .. }
            | ToVm::Input(_)
            | ToVm::Console(_)
            | ToVm::ForkDone(_)
            | ToVm::Balloon { .. }
            | ToVm::AskStats
            | ToVm::HintFree
            | ToVm::Connect { .. }
            | ToVm::Connected { .. }
            | ToVm::Stop => None,
        }
    }
}

impl fmt::Display for Owed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Preparation => "prepare itself",
            Self::Expectation => "get ready for a child",
            Self::Start => "start",
            Self::FirstSign => "show a sign of life",
            Self::RunState => "pause or to resume",
            Self::Freeze(_) => "freeze",
            Self::Dedup => "give back what is in memory twice",
        })
    }
}

/// What one process owes. What it owes several times, it owes since the last.
#[derive(Debug, Default)]
pub struct Answers(Vec<(Owed, Instant)>);

impl Answers {
    /// The process is told something. Whether it owes anything now that owed nothing before.
    pub fn asked(&mut self, message: &ToVm, now: Instant) -> bool {
        let before = self.0.len();
        if let Some(owed) = Owed::by(message) {
            self.owe(owed, now);
        }
        before == 0 && !self.0.is_empty()
    }

    fn owe(&mut self, owed: Owed, now: Instant) {
        self.0.retain(|(other, _)| *other != owed);
        self.0.push((owed, now));
    }

    /// The process says something. It does one thing after the other: where that is an answer, it has had no time before for
    /// what else it owes.
    pub fn heard(&mut self, message: &FromVm, machine: Machine, now: Instant) {
        let paid: &[Owed] = match message {
            FromVm::Ready { .. } | FromVm::PrepareFailed(_) => &[Owed::Preparation],
            FromVm::Expecting => &[Owed::Expectation],
            FromVm::Running { .. } if self.owes(Owed::Start) => {
                if machine == Machine::Monitor {
                    self.owe(Owed::FirstSign, now);
                }
                &[Owed::Start]
            }
            FromVm::Paused if self.owes(Owed::Start) => &[Owed::Start],
            FromVm::Running { .. } | FromVm::Paused => &[Owed::RunState],
            FromVm::StartFailed(_) => &[Owed::Expectation, Owed::Start, Owed::FirstSign],
            FromVm::FirstSign { .. } => &[Owed::FirstSign],
            FromVm::Deduped { .. } => &[Owed::Dedup],
            // Of a freeze there is mostly more to come.
            FromVm::Standing
            | FromVm::Frozen(_)
            | FromVm::Saved { .. }
            | FromVm::Copied { .. }
            | FromVm::WentOn { .. }
            | FromVm::FreezeFailed(_) => &[],
            _ => return,
        };
        self.0.retain(|(owed, _)| !paid.contains(owed));
        self.0.iter_mut().for_each(|(_, since)| *since = now);
    }

    /// Nothing more is to come of this.
    pub fn paid(&mut self, owed: Owed) {
        self.0.retain(|(other, _)| *other != owed);
    }

    fn owes(&self, owed: Owed) -> bool {
        self.0.iter().any(|(other, _)| *other == owed)
    }

    /// What has been owed for longest, and since when.
    pub fn oldest(&self) -> Option<(Owed, Instant)> {
        self.0.iter().copied().min_by_key(|(_, since)| *since)
    }

    /// Nobody waits for any of it.
    pub fn forget(&mut self) {
        self.0.clear();
    }
}

/// What keeps a process from answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excuse {
    /// Nothing that anybody knows of.
    None,
    /// It has something to do, and waits for a processor or for the disk.
    Busy,
    /// Its guest waits for pages that we are to bring.
    Pages,
}

/// Who has something to do gets so many times as long: the host may have more to do than it can.
const BUSY: u32 = 4;

/// Whether an answer is so late that none will come.
pub fn is_late(owed_for: Duration, within: Duration, excuse: Excuse) -> bool {
    match excuse {
        Excuse::None => owed_for >= within,
        Excuse::Busy => owed_for >= within * BUSY,
        Excuse::Pages => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    const RUNNING: FromVm = FromVm::Running { at_ns: 0 };

    #[test]
    fn an_answer_pays_and_gives_time_for_the_rest() {
        let start = Instant::now();
        let mut answers = Answers::default();
        assert!(answers.asked(&ToVm::Pause, start));
        assert!(!answers.asked(&ToVm::Dedup { store: StoreId(1), pages: Vec::new() }, at(start, 1)), "it owed already");
        assert_eq!(answers.oldest(), Some((Owed::RunState, start)));
        answers.heard(&FromVm::Paused, Machine::Linux, at(start, 5));
        assert_eq!(answers.oldest(), Some((Owed::Dedup, at(start, 5))));
        answers.heard(&FromVm::Deduped { store: StoreId(1), pages: Vec::new() }, Machine::Linux, at(start, 6));
        assert_eq!(answers.oldest(), None);
    }

    #[test]
    fn what_nobody_asked_for_gives_no_time() {
        let start = Instant::now();
        let mut answers = Answers::default();
        answers.asked(&ToVm::Resume, start);
        for said in [FromVm::Log(String::new()), FromVm::Hinted, FromVm::Console(Vec::new())] {
            answers.heard(&said, Machine::Linux, at(start, 9));
        }
        assert_eq!(answers.oldest(), Some((Owed::RunState, start)));
    }

    #[test]
    fn a_start_of_the_built_in_guest_is_followed_by_its_first_sign() {
        let start = Instant::now();
        let mut answers = Answers::default();
        answers.asked(&ToVm::LoadExpected, start);
        answers.heard(&RUNNING, Machine::Monitor, at(start, 1));
        assert_eq!(answers.oldest(), Some((Owed::FirstSign, at(start, 1))));
        answers.heard(&FromVm::FirstSign { at_ns: 0 }, Machine::Monitor, at(start, 2));
        assert_eq!(answers.oldest(), None);
        answers.asked(&ToVm::LoadExpected, start);
        answers.heard(&FromVm::Paused, Machine::Monitor, at(start, 1));
        assert_eq!(answers.oldest(), None, "who stands shows none");
        answers.asked(&ToVm::LoadExpected, start);
        answers.heard(&RUNNING, Machine::Linux, at(start, 1));
        assert_eq!(answers.oldest(), None, "nor does a Linux guest");
    }

    #[test]
    fn a_freeze_is_owed_until_all_of_it_is_told() {
        let start = Instant::now();
        let mut answers = Answers::default();
        let freeze = Owed::Freeze(StoreId(7));
        let (take, along) = (crate::wire::Take::Remap, guest_mem::Along::default());
        answers.asked(&ToVm::Freeze { store: StoreId(7), max_runs: 1, take, along, first: Vec::new() }, start);
        answers.heard(&FromVm::Standing, Machine::Linux, at(start, 3));
        assert_eq!(answers.oldest(), Some((freeze, at(start, 3))));
        answers.paid(freeze);
        assert_eq!(answers.oldest(), None);
    }

    #[test]
    fn who_is_busy_has_more_time_and_who_waits_for_us_has_all_of_it() {
        let within = Duration::from_secs(10);
        let late = |seconds, excuse| is_late(Duration::from_secs(seconds), within, excuse);
        assert_eq!([9, 10].map(|seconds| late(seconds, Excuse::None)), [false, true]);
        assert_eq!([10, 39, 40].map(|seconds| late(seconds, Excuse::Busy)), [false, false, true]);
        assert!(!late(1000, Excuse::Pages));
    }
}
