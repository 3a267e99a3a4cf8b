//! What a window maps otherwise than its stage-2 tables say.

use crate::addr::page_map::PageMap;
use crate::addr::{Distance, Gfn, GfnRange};
use crate::ids::{Run, Source};
use crate::space::runs::{Runs, among, outside, over};

/// Where a window does not map what stage-2 shows, and what it maps there instead. Stage-2 alone says what a VM *sees*, so
/// nothing is in here that a guest could tell from it. What is in here is one of three:
///
/// * A **kept copy**: a frozen page of which the window has a private copy, over what it mapped before the freeze. It never
///   traps. The freeze that copied the page puts it in; one that moves it, a dedup and a balloon take it out. No child
///   inherits it: children map the store that stage-2 shows.
/// * A **bridge**: stage-2 shows zeros, and the window maps the store of the pages around them, which has a hole there.
/// * A **zero run**: stage-2 shows a store, all pages there have turned out zero, and the window is anonymous.
///
/// The fork that makes a window puts bridges and zero runs in, the same for all children of a freeze; they are one list
/// that all of them hold until one has another.
/// Whatever has a window map what stage-2 shows takes them out: a freeze, a balloon, a dedup. A page is in one of the three at
/// most: where a copy is kept, it is its entry that knows what lies beneath.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    /// Kept copies, and what the window maps beneath them.
    pub(crate) kept: PageMap<Gfn, Source>,
    /// Bridges and zero runs.
    pub(crate) zeros: Runs,
}

impl Overlay {
    /// That of a new window, with these bridges and zero runs.
    pub fn new(zeros: Runs) -> Self {
        Self { zeros, ..Self::default() }
    }

    /// What the window maps at `pages`, where stage-2 shows this.
    pub fn mapped(&self, shown: &[Run], pages: GfnRange) -> Vec<Run> {
        let kept = self.kept.within(pages).map(|(pages, source)| Run { pages, source });
        over(&over(shown, among(&self.zeros, pages)), kept)
    }

    /// What it has in place of what stage-2 shows.
    pub fn sources(&self) -> impl Iterator<Item = Source> {
        self.kept.iter().map(|(_, source)| source).chain(self.zeros.iter().map(|run| run.source))
    }

    /// The window keeps copies of `pages`, which it did not, over what it maps there. Stage-2 showed `before` there until now.
    pub fn keep(&mut self, pages: &[GfnRange], before: &[Run]) {
        let beneath = over(before, pages.iter().flat_map(|&pages| among(&self.zeros, pages)));
        for runs in beneath.chunk_by(|a, b| a.source == b.source) {
            self.kept.insert(runs.iter().map(|run| run.pages), runs[0].source);
        }
        self.take_out(pages);
    }

    /// The window maps what stage-2 shows at `pages` (sorted).
    pub fn uncover(&mut self, pages: &[GfnRange]) {
        pages.iter().for_each(|&pages| self.kept.remove(pages));
        self.take_out(pages);
    }

    /// What the window maps otherwise at `pages` it does so at where they have moved to, and nothing there any more.
    pub fn move_pages(&mut self, pages: GfnRange, by: Distance) {
        let kept: Vec<(GfnRange, Source)> = self.kept.within(pages).collect();
        self.kept.remove(pages);
        for (part, source) in kept {
            self.kept.insert([part.moved(by)], source.moved(by));
        }
        let zeros: Vec<Run> = among(&self.zeros, pages).map(|run| run.moved(by)).collect();
        if !zeros.is_empty() {
            self.zeros = over(&outside(&self.zeros, &[pages]), zeros).into();
        }
    }

    fn take_out(&mut self, pages: &[GfnRange]) {
        if pages.iter().any(|&pages| among(&self.zeros, pages).next().is_some()) {
            self.zeros = outside(&self.zeros, pages).into();
        }
    }
}

/// What the window of a child would map that is forked now. Made by the first fork, or by who prepares for it, and shared by
/// all children up to the parent's next change.
#[derive(Clone, Debug)]
pub(crate) struct NewWindow {
    pub(crate) runs: Runs,
    /// Where they are not what stage-2 shows.
    pub(crate) zeros: Runs,
    /// It holds as long as these are the same: how often stores have lost what was to be mapped from them, and the most
    /// runs that a window may have.
    pub(crate) made_for: (u64, usize),
}
