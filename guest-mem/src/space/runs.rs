//! Sorted lists of runs, apart from each other: all of these go once over what they are given.

use crate::addr::extents::without;
use crate::addr::{Gfn, GfnRange};
use crate::ids::Run;
use crate::steps::step;
use std::sync::Arc;

/// A list of runs that many hold and nobody changes: who needs another makes another.
pub type Runs = Arc<[Run]>;

/// Both lists as one; where they meet, `top` holds.
pub(crate) fn over(base: &[Run], top: impl IntoIterator<Item = Run>) -> Vec<Run> {
    let mut runs = Vec::with_capacity(base.len());
    let mut base = base.iter().copied();
    let mut next = base.next();
    for run in top {
        while let Some(below) = next.filter(|below| below.pages.start() < run.pages.end()) {
            let before = GfnRange::between(below.pages.start(), below.pages.end().min(run.pages.start()));
            push_run(&mut runs, Run { pages: before, ..below });
            let after = GfnRange::between(below.pages.start().max(run.pages.end()), below.pages.end());
            next = if after.is_empty() { base.next() } else { Some(Run { pages: after, ..below }) };
        }
        push_run(&mut runs, run);
    }
    next.into_iter().chain(base).for_each(|run| push_run(&mut runs, run));
    runs
}

/// The parts of `runs` that lie in none of `pages`.
pub(crate) fn outside(runs: &[Run], pages: &[GfnRange]) -> Vec<Run> {
    let (mut parts, mut holes) = (Vec::with_capacity(runs.len()), pages);
    for run in runs {
        holes = &holes[holes.iter().take_while(|hole| hole.end() <= run.pages.start()).count()..];
        let left = without(&[run.pages], holes).into_iter();
        left.for_each(|pages| push_run(&mut parts, Run { pages, ..*run }));
    }
    parts
}

/// The part of `runs` that lies in `pages`, found without a look at all of them.
pub(crate) fn among(runs: &[Run], pages: GfnRange) -> impl Iterator<Item = Run> {
    let first = runs.partition_point(|run| run.pages.end() <= pages.start());
    let touched = runs[first..].iter().take_while(move |run| run.pages.start() < pages.end());
    touched.map(move |run| Run { pages: run.pages.intersect(pages), ..*run })
}

/// What `runs` say otherwise than `before` did.
pub fn changed(runs: &[Run], before: &[Run]) -> Vec<Run> {
    let (mut news, mut before) = (Vec::new(), before);
    for run in runs {
        let mut add = |from: Gfn, to: Gfn| push_run(&mut news, Run { pages: GfnRange::between(from, to), ..*run });
        before = &before[before.iter().take_while(|there| there.pages.end() <= run.pages.start()).count()..];
        let mut at = run.pages.start();
        for there in before.iter().take_while(|there| there.pages.start() < run.pages.end()) {
            if there.source == run.source {
                add(at, there.pages.start());
                at = there.pages.end();
            }
        }
        add(at, run.pages.end());
    }
    news
}

/// Appends a run, as one with the last where it continues it.
pub(crate) fn push_run(runs: &mut Vec<Run>, run: Run) {
    step();
    match runs.last_mut() {
        _ if run.pages.is_empty() => {}
        Some(last) if last.pages.end() == run.pages.start() && last.source == run.source => {
            last.pages = GfnRange::between(last.pages.start(), run.pages.end());
        }
        _ => runs.push(run),
    }
}

/// Makes runs of one source and neighbouring frames one, whatever order they came in.
pub(crate) fn merge_runs(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.pages.start());
    let mut merged = Vec::with_capacity(runs.len());
    for run in runs {
        push_run(&mut merged, run);
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PageOrigin;
    use crate::ids::{Source, StoreId};

    const PAGES: u64 = 120;

    fn source(store: u64) -> Source {
        match store {
            0 => Source::Anonymous,
            id => Source::Store { store: StoreId(id as u32), origin: PageOrigin(0) },
        }
    }

    type Pages = [Option<Source>; PAGES as usize];

    fn listed(pages: &Pages) -> Vec<Run> {
        let mut runs = Vec::new();
        for (gfn, source) in (0..).zip(pages) {
            if let Some(source) = *source {
                push_run(&mut runs, Run { pages: (gfn..gfn + 1).into(), source });
            }
        }
        runs
    }

    /// For many pseudo-random lists: what a look at each page tells.
    #[test]
    fn lists_are_what_arrays_of_sources_would_be() {
        let mut random = crate::testing::numbers();
        let mut list = |most: u64| {
            let mut pages: Pages = [None; PAGES as usize];
            for _ in 0..random(most) {
                let start = random(PAGES);
                let end = (start + 1 + random(20)).min(PAGES);
                pages[start as usize..end as usize].fill((random(4) > 0).then(|| source(random(3))));
            }
            pages
        };
        for _ in 0..2000 {
            let (base, top) = (list(9), list(9));
            let both = |pick: fn(Option<Source>, Option<Source>) -> Option<Source>| -> Pages {
                std::array::from_fn(|at| pick(base[at], top[at]))
            };
            let (runs, others) = (listed(&base), listed(&top));
            let ranges: Vec<GfnRange> = others.iter().map(|run| run.pages).collect();
            assert_eq!(over(&runs, others.iter().copied()), listed(&both(|base, top| top.or(base))));
            assert_eq!(outside(&runs, &ranges), listed(&both(|base, top| if top.is_some() { None } else { base })));
            assert_eq!(changed(&runs, &others), listed(&both(|base, top| base.filter(|_| base != top))));
            let mut part = [None; PAGES as usize];
            part[30..70].copy_from_slice(&base[30..70]);
            assert_eq!(among(&runs, (30..70).into()).collect::<Vec<_>>(), listed(&part));
        }
    }
}
