//! Looking down the chain.

use super::{Objects, Slot};
use crate::addr::extents::without;
use crate::addr::{GfnRange, PageOrigin, PageRange};
use crate::ids::{ObjectId, StoreId};

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
    /// Where its pages stand.
    pub origin: PageOrigin,
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
    pub fn indexes(&self, frames: GfnRange) -> PageRange {
        self.origin.pages(frames)
    }
}

impl Objects {
    /// What the chain from `top` down, whose pages stand at `origin`, says of `pages`; in order of the frames.
    ///
    /// Depth is the number of live generations, without bound: a list of what is still looked for goes down, no recursion.
    pub fn resolve(&self, top: Option<ObjectId>, origin: PageOrigin, pages: GfnRange) -> Vec<Segment> {
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
            origin = origin + backing.map_or(PageOrigin(0), |backing| backing.origin);
        }
        segments.extend(rest.into_iter().map(|pages| Segment { pages, found: None }));
        segments.sort_unstable_by_key(|segment| segment.pages.start());
        segments
    }

    /// What one object, whose pages stand at `origin`, has of `pages`.
    fn segments_of(&self, object: ObjectId, origin: PageOrigin, pages: GfnRange) -> impl Iterator<Item = Segment> {
        let slots = self.slots_in(object, origin.pages(pages));
        slots.map(move |(part, slot)| Segment {
            pages: origin.frames(part),
            found: Some(Found { object, origin, slot }),
        })
    }

    /// What these frames are whose leaves name `store`, its pages at `origin`: the slots that name it, whosever they are
    /// now, and zero where none does. No chain is asked: this costs the same at any depth.
    pub(crate) fn stored(&self, store: StoreId, origin: PageOrigin, pages: GfnRange) -> Vec<Segment> {
        let owners = self.accounts.owners(store).flat_map(|(object, _)| self.segments_of(object, origin, pages));
        let names = |segment: &Segment| segment.found.and_then(|found| found.slot.store()) == Some(store);
        let mut segments: Vec<Segment> = owners.filter(names).collect();
        segments.sort_unstable_by_key(|segment| segment.pages.start());
        let there: Vec<GfnRange> = segments.iter().map(|segment| segment.pages).collect();
        let zeros = without(&[pages], &there).into_iter();
        segments.extend(zeros.map(|pages| Segment { pages, found: None }));
        segments.sort_unstable_by_key(|segment| segment.pages.start());
        segments
    }

    /// The objects from `top` down.
    pub fn chain(&self, top: Option<ObjectId>) -> impl Iterator<Item = ObjectId> {
        std::iter::successors(top, |&id| self.get(id).backing.map(|backing| backing.object))
    }
}
