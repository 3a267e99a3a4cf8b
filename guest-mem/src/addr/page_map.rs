//! What is said of pages, stretch by stretch.

use crate::addr::extents::push;
use crate::addr::{PageNumber, RangeOf};
use crate::steps::step;
use std::collections::BTreeMap;
use std::iter;
use std::marker::PhantomData;
use std::ops::Range;

/// Pages of a chunk.
const CHUNK: u64 = 512;

/// Pages that have a value: an object's and their slots, or a window's copies and what lies beneath them.
///
/// Stretches are cut at the borders of chunks, and those of a chunk stand in one list: a guest writes single pages by the
/// thousand, near each other, and each is a stretch of its own.
#[derive(Debug)]
pub(crate) struct PageMap<I, V> {
    /// Chunks with pages. Their parts are sorted, and neighbours that continue each other are one.
    chunks: BTreeMap<u64, Vec<Piece<V>>>,
    numbered: PhantomData<I>,
}

impl<I, V> Default for PageMap<I, V> {
    fn default() -> Self {
        Self { chunks: BTreeMap::new(), numbered: PhantomData }
    }
}

/// Pages of a chunk, counted from its first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece<V> {
    start: u16,
    end: u16,
    value: V,
}

impl<I: PageNumber, V: Copy + PartialEq> PageMap<I, V> {
    /// Gives pages this value, whatever they had.
    pub fn replace(&mut self, pages: RangeOf<I>, value: V) {
        for (chunk, start, end) in chunks(pages) {
            set(self.chunks.entry(chunk).or_default(), start, end, Some(value));
        }
    }

    /// Gives absent pages this value. Costs least where they are sorted.
    ///
    /// # Panics
    /// If one of them has a value: what it says of the page would be forgotten.
    pub fn insert(&mut self, all: impl IntoIterator<Item = RangeOf<I>>, value: V) {
        let mut all = all.into_iter().flat_map(chunks).peekable();
        while let Some(&(chunk, ..)) = all.peek() {
            let parts = self.chunks.entry(chunk).or_default();
            while let Some((_, start, end)) = all.next_if(|&(next, ..)| next == chunk) {
                if parts.last().is_none_or(|last| last.end < start) {
                    parts.push(Piece { start, end, value });
                    continue;
                }
                let next = parts.partition_point(|part| part.end <= start);
                let free = parts.get(next).is_none_or(|part| part.start >= end);
                assert!(free, "a slot that holds a page is not overwritten");
                set(parts, start, end, Some(value));
            }
        }
    }

    /// Makes pages absent.
    pub fn remove(&mut self, pages: RangeOf<I>) {
        for (chunk, start, end) in chunks(pages) {
            if let Some(parts) = self.chunks.get_mut(&chunk) {
                set(parts, start, end, None);
                if parts.is_empty() {
                    self.chunks.remove(&chunk);
                }
            }
        }
    }

    /// The value of a page; none of one that is absent.
    pub fn get(&self, page: I) -> Option<V> {
        self.parts(RangeOf::one(page)).next().map(|(_, value)| value)
    }

    /// The stretches among `pages`, cut to them.
    pub fn within(&self, pages: RangeOf<I>) -> impl Iterator<Item = (RangeOf<I>, V)> {
        let mut parts = self.parts(pages).peekable();
        iter::from_fn(move || {
            let (mut pages, value) = parts.next()?;
            while let Some((next, _)) = parts.next_if(|&(next, of)| next.start() == pages.end() && of == value) {
                pages = RangeOf::between(pages.start(), next.end());
            }
            Some((pages, value))
        })
    }

    /// The same, cut at the borders of chunks besides.
    pub fn parts(&self, pages: RangeOf<I>) -> impl Iterator<Item = (RangeOf<I>, V)> {
        let chunks = self.chunks.range(chunks_of(pages));
        chunks.flat_map(move |(chunk, parts)| {
            let range = move |part: &Piece<V>| {
                RangeOf::<I>::from(chunk * CHUNK + u64::from(part.start)..chunk * CHUNK + u64::from(part.end))
            };
            let first = parts.partition_point(|part| range(part).end() <= pages.start());
            let parts = parts[first..].iter().take_while(move |part| range(part).start() < pages.end());
            parts.inspect(|_| step()).map(move |part| (range(part).intersect(pages), part.value))
        })
    }

    /// All stretches.
    pub fn iter(&self) -> impl Iterator<Item = (RangeOf<I>, V)> {
        self.within((0..u64::MAX).into())
    }

    /// Whether each of these pages has a value.
    pub fn covers(&self, pages: RangeOf<I>) -> bool {
        self.parts(pages).map(|(part, _)| part.count().0).sum::<u64>() == pages.count().0
    }

    /// Which of these pages (sorted, apart from each other) have no value: each chunk is looked up once.
    pub fn absent(&self, all: &[RangeOf<I>]) -> Vec<RangeOf<I>> {
        let mut absent = Vec::new();
        let mut all = all.iter().copied().flat_map(chunks).peekable();
        while let Some(&(chunk, ..)) = all.peek() {
            let mut parts = self.chunks.get(&chunk).map_or(&[][..], Vec::as_slice);
            let base = chunk * CHUNK;
            let mut add = |start: u16, end: u16| {
                if start < end {
                    push(&mut absent, (base + u64::from(start)..base + u64::from(end)).into());
                }
            };
            while let Some((_, mut start, end)) = all.next_if(|&(next, ..)| next == chunk) {
                step();
                parts = &parts[parts.iter().take_while(|part| part.end <= start).count()..];
                for part in parts.iter().take_while(|part| part.start < end) {
                    add(start, part.start);
                    start = part.end;
                }
                add(start, end);
            }
        }
        absent
    }

    /// Takes out the first stretches, about as many as are `left` to take, and counts them.
    pub fn take_some(&mut self, left: &mut usize) -> Vec<(RangeOf<I>, V)> {
        let mut some: Vec<(RangeOf<I>, V)> = Vec::new();
        while *left > 0
            && let Some((chunk, parts)) = self.chunks.pop_first()
        {
            *left = left.saturating_sub(parts.len());
            for Piece { start, end, value } in parts {
                step();
                let pages = RangeOf::from(chunk * CHUNK + u64::from(start)..chunk * CHUNK + u64::from(end));
                match some.last_mut() {
                    Some((last, of)) if last.end() == pages.start() && *of == value => {
                        *last = RangeOf::between(last.start(), pages.end());
                    }
                    _ => some.push((pages, value)),
                }
            }
        }
        some
    }

    /// A number behind that of each page that has a value.
    pub fn end(&self) -> u64 {
        self.chunks.last_key_value().map_or(0, |(chunk, _)| (chunk + 1) * CHUNK)
    }

    /// Whether all pages are absent.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Whether it is more work to go over these than over the others. To find out is as much work as the lesser.
    pub fn outnumber(&self, others: &Self) -> bool {
        let len = |parts: &Vec<Piece<V>>| parts.len() as i64;
        let (mut ours, mut theirs) = (self.chunks.values().map(len), others.chunks.values().map(len));
        let mut more = 0;
        loop {
            match (ours.next(), theirs.next()) {
                (Some(ours), Some(theirs)) => more += ours - theirs,
                (Some(ours), None) if more + ours > 0 => return true,
                (Some(ours), None) => more += ours,
                (None, Some(theirs)) if more - theirs <= 0 => return false,
                (None, Some(theirs)) => more -= theirs,
                (None, None) => return more > 0,
            }
        }
    }
}

fn chunks_of<I: PageNumber>(pages: RangeOf<I>) -> Range<u64> {
    if pages.is_empty() { 0..0 } else { pages.start().raw() / CHUNK..pages.end().raw().div_ceil(CHUNK) }
}

/// The chunks of `pages`, and which pages of each.
fn chunks<I: PageNumber>(pages: RangeOf<I>) -> impl Iterator<Item = (u64, u16, u16)> {
    let (start, end) = (pages.start().raw(), pages.end().raw());
    chunks_of(pages).map(move |chunk| {
        let base = chunk * CHUNK;
        (chunk, (start.max(base) - base) as u16, (end.min(base + CHUNK) - base) as u16)
    })
}

/// Gives pages of a chunk this value, or none.
fn set<V: Copy + PartialEq>(parts: &mut Vec<Piece<V>>, start: u16, end: u16, value: Option<V>) {
    // Those that overlap or touch.
    let first = parts.partition_point(|part| part.end < start);
    let last = first + parts[first..].partition_point(|part| part.start <= end);
    let touched = &parts[first..last];
    let mut before = touched.first().filter(|part| part.start < start).map(|&part| Piece { end: start, ..part });
    let mut after = touched.last().filter(|part| part.end > end).map(|&part| Piece { start: end, ..part });
    let mut middle = value.map(|value| Piece { start, end, value });
    if let Some(middle) = &mut middle {
        middle.start = before.take_if(|before| before.value == middle.value).map_or(start, |before| before.start);
        middle.end = after.take_if(|after| after.value == middle.value).map_or(end, |after| after.end);
    }
    parts.splice(first..last, [before, middle, after].into_iter().flatten());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{PageIndex, PageRange};
    use crate::ids::StoreId;
    use crate::object::Slot;

    const PAGES: u64 = 3 * CHUNK;

    /// For many pseudo-random changes, long and short, near the borders of chunks and far from them: the same as an array.
    #[test]
    fn slots_are_what_an_array_of_them_would_be() {
        let mut random = crate::testing::numbers();
        let (mut slots, mut model) = (PageMap::default(), [None; PAGES as usize]);
        for step in 0..4000 {
            let start = random(PAGES);
            let most = if random(4) == 0 { PAGES } else { 4 };
            let pages = PageRange::from(start..(start + random(most)).min(PAGES));
            let slot = [None, Some(Slot::Zero), Some(Slot::Resident(StoreId(1))), Some(Slot::InFlight(StoreId(2)))];
            let slot = slot[random(4) as usize];
            match slot {
                Some(slot) if slots.parts(pages).next().is_none() => slots.insert([pages], slot),
                Some(slot) => slots.replace(pages, slot),
                None => slots.remove(pages),
            }
            model[pages.start().0 as usize..pages.end().0 as usize].fill(slot);
            let asked = PageRange::from(random(PAGES)..random(PAGES));
            let of_model = &model[asked.start().0 as usize..asked.end().0 as usize];
            assert_eq!(slots.covers(asked), of_model.iter().all(Option::is_some), "step {step}");
            let absent = slots.absent(&[asked, PageRange::from(PAGES..PAGES + 1)]);
            let absent: Vec<_> = absent.into_iter().flat_map(|pages| pages.iter()).collect();
            let none = asked.iter().zip(of_model).filter_map(|(page, slot)| slot.is_none().then_some(page));
            assert!(none.chain([PageIndex(PAGES)]).eq(absent), "step {step}");
            let told = slots.within(asked);
            let pages = told.flat_map(|(pages, slot)| pages.iter().map(move |page| (page, slot)));
            let want = asked.iter().zip(of_model).filter_map(|(page, slot)| Some((page, (*slot)?)));
            assert!(pages.eq(want), "step {step}");
            let all: Vec<_> = slots.iter().collect();
            let apart = |pair: &[(PageRange, Slot)]| pair[0].0.end() < pair[1].0.start() || pair[0].1 != pair[1].1;
            assert!(
                all.windows(2).all(apart) && all.iter().all(|(pages, _)| !pages.is_empty()),
                "step {step}: {all:?}"
            );
        }
        slots.remove((0..PAGES).into());
        assert!(slots.is_empty());
    }

    #[test]
    #[should_panic(expected = "not overwritten")]
    fn a_slot_is_not_overwritten_by_accident() {
        let mut slots = PageMap::<PageIndex, _>::default();
        slots.insert([(10..20).into(), (20..30).into()], Slot::Zero);
        slots.insert([(0..11).into()], Slot::Zero);
    }
}
