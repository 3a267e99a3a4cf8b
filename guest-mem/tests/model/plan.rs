//! What a freeze may do with the pages that it finds: not which plan is made, but which are allowed. The fake window picks any
//! of these, and the real window's planner is held against them too.

use guest_mem::Harvest;
use guest_mem::addr::GfnRange;
use rangemap::RangeSet;

fn set(ranges: &[GfnRange]) -> RangeSet<u64> {
    ranges.iter().map(|range| range.raw()).collect()
}

fn overlap(a: &RangeSet<u64>, b: &RangeSet<u64>) -> RangeSet<u64> {
    a.iter()
        .flat_map(|range| {
            b.overlapping(range.clone()).map(|other| range.start.max(other.start)..range.end.min(other.end))
        })
        .collect()
}

/// The rule that a harvest of `private` pages breaks, if it breaks one.
pub fn broken_rule(harvest: &Harvest, private: &[GfnRange], ram: &[GfnRange]) -> Option<&'static str> {
    let Harvest { moved, copied, moved_private } = harvest;
    let apart = |ranges: &[GfnRange]| {
        ranges.iter().all(|range| !range.is_empty()) && ranges.windows(2).all(|pair| pair[0].end() <= pair[1].start())
    };
    let whole = |range: &GfnRange| ram.iter().any(|ram| ram.intersect(*range) == *range);
    let [moved_set, copied_set, private_set] = [moved, copied, private].map(set);
    let rules = [
        ("ranges are sorted, apart and not empty", [moved, copied, moved_private].iter().all(|ranges| apart(ranges))),
        ("no stretch goes from one RAM range to the next", moved.iter().chain(copied).all(whole)),
        ("what is moved is not copied", overlap(&moved_set, &copied_set).is_empty()),
        ("only private pages are copied", overlap(&copied_set, &private_set) == copied_set),
        ("the private pages among those moved are told", set(moved_private) == overlap(&moved_set, &private_set)),
        (
            "every private page is moved or copied",
            private.iter().all(|range| set(&harvest.taken()).gaps(&range.raw()).eq([])),
        ),
        ("nothing is moved without a private page in it", moved.iter().all(|range| private_set.overlaps(&range.raw()))),
    ];
    rules.into_iter().find(|(_, holds)| !holds).map(|(rule, _)| rule)
}
