//! Stores, a file and windows without a kernel, which keep to the letter of what the kernel does with private mappings.
//!
//! A page's content is a [`Stamp`]; it is spelled out in bytes only where the manager looks at it.

use guest_mem::addr::{Gfn, GfnRange, PAGE_SIZE, PageCount, PageIndex};
use guest_mem::store::swap::SharedSwap;
use guest_mem::store::{FileStore, Store, StoreFactory};
use guest_mem::swap::{Fetch, Swap, SwapSlot};
use guest_mem::{Harvest, Protection, Run, Source, StoreId, Window};
use rangemap::{RangeMap, RangeSet};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

/// What a page holds: who wrote it and when, or 0 for zeros.
pub type Stamp = u64;

fn encode(stamp: Stamp, page: &mut [u8]) {
    page.fill(0);
    page[..8].copy_from_slice(&stamp.to_le_bytes());
    page[PAGE_SIZE - 8..].copy_from_slice(&stamp.to_le_bytes());
}

fn decode(page: &[u8]) -> Stamp {
    assert_eq!(page[..8], page[PAGE_SIZE - 8..], "a page is copied as a whole");
    Stamp::from_le_bytes(page[..8].try_into().expect("eight bytes"))
}

/// Calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Create,
    Fill,
    ReadScratch,
    ReadFile,
    Protect,
    PutSwap,
    GetSwap,
    Supply,
}

/// What all fakes of a world share: how much they hold, and which call is to fail.
#[derive(Debug, Default)]
pub struct Ledger {
    pages: Cell<u64>,
    stores: Cell<u64>,
    fail: Cell<Option<(Call, u64)>>,
}

impl Ledger {
    /// Pages in all stores.
    pub fn pages(&self) -> u64 {
        self.pages.get()
    }

    /// Stores that have not been dropped.
    pub fn stores(&self) -> u64 {
        self.stores.get()
    }

    /// Makes the `nth` call (from 0) of this kind, from now on, fail; once.
    pub fn fail(&self, call: Call, nth: u64) {
        self.fail.set(Some((call, nth)));
    }

    /// Whether a call that is to fail has not been made yet. It will not fail any more.
    pub fn take_unfailed(&self) -> bool {
        self.fail.take().is_some()
    }

    fn check(&self, call: Call) -> io::Result<()> {
        match self.fail.get() {
            Some((failing, 0)) if failing == call => {
                self.fail.set(None);
                Err(io::Error::other("as the test ordered"))
            }
            Some((failing, nth)) if failing == call => {
                self.fail.set(Some((failing, nth - 1)));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The pages of a store; whoever maps it holds on to them, as with a memfd.
type Pages = Rc<RefCell<BTreeMap<u64, Stamp>>>;

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
    fn new(ledger: &Rc<Ledger>) -> Self {
        let ledger = Rc::clone(ledger);
        Self { slots: BTreeMap::new(), puts: 0, gets: 0, hits: 0, size: u64::MAX, reads: Reads::AtOnce, ledger }
    }

    /// Pages there are.
    pub fn pages(&self) -> usize {
        self.slots.len()
    }

    /// Puts, and gets that brought pages.
    pub fn calls(&self) -> (u64, u64) {
        (self.puts, self.gets)
    }

    /// Ends all reads that are under way. Whether there were any.
    pub fn end_reads(&mut self) -> bool {
        let under_way = self.slots.values_mut().filter(|page| page.read == Read::UnderWay);
        under_way.map(|page| page.read = Read::Done).count() > 0
    }

    /// Whether reads have begun of which nobody has had the pages.
    pub fn is_reading(&self) -> bool {
        self.slots.values().any(|page| page.read != Read::None)
    }

    /// The lowest slots that are free in a row: slots are used again soon, and puts become neighbours.
    fn allocate(&self, count: u64) -> io::Result<u64> {
        if self.pages() as u64 + count > self.size {
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

/// Makes [`VecStore`]s.
pub struct VecStores {
    ledger: Rc<Ledger>,
    swap: SharedSwap,
}

impl VecStores {
    /// Stores on `ledger`, and their swap.
    pub fn new(ledger: &Rc<Ledger>) -> (Self, Rc<RefCell<FakeSwap>>) {
        let swap = Rc::new(RefCell::new(FakeSwap::new(ledger)));
        (Self { ledger: Rc::clone(ledger), swap: SharedSwap::new(Rc::clone(&swap)) }, swap)
    }
}

/// A store in memory. Panics where the manager frees what is not there, or drops what is.
pub struct VecStore {
    pages: Pages,
    size: PageCount,
    /// Where a fill failed half way.
    torn: Option<GfnRange>,
    ledger: Rc<Ledger>,
}

impl StoreFactory for VecStores {
    type Store = VecStore;
    type File = FakeFile;
    type Swap = SharedSwap;

    fn create(&mut self, pages: PageCount) -> io::Result<VecStore> {
        let ledger = Rc::clone(&self.ledger);
        ledger.check(Call::Create)?;
        ledger.stores.set(ledger.stores.get() + 1);
        Ok(VecStore { pages: Pages::default(), size: pages, torn: None, ledger })
    }

    fn swap(&mut self) -> &mut SharedSwap {
        &mut self.swap
    }
}

impl Store for VecStore {
    /// A failing call leaves half of the pages behind, as the kernel does.
    fn fill(&mut self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        let count = bytes.len() / PAGE_SIZE;
        let done = self.ledger.check(Call::Fill);
        let filled = if done.is_ok() { count } else { count / 2 };
        for (index, page) in (first.0..).zip(bytes.chunks_exact(PAGE_SIZE)).take(filled) {
            assert!(index < self.size.0, "page {index} lies outside of the store");
            let before = self.pages.borrow_mut().insert(index, decode(page));
            assert_eq!(before, None, "page {index} is filled where there is a hole");
        }
        self.ledger.pages.set(self.ledger.pages.get() + filled as u64);
        if done.is_err() {
            self.torn = Some(GfnRange::new(Gfn(first.0), PageCount(count as u64)));
        }
        done
    }

    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        for (index, page) in (first.0..).zip(buf.chunks_exact_mut(PAGE_SIZE)) {
            let stamp = *self.pages.borrow().get(&index).expect("the manager reads pages that are there");
            encode(stamp, page);
        }
        Ok(())
    }

    fn punch(&mut self, first: PageIndex, count: PageCount) {
        let range = GfnRange::new(Gfn(first.0), count);
        let torn = self.torn.take() == Some(range);
        for index in range.raw() {
            let was = self.pages.borrow_mut().remove(&index).is_some();
            assert!(was || torn, "page {index} is freed once, and only if it is there");
            self.ledger.pages.set(self.ledger.pages.get() - u64::from(was));
        }
    }

    fn extents(&self) -> io::Result<Vec<GfnRange>> {
        let pages: RangeSet<u64> = self.pages.borrow().keys().map(|&page| page..page + 1).collect();
        Ok(pages.into_iter().map(GfnRange::from).collect())
    }
}

impl Drop for VecStore {
    fn drop(&mut self) {
        self.ledger.stores.set(self.ledger.stores.get() - 1);
        let left = self.pages.borrow().len();
        assert!(left == 0 || std::thread::panicking(), "a store is dropped with {left} pages");
    }
}

/// A file of which every fourth page is zero, and its store, filled on first touch.
pub struct FakeFile {
    pages: PageCount,
    filled: RefCell<BTreeSet<u64>>,
    ledger: Rc<Ledger>,
}

impl FakeFile {
    pub fn new(pages: PageCount, ledger: &Rc<Ledger>) -> Self {
        Self { pages, filled: RefCell::default(), ledger: Rc::clone(ledger) }
    }

    /// What the file has.
    pub fn content(index: u64) -> Stamp {
        if index % 4 == 3 { 0 } else { 0xf11e << 48 | index }
    }
}

impl FileStore for FakeFile {
    fn ensure(&self, pages: GfnRange) -> io::Result<()> {
        assert!(pages.end().0 <= self.pages.0, "{pages:?} lies outside of the file");
        self.ledger.check(Call::ReadFile)?;
        self.filled.borrow_mut().extend(pages.iter().map(|page| page.0));
        Ok(())
    }

    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        self.ledger.check(Call::ReadFile)?;
        for (index, page) in (first.0..).zip(buf.chunks_exact_mut(PAGE_SIZE)) {
            assert!(index < self.pages.0, "page {index} lies outside of the file");
            encode(Self::content(index), page);
        }
        Ok(())
    }
}

/// What a window maps: it outlives the manager's own hold on it, as a mapping outlives a descriptor.
#[derive(Clone)]
pub enum Mapped {
    Store(Pages),
    File(Rc<FakeFile>),
}

impl Mapped {
    pub fn store(store: &VecStore) -> Self {
        Self::Store(Rc::clone(&store.pages))
    }

    fn get(&self, index: u64) -> Option<Stamp> {
        match self {
            Self::Store(pages) => pages.borrow().get(&index).copied(),
            Self::File(file) => file.filled.borrow().contains(&index).then(|| FakeFile::content(index)),
        }
    }
}

/// A page of the process that holds the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Private {
    /// Written by the guest.
    Dirty(Stamp),
    /// A copy made without a write: KVM asks for writable pages on reads.
    Clean(Stamp),
    /// Frozen by a copy, and not written since: what is mapped there shows something older.
    Kept(Stamp),
    /// The kernel's zero page, supplied by the manager.
    Zero,
}

/// How far a freeze moves clean pages along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// Not at all.
    None,
    /// Some, by these random bits.
    Some(u64),
    /// Everything between any two pages.
    All,
    /// Nothing is moved: pages are copied and stay.
    Stay,
}

impl Gaps {
    /// Whether a stretch is copied, and stays.
    fn stays(self, range: &std::ops::Range<u64>) -> bool {
        match self {
            Self::None | Self::All => false,
            Self::Some(bits) => bits >> (range.start % 61) & 1 == 1,
            Self::Stay => true,
        }
    }
}

/// A touch of a page that nothing supplies: the guest waits.
#[derive(Debug, PartialEq, Eq)]
pub struct Trapped;

/// What became of a write.
#[derive(Debug, PartialEq, Eq)]
pub enum Write {
    Done,
    /// The page is read-only: the kernel says so to who tried.
    Refused,
}

/// A VM's window.
#[derive(Default)]
pub struct FakeWindow {
    ram: Vec<GfnRange>,
    runs: RangeMap<u64, Source>,
    mapped: BTreeMap<StoreId, Mapped>,
    present: BTreeMap<u64, Private>,
    scratch: BTreeMap<StoreId, BTreeMap<u64, Stamp>>,
    /// What the guest may not write.
    pub read_only: BTreeSet<u64>,
    /// Pages that guests wait for.
    waiting: BTreeSet<u64>,
    /// The process is gone, and its memory.
    pub killed: bool,
    /// The process has still to copy what its freezes have taken.
    pub copying: bool,
    /// Why the VM must not run on.
    pub failed: Option<String>,
    ledger: Rc<Ledger>,
}

impl FakeWindow {
    pub fn new(ram: &[GfnRange], ledger: &Rc<Ledger>) -> Self {
        Self { ram: ram.to_vec(), ledger: Rc::clone(ledger), ..Self::default() }
    }

    /// Maps a run; `mapped` is its store.
    pub fn map(&mut self, run: Run, mapped: Option<Mapped>) {
        assert!(!self.runs.overlaps(&run.pages.raw()), "runs do not overlap");
        self.runs.insert(run.pages.raw(), run.source);
        if let (Source::Store { store, .. }, Some(mapped)) = (run.source, mapped) {
            self.mapped.insert(store, mapped);
        }
    }

    pub fn runs(&self) -> Vec<Run> {
        self.runs.iter().map(|(pages, &source)| Run { pages: pages.clone().into(), source }).collect()
    }

    /// Frozen pages that stayed.
    pub fn kept(&self) -> Vec<GfnRange> {
        let kept = self.present.iter().filter(|(_, page)| matches!(page, Private::Kept(_)));
        let kept: RangeSet<u64> = kept.map(|(&page, _)| page..page + 1).collect();
        kept.into_iter().map(GfnRange::from).collect()
    }

    /// The live layer.
    pub fn live(&self) -> RangeSet<u64> {
        let dirty = self.present.iter().filter(|(_, page)| matches!(page, Private::Dirty(_)));
        dirty.map(|(&page, _)| page..page + 1).collect()
    }

    /// Whether moved-out pages are kept.
    pub fn has_scratch(&self) -> bool {
        !self.scratch.is_empty()
    }

    fn source(&self, gfn: Gfn) -> Source {
        *self.runs.get(&gfn.0).expect("guests touch what is mapped")
    }

    fn beneath(&self, gfn: Gfn) -> Result<Stamp, Trapped> {
        match self.source(gfn).page(gfn) {
            None => Ok(0),
            Some((store, index)) => self.mapped[&store].get(index.0).ok_or(Trapped),
        }
    }

    /// A guest reads.
    pub fn read(&self, gfn: Gfn) -> Result<Stamp, Trapped> {
        match self.present.get(&gfn.0) {
            Some(Private::Dirty(stamp) | Private::Clean(stamp) | Private::Kept(stamp)) => Ok(*stamp),
            Some(Private::Zero) => Ok(0),
            None => self.beneath(gfn),
        }
    }

    /// A guest writes a whole page. The copy is made of what is beneath, which must be there first.
    pub fn write(&mut self, gfn: Gfn, stamp: Stamp) -> Result<Write, Trapped> {
        if self.read_only.contains(&gfn.0) {
            return Ok(Write::Refused);
        }
        self.read(gfn)?;
        self.present.insert(gfn.0, Private::Dirty(stamp));
        Ok(Write::Done)
    }

    /// KVM makes a page writable that is only read.
    pub fn copy_clean(&mut self, gfn: Gfn) -> Result<(), Trapped> {
        let stamp = self.read(gfn)?;
        if !self.read_only.contains(&gfn.0) {
            self.present.entry(gfn.0).or_insert(Private::Clean(stamp));
        }
        Ok(())
    }

    /// A guest has trapped.
    pub fn wait(&mut self, gfn: Gfn) {
        self.waiting.insert(gfn.0);
    }

    /// Whether it waits on.
    pub fn is_waiting(&self, gfn: Gfn) -> bool {
        self.waiting.contains(&gfn.0)
    }

    /// All pages that guests wait for.
    pub fn waiting(&self) -> &BTreeSet<u64> {
        &self.waiting
    }

    /// Drops what is there, and maps anonymous memory in its place.
    pub fn balloon(&mut self, pages: GfnRange) {
        self.present.retain(|page, _| !pages.contains(Gfn(*page)));
        let mapped: Vec<_> = self.runs.overlapping(pages.raw()).map(|(run, _)| run.clone()).collect();
        for run in mapped {
            self.runs.insert(pages.intersect(run.into()).raw(), Source::Anonymous);
        }
    }

    /// Frozen pages that stayed count as written.
    pub fn forget_kept(&mut self) {
        for page in self.present.values_mut() {
            if let Private::Kept(stamp) = *page {
                *page = Private::Dirty(stamp);
            }
        }
    }

    /// Moves dirty pages out and maps `file` in their place, or copies them.
    pub fn freeze(&mut self, store: StoreId, file: Mapped, gaps: Gaps) -> Harvest {
        self.present.retain(|_, page| !matches!(page, Private::Clean(_)));
        let private = self.live();
        let mut moved = self.plan(&private, gaps);
        let copied = private.iter().filter(|range| moved.get(&range.start) == Some(*range) && gaps.stays(range));
        let copied: RangeSet<u64> = copied.cloned().collect();
        copied.iter().for_each(|range| moved.remove(range.clone()));
        let source = Source::Store { store, origin: Gfn(0) };
        let mut scratch = BTreeMap::new();
        for range in moved.iter() {
            for page in range.clone() {
                if let Some(Private::Dirty(stamp)) = self.present.remove(&page) {
                    scratch.insert(page, stamp);
                }
            }
            self.runs.insert(range.clone(), source);
        }
        for page in copied.iter().flat_map(Clone::clone) {
            if let Some(Private::Dirty(stamp)) = self.present.get(&page).copied() {
                scratch.insert(page, stamp);
                self.present.insert(page, Private::Kept(stamp));
            }
        }
        if !scratch.is_empty() {
            self.scratch.insert(store, scratch);
            self.mapped.insert(store, file);
        }
        let sorted = |set: &RangeSet<u64>| set.iter().map(|range| range.clone().into()).collect();
        let mut moved_private = private;
        copied.iter().for_each(|range| moved_private.remove(range.clone()));
        Harvest { moved: sorted(&moved), copied: sorted(&copied), moved_private: sorted(&moved_private) }
    }

    /// Maps `file` where frozen pages stayed. What was written since stays.
    pub fn shed(&mut self, store: StoreId, file: Mapped, pages: &[GfnRange]) {
        for pages in pages {
            for gfn in pages.iter() {
                match self.present.get(&gfn.0) {
                    Some(Private::Kept(_)) => drop(self.present.remove(&gfn.0)),
                    Some(Private::Dirty(_)) => {}
                    other => panic!("the books say that {gfn} stayed, and it is {other:?}"),
                }
            }
            self.runs.insert(pages.raw(), Source::Store { store, origin: Gfn(0) });
        }
        self.mapped.insert(store, file);
    }

    /// The stretches to move: dirty pages, and by `gaps` clean ones of the same RAM.
    fn plan(&self, private: &RangeSet<u64>, gaps: Gaps) -> RangeSet<u64> {
        let mut moved = private.clone();
        let mut bits = match gaps {
            Gaps::None | Gaps::Stay => return moved,
            Gaps::Some(bits) => bits,
            Gaps::All => u64::MAX,
        };
        for ram in &self.ram {
            let first = private.overlapping(ram.raw()).next().map(|range| range.start);
            let last = private.overlapping(ram.raw()).next_back().map(|range| range.end);
            let (Some(first), Some(last)) = (first, last) else { continue };
            let beyond: Vec<_> = private.gaps(&(first..last)).collect();
            let ends = (gaps == Gaps::All).then_some([ram.start().0..first, last..ram.end().0]);
            for gap in beyond.into_iter().chain(ends.into_iter().flatten()).filter(|gap| !gap.is_empty()) {
                bits = bits.rotate_right(1);
                if bits & 1 == 1 {
                    moved.insert(gap);
                }
            }
        }
        moved
    }
}

impl Window for FakeWindow {
    fn read_scratch(&self, scratch: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        if self.killed {
            return Err(io::ErrorKind::NotFound.into());
        }
        if self.copying {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.ledger.check(Call::ReadScratch)?;
        let pages = &self.scratch[&scratch];
        for (gfn, page) in (first.0..).zip(buf.chunks_exact_mut(PAGE_SIZE)) {
            encode(*pages.get(&gfn).expect("only private pages are read out of a scratch range"), page);
        }
        Ok(())
    }

    fn leave_scratch(&mut self, scratch: StoreId, pages: GfnRange) {
        let there = self.scratch.get_mut(&scratch).expect("a scratch range of a freeze that has not settled");
        there.retain(|page, _| !pages.contains(Gfn(*page)));
    }

    fn drop_scratch(&mut self, scratch: StoreId) {
        assert!(self.scratch.remove(&scratch).is_some(), "a scratch range is dropped once");
    }

    fn zero(&mut self, pages: GfnRange) {
        for gfn in pages.iter() {
            if self.present.contains_key(&gfn.0) || self.source(gfn) == Source::Anonymous {
                continue;
            }
            // The kernel looks at the page table alone: it would hide the store's page.
            assert_eq!(self.beneath(gfn), Err(Trapped), "zeros are for holes, and {gfn} is none");
            self.present.insert(gfn.0, Private::Zero);
        }
    }

    /// As the kernel: it looks at the page table alone, and at what traps.
    fn supply(&mut self, gfn: Gfn, page: &[u8]) -> io::Result<()> {
        if self.source(gfn) == Source::Anonymous {
            return Err(io::ErrorKind::NotFound.into());
        }
        if self.present.contains_key(&gfn.0) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        assert_eq!(self.beneath(gfn), Err(Trapped), "{gfn} is in its store, and would be there twice");
        self.ledger.check(Call::Supply)?;
        self.present.insert(gfn.0, Private::Clean(decode(page)));
        Ok(())
    }

    fn protect(&mut self, pages: GfnRange, protection: Protection) -> io::Result<()> {
        self.ledger.check(Call::Protect)?;
        match protection {
            Protection::ReadOnly => self.read_only.extend(self.ram.iter().flat_map(|ram| ram.intersect(pages).raw())),
            Protection::ReadWrite => self.read_only.retain(|page| !pages.contains(Gfn(*page))),
        }
        Ok(())
    }

    fn wake(&mut self, pages: GfnRange) {
        self.waiting.retain(|page| !pages.contains(Gfn(*page)));
    }

    fn fail(&mut self, why: &str) {
        self.failed.get_or_insert(why.to_owned());
    }
}
