//! Looking down the chain.

use super::{ObjectId, Objects, Slot};
use crate::addr::{Gfn, GfnRange};
use crate::ranges::without;
use crate::window::StoreId;

/// What the chain says of a stretch of guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The frames.
    pub pages: GfnRange,
    /// The first object of the chain that has them; none where no object does.
    pub found: Option<Found>,
}

/// An object that has the pages one looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The object.
    pub object: ObjectId,
    /// Guest frame of the object's page 0.
    pub origin: Gfn,
    /// The state of the pages.
    pub slot: Slot,
}

impl Segment {
    /// Whether the pages are known to be zero.
    pub fn is_zero(&self) -> bool {
        self.found.is_none_or(|found| found.slot == Slot::Zero)
    }
}

impl Found {
    /// Indexes, in the object, of guest frames.
    pub fn indexes(&self, pages: GfnRange) -> GfnRange {
        shift_down(pages, self.origin)
    }
}

/// Frames, counted from `origin`.
pub(crate) fn shift_down(pages: GfnRange, origin: Gfn) -> GfnRange {
    GfnRange::between(Gfn(pages.start().0 - origin.0), Gfn(pages.end().0 - origin.0))
}

impl Objects {
    /// What the chain from `top` down, its page 0 at guest frame `origin`, says of `pages`; in order of the frames.
    ///
    /// Depth is the number of live generations, without bound: a list of what is still looked for goes down, no recursion.
    pub fn resolve(&self, top: Option<ObjectId>, origin: Gfn, pages: GfnRange) -> Vec<Segment> {
        let mut segments = Vec::new();
        let (mut rest, mut left) = (vec![pages], Vec::new());
        let (mut next, mut origin) = (top, origin);
        rest.retain(|pages| !pages.is_empty());
        while let Some(id) = next.filter(|_| !rest.is_empty()) {
            for pages in rest.drain(..) {
                let mut at = pages.start();
                for segment in self.segments_of(id, origin, pages) {
                    left.push(GfnRange::between(at, segment.pages.start()));
                    at = segment.pages.end();
                    segments.push(segment);
                }
                left.push(GfnRange::between(at, pages.end()));
            }
            left.retain(|pages| !pages.is_empty());
            std::mem::swap(&mut rest, &mut left);
            let backing = self.get(id).backing;
            next = backing.map(|backing| backing.object);
            origin = Gfn(origin.0 + backing.map_or(0, |backing| backing.origin));
        }
        segments.extend(rest.into_iter().map(|pages| Segment { pages, found: None }));
        segments.sort_unstable_by_key(|segment| segment.pages.start());
        segments
    }

    /// What one object, its page 0 at guest frame `origin`, has of `pages`.
    fn segments_of(&self, object: ObjectId, origin: Gfn, pages: GfnRange) -> impl Iterator<Item = Segment> {
        // Frames before the object's first page are not its own.
        let own = pages.intersect(GfnRange::between(origin, Gfn(u64::MAX)));
        let indexes = if own.is_empty() { own } else { shift_down(own, origin) };
        self.slots_in(object, indexes).map(move |(part, slot)| {
            let pages = GfnRange::between(Gfn(part.start().0 + origin.0), Gfn(part.end().0 + origin.0));
            Segment { pages, found: Some(Found { object, origin, slot }) }
        })
    }

    /// What these frames are whose leaves name `store`, its page 0 at `origin`: the slots that name it, whosever they are
    /// now, and zero where none does. No chain is asked: this costs the same at any depth.
    pub(crate) fn stored(&self, store: StoreId, origin: Gfn, pages: GfnRange) -> Vec<Segment> {
        let owners = self.owners(store).flat_map(|(object, _)| self.segments_of(object, origin, pages));
        let names = |segment: &Segment| segment.found.and_then(|found| found.slot.store()) == Some(store);
        let mut segments: Vec<Segment> = owners.filter(names).collect();
        segments.sort_unstable_by_key(|segment| segment.pages.start());
        let there: Vec<GfnRange> = segments.iter().map(|segment| segment.pages).collect();
        let zeros = without(&[pages], &there).into_iter();
        segments.extend(zeros.map(|pages| Segment { pages, found: None }));
        segments.sort_unstable_by_key(|segment| segment.pages.start());
        segments
    }

    /// Those of `all` (sorted, apart from each other) where an object of the chain from `top` down has a slot. Costs a look at
    /// each slot between the first and the last of them, and none down the chain for each of them.
    pub(crate) fn touched(&self, top: Option<ObjectId>, origin: Gfn, all: &[GfnRange]) -> Vec<GfnRange> {
        let Some((first, last)) = all.first().zip(all.last()) else { return Vec::new() };
        let bounds = GfnRange::between(first.start(), last.end());
        let mut touched = vec![false; all.len()];
        let (mut next, mut origin) = (top, origin);
        while let Some(object) = next.map(|id| self.get(id)) {
            let own = bounds.intersect(GfnRange::between(origin, Gfn(u64::MAX)));
            let mut at = 0;
            for (part, _) in object.slots.parts(shift_down(own, origin)) {
                let part = GfnRange::between(Gfn(part.start().0 + origin.0), Gfn(part.end().0 + origin.0));
                at += all[at..].partition_point(|pages| pages.end() <= part.start());
                let hit = all[at..].partition_point(|pages| pages.start() < part.end());
                touched[at..at + hit].fill(true);
            }
            next = object.backing.map(|backing| backing.object);
            origin = Gfn(origin.0 + object.backing.map_or(0, |backing| backing.origin));
        }
        all.iter().zip(touched).filter_map(|(pages, touched)| touched.then_some(*pages)).collect()
    }

    /// The objects from `top` down.
    pub fn chain(&self, top: Option<ObjectId>) -> impl Iterator<Item = ObjectId> {
        std::iter::successors(top, |&id| self.get(id).backing.map(|backing| backing.object))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Backing;
    use super::*;

    /// For many pseudo-random chains of objects that begin at different frames: as a look at every page tells.
    #[test]
    fn what_no_object_of_a_chain_has_is_not_touched() {
        let mut random = crate::testing::numbers();
        let mut times = [0; 2];
        for _ in 0..300 {
            let mut objects = Objects::default();
            let mut top = None;
            for _ in 0..random(4) {
                let origin = random(3) * 100;
                let object = objects.stack(top.map(|object| Backing { object, origin }));
                (0..random(6)).for_each(|_| {
                    let start = random(1200);
                    objects
                        .get_mut(object)
                        .slots
                        .replace((start..start + 1 + random(40)).into(), Slot::Gap(StoreId(0)));
                });
                top = Some(object);
            }
            let mut at = random(100);
            let all: Vec<GfnRange> = (0..random(40))
                .map(|_| {
                    let start = at + 1 + random(30);
                    at = start + 1 + random(30);
                    (start..at).into()
                })
                .collect();
            let has_slot = |pages: &&GfnRange| {
                let segments = objects.resolve(top, Gfn(0), **pages);
                segments.iter().any(|segment| segment.found.is_some())
            };
            let want: Vec<GfnRange> = all.iter().filter(has_slot).copied().collect();
            assert_eq!(objects.touched(top, Gfn(0), &all), want);
            times[usize::from(want.is_empty())] += 1;
        }
        assert!(times.iter().all(|times| *times > 20), "{times:?}");
    }
}
