//! What each command does.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::abi::{BalloonState, Doorbell, FIRST_FREE_PAGE};
use crate::answer::{Answer, Failure};
use crate::balloon::{Balloon, Change};
use crate::command::{Command, Extent, Pages};
use crate::machine::Machine;
use crate::monitor::Monitor;
use crate::pattern::{PAGE_WORDS, Words};

impl<'m, M: Machine> Monitor<'m, M> {
    pub(crate) fn execute(&mut self, command: Command) -> Result<Answer<'m>, Failure<'m>> {
        match command {
            Command::Help => Ok(Answer::Usage),
            Command::Id => Ok(Answer::Id(self.machine.event_page())),
            Command::Mem => Ok(Answer::Mem(self.mem_pages(), self.balloon().held())),
            Command::Write(pages, seed, extent) => self.write(pages, seed, extent),
            Command::Verify(pages, seed, extent) => self.verify(pages, seed, extent),
            Command::Zero(pages) => self.zero(pages),
            Command::Sum(pages) => self.sum(pages),
            Command::Inflate(pages) => self.inflate(pages),
            Command::Deflate(pages) => self.deflate(pages),
            Command::Fork(count) => self.fork(count),
            Command::Gap(ms) => self.gap(ms),
            Command::Spin(count) => self.spin(count),
            Command::Halt => Ok(Answer::Halt),
        }
    }

    fn write(&mut self, pages: Pages, seed: u64, extent: Extent) -> Result<Answer<'m>, Failure<'m>> {
        for number in self.writable(pages)? {
            self.notice();
            let page = &self.machine.page(number)[..extent.words()];
            page.iter().zip(Words::new(seed, number)).for_each(|(word, value)| word.store(value, Relaxed));
        }
        let done = match extent {
            Extent::Whole => "filled",
            Extent::FirstWord => "touched",
        };
        Ok(Answer::Pages(done, pages.count))
    }

    fn verify(&mut self, pages: Pages, seed: u64, extent: Extent) -> Result<Answer<'m>, Failure<'m>> {
        for number in self.within(pages, 0)? {
            self.notice();
            let page = &self.machine.page(number)[..extent.words()];
            for (index, (word, want)) in page.iter().zip(Words::new(seed, number)).enumerate() {
                let got = word.load(Relaxed);
                if got != want {
                    return Err(Failure::Mismatch { page: number, word: index, want, got });
                }
            }
        }
        Ok(Answer::Pages("verified", pages.count))
    }

    fn zero(&mut self, pages: Pages) -> Result<Answer<'m>, Failure<'m>> {
        for number in self.writable(pages)? {
            self.notice();
            self.machine.page(number).iter().for_each(|word| word.store(0, Relaxed));
        }
        Ok(Answer::Pages("zeroed", pages.count))
    }

    fn sum(&mut self, pages: Pages) -> Result<Answer<'m>, Failure<'m>> {
        let mut sum = 0u64;
        for number in self.within(pages, 0)? {
            self.notice();
            let page = self.machine.page(number).iter();
            sum = page.fold(sum, |sum, word| sum.wrapping_add(word.load(Relaxed)));
        }
        Ok(Answer::Sum(sum))
    }

    /// Gives pages back, whether they are in the balloon or not.
    fn inflate(&mut self, pages: Pages) -> Result<Answer<'m>, Failure<'m>> {
        let range = self.within(pages, FIRST_FREE_PAGE)?;
        let change = self.balloon().with(range).ok_or(Failure::BalloonFull)?;
        self.tell_balloon(pages, Doorbell::Inflate, &change)
    }

    /// Takes pages back, those that are in the balloon.
    fn deflate(&mut self, pages: Pages) -> Result<Answer<'m>, Failure<'m>> {
        let range = self.within(pages, FIRST_FREE_PAGE)?;
        let change = self.balloon().without(range).ok_or(Failure::BalloonFull)?;
        self.tell_balloon(pages, Doorbell::Deflate, &change)
    }

    /// Has the VMM do its part, which is over when the doorbell is, then takes note.
    fn tell_balloon(&mut self, pages: Pages, doorbell: Doorbell, change: &Change) -> Result<Answer<'m>, Failure<'m>> {
        if pages.count == 0 {
            return Ok(Answer::Ballooned(self.balloon().held()));
        }
        let page = self.machine.balloon_page();
        page.first.store(pages.first, Relaxed);
        page.count.store(pages.count, Relaxed);
        page.held.store(change.held, Relaxed);
        page.state.store(BalloonState::Pending as u32, Release);
        self.machine.ring(doorbell);
        self.notice();
        match BalloonState::from_u32(page.state.load(Acquire)) {
            Some(BalloonState::Done) => {
                self.balloon().apply(change);
                Ok(Answer::Ballooned(change.held))
            }
            Some(BalloonState::Failed) => Err(Failure::NotTaken(pages)),
            Some(BalloonState::Pending) | None => Err(Failure::Unsupported),
        }
    }

    fn balloon(&self) -> Balloon<'m> {
        Balloon(self.machine.balloon_page())
    }

    fn gap(&mut self, ms: u64) -> Result<Answer<'m>, Failure<'m>> {
        let khz = self.machine.event_page().tsc_khz.load(Relaxed);
        if khz == 0 {
            return Err(Failure::NoClock);
        }
        let start = self.machine.tsc();
        let length = ms.saturating_mul(khz);
        let (mut last, mut longest) = (start, 0);
        while last.wrapping_sub(start) < length {
            self.notice();
            let now = self.machine.tsc();
            longest = longest.max(now.saturating_sub(last));
            last = now;
        }
        Ok(Answer::MaxGap(longest.saturating_mul(1000) / khz))
    }

    fn spin(&mut self, count: u64) -> Result<Answer<'m>, Failure<'m>> {
        for _ in 0..count {
            self.notice();
        }
        Ok(Answer::Done)
    }

    fn mem_pages(&self) -> u64 {
        self.machine.event_page().mem_pages.load(Relaxed)
    }

    /// The page numbers of `pages`, all of which must be free to be written.
    fn writable(&self, pages: Pages) -> Result<core::ops::Range<u64>, Failure<'m>> {
        let range = self.within(pages, FIRST_FREE_PAGE)?;
        match self.balloon().first_of(&range) {
            Some(page) => Err(Failure::InBalloon(page)),
            None => Ok(range),
        }
    }

    /// The page numbers of `pages`, all of which must be RAM from page `first` on.
    fn within(&self, pages: Pages, first: u64) -> Result<core::ops::Range<u64>, Failure<'m>> {
        let end = self.mem_pages();
        match pages.first.checked_add(pages.count) {
            Some(stop) if pages.first >= first && stop <= end => Ok(pages.first..stop),
            _ => Err(Failure::Outside { pages, first, end }),
        }
    }
}

impl Extent {
    const fn words(self) -> usize {
        match self {
            Self::Whole => PAGE_WORDS,
            Self::FirstWord => 1,
        }
    }
}
