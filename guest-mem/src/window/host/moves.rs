//! Which stretches a freeze moves.

use crate::addr::GfnRange;

/// Clean pages that are moved along for the sake of fewer mappings, in percent of the private ones.
const FREE_GAP_PERCENT: u64 = 25;

/// Joins `private` (sorted, not adjacent, each within one RAM range) over the gaps between into the stretches to move.
///
/// Gaps are closed smallest first: as long as their sum stays within [`FREE_GAP_PERCENT`] of the private pages, because
/// a mapping costs more than a few pages copied along, and then on until at most `limit` stretches are left. No
/// stretch crosses from one RAM range to another, even where that misses the limit.
pub(super) fn plan(private: &[GfnRange], ram: &[GfnRange], limit: usize) -> Vec<GfnRange> {
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
        assert_eq!(plan(&private, &everywhere(), usize::MAX), ranges(&[0..100, 1000..1010]));
    }

    #[test]
    fn the_limit_closes_the_smallest_gaps_first() {
        let private = ranges(&[0..1, 10..11, 100..101, 105..106]);
        assert_eq!(plan(&private, &everywhere(), 3), ranges(&[0..1, 10..11, 100..106]));
        assert_eq!(plan(&private, &everywhere(), 2), ranges(&[0..11, 100..106]));
        assert_eq!(plan(&private, &everywhere(), 0), [GfnRange::from(0..106)]);
        assert_eq!(plan(&private, &everywhere(), 4), private);
    }

    #[test]
    fn no_stretch_crosses_the_hole_between_ram_ranges() {
        let ram = ranges(&[0..100, 100..200]);
        assert_eq!(plan(&ranges(&[90..99, 101..110]), &ram, 1), ranges(&[90..99, 101..110]));
        assert_eq!(plan(&[], &ram, 1), []);
    }

    /// For many pseudo-random inputs: all private pages are covered, nothing starts or ends in a gap, the limit or the
    /// free share holds, and closing one more gap would have broken the free share.
    #[test]
    fn the_plan_keeps_its_promises() {
        let mut seed = 1_u64;
        let mut random = |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % bound
        };
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
            let moves = plan(&private, &everywhere(), limit);
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
}
