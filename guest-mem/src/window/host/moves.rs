//! Which stretches a freeze moves, and which it copies.

use crate::addr::GfnRange;
use serde::{Deserialize, Serialize};

/// The longest stretch that is copied: a move of any length takes as long as a copy of some eight pages, then traps who
/// touches it, and cuts the window's mappings.
pub(super) const SHORT: u64 = 16;
/// Pages that one freeze copies at most (64 MiB): as long as they stay in the window, they are in memory twice.
pub(super) const COPIED_MOST: u64 = 16 << 10;

/// What becomes of dirty private pages while their short stretches may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SmallExtents {
    /// They are copied, and stay in the window.
    CopyInPlace,
    /// They are moved like all.
    Remap,
}

/// What a freeze does with every private page: sorted ranges, apart from each other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MovePlan {
    /// Stretches to move, clean pages between private ones included.
    pub moves: Vec<GfnRange>,
    /// Private pages to copy.
    pub copies: Vec<GfnRange>,
}

/// Plans for `private` (sorted, not adjacent, each within one RAM range): short stretches are copied, the shortest
/// first, and the others [joined](join) and moved. Where there are more than `limit` stretches, nothing is copied: copies
/// cannot be joined, and every stretch is a mapping of the VM's children.
pub(super) fn plan(private: &[GfnRange], ram: &[GfnRange], limit: usize, short: SmallExtents) -> MovePlan {
    if short == SmallExtents::Remap || private.len() > limit {
        return MovePlan { moves: join(private, ram, limit), copies: Vec::new() };
    }
    let mut by_length = [0; SHORT as usize + 1];
    for range in private.iter().filter(|range| range.count().0 <= SHORT) {
        by_length[range.count().0 as usize] += range.count().0;
    }
    let within_most = by_length.iter().scan(0, |sum, pages| {
        *sum += pages;
        Some(*sum)
    });
    let longest = within_most.take_while(|sum| *sum <= COPIED_MOST).count() as u64 - 1;
    let (mut copies, long): (Vec<GfnRange>, Vec<GfnRange>) =
        private.iter().partition(|range| range.count().0 <= longest);
    let moves = join(&long, ram, limit);
    copies.retain(|copy| {
        let next = moves.partition_point(|range| range.end() <= copy.start());
        moves.get(next).is_none_or(|range| range.start() >= copy.end())
    });
    MovePlan { moves, copies }
}

/// Clean pages that are moved along for the sake of fewer mappings, in percent of the private ones.
const FREE_GAP_PERCENT: u64 = 25;

/// Joins `private` (sorted, not adjacent, each within one RAM range) over the gaps between into the stretches to move.
///
/// Gaps are closed smallest first: as long as their sum stays within [`FREE_GAP_PERCENT`] of the private pages, because
/// a mapping costs more than a few pages copied along, and then on until at most `limit` stretches are left. No
/// stretch crosses from one RAM range to another, even where that misses the limit.
fn join(private: &[GfnRange], ram: &[GfnRange], limit: usize) -> Vec<GfnRange> {
    let same_ram =
        |a: &GfnRange, b: &GfnRange| ram.iter().any(|ram| ram.contains(a.start()) && ram.contains(b.start()));
    let mut gaps: Vec<(u64, usize)> = private
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| same_ram(&pair[0], &pair[1]))
        .map(|(index, pair)| (pair[1].start().0 - pair[0].end().0, index))
        .collect();
    gaps.sort_unstable();

    let pages: u64 = private.iter().map(|range| range.count().0).sum();
    let free = pages * FREE_GAP_PERCENT / 100;
    let mut closed = vec![false; private.len()];
    let (mut total, mut stretches) = (0, private.len());
    for (gap, index) in gaps {
        if total + gap > free && stretches <= limit {
            break;
        }
        total += gap;
        stretches -= 1;
        closed[index] = true;
    }

    let mut moves: Vec<GfnRange> = Vec::with_capacity(stretches);
    for (index, range) in private.iter().enumerate() {
        match moves.last_mut() {
            Some(last) if closed[index - 1] => *last = GfnRange::between(last.start(), range.end()),
            _ => moves.push(*range),
        }
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(raw: &[std::ops::Range<u64>]) -> Vec<GfnRange> {
        raw.iter().cloned().map(GfnRange::from).collect()
    }

    fn everywhere() -> Vec<GfnRange> {
        vec![GfnRange::from(0..1 << 40)]
    }

    #[test]
    fn small_gaps_are_closed_and_large_ones_are_not() {
        let private = ranges(&[0..50, 52..100, 1000..1010]);
        assert_eq!(join(&private, &everywhere(), usize::MAX), ranges(&[0..100, 1000..1010]));
    }

    #[test]
    fn the_limit_closes_the_smallest_gaps_first() {
        let private = ranges(&[0..1, 10..11, 100..101, 105..106]);
        assert_eq!(join(&private, &everywhere(), 3), ranges(&[0..1, 10..11, 100..106]));
        assert_eq!(join(&private, &everywhere(), 2), ranges(&[0..11, 100..106]));
        assert_eq!(join(&private, &everywhere(), 0), [GfnRange::from(0..106)]);
        assert_eq!(join(&private, &everywhere(), 4), private);
    }

    #[test]
    fn short_stretches_are_copied_unless_they_lie_within_a_move_or_are_too_many() {
        let private = ranges(&[0..500, 520..521, 540..1000, 2000..2016, 3000..3017]);
        let plan_with = |limit, short| plan(&private, &everywhere(), limit, short);
        let want = MovePlan { moves: ranges(&[0..1000, 3000..3017]), copies: vec![(2000..2016).into()] };
        assert_eq!(plan_with(5, SmallExtents::CopyInPlace), want);
        let moved = MovePlan { moves: ranges(&[0..1000, 2000..2016, 3000..3017]), copies: Vec::new() };
        assert_eq!(plan_with(4, SmallExtents::CopyInPlace), moved);
        assert_eq!(plan_with(5, SmallExtents::Remap), moved);
    }

    #[test]
    fn of_many_short_stretches_the_shortest_are_copied() {
        let pairs = (0..COPIED_MOST / 2).map(|n| GfnRange::from(100 * n..100 * n + 2));
        let end = 50 * COPIED_MOST;
        let single = GfnRange::from(end..end + 1);
        let plan =
            plan(&pairs.chain([single]).collect::<Vec<_>>(), &everywhere(), usize::MAX, SmallExtents::CopyInPlace);
        assert_eq!(plan.copies, [single]);
    }

    #[test]
    fn no_stretch_crosses_the_hole_between_ram_ranges() {
        let ram = ranges(&[0..100, 100..200]);
        assert_eq!(join(&ranges(&[90..99, 101..110]), &ram, 1), ranges(&[90..99, 101..110]));
        assert_eq!(join(&[], &ram, 1), []);
    }

    /// For many pseudo-random inputs: all private pages are covered, nothing starts or ends in a gap, the limit or the
    /// free share holds, and closing one more gap would have broken the free share.
    #[test]
    fn the_plan_keeps_its_promises() {
        let mut random = crate::testing::numbers();
        for _ in 0..2000 {
            let mut at = 0;
            let private: Vec<GfnRange> = (0..random(30))
                .map(|_| {
                    let start = at + 1 + random(20);
                    at = start + 1 + random(20);
                    GfnRange::from(start..at)
                })
                .collect();
            let limit = random(20) as usize;
            let moves = join(&private, &everywhere(), limit);
            let pages = |ranges: &[GfnRange]| ranges.iter().map(|range| range.count().0).sum::<u64>();
            for range in &private {
                assert!(moves.iter().any(|to| to.intersect(*range) == *range));
            }
            for to in &moves {
                assert!(private.iter().any(|range| range.start() == to.start()));
                assert!(private.iter().any(|range| range.end() == to.end()));
            }
            let free = pages(&private) * FREE_GAP_PERCENT / 100;
            let gap = pages(&moves) - pages(&private);
            assert!(moves.len() <= limit.max(1) || gap <= free || private.is_empty());
            if gap > free {
                assert!(moves.len() >= limit.min(private.len()), "no gap is closed without need");
            }
            if let Some(next) = moves.windows(2).map(|pair| pair[1].start().0 - pair[0].end().0).min() {
                assert!(gap + next > free, "a gap that fits is closed");
            }
        }
    }
    /// Whatever a plan is, it is one that the model's windows might make.
    #[test]
    fn every_plan_is_allowed() {
        let mut random = crate::testing::numbers();
        for _ in 0..2000 {
            let ram = ranges(&[0..200, 200..400, 500..900]);
            let mut private: Vec<GfnRange> = Vec::new();
            for ram in &ram {
                let mut at = ram.start().0 + random(30);
                while at < ram.end().0 {
                    let end = ram.end().0.min(at + 1 + random(2 * SHORT));
                    private.push((at..end).into());
                    at = end + 1 + random(40);
                }
            }
            let limit = random(40) as usize;
            for short in [SmallExtents::CopyInPlace, SmallExtents::Remap] {
                let MovePlan { moves, copies } = plan(&private, &ram, limit, short);
                let parts = moves.iter().flat_map(|to| private.iter().map(|range| range.intersect(*to)));
                let moved_private = parts.filter(|part| !part.is_empty()).collect();
                let harvest = crate::Harvest { moved: moves, copied: copies, moved_private };
                assert_eq!(crate::model::plan::broken_rule(&harvest, &private, &ram), None, "{harvest:?}");
            }
        }
    }
}
