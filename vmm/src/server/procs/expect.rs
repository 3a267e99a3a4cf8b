//! What prepared processes are told to expect: the window and the registers of the next child of the VM that is forked
//! again and again, and copies of what it will most likely write, touched, so that KVM has mapped them.
//!
//! All this takes as long as all else that a prepared process does before its first instruction. So it is done while there
//! is time; at the fork only what has changed since is mapped, over it, and set. Nobody else touches such a window, and
//! whoever frees pages of a store punches them out, so that it keeps none of them in memory but its copies, which count as
//! any other memory of a prepared process.
//!
//! Whoever is told of a VM has mapped its memory and has its registers, and both may be a hostile process's work. It becomes
//! that VM's child, or ends: it expects nothing else afterwards, and nobody else gets it.
//!
//! A page may leave its store before it is copied: the process then waits for it, and nobody can say what it should get,
//! for it is no VM yet. So it is out of the pool until it has said that it is done, and ends if it waits for a page.

use crate::machine::state::PackedState;
use crate::server::ids::{FamilyId, Generation};
use crate::wire::Machine;
use firmware::abi::EVENT_PAGE;
use guest_mem::space::runs::{Runs, changed};
use guest_mem::{GfnRange, PAGE_SIZE, Run, Source};
use rangemap::RangeSet;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// What a process expects.
#[derive(Debug, Default)]
pub struct Expectation {
    /// Whose child it expects to become.
    pub parent: Option<Generation>,
    /// What it has mapped, and of which family the stores are: others have stores of the same names.
    window: Option<(FamilyId, Runs)>,
    /// Pages of that of which it has copies.
    ahead: RangeSet<u64>,
    /// The state that it has ready.
    state: Option<Rc<PackedState>>,
}

impl Expectation {
    /// To become a child of this VM, of which it has nothing yet.
    pub fn of(parent: Generation) -> Self {
        Self { parent: Some(parent), ..Self::default() }
    }

    /// To have these runs of a family mapped, copies of these of their pages, and this state.
    pub fn with(self, (family, runs): (FamilyId, Runs), ahead: &[GfnRange], state: Option<Rc<PackedState>>) -> Self {
        let ahead = ahead.iter().map(|pages| pages.raw()).collect();
        Self { window: Some((family, runs)), ahead, state, ..self }
    }

    /// The process is about to become a child of somebody: its window is another from now on.
    pub fn forget_window(&mut self) {
        self.window = None;
        self.ahead = RangeSet::new();
    }

    /// Those of the pages `ahead` of which it has no copy any more once `news` are mapped.
    pub fn left_ahead(&self, ahead: &[GfnRange], news: &[Run]) -> Vec<GfnRange> {
        let mut has = self.ahead.clone();
        news.iter().for_each(|run| has.remove(run.pages.raw()));
        ahead.iter().flat_map(|pages| has.gaps(&pages.raw()).map(GfnRange::from).collect::<Vec<_>>()).collect()
    }

    /// The state that it has ready, when it gets one.
    pub fn take_state(&mut self) -> Option<Rc<PackedState>> {
        self.state.take()
    }

    /// Those parts of `runs` of a member of `family` that are to be mapped: they are not as expected.
    pub fn news(&self, family: FamilyId, runs: &Runs) -> Vec<Run> {
        match self.window.as_ref().filter(|(of, _)| *of == family) {
            None => runs.to_vec(),
            // Mostly nothing has changed, and its parent's children still share the one list.
            Some((_, expected)) if Arc::ptr_eq(runs, expected) => Vec::new(),
            Some((_, expected)) => changed(runs, expected),
        }
    }
}

/// Which of processes that expect to become children of `expected` may become a child of `parent`, or of nobody: best one
/// that expects just that, else one that has seen no VM at all.
pub fn fitting(
    expected: impl Iterator<Item = Option<Generation>> + Clone,
    parent: Option<Generation>,
) -> Option<usize> {
    let find = |wanted| expected.clone().position(|expects| expects == wanted);
    find(parent).or_else(|| find(None))
}

/// Which VMs of a shape are forked again and again: each has a prepared process that expects to become its child.
#[derive(Debug, Default)]
pub struct Favourites {
    /// The parents of the last forks, the last one first.
    forks: VecDeque<Generation>,
    /// What their children started from when they were last forked.
    states: BTreeMap<Generation, Rc<PackedState>>,
}

impl Favourites {
    /// Forks that are looked back upon.
    const FORKS: usize = 32;
    /// There are no more of them than this.
    const MOST: usize = 8;

    /// `parent` is forked.
    pub fn forked(&mut self, parent: Generation) {
        self.forks.push_front(parent);
        self.forks.truncate(Self::FORKS);
    }

    /// Forgets VMs that are gone.
    pub fn retain(&mut self, lives: impl Fn(Generation) -> bool) {
        let Self { forks, states } = self;
        forks.retain(|&parent| lives(parent));
        states.retain(|parent, _| forks.contains(parent));
    }

    /// Children of `parent` start from this.
    pub fn saved(&mut self, parent: Generation, state: PackedState) {
        if self.is_one(parent) && self.states.get(&parent).is_none_or(|before| **before != state) {
            self.states.insert(parent, Rc::new(state));
        }
    }

    /// What children of the VM have started from last, if that is known.
    pub fn state(&self, parent: Generation) -> Option<Rc<PackedState>> {
        self.states.get(&parent).cloned()
    }

    /// Those that were forked more than once lately, the last one first. A wrong guess costs the child that suffers it more
    /// than a right one gains: who was forked once is none, and where too many take turns there are none.
    pub fn all(&self) -> Vec<Generation> {
        let mut all = Vec::new();
        for &parent in &self.forks {
            if !all.contains(&parent) && self.is_one(parent) {
                all.push(parent);
            }
        }
        all.truncate(if all.len() > Self::MOST { 0 } else { Self::MOST });
        all
    }

    fn is_one(&self, parent: Generation) -> bool {
        self.forks.iter().filter(|&&forked| forked == parent).count() > 1
    }

    /// Which of processes that expect to become children of `expected` is to expect a parent, and which: one that expects
    /// nothing yet, and if each has its own, not the last such.
    pub fn to_tell(&self, expected: &[Option<Generation>]) -> Option<(usize, Generation)> {
        let all = self.all();
        let mut free = (0..expected.len()).filter(|&at| expected[at].is_none());
        let (first, spare) = (free.next()?, free.next());
        let missing = all.iter().find(|&&parent| !expected.contains(&Some(parent)));
        missing.or_else(|| spare.and(all.first())).map(|&parent| (first, parent))
    }
}

/// All runs but those of shared memory: who is no VM yet is not given what it could write.
pub fn without_shared(runs: Runs) -> Runs {
    let is_own = |run: &Run| !matches!(run.source, Source::Shared { .. });
    if runs.iter().all(is_own) { runs } else { runs.iter().copied().filter(is_own).collect() }
}

/// The page that every child is written to before it runs.
pub fn told_first(machine: Machine) -> Option<GfnRange> {
    let page = EVENT_PAGE / PAGE_SIZE as u64;
    (machine == Machine::Monitor).then(|| (page..page + 1).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_mem::{PageOrigin, StoreId};

    const PARENT: Generation = Generation(7);
    const FAMILY: FamilyId = FamilyId(3);

    fn store(id: u32) -> Source {
        Source::Store { store: StoreId(id), origin: PageOrigin(0) }
    }

    fn runs(raw: &[(u64, u64, Source)]) -> Runs {
        raw.iter().map(|&(start, end, source)| Run { pages: (start..end).into(), source }).collect()
    }

    #[test]
    fn only_what_has_changed_is_mapped_again() {
        let before = runs(&[(0, 10, Source::Anonymous), (10, 100, store(1)), (200, 300, store(1))]);
        let expectation = Expectation::of(PARENT).with((FAMILY, before.clone()), &[], None);
        assert_eq!(expectation.news(FAMILY, &before), []);
        // A freeze has put a store in the middle of another, and zeros were found at the end.
        let after = [
            (0, 10, Source::Anonymous),
            (10, 40, store(1)),
            (40, 50, store(2)),
            (50, 100, store(1)),
            (200, 290, store(1)),
            (290, 300, Source::Anonymous),
        ];
        let news = expectation.news(FAMILY, &runs(&after));
        assert_eq!(news[..], runs(&[(40, 50, store(2)), (290, 300, Source::Anonymous)])[..]);
        // The runs of now may be longer than those of then.
        let joined = runs(&[(0, 10, Source::Anonymous), (10, 300, store(1))]);
        assert_eq!(expectation.news(FAMILY, &joined)[..], runs(&[(100, 200, store(1))])[..]);
    }

    #[test]
    fn copies_that_are_mapped_over_are_made_again() {
        let pages = |raw: &[(u64, u64)]| raw.iter().map(|&(start, end)| (start..end).into()).collect::<Vec<GfnRange>>();
        let before = Expectation::of(PARENT).with((FAMILY, runs(&[(0, 100, store(1))])), &[], None);
        let expectation = Expectation { ahead: [10..20, 50..60].into_iter().collect(), ..before };
        let ahead = pages(&[(10, 20), (55, 70)]);
        assert_eq!(expectation.left_ahead(&ahead, &[]), pages(&[(60, 70)]));
        let news = runs(&[(12, 14, store(2)), (30, 40, store(2))]);
        assert_eq!(expectation.left_ahead(&ahead, &news), pages(&[(12, 14), (60, 70)]));
        assert_eq!(Expectation::default().left_ahead(&ahead, &[]), ahead);
    }

    #[test]
    fn who_expects_nothing_maps_everything() {
        let all = runs(&[(0, 10, Source::Anonymous), (10, 100, store(1))]);
        assert_eq!(Expectation::default().news(FAMILY, &all)[..], all[..]);
    }

    /// Two families had a store of the same name, and a child of one got the pages of the other.
    #[test]
    fn stores_of_another_family_are_others() {
        let all = runs(&[(0, 10, Source::Anonymous), (10, 100, store(1))]);
        let expectation = Expectation::of(PARENT).with((FAMILY, all.clone()), &[], None);
        assert_eq!(expectation.news(FamilyId(4), &all)[..], all[..]);
    }

    #[test]
    fn who_is_forked_more_than_once_is_a_favourite() {
        let [one, two, three] = [1, 2, 3].map(Generation);
        let mut favourites = Favourites::default();
        favourites.forked(one);
        assert_eq!(favourites.all(), []);
        favourites.forked(one);
        favourites.forked(two);
        assert_eq!(favourites.all(), [one]);
        favourites.forked(two);
        assert_eq!(favourites.all(), [two, one]);
        (0..Favourites::FORKS).for_each(|_| favourites.forked(three));
        assert_eq!(favourites.all(), [three]);
        for parent in 10..30 {
            favourites.forked(Generation(parent));
            favourites.forked(Generation(parent));
        }
        assert_eq!(favourites.all(), []);
    }

    #[test]
    fn each_favourite_has_a_process_that_expects_it() {
        let [one, two, gone] = [1, 2, 9].map(Generation);
        let mut favourites = Favourites::default();
        assert_eq!(favourites.to_tell(&[None, Some(gone)]), None);
        [one, one, two, two].into_iter().for_each(|parent| favourites.forked(parent));
        assert_eq!(favourites.to_tell(&[None, None]), Some((0, two)));
        assert_eq!(favourites.to_tell(&[Some(two), None]), Some((1, one)));
        assert_eq!(favourites.to_tell(&[Some(two), Some(one), None, None]), Some((2, two)));
        assert_eq!(favourites.to_tell(&[Some(two), Some(one), Some(two), None]), None, "one is for everybody else");
        assert_eq!(favourites.to_tell(&[]), None);
    }

    /// What a hostile VM had prepared processes expect was in them still when they became VMs of other families.
    #[test]
    fn who_was_told_of_a_vm_is_nobody_elses() {
        let [one, two, gone] = [1, 2, 9].map(Generation);
        let mut favourites = Favourites::default();
        [one, one, two, two].into_iter().for_each(|parent| favourites.forked(parent));
        assert_eq!(favourites.to_tell(&[Some(two), Some(gone)]), None);
        assert_eq!(favourites.to_tell(&[Some(two), Some(two)]), None);
        let fitting = |expected: &[_], parent| fitting(expected.iter().copied(), parent);
        assert_eq!(fitting(&[Some(one), Some(two)], Some(two)), Some(1));
        assert_eq!(fitting(&[Some(one), None], Some(two)), Some(1));
        assert_eq!(fitting(&[Some(one), None], None), Some(1));
        assert_eq!(fitting(&[Some(one)], Some(two)), None);
        assert_eq!(fitting(&[Some(one)], None), None);
    }
}
