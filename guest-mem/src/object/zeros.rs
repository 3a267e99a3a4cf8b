//! Pages that were bound for a store and have turned out zero.

use crate::addr::{PageCount, PageRange};
use rangemap::RangeSet;

/// Zero pages are supplied together with all others around, of so many pages (2 MiB). Whoever has fewer in a row waits once
/// for them, which costs less than mappings of their own in every window.
pub(crate) const ZERO_CLUSTER: PageCount = PageCount(512);

/// Pages of a store that are zero for whoever sees them there, for good, and take no storage.
#[derive(Debug, Default)]
pub(crate) struct ZeroRuns {
    all: RangeSet<u64>,
    /// Those stretches among them that are worth a mapping of their own: who forks looks at no others.
    long: RangeSet<u64>,
}

impl ZeroRuns {
    /// These pages are zero. Whether a long stretch is one, or longer, by that.
    pub fn add(&mut self, pages: PageRange) -> bool {
        self.all.insert(pages.raw());
        let stretch = self.all.get(&pages.start().0).expect("just put in").clone();
        let is_long = stretch.end - stretch.start >= ZERO_CLUSTER.0;
        if is_long {
            self.long.insert(stretch);
        }
        is_long
    }

    /// Long stretches among `pages`.
    pub fn long(&self, pages: PageRange) -> impl Iterator<Item = PageRange> {
        let stretches = self.long.overlapping(pages.raw()).map(move |run| pages.intersect(run.clone().into()));
        stretches.filter(|run| run.count() >= ZERO_CLUSTER)
    }

    /// Whether all of `pages` are zero.
    pub fn covers(&self, pages: PageRange) -> bool {
        self.all.gaps(&pages.raw()).next().is_none()
    }
}
