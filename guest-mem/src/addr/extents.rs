//! Sorted lists of page ranges.

use crate::addr::{PageNumber, RangeOf};
use crate::steps::step;

/// The parts of sorted ranges that lie within `bounds`.
pub(crate) fn within<I: PageNumber>(ranges: &[RangeOf<I>], bounds: RangeOf<I>) -> impl Iterator<Item = RangeOf<I>> {
    let first = ranges.partition_point(move |range| range.end() <= bounds.start());
    ranges[first..]
        .iter()
        .take_while(move |range| range.start() < bounds.end())
        .map(move |range| range.intersect(bounds))
}

/// What sorted `ranges` have besides sorted `holes`.
pub(crate) fn without<I: PageNumber>(ranges: &[RangeOf<I>], holes: &[RangeOf<I>]) -> Vec<RangeOf<I>> {
    let (mut rest, mut holes) = (Vec::with_capacity(ranges.len()), holes);
    for range in ranges {
        holes = &holes[holes.iter().take_while(|hole| hole.end() <= range.start()).inspect(|_| step()).count()..];
        let mut start = range.start();
        for hole in holes.iter().take_while(|hole| hole.start() < range.end()) {
            rest.push(RangeOf::between(start, hole.start()));
            start = hole.end();
        }
        rest.push(RangeOf::between(start, range.end()));
    }
    rest.retain(|range| !range.is_empty());
    rest
}

/// All of two sorted lists, sorted.
pub(crate) fn merged<I: PageNumber>(one: &[RangeOf<I>], other: &[RangeOf<I>]) -> Vec<RangeOf<I>> {
    let mut all = [one, other].concat();
    if !one.is_empty() && !other.is_empty() {
        // Stable, it knows two sorted parts for what they are.
        all.sort_by_key(|range| range.start());
    }
    all
}

/// What lies in one of two sorted lists at least, sorted; ranges that overlap are one.
pub(crate) fn union<I: PageNumber>(one: &[RangeOf<I>], other: &[RangeOf<I>]) -> Vec<RangeOf<I>> {
    let mut all: Vec<RangeOf<I>> = Vec::with_capacity(one.len() + other.len());
    for pages in merged(one, other) {
        match all.last_mut() {
            Some(last) if pages.start() < last.end() => {
                *last = RangeOf::between(last.start(), last.end().max(pages.end()));
            }
            _ => all.push(pages),
        }
    }
    all
}

/// Appends `pages` to sorted ranges, joining it to the last where it continues that.
pub(crate) fn push<I: PageNumber>(ranges: &mut Vec<RangeOf<I>>, pages: RangeOf<I>) {
    match ranges.last_mut() {
        Some(last) if last.end() == pages.start() => *last = RangeOf::between(last.start(), pages.end()),
        _ => ranges.push(pages),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ranges;

    #[test]
    fn holes_may_lie_across_ranges_and_outside() {
        let all = ranges(&[(10, 20), (20, 30), (40, 50)]);
        assert_eq!(
            without(&all, &ranges(&[(0, 5), (12, 14), (18, 22), (35, 60)])),
            ranges(&[(10, 12), (14, 18), (22, 30)])
        );
        assert_eq!(without(&all, &[]), all);
        assert_eq!(without(&[], &all), []);
        assert_eq!(within(&all, (15..41).into()).collect::<Vec<_>>(), ranges(&[(15, 20), (20, 30), (40, 41)]));
    }

    #[test]
    fn what_overlaps_is_one_and_neighbours_stay_apart() {
        let (one, other) = (ranges(&[(0, 10), (20, 30), (40, 50)]), ranges(&[(5, 25), (30, 35), (60, 61)]));
        assert_eq!(union(&one, &other), ranges(&[(0, 30), (30, 35), (40, 50), (60, 61)]));
        assert_eq!(union(&one, &[]), one);
    }

    #[test]
    fn neighbours_are_joined() {
        let mut all = ranges(&[(1, 2)]);
        push(&mut all, (2..4).into());
        push(&mut all, (5..6).into());
        assert_eq!(all, ranges(&[(1, 4), (5, 6)]));
    }
}
