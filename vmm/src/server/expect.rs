//! What prepared processes are told to expect: the window and the registers of the next child of the VM that is forked
//! again and again.
//!
//! All this takes as long as all else that a prepared process does before its first instruction. So it is done while there
//! is time; at the fork only what has changed since is mapped, over it, and set. Nobody touches such a window, not even to
//! copy what the child will most likely write: the page may have left its store by then, and nobody answers the trap of a
//! process that is no VM yet. Whoever frees pages of a store punches them out, so that it keeps none of them in memory.

use super::Server;
use super::launch::stores_of;
use super::process::{Parcel, ProcessId};
use super::vm::{FamilyId, Generation};
use crate::machine::state::PackedState;
use crate::wire::{Expect, Shape, ToVm};
use guest_mem::{Run, Source};
use rangemap::RangeMap;
use std::rc::Rc;

/// What a process expects.
#[derive(Debug, Default)]
pub struct Expectation {
    /// Whose child it expects to become.
    pub parent: Option<Generation>,
    /// What it has mapped, and of which family the stores are: others have stores of the same names.
    window: Option<(FamilyId, RangeMap<u64, Source>)>,
    /// The state that it has ready.
    state: Option<Rc<PackedState>>,
}

impl Expectation {
    fn new(parent: Generation, family: FamilyId, runs: &[Run]) -> Self {
        let runs = runs.iter().map(|run| (run.pages.raw(), run.source)).collect();
        Self { parent: Some(parent), window: Some((family, runs)), ..Self::default() }
    }

    /// The process is about to become a child of somebody: its window is another from now on.
    pub fn forget_window(&mut self) {
        self.window = None;
    }

    /// The state that it has ready, when it gets one.
    pub fn take_state(&mut self) -> Option<Rc<PackedState>> {
        self.state.take()
    }

    /// Those parts of `runs` of a member of `family` that are to be mapped: they are not as expected.
    pub fn news(&self, family: FamilyId, runs: impl Iterator<Item = Run>) -> Vec<Run> {
        let Some((_, expected)) = self.window.as_ref().filter(|(of, _)| *of == family) else { return runs.collect() };
        let mut news = Vec::new();
        for Run { pages, source } in runs {
            let mut add = |range: std::ops::Range<u64>| {
                if !range.is_empty() {
                    news.push(Run { pages: range.into(), source });
                }
            };
            let pages = pages.raw();
            let mut at = pages.start;
            for (there, _) in expected.overlapping(&pages).filter(|(_, there)| **there == source) {
                add(at..there.start);
                at = there.end;
            }
            add(at..pages.end);
        }
        news
    }
}

/// Which VM of a shape is forked again and again, if one is.
#[derive(Debug, Default)]
pub struct Favourite {
    last: Option<Generation>,
    /// It was forked at least twice in a row.
    again: bool,
    /// What its children started from when it was last forked.
    state: Option<Rc<PackedState>>,
}

impl Favourite {
    /// `parent` is forked.
    pub fn forked(&mut self, parent: Generation) {
        self.again = self.last.replace(parent) == Some(parent);
        if !self.again {
            self.state = None;
        }
    }

    /// Children of `parent` start from this.
    pub fn saved(&mut self, parent: Generation, state: PackedState) {
        if self.get() == Some(parent) && self.state.as_deref() != Some(&state) {
            self.state = Some(Rc::new(state));
        }
    }

    /// What children of the VM have started from last, if that is known.
    pub fn state(&self) -> Option<Rc<PackedState>> {
        self.state.clone()
    }

    /// Whose child prepared processes are to expect. A wrong guess costs the child that suffers it more than a right one
    /// gains: where parents take turns there is none.
    pub fn get(&self) -> Option<Generation> {
        self.last.filter(|_| self.again)
    }
}

impl Server {
    /// Tells one prepared process what to expect, if there is one that does not. Whether there was.
    pub(super) fn tell_what_to_expect(&mut self) -> bool {
        let untold = |(shape, parent): (Shape, Generation)| {
            let other = |id: &ProcessId| self.processes[id].expectation.parent != Some(parent);
            self.pool.ready(shape).find(other).map(|process| (shape, parent, process))
        };
        let Some((shape, parent, process)) = self.pool.favourites().find_map(untold) else { return false };
        self.expect(shape, parent, process);
        true
    }

    fn expect(&mut self, shape: Shape, parent: Generation, process: ProcessId) {
        let memory = self.vms.get(parent).and_then(|parent| parent.memory);
        let process = self.processes.get_mut(&process).expect("a process of the pool");
        let before =
            std::mem::replace(&mut process.expectation, Expectation { parent: Some(parent), ..Expectation::default() });
        let Some((family, member)) = memory else { return };
        let manager = &self.families[&family];
        let runs = manager.runs_of_child(member);
        let news = before.news(family, runs.iter().copied());
        // Where descriptors are short, it expects nothing.
        if let Ok((stores, descriptors)) = stores_of(manager, &news) {
            let state = self.pool.state_to_expect(shape);
            process.expectation = Expectation { state: state.clone(), ..Expectation::new(parent, family, &runs) };
            let expect = Expect { runs: news, stores, state: state.as_deref().cloned() };
            process.send_when_ready(Parcel { message: ToVm::Expect(Box::new(expect)), descriptors });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_mem::{Gfn, StoreId};

    const PARENT: Generation = Generation(7);
    const FAMILY: FamilyId = FamilyId(3);

    fn store(id: u32) -> Source {
        Source::Store { store: StoreId(id), origin: Gfn(0) }
    }

    fn runs(raw: &[(u64, u64, Source)]) -> Vec<Run> {
        raw.iter().map(|&(start, end, source)| Run { pages: (start..end).into(), source }).collect()
    }

    #[test]
    fn only_what_has_changed_is_mapped_again() {
        let before = runs(&[(0, 10, Source::Anonymous), (10, 100, store(1)), (200, 300, store(1))]);
        let expectation = Expectation::new(PARENT, FAMILY, &before);
        assert_eq!(expectation.news(FAMILY, before.iter().copied()), []);
        // A freeze has put a store in the middle of another, and zeros were found at the end.
        let after = [
            (0, 10, Source::Anonymous),
            (10, 40, store(1)),
            (40, 50, store(2)),
            (50, 100, store(1)),
            (200, 290, store(1)),
            (290, 300, Source::Anonymous),
        ];
        let news = expectation.news(FAMILY, runs(&after).into_iter());
        assert_eq!(news, runs(&[(40, 50, store(2)), (290, 300, Source::Anonymous)]));
        // The runs of now may be longer than those of then.
        let joined = runs(&[(0, 10, Source::Anonymous), (10, 300, store(1))]);
        assert_eq!(expectation.news(FAMILY, joined.into_iter()), runs(&[(100, 200, store(1))]));
    }

    #[test]
    fn who_expects_nothing_maps_everything() {
        let all = runs(&[(0, 10, Source::Anonymous), (10, 100, store(1))]);
        assert_eq!(Expectation::default().news(FAMILY, all.iter().copied()), all);
    }

    /// Two families had a store of the same name, and a child of one got the pages of the other.
    #[test]
    fn stores_of_another_family_are_others() {
        let all = runs(&[(0, 10, Source::Anonymous), (10, 100, store(1))]);
        let expectation = Expectation::new(PARENT, FAMILY, &all);
        assert_eq!(expectation.news(FamilyId(4), all.iter().copied()), all);
    }

    #[test]
    fn parents_that_take_turns_have_no_favourite_among_them() {
        let mut favourite = Favourite::default();
        favourite.forked(Generation(1));
        assert_eq!(favourite.get(), None);
        favourite.forked(Generation(1));
        assert_eq!(favourite.get(), Some(Generation(1)));
        favourite.forked(Generation(2));
        favourite.forked(Generation(1));
        assert_eq!(favourite.get(), None);
    }
}
