//! Stores, a file and windows without a kernel, which keep to the letter of what the kernel does with private mappings.
//!
//! A page's content is a [`Stamp`]; it is spelled out in bytes only where the manager looks at it.

use super::plan::broken_rule;
use super::rng::Rng;
use guest_mem::addr::{Distance, Gfn, GfnRange, PAGE_SIZE, PageCount, PageIndex, PageOrigin, PageRange};
use guest_mem::store::{FileStore, Store, StoreFactory};
use guest_mem::swap::Swap;
use guest_mem::swap::handle::SharedSwap;
use guest_mem::{Along, Failure, Harvest, Protection, Run, Source, StoreId, Window};
use rangemap::{RangeMap, RangeSet};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Deref;
use std::rc::Rc;

/// What a page holds: who wrote it and when, or 0 for zeros.
pub type Stamp = u64;

pub fn encode(stamp: Stamp, page: &mut [u8]) {
    page.fill(0);
    page[..8].copy_from_slice(&stamp.to_le_bytes());
    page[PAGE_SIZE - 8..].copy_from_slice(&stamp.to_le_bytes());
}

pub fn decode(page: &[u8]) -> Stamp {
    assert_eq!(page[..8], page[PAGE_SIZE - 8..], "a page is copied as a whole");
    Stamp::from_le_bytes(page[..8].try_into().expect("eight bytes"))
}

/// Calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Create,
    Fill,
    Read,
    Punch,
    ReadScratch,
    ReadFile,
    Protect,
    Map,
    PutSwap,
    GetSwap,
    Supply,
    /// The read of a scratch range, whose memory is gone.
    LoseScratch,
}

/// Which calls of a kind fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failing {
    /// The one before which so many others are made.
    Once(u64),
    /// One of so many, and the one before which so many others are made is the next.
    Each(u64, u64),
}

/// What all fakes of a world share: how much they hold, and which call is to fail.
#[derive(Debug, Default)]
pub struct Ledger {
    pages: Cell<u64>,
    stores: Cell<u64>,
    punches: Cell<u64>,
    fail: Cell<Option<(Call, Failing)>>,
    /// Pages that could not be freed.
    stuck: Cell<u64>,
}

impl Ledger {
    /// Pages in all stores, but for those that could not be freed.
    pub fn pages(&self) -> u64 {
        self.pages.get()
    }

    /// Pages that could not be freed.
    pub fn stuck(&self) -> u64 {
        self.stuck.get()
    }

    /// Calls that freed pages of a store.
    pub fn punches(&self) -> u64 {
        self.punches.get()
    }

    /// Stores that have not been dropped.
    pub fn stores(&self) -> u64 {
        self.stores.get()
    }

    /// Makes the `nth` call (from 0) of this kind, from now on, fail; once.
    pub fn fail(&self, call: Call, nth: u64) {
        self.fail.set(Some((call, Failing::Once(nth))));
    }

    /// Makes every `nth` call (from 1) of this kind fail, until [`take_unfailed`](Self::take_unfailed).
    pub fn fail_each(&self, call: Call, nth: u64) {
        self.fail.set(Some((call, Failing::Each(nth, nth - 1))));
    }

    /// Whether a call that is to fail has not been made yet. It will not fail any more.
    pub fn take_unfailed(&self) -> bool {
        self.fail.take().is_some()
    }

    pub fn check(&self, call: Call) -> io::Result<()> {
        let Some((failing, which)) = self.fail.get().filter(|(failing, _)| *failing == call) else { return Ok(()) };
        let (fails, then) = match which {
            Failing::Once(0) => (true, None),
            Failing::Once(more) => (false, Some(Failing::Once(more - 1))),
            Failing::Each(nth, 0) => (true, Some(Failing::Each(nth, nth - 1))),
            Failing::Each(nth, more) => (false, Some(Failing::Each(nth, more - 1))),
        };
        self.fail.set(then.map(|then| (failing, then)));
        if fails { Err(io::Error::other("as the test ordered")) } else { Ok(()) }
    }
}

/// The pages of a store; whoever maps it holds on to them, as with a memfd.
type Pages = Rc<Inode>;

#[derive(Default)]
pub struct Inode {
    pages: RefCell<BTreeMap<u64, Stamp>>,
    /// Those that count as freed.
    stuck: Cell<u64>,
    ledger: Rc<Ledger>,
}

impl Deref for Inode {
    type Target = RefCell<BTreeMap<u64, Stamp>>;

    fn deref(&self) -> &Self::Target {
        &self.pages
    }
}

impl Drop for Inode {
    fn drop(&mut self) {
        self.ledger.pages.set(self.ledger.pages.get() + self.stuck.get() - self.borrow().len() as u64);
    }
}

/// Makes [`VecStore`]s.
pub struct VecStores {
    ledger: Rc<Ledger>,
    swap: SharedSwap,
}

impl VecStores {
    /// Stores on `ledger` that evict to `swap`.
    pub fn new<S: Swap + 'static>(ledger: &Rc<Ledger>, swap: &Rc<RefCell<S>>) -> Self {
        Self { ledger: Rc::clone(ledger), swap: SharedSwap::new(Rc::clone(swap)) }
    }
}

/// A store in memory. Panics where the manager frees what is not there.
pub struct VecStore {
    pages: Pages,
    size: PageCount,
    /// Whoever maps it writes it: the manager does not know which pages are there.
    is_shared: bool,
    /// Where a fill failed half way.
    torn: Option<PageRange>,
    /// Pages that could not be freed.
    stuck: BTreeSet<u64>,
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
        let inode = Inode { pages: RefCell::default(), stuck: Cell::default(), ledger: Rc::clone(&ledger) };
        let (is_shared, torn, stuck) = (false, None, BTreeSet::new());
        Ok(VecStore { pages: Rc::new(inode), size: pages, is_shared, torn, stuck, ledger })
    }

    fn create_shared(&mut self, pages: PageCount) -> io::Result<VecStore> {
        let mut store = self.create(pages)?;
        store.is_shared = true;
        Ok(store)
    }

    fn swap(&mut self) -> &mut SharedSwap {
        &mut self.swap
    }
}

impl Store for VecStore {
    /// A failing call leaves half of the pages behind, as the kernel does.
    fn fill(&mut self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        let count = bytes.len() / PAGE_SIZE;
        if self.stuck.range(first.0..first.0 + count as u64).next().is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let done = self.ledger.check(Call::Fill);
        let filled = if done.is_ok() { count } else { count / 2 };
        for (index, page) in (first.0..).zip(bytes.chunks_exact(PAGE_SIZE)).take(filled) {
            assert!(index < self.size.0, "page {index} lies outside of the store");
            let before = self.pages.borrow_mut().insert(index, decode(page));
            assert_eq!(before, None, "page {index} is filled where there is a hole");
        }
        self.ledger.pages.set(self.ledger.pages.get() + filled as u64);
        if done.is_err() {
            self.torn = Some(PageRange::new(first, PageCount(count as u64)));
        }
        done
    }

    fn read(&self, first: PageIndex, buf: &mut [u8]) -> io::Result<()> {
        self.ledger.check(Call::Read)?;
        for (index, page) in (first.0..).zip(buf.chunks_exact_mut(PAGE_SIZE)) {
            let stamp = *self.pages.borrow().get(&index).expect("the manager reads pages that are there");
            encode(stamp, page);
        }
        Ok(())
    }

    /// A failing call leaves everything where it is, and nobody is told.
    fn punch(&mut self, first: PageIndex, count: PageCount) {
        self.ledger.punches.set(self.ledger.punches.get() + 1);
        let range = PageRange::new(first, count);
        if self.is_shared {
            let before = self.pages.borrow().len();
            self.pages.borrow_mut().retain(|page, _| !range.contains(PageIndex(*page)));
            let freed = before - self.pages.borrow().len();
            return self.ledger.pages.set(self.ledger.pages.get() - freed as u64);
        }
        let torn = self.torn.take() == Some(range);
        let fails = self.ledger.check(Call::Punch).is_err();
        for index in range.raw() {
            let was = match fails {
                true => self.pages.borrow().contains_key(&index),
                false => self.pages.borrow_mut().remove(&index).is_some(),
            };
            let freed_before = self.stuck.contains(&index);
            assert!((was && !freed_before) || torn, "page {index} is freed once, and only if it is there");
            self.ledger.pages.set(self.ledger.pages.get() - u64::from(was));
            if was && fails {
                self.stuck.insert(index);
                self.pages.stuck.set(self.pages.stuck.get() + 1);
                self.ledger.stuck.set(self.ledger.stuck.get() + 1);
            }
        }
    }

    fn resident(&self) -> io::Result<PageCount> {
        Ok(PageCount(self.pages.borrow().len() as u64))
    }

    fn extents(&self) -> io::Result<Vec<PageRange>> {
        let there = self.pages.borrow();
        let pages: RangeSet<u64> =
            there.keys().filter(|page| !self.stuck.contains(page)).map(|&page| page..page + 1).collect();
        Ok(pages.into_iter().map(PageRange::from).collect())
    }
}

impl Drop for VecStore {
    fn drop(&mut self) {
        self.ledger.stores.set(self.ledger.stores.get() - 1);
        self.ledger.stuck.set(self.ledger.stuck.get() - self.stuck.len() as u64);
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
    fn ensure(&self, pages: PageRange) -> io::Result<()> {
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

/// What a freeze does with what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// Private pages are moved, and nothing else.
    None,
    /// Anything that is [allowed](super::plan), by these random bits.
    Some(u64),
    /// Everything is moved, from the first page of RAM with a private page to the last.
    All,
    /// Nothing is moved: pages are copied and stay.
    Stay,
}

/// A touch of a page that nothing supplies: the guest waits.
#[derive(Debug, PartialEq, Eq)]
pub struct Trapped;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Done,
    /// The page is read-only: the kernel says so to who tried.
    Refused,
}

/// What is said of these pages is so of those to which they move.
pub fn carry_pages<V>(all: &mut BTreeMap<u64, V>, from: GfnRange, by: Distance) {
    let mut carried = all.split_off(&from.start().0);
    all.append(&mut carried.split_off(&from.end().0));
    let place = |page: u64| GfnRange::one(Gfn(page)).moved(by).start().0;
    all.extend(carried.into_iter().map(|(page, value)| (place(page), value)));
}

/// The same of a set of pages.
pub fn carry_set(all: &mut BTreeSet<u64>, from: GfnRange, by: Distance) {
    let mut values = std::mem::take(all).into_iter().map(|page| (page, ())).collect();
    carry_pages(&mut values, from, by);
    all.extend(values.into_keys());
}

/// A VM's window.
#[derive(Default)]
pub struct FakeWindow {
    ram: Vec<GfnRange>,
    runs: RangeMap<u64, Source>,
    mapped: BTreeMap<StoreId, Mapped>,
    present: BTreeMap<u64, Private>,
    /// Frozen pages that stayed, written since or not.
    stayed: RangeSet<u64>,
    scratch: BTreeMap<StoreId, BTreeMap<u64, Stamp>>,
    /// What the guest may not write.
    pub read_only: BTreeSet<u64>,
    /// Pages that guests wait for.
    waiting: BTreeSet<u64>,
    /// Freezes whose pages are gone, and nothing else of the process.
    gone: BTreeSet<StoreId>,
    /// The process is gone, and its memory.
    pub killed: bool,
    /// Freezes of which the process has still to copy what they have taken.
    copying: BTreeSet<StoreId>,
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
        if let (Some((store, _)), Some(mapped)) = (run.source.store(), mapped) {
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

    /// Frozen pages that stayed, written since or not.
    pub fn stayed(&self) -> Vec<GfnRange> {
        self.stayed.iter().map(|range| range.clone().into()).collect()
    }

    /// All that freezes have taken and that has not been written back is gone.
    pub fn lose_scratch(&mut self) {
        self.gone.extend(self.scratch.keys());
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

    /// The page of shared memory that is mapped there.
    fn shared(&self, gfn: Gfn) -> Option<(&Pages, u64)> {
        let source = self.source(gfn);
        let (store, index) = source.page(gfn).filter(|_| matches!(source, Source::Shared { .. }))?;
        match &self.mapped[&store] {
            Mapped::Store(pages) => Some((pages, index.0)),
            Mapped::File(_) => panic!("{gfn} shows a file, and as shared memory"),
        }
    }

    /// What is mapped of RAM, without shared memory.
    fn own_ram(&self) -> Vec<GfnRange> {
        let own = |ram: &GfnRange| {
            let runs = self.runs.overlapping(ram.raw()).filter(|(_, source)| !matches!(source, Source::Shared { .. }));
            // Ranges of RAM that lie side by side are two.
            runs.map(|(pages, _)| ram.intersect(pages.clone().into()).raw()).collect::<RangeSet<u64>>()
        };
        self.ram.iter().flat_map(own).map(GfnRange::from).collect()
    }

    /// Maps a run where nothing is mapped; or fails, and nothing is.
    pub fn show(&mut self, run: Run, mapped: Option<Mapped>) -> io::Result<()> {
        self.ledger.check(Call::Map)?;
        self.map(run, mapped);
        Ok(())
    }

    /// Nothing is mapped at these pages any more; or all is as it was.
    pub fn hide(&mut self, pages: GfnRange) -> io::Result<()> {
        self.ledger.check(Call::Map)?;
        let shared = self.runs.overlapping(pages.raw()).filter(|(_, source)| matches!(source, Source::Shared { .. }));
        let shared: Vec<StoreId> = shared.filter_map(|(_, source)| source.store()).map(|(store, _)| store).collect();
        self.runs.remove(pages.raw());
        // Its pages go with the last mapping.
        let names = |store| self.runs.iter().any(|(_, source)| source.store().is_some_and(|(id, _)| id == store));
        let gone: Vec<StoreId> = shared.into_iter().filter(|&store| !names(store)).collect();
        gone.iter().for_each(|store| drop(self.mapped.remove(store)));
        self.present.retain(|page, _| !pages.contains(Gfn(*page)));
        self.stayed.remove(pages.raw());
        self.read_only.retain(|page| !pages.contains(Gfn(*page)));
        Ok(())
    }

    /// Maps from `to` on what is mapped at `from`, private pages and all, and nothing there any more; or all is as it was.
    pub fn carry(&mut self, from: GfnRange, to: Gfn) -> io::Result<()> {
        self.ledger.check(Call::Map)?;
        let by = Distance::between(from.start(), to);
        assert!(!self.runs.overlaps(&from.moved(by).raw()), "nothing is in the way");
        let runs: Vec<Run> = self.runs_within(from);
        self.runs.remove(from.raw());
        for run in runs {
            self.runs.insert(run.pages.moved(by).raw(), run.source.moved(by));
        }
        carry_pages(&mut self.present, from, by);
        carry_set(&mut self.read_only, from, by);
        let stayed = from.iter().filter(|gfn| self.stayed.contains(&gfn.0));
        let stayed: Vec<GfnRange> = stayed.map(|gfn| GfnRange::one(gfn).moved(by)).collect();
        self.stayed.remove(from.raw());
        self.stayed.extend(stayed.into_iter().map(GfnRange::raw));
        Ok(())
    }

    fn runs_within(&self, pages: GfnRange) -> Vec<Run> {
        let there = self.runs.overlapping(pages.raw());
        there.map(|(part, &source)| Run { pages: pages.intersect(part.clone().into()), source }).collect()
    }

    fn beneath(&self, gfn: Gfn) -> Result<Stamp, Trapped> {
        if let Some((pages, index)) = self.shared(gfn) {
            return Ok(pages.borrow().get(&index).copied().unwrap_or(0));
        }
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
        if let Some((pages, index)) = self.shared(gfn) {
            let is_new = pages.borrow_mut().insert(index, stamp).is_none();
            self.ledger.pages.set(self.ledger.pages.get() + u64::from(is_new));
            return Ok(Write::Done);
        }
        self.present.insert(gfn.0, Private::Dirty(stamp));
        Ok(Write::Done)
    }

    /// KVM makes a page writable that is only read.
    pub fn copy_clean(&mut self, gfn: Gfn) -> Result<(), Trapped> {
        let stamp = self.read(gfn)?;
        if !self.read_only.contains(&gfn.0) && self.shared(gfn).is_none() {
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

    /// Drops what is there, and maps anonymous memory in its place, but not where shared memory is.
    pub fn balloon(&mut self, pages: GfnRange) {
        self.present.retain(|page, _| !pages.contains(Gfn(*page)));
        self.stayed.remove(pages.raw());
        let own = self.runs.overlapping(pages.raw()).filter(|(_, source)| !matches!(source, Source::Shared { .. }));
        let mapped: Vec<_> = own.map(|(run, _)| run.clone()).collect();
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

    /// The process has told of its last freezes before it has copied what they have taken.
    pub fn copies_behind(&mut self) {
        self.copying = self.scratch.keys().copied().collect();
    }

    /// Whether it has still to copy pages that somebody waits for.
    pub fn is_copying(&self) -> bool {
        !self.copying.is_empty()
    }

    /// It has copied all. Whether there was something to copy.
    pub fn end_copies(&mut self) -> bool {
        !std::mem::take(&mut self.copying).is_empty()
    }

    /// Moves dirty pages out and maps `file` in their place, or copies them. If anything is taken so are the pages `along`.
    pub fn freeze(&mut self, store: StoreId, file: Mapped, gaps: Gaps, along: &Along) -> Harvest {
        for gfn in along.copies.iter().flat_map(|pages| pages.iter()) {
            if let Some(Private::Kept(stamp)) = self.present.get(&gfn.0).copied() {
                self.present.insert(gfn.0, Private::Dirty(stamp));
            }
        }
        self.present.retain(|_, page| !matches!(page, Private::Clean(_)));
        let private = self.live();
        let (mut moved, mut copied) = self.plan(&private, gaps);
        let sorted = |set: &RangeSet<u64>| -> Vec<GfnRange> { set.iter().map(|range| range.clone().into()).collect() };
        let planned = self.harvest(&private, &moved, &copied);
        assert_eq!(broken_rule(&planned, &sorted(&private), &self.own_ram()), None, "{planned:?} of {private:?}");
        if !private.is_empty() {
            moved.extend(along.moves.iter().map(|pages| pages.raw()));
            along.moves.iter().for_each(|pages| copied.remove(pages.raw()));
        }
        let harvest = self.harvest(&private, &moved, &copied);
        let mut scratch = BTreeMap::new();
        for range in moved.iter() {
            for page in range.clone() {
                if let Some(Private::Dirty(stamp)) = self.present.remove(&page) {
                    scratch.insert(page, stamp);
                }
            }
            self.runs.insert(range.clone(), Source::Store { store, origin: PageOrigin(0) });
            self.stayed.remove(range.clone());
        }
        for page in copied.iter().flat_map(Clone::clone) {
            if let Some(Private::Dirty(stamp)) = self.present.get(&page).copied() {
                scratch.insert(page, stamp);
                self.present.insert(page, Private::Kept(stamp));
            }
        }
        self.stayed.extend(copied.iter().cloned());
        if !scratch.is_empty() {
            self.scratch.insert(store, scratch);
            self.mapped.insert(store, file);
        }
        harvest
    }

    /// What is taken of `private` pages.
    fn harvest(&self, private: &RangeSet<u64>, moved: &RangeSet<u64>, copied: &RangeSet<u64>) -> Harvest {
        let sorted = |set: &RangeSet<u64>| -> Vec<GfnRange> { set.iter().map(|range| range.clone().into()).collect() };
        let mut moved_private = private.clone();
        copied.iter().for_each(|range| moved_private.remove(range.clone()));
        Harvest { moved: sorted(moved), copied: sorted(copied), moved_private: sorted(&moved_private) }
    }

    /// Maps `file` where frozen pages stayed, and stay still. What was written since stays. Which pages it did so for.
    pub fn dedup(&mut self, store: StoreId, file: Mapped, pages: &[GfnRange]) -> Vec<GfnRange> {
        let stayed = pages.iter().flat_map(|pages| {
            self.stayed.overlapping(pages.raw()).map(|range| GfnRange::from(range.clone()).intersect(*pages))
        });
        let stayed: Vec<GfnRange> = stayed.collect();
        for pages in &stayed {
            for gfn in pages.iter() {
                match self.present.get(&gfn.0) {
                    Some(Private::Kept(_)) => drop(self.present.remove(&gfn.0)),
                    Some(Private::Dirty(_)) => {}
                    other => panic!("{gfn} stayed, and it is {other:?}"),
                }
            }
            self.runs.insert(pages.raw(), Source::Store { store, origin: PageOrigin(0) });
            self.stayed.remove(pages.raw());
        }
        self.mapped.insert(store, file);
        stayed
    }

    /// The stretches to move and those to copy.
    fn plan(&self, private: &RangeSet<u64>, gaps: Gaps) -> (RangeSet<u64>, RangeSet<u64>) {
        let (mut moved, mut copied) = (private.clone(), RangeSet::new());
        let own = self.own_ram();
        match gaps {
            Gaps::None => {}
            Gaps::Stay => std::mem::swap(&mut moved, &mut copied),
            Gaps::All => {
                let touched = own.iter().filter(|ram| private.overlaps(&ram.raw()));
                moved = touched.map(|ram| ram.raw()).collect();
            }
            Gaps::Some(bits) => {
                let mut rng = Rng::new(bits);
                for range in private.iter() {
                    // Whole, in part, or not at all.
                    let length = range.end - range.start;
                    let most = rng.pick(&[0, 0, length / 2, length, length]);
                    let first = range.start + rng.below(length);
                    copied.extend(Some(first..range.end.min(first + most)).filter(|range| !range.is_empty()));
                }
                copied.iter().for_each(|range| moved.remove(range.clone()));
                let between: Vec<_> = moved.iter().zip(moved.iter().skip(1)).map(|(a, b)| a.end..b.start).collect();
                for gap in between {
                    let joined = GfnRange::from(gap.start - 1..gap.end + 1);
                    let in_ram = own.iter().any(|ram| ram.intersect(joined) == joined);
                    if in_ram && !copied.overlaps(&gap) && rng.below(2) == 0 {
                        moved.insert(gap);
                    }
                }
            }
        }
        (moved, copied)
    }
}

impl Window for FakeWindow {
    fn read_scratch(&self, scratch: StoreId, first: Gfn, buf: &mut [u8]) -> io::Result<()> {
        if self.killed || self.gone.contains(&scratch) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if self.copying.contains(&scratch) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.ledger.check(Call::LoseScratch).map_err(|_| io::ErrorKind::NotFound)?;
        self.ledger.check(Call::ReadScratch)?;
        let pages = &self.scratch[&scratch];
        for (gfn, page) in (first.0..).zip(buf.chunks_exact_mut(PAGE_SIZE)) {
            encode(*pages.get(&gfn).expect("only private pages are read out of a scratch range"), page);
        }
        Ok(())
    }

    fn leave_scratch(&mut self, scratch: StoreId, pages: GfnRange) {
        let there = self.scratch.get_mut(&scratch).expect("a scratch range of a freeze that has not been written back");
        there.retain(|page, _| !pages.contains(Gfn(*page)));
    }

    fn drop_scratch(&mut self, scratch: StoreId) {
        assert!(self.scratch.remove(&scratch).is_some(), "a scratch range is dropped once");
        self.copying.remove(&scratch);
    }

    fn zero(&mut self, pages: GfnRange) {
        for gfn in pages.iter() {
            assert_eq!(
                self.shared(gfn).map(|(_, index)| index),
                None,
                "nobody supplies shared memory, and {gfn} is some"
            );
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
        if !matches!(self.source(gfn), Source::Store { .. }) {
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
            Protection::ReadOnly => {
                let mapped: Vec<_> = self.runs.overlapping(pages.raw()).map(|(run, _)| run.clone()).collect();
                self.read_only.extend(mapped.into_iter().flat_map(|run| pages.intersect(run.into()).raw()));
            }
            Protection::ReadWrite => self.read_only.retain(|page| !pages.contains(Gfn(*page))),
        }
        Ok(())
    }

    fn wake(&mut self, pages: GfnRange) {
        self.waiting.retain(|page| !pages.contains(Gfn(*page)));
    }

    fn fail(&mut self, failure: Failure) {
        self.failed.get_or_insert(failure.to_string());
    }
}
