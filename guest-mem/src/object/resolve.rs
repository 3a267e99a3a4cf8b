//! Looking down the chain.

use super::{ObjectId, Objects, Slot};
use crate::addr::{Gfn, GfnRange};

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
    pub fn resolve(&self, top: Option<ObjectId>, origin: Gfn, pages: GfnRange) -> Vec<Segment> {
        let mut segments = Vec::new();
        self.for_each_segment(top, origin, pages, &mut |segment| segments.push(segment));
        segments
    }

    /// The same, segment by segment.
    pub(crate) fn for_each_segment(
        &self,
        top: Option<ObjectId>,
        origin: Gfn,
        pages: GfnRange,
        out: &mut dyn FnMut(Segment),
    ) {
        // Depth is the number of live generations: without bound, so no recursion over it where nothing is found.
        let (mut top, mut origin) = (top, origin);
        loop {
            let Some(id) = top else {
                out(Segment { pages, found: None });
                return;
            };
            let object = self.get(id);
            // Frames before the object's first page are not its own.
            let own = pages.intersect(GfnRange::between(origin, Gfn(u64::MAX)));
            let below = object.backing;
            let (next, next_origin) = match below {
                Some(backing) => (Some(backing.object), Gfn(origin.0 + backing.origin)),
                None => (None, origin),
            };
            let mut hits =
                if own.is_empty() { None } else { Some(self.slots_in(id, shift_down(own, origin)).peekable()) };
            if hits.as_mut().is_none_or(|hits| hits.peek().is_none()) {
                (top, origin) = (next, next_origin);
                continue;
            }
            let mut at = pages.start();
            for (part, slot) in hits.into_iter().flatten() {
                let part = GfnRange::between(Gfn(part.start().0 + origin.0), Gfn(part.end().0 + origin.0));
                if at < part.start() {
                    self.for_each_segment(next, next_origin, GfnRange::between(at, part.start()), out);
                }
                out(Segment { pages: part, found: Some(Found { object: id, origin, slot }) });
                at = part.end();
            }
            if at < pages.end() {
                self.for_each_segment(next, next_origin, GfnRange::between(at, pages.end()), out);
            }
            return;
        }
    }

    /// The objects from `top` down.
    pub fn chain(&self, top: Option<ObjectId>) -> impl Iterator<Item = ObjectId> {
        std::iter::successors(top, |&id| self.get(id).backing.map(|backing| backing.object))
    }
}
