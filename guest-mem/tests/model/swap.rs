//! Swap in memory, to the letter of what the manager may ask of it; and what a world asks of any swap.

use super::fakes::{Call, Ledger, Stamp, decode, encode};
use guest_mem::addr::{PAGE_SIZE, PageCount};
use guest_mem::ids::SwapSlot;
use guest_mem::swap::{Fetch, Swap};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

/// Swap under a world.
pub trait WorldSwap: Swap + 'static {
    /// Ends all reads that are under way. Whether there were any.
    fn end_reads(&mut self) -> bool;

    /// Whether reads have begun of which nobody has had the pages.
    fn is_reading(&self) -> bool;

    /// Pages there are.
    fn pages(&self) -> usize;
}

/// How soon a page is read from swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    AtOnce,
    /// When the test says so.
    Later,
}

/// A page in swap.
#[derive(Debug)]
struct Swapped {
    stamp: Stamp,
    /// Number of its put.
    put: u64,
    read: Read,
}

/// How far a read has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    None,
    UnderWay,
    Done,
}

/// Swap in memory. Panics where the manager reads or frees what is not there, or reads pages of two puts at once.
pub struct FakeSwap {
    slots: BTreeMap<u64, Swapped>,
    puts: u64,
    gets: u64,
    /// Pages that were read ahead and proved useful.
    pub hits: u64,
    /// Slots for so many pages, all in all.
    pub size: u64,
    pub reads: Reads,
    ledger: Rc<Ledger>,
}

impl FakeSwap {
    pub fn new(ledger: &Rc<Ledger>) -> Self {
        let ledger = Rc::clone(ledger);
        Self { slots: BTreeMap::new(), puts: 0, gets: 0, hits: 0, size: u64::MAX, reads: Reads::AtOnce, ledger }
    }

    /// Puts, and gets that brought pages.
    pub fn calls(&self) -> (u64, u64) {
        (self.puts, self.gets)
    }

    /// The lowest slots that are free in a row: slots are used again soon, and puts become neighbours.
    fn allocate(&self, count: u64) -> io::Result<u64> {
        if self.slots.len() as u64 + count > self.size {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut first = 0;
        for &slot in self.slots.keys() {
            if slot - first >= count {
                break;
            }
            first = slot + 1;
        }
        Ok(first)
    }
}

impl WorldSwap for FakeSwap {
    fn end_reads(&mut self) -> bool {
        let under_way = self.slots.values_mut().filter(|page| page.read == Read::UnderWay);
        under_way.map(|page| page.read = Read::Done).count() > 0
    }

    fn is_reading(&self) -> bool {
        self.slots.values().any(|page| page.read != Read::None)
    }

    fn pages(&self) -> usize {
        self.slots.len()
    }
}

impl Swap for FakeSwap {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        let count = (pages.len() / PAGE_SIZE) as u64;
        assert!((1..=16).contains(&count) && pages.len().is_multiple_of(PAGE_SIZE), "{} bytes are put", pages.len());
        self.ledger.check(Call::PutSwap)?;
        let first = self.allocate(count)?;
        for (slot, page) in (first..).zip(pages.chunks_exact(PAGE_SIZE)) {
            let page = Swapped { stamp: decode(page), put: self.puts, read: Read::None };
            assert!(self.slots.insert(slot, page).is_none(), "slot {slot} is free");
        }
        self.puts += 1;
        Ok(SwapSlot(first))
    }

    /// What a read has brought is brought once.
    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        let count = (buf.len() / PAGE_SIZE) as u64;
        assert!((1..=16).contains(&count) && buf.len().is_multiple_of(PAGE_SIZE), "{} bytes are read", buf.len());
        let mut pages: Vec<_> = self.slots.range_mut(first.0..first.0 + count).map(|(_, page)| page).collect();
        assert_eq!(pages.len() as u64, count, "{count} slots from {first:?} on are in use");
        assert!(pages.windows(2).all(|two| two[0].put == two[1].put), "pages of one put are read together");
        self.ledger.check(Call::GetSwap)?;
        if self.reads == Reads::Later && pages.iter().any(|page| page.read != Read::Done) {
            pages.iter_mut().filter(|page| page.read == Read::None).for_each(|page| page.read = Read::UnderWay);
            return Ok(Fetch::Coming);
        }
        for (page, bytes) in pages.into_iter().zip(buf.chunks_exact_mut(PAGE_SIZE)) {
            encode(page.stamp, bytes);
            page.read = Read::None;
        }
        self.gets += 1;
        Ok(Fetch::Here)
    }

    fn expect(&mut self, first: SwapSlot, count: PageCount) -> PageCount {
        let pages = self.slots.range_mut(first.0..first.0 + count.0).map(|(_, page)| page);
        let unread = pages.filter(|page| self.reads == Reads::Later && page.read == Read::None);
        PageCount(unread.map(|page| page.read = Read::UnderWay).count() as u64)
    }

    /// What is not on its way is not waited for.
    fn get_expected(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        let count = (buf.len() / PAGE_SIZE) as u64;
        let mut pages = self.slots.range(first.0..first.0 + count).map(|(_, page)| page);
        if self.reads == Reads::Later && pages.any(|page| page.read == Read::None) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.get(first, buf)
    }

    fn count_hits(&mut self, pages: PageCount) {
        self.hits += pages.0;
    }

    fn free(&mut self, first: SwapSlot, count: PageCount) {
        for slot in first.0..first.0 + count.0 {
            assert!(self.slots.remove(&slot).is_some(), "slot {slot} is freed once");
        }
    }

    fn used(&self) -> Option<Vec<(SwapSlot, PageCount)>> {
        Some(self.slots.keys().map(|&slot| (SwapSlot(slot), PageCount(1))).collect())
    }
}
