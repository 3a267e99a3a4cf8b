//! What clients, and forks, do not wait for any longer than until then.

use crate::server::ids::{ClientId, ForkId, Generation};
use std::time::{Duration, Instant};

/// Something that nobody waits for any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// The answer to its line.
    Answer(Generation, u64, ClientId),
    /// A VM's end.
    End(Generation, ClientId),
    /// The size of its balloon.
    Balloon(Generation, ClientId),
    /// What its guest says of its memory.
    Stats(Generation, ClientId),
    /// What its guest tells of free pages, for this fork.
    Hint(Generation, ForkId),
    /// The guest's answer to a connection, by its tag.
    Connect(Generation, u64),
    /// A VM's end, which is the server's doing then.
    TimeToLive(Generation),
}

impl Deadline {
    /// The VM that it is about.
    pub fn vm(&self) -> Generation {
        match *self {
            Self::Answer(vm, ..) | Self::End(vm, _) | Self::Balloon(vm, _) | Self::Stats(vm, _) => vm,
            Self::Hint(vm, _) | Self::Connect(vm, _) | Self::TimeToLive(vm) => vm,
        }
    }

    /// Whether it is for the answer to this line.
    fn is_of_line(&self, vm: Generation, line: u64) -> bool {
        matches!(*self, Self::Answer(of, tag, _) if (of, tag) == (vm, line))
    }
}

/// All of them: as many as there is somebody who waits.
#[derive(Debug, Default)]
pub struct Deadlines(Vec<(Instant, Deadline)>);

impl Deadlines {
    /// So long somebody waits from now on; for ever, where that is not said, or longer than there are clocks.
    pub fn set(&mut self, now: Instant, timeout_ms: Option<u64>, deadline: Deadline) {
        let at = timeout_ms.and_then(|ms| now.checked_add(Duration::from_millis(ms)));
        self.0.extend(at.map(|at| (at, deadline)));
    }

    /// Nobody waits for this any longer then.
    pub fn set_at(&mut self, at: Instant, deadline: Deadline) {
        self.0.push((at, deadline));
    }

    /// What was waited for has come.
    pub fn met(&mut self, what: Deadline) {
        self.0.retain(|(_, deadline)| *deadline != what);
    }

    /// The answer to a line has come.
    pub fn line_answered(&mut self, vm: Generation, line: u64) {
        self.0.retain(|(_, deadline)| !deadline.is_of_line(vm, line));
    }

    /// A VM has ended, and those who waited have been told.
    pub fn forget(&mut self, vm: Generation) {
        self.0.retain(|(_, deadline)| deadline.vm() != vm);
    }

    /// Those that have passed, once.
    pub fn passed(&mut self, now: Instant) -> Vec<Deadline> {
        self.0.extract_if(.., |(at, _)| *at <= now).map(|(_, what)| what).collect()
    }

    /// When the next one passes.
    pub fn next(&self) -> Option<Instant> {
        self.0.iter().map(|(at, _)| *at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Generation = Generation(1);
    const B: Generation = Generation(2);

    #[test]
    fn a_deadline_passes_once_and_not_if_it_was_met() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut deadlines = Deadlines::default();
        let line = |tag| Deadline::Answer(A, tag, ClientId(1));
        deadlines.set(start, Some(10), line(1));
        deadlines.set(start, Some(20), line(2));
        deadlines.set(start, Some(30), Deadline::End(B, ClientId(2)));
        deadlines.set(start, None, Deadline::End(A, ClientId(3)));
        deadlines.set(start, Some(u64::MAX), Deadline::Balloon(A, ClientId(3)));
        assert_eq!(deadlines.next(), Some(at(10)));
        assert_eq!(deadlines.passed(at(9)), []);
        deadlines.line_answered(A, 1);
        deadlines.line_answered(B, 2);
        assert_eq!(deadlines.passed(at(25)), [line(2)]);
        assert_eq!(deadlines.passed(at(25)), []);
        deadlines.met(Deadline::End(B, ClientId(1)));
        assert_eq!(deadlines.next(), Some(at(30)), "somebody else waits for that");
        deadlines.met(Deadline::End(B, ClientId(2)));
        assert!(deadlines.next().is_none_or(|next| next > at(1 << 40)), "hardly ever");
    }

    #[test]
    fn nobody_waits_for_a_vm_that_has_ended() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.set(start, Some(10), Deadline::Hint(A, ForkId(1)));
        deadlines.set(start, Some(10), Deadline::Stats(B, ClientId(1)));
        deadlines.forget(A);
        assert_eq!(deadlines.passed(start + Duration::from_secs(1)), [Deadline::Stats(B, ClientId(1))]);
    }
}
