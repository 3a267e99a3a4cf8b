//! What a window has mapped.

use crate::addr::GfnRange;
use crate::ids::{Run, Source};
use rangemap::RangeMap;

/// The mappings of a window, at least as finely divided as the kernel's own.
///
/// `mremap` wants to be asked for one mapping at a time, so two runs that continue each other must not become one
/// entry: the kernel keeps them apart when each has private pages of its own. Every mapping call gets a number for that.
#[derive(Clone, Debug, Default)]
pub(super) struct RunMap {
    map: RangeMap<u64, RunMapping>,
    calls: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RunMapping {
    source: Source,
    call: u32,
}

impl RunMap {
    /// One call has mapped `pages`.
    pub fn mapped(&mut self, pages: GfnRange, source: Source) {
        self.calls = self.calls.wrapping_add(1);
        self.map.insert(pages.raw(), RunMapping { source, call: self.calls });
    }

    /// Nothing is mapped at `pages` any more.
    pub fn unmapped(&mut self, pages: GfnRange) {
        self.map.remove(pages.raw());
    }

    /// How many mappings there are, at most.
    pub fn count(&self) -> usize {
        self.map.len()
    }

    /// How many there will be, at most, when one call has mapped `pages`.
    pub fn count_with(&self, pages: GfnRange) -> usize {
        let replaced = self.map.overlapping(pages.raw()).count();
        let cut = |range: &std::ops::Range<u64>| {
            usize::from(range.start < pages.start().0) + usize::from(range.end > pages.end().0)
        };
        let left: usize = self.map.overlapping(pages.raw()).map(|(range, _)| cut(range)).sum();
        self.map.len() - replaced + left + 1
    }

    /// The mappings within `pages`, cut to them.
    pub fn within(&self, pages: GfnRange) -> impl Iterator<Item = (GfnRange, Source)> {
        self.map
            .overlapping(pages.raw())
            .map(move |(range, mapping)| (pages.intersect(range.clone().into()), mapping.source))
    }

    /// The runs, neighbours joined where one source supplies both.
    pub fn joined(&self) -> impl Iterator<Item = Run> {
        let mut entries = self.map.iter().peekable();
        std::iter::from_fn(move || {
            let (range, mapping) = entries.next()?;
            let mut end = range.end;
            while let Some((next, _)) =
                entries.next_if(|(next, more)| next.start == end && more.source == mapping.source)
            {
                end = next.end;
            }
            Some(Run { pages: (range.start..end).into(), source: mapping.source })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StoreId;
    use crate::{Gfn, PageCount, PageOrigin};

    fn range(start: u64, count: u64) -> GfnRange {
        GfnRange::new(Gfn(start), PageCount(count))
    }

    #[test]
    fn runs_that_continue_each_other_are_shown_as_one_and_kept_as_two() {
        let source = Source::Store { store: StoreId(1), origin: PageOrigin(0) };
        let mut runs = RunMap::default();
        runs.mapped(range(0, 4), source);
        runs.mapped(range(4, 4), source);
        runs.mapped(range(8, 4), Source::Anonymous);
        assert_eq!(runs.count(), 3);
        let joined: Vec<_> = runs.joined().collect();
        assert_eq!(joined[0], Run { pages: range(0, 8), source });
        assert_eq!(joined.len(), 2);
        assert_eq!([range(5, 1), range(4, 4), range(2, 7)].map(|pages| runs.count_with(pages)), [5, 3, 3]);
        let cut: Vec<_> = runs.within(range(2, 4)).collect();
        assert_eq!(cut, [(range(2, 2), source), (range(4, 2), source)]);
    }
}
