//! The window on a real kernel.

mod moved;
mod shared;

use super::*;
use crate::addr::{PageCount, PageIndex, PageOrigin};
use crate::skips::{Lack, skip};
use crate::sys::{Alias, Memfd, inject};
use crate::window::{Along, Harvest};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const ALL: Features = Features { userfaultfd: true, pagemap_scan: true };
const PAGES: u64 = 1024;
const ROOT: StoreId = StoreId(0);

/// A window over a store in which page `n` holds the word `n`, and anonymous memory behind it.
struct Rig {
    window: HostWindow,
    uffd: Arc<Userfaultfd>,
    root: Memfd,
}

fn frames(range: std::ops::Range<u64>) -> GfnRange {
    range.into()
}

impl Rig {
    /// `None` where traps are not to be had and tests may do without.
    fn new(features: Features) -> Option<Self> {
        let uffd = match Userfaultfd::new() {
            Ok(uffd) => Arc::new(uffd),
            Err(error) => {
                skip(Lack::Userfaultfd, error);
                return None;
            }
        };
        let root = Memfd::new("root", PageCount(PAGES)).unwrap();
        let mut bytes = vec![0; PAGES as usize * 4096];
        for (number, page) in bytes.chunks_exact_mut(4096).enumerate() {
            page[..8].copy_from_slice(&(number as u64).to_ne_bytes());
        }
        Alias::new(&root, Arc::clone(&uffd)).unwrap().fill(PageIndex(0), &bytes).unwrap();
        let ram = [frames(0..2 * PAGES)];
        let mut window = HostWindow::reserve(&ram, Place::Anywhere, features).unwrap();
        let store = Source::Store { store: ROOT, origin: PageOrigin(0) };
        let runs = [
            Run { pages: frames(0..PAGES), source: store },
            Run { pages: frames(PAGES..2 * PAGES), source: Source::Anonymous },
        ];
        window.map(&runs, &[(ROOT, root.as_fd())], HugePages::Never).unwrap();
        Some(Self { window, uffd, root })
    }

    fn write(&self, frame: u64, word: u64) {
        self.window.memory().write_obj(word, GuestAddress(frame << 12)).unwrap();
    }

    fn word(&self, frame: u64) -> u64 {
        self.window.memory().read_obj(GuestAddress(frame << 12)).unwrap()
    }

    fn freeze(&mut self, dirty: Dirty<'_>, store: u32, max_runs: u32) -> (FrozenPages, Memfd) {
        self.freeze_with(dirty, store, max_runs, SmallExtents::Remap)
    }

    fn freeze_with(
        &mut self,
        dirty: Dirty<'_>,
        store: u32,
        max_runs: u32,
        short: SmallExtents,
    ) -> (FrozenPages, Memfd) {
        let file = Memfd::new("store", PageCount(2 * PAGES)).unwrap();
        let frozen = self.window.freeze(dirty, StoreId(store), file.as_fd(), asked(max_runs, short)).unwrap();
        (frozen, file)
    }

    fn scratch_word(&self, store: u32, frame: u64) -> io::Result<u64> {
        let mut page = vec![0; 4096];
        self.window.read_scratch(StoreId(store), Gfn(frame), &mut page)?;
        Ok(u64::from_ne_bytes(page[..8].try_into().unwrap()))
    }
}

fn asked(max_runs: u32, short: SmallExtents) -> Asked<'static> {
    static NO_PAGES: Along = Along { copies: Vec::new(), moves: Vec::new() };
    Asked { max_runs, short, along: &NO_PAGES }
}

/// What KVM's log would say if the guest had written these frames.
fn log_of(written: impl IntoIterator<Item = u64>) -> [SlotLog; 1] {
    let mut words = vec![0; 2 * PAGES as usize / 64];
    written.into_iter().for_each(|frame| words[frame as usize / 64] |= 1 << (frame % 64));
    [SlotLog { first: Gfn(0), words }]
}

#[test]
fn a_freeze_takes_exactly_what_was_written() {
    for features in [ALL, Features { pagemap_scan: false, ..ALL }] {
        let Some(mut rig) = Rig::new(features) else { return };
        let written: Vec<u64> = (10..300).chain([500, 501, 900]).chain(PAGES + 5..PAGES + 9).collect();
        written.iter().for_each(|frame| rig.write(*frame, 7000 + frame));
        (300..400).for_each(|frame| assert_eq!(rig.word(frame), frame));
        let (frozen, _file) = rig.freeze(Dirty::Logged(&[]), 1, 1000);
        let expect = [10..300, 500..502, 900..901, PAGES + 5..PAGES + 9].map(frames);
        assert_eq!(frozen.harvest.private(), expect);
        for frame in written {
            assert_eq!(rig.scratch_word(1, frame).unwrap(), 7000 + frame);
        }
        assert!(rig.scratch_word(1, 400).is_err(), "a page that was not harvested");
        assert!(rig.scratch_word(2, 10).is_err(), "a freeze that was not");
        let runs: Vec<Run> = rig.window.runs().collect();
        assert_eq!(runs.iter().map(|run| run.pages.count().0).sum::<u64>(), 2 * PAGES);
        let again = rig.freeze(Dirty::Logged(&[]), 2, 1000).0;
        assert_eq!((again.harvest, again.scratch_base), (Harvest::default(), 0));
        rig.window.drop_scratch(StoreId(1));
        assert!(rig.scratch_word(1, 10).is_err());
    }
}

#[test]
fn a_touch_of_a_moved_page_waits_for_its_store() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    (64..128).for_each(|frame| rig.write(frame, 9000 + frame));
    let (frozen, file) = rig.freeze(Dirty::Every, 1, 1000);
    assert_eq!(frozen.harvest.private(), [frames(64..128)]);
    let memory = rig.window.memory().clone();
    let read = thread::spawn(move || memory.read_obj::<u64>(GuestAddress(70 << 12)).unwrap());
    let mut traps = Vec::new();
    while traps.is_empty() {
        rig.window.uffd.as_ref().unwrap().read(&mut traps, 1).unwrap();
    }
    assert_eq!(traps[0].address, rig.window.base() + (70 << 12));
    let mut bytes = vec![0; 64 << 12];
    rig.window.read_scratch(StoreId(1), Gfn(64), &mut bytes).unwrap();
    Alias::new(&file, Arc::clone(&rig.uffd)).unwrap().fill(PageIndex(64), &bytes).unwrap();
    assert!(!read.is_finished());
    rig.window.wake(frames(64..128));
    assert_eq!(read.join().unwrap(), 9070);
    assert_eq!(rig.word(100), 9100);
}

#[test]
fn zero_pages_are_supplied_where_nothing_is() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    (64..128).for_each(|frame| rig.write(frame, 1));
    let (_frozen, file) = rig.freeze(Dirty::Every, 1, 1000);
    let page = [5; 4096];
    Alias::new(&file, Arc::clone(&rig.uffd)).unwrap().fill(PageIndex(100), &page).unwrap();
    rig.write(100, 77);
    rig.window.zero(frames(64..128));
    rig.window.zero(frames(PAGES..PAGES + 10)); // anonymous: nothing to do
    assert_eq!((rig.word(64), rig.word(100), rig.word(127), rig.word(200)), (0, 77, 0, 200));
    let (frozen, _file) = rig.freeze(Dirty::Logged(&[]), 2, 1000);
    assert_eq!(frozen.harvest.private(), [frames(100..101)]);
}

/// One stretch in the books may be two mappings. The kernel refuses to supply zeros to both at once, and the guest that waited
/// for them waited for ever.
#[test]
fn zero_pages_are_supplied_across_mappings() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let files = [1, 2].map(|_| Memfd::new("store", PageCount(PAGES)).unwrap());
    let stores = [(StoreId(1), files[0].as_fd()), (StoreId(2), files[1].as_fd())];
    let run = |pages, store| Run { pages, source: Source::Store { store: StoreId(store), origin: PageOrigin(0) } };
    rig.window.map(&[run(frames(100..110), 1), run(frames(110..120), 2)], &stores, HugePages::Never).unwrap();
    let (start, len) = rig.window.area.host(frames(100..120)).unwrap();
    rig.window.uffd.as_ref().unwrap().zero(start, len).unwrap();
    assert_eq!([100, 109, 110, 119].map(|frame| rig.word(frame)), [0; 4]);
    assert!(rig.window.uffd.as_ref().unwrap().zero(rig.window.base() - 4096, 4096).is_err());
}

#[test]
fn clean_private_copies_are_dropped_and_gaps_move_along() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    // KVM asks for write on reads: private, and unchanged.
    (10..20).for_each(|frame| rig.write(frame, frame));
    rig.window.memory().find_region(GuestAddress(0)).unwrap().bitmap().take(|_, _| {});
    (20..40).chain(42..62).for_each(|frame| rig.write(frame, 1));
    let (frozen, _file) = rig.freeze(Dirty::Logged(&log_of([])), 1, 1000);
    assert_eq!(frozen.harvest.private(), [frames(20..40), frames(42..62)]);
    assert_eq!(frozen.harvest.moved, [frames(20..62)]);
    assert!((10..20).all(|frame| rig.word(frame) == frame));
    let (again, _file) = rig.freeze(Dirty::Every, 2, 1000);
    assert_eq!(again.harvest.private(), [], "the clean copies are gone");
}

#[test]
fn a_log_that_tells_too_much_is_found_out() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    (128..200).for_each(|frame| rig.write(frame, 3));
    // All of two words, of which the second is private in part only, and a page that is not private at all.
    let (frozen, _file) = rig.freeze(Dirty::Logged(&log_of((128..256).chain([700]))), 1, 1000);
    assert_eq!(frozen.harvest.private(), [frames(128..200)]);
    assert_eq!(frozen.harvest.moved, [frames(128..256)]);
}

#[test]
fn short_stretches_are_copied_and_stay() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let short = || (10..14).chain(100..116).chain(PAGES + 50..PAGES + 51);
    short().chain(200..300).for_each(|frame| rig.write(frame, 5000 + frame));
    let (frozen, _file) = rig.freeze_with(Dirty::Logged(&[]), 1, 1000, SmallExtents::CopyInPlace);
    let copied = [10..14, 100..116, PAGES + 50..PAGES + 51].map(frames);
    assert_eq!(
        (frozen.harvest.copied.as_slice(), frozen.harvest.moved.as_slice()),
        (&copied[..], &[frames(200..300)][..])
    );
    assert_eq!(frozen.harvest.private(), [10..14, 100..116, 200..300, PAGES + 50..PAGES + 51].map(frames));

    // Nobody fills the store: what stayed is there all the same, and what was copied is of the time of the freeze.
    rig.write(11, 1);
    assert!(short().filter(|frame| *frame != 11).all(|frame| rig.word(frame) == 5000 + frame));
    assert!(short().chain([200, 299]).all(|frame| rig.scratch_word(1, frame).unwrap() == 5000 + frame));
    assert!(rig.scratch_word(1, 15).is_err());

    // What was not written since is neither copied again nor dropped, though the store beneath has something else.
    let (again, _file) = rig.freeze_with(Dirty::Logged(&log_of(11..12)), 2, 1000, SmallExtents::CopyInPlace);
    assert_eq!((again.harvest.copied.as_slice(), again.harvest.moved.as_slice()), (&[frames(11..12)][..], &[][..]));
    assert_eq!((rig.scratch_word(2, 11).unwrap(), rig.word(11), rig.word(12)), (1, 1, 5012));
    rig.window.balloon(&[frames(100..108)], 1000);
    assert_eq!((rig.word(100), rig.word(108)), (0, 5108));

    // Where all are to be moved, they are, written or not.
    let (all, _file) = rig.freeze_with(Dirty::Logged(&[]), 3, 1000, SmallExtents::Remap);
    assert_eq!(all.harvest.moved, [10..14, 108..116, PAGES + 50..PAGES + 51].map(frames));
    assert_eq!((rig.scratch_word(3, 11).unwrap(), rig.scratch_word(3, 12).unwrap()), (1, 5012));
    let (none, _file) = rig.freeze_with(Dirty::Logged(&[]), 4, 1000, SmallExtents::Remap);
    assert!(none.harvest.is_empty());
}

/// Copies of thousands of pages take huge pages, of which the last is not full.
#[test]
fn many_copies() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    (0..2 * PAGES).step_by(3).for_each(|frame| rig.write(frame, frame + 1));
    let (frozen, _file) = rig.freeze_with(Dirty::Every, 1, 10_000, SmallExtents::CopyInPlace);
    assert_eq!((frozen.harvest.copied.len() as u64, frozen.harvest.moved.len()), (2 * PAGES / 3 + 1, 0));
    assert!((0..2 * PAGES).step_by(3).all(|frame| rig.scratch_word(1, frame).unwrap() == frame + 1));
    // So many that stay are too many mappings for a child with a smaller budget: they are joined and moved.
    rig.write(0, 7);
    let (frozen, _file) = rig.freeze_with(Dirty::Logged(&[]), 2, 1000, SmallExtents::CopyInPlace);
    assert_eq!((frozen.harvest.copied.len(), frozen.harvest.private().len() as u64), (0, 2 * PAGES / 3 + 1));
    assert!(frozen.harvest.moved.len() < 500);
    assert_eq!((rig.scratch_word(2, 0).unwrap(), rig.scratch_word(2, 3).unwrap()), (7, 4));
}

/// The log's last word told of pages beyond the end of RAM, as it does after a freeze that took every page and failed:
/// pages that are not there were to be copied.
/// Pages of this process's memory from `start` on that are private.
fn private_pages(start: u64, pages: u64) -> u64 {
    let mut count = 0;
    let pagemap = Pagemap::open(ScanMethod::Scan).unwrap();
    pagemap.private(start..start + (pages << 12), |bytes| count += (bytes.end - bytes.start) >> 12).unwrap();
    count
}

#[test]
fn memory_of_settled_copies_is_for_the_next_freeze() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let scattered: Vec<u64> = (10..800).step_by(10).collect();
    let count = scattered.len() as u64;
    let freeze = |rig: &mut Rig, store: u32, frames: &[u64]| {
        frames.iter().for_each(|frame| rig.write(*frame, u64::from(store) * 10_000 + frame));
        let (frozen, _file) = rig.freeze_with(Dirty::Logged(&[]), store, 1000, SmallExtents::CopyInPlace);
        assert_eq!(frozen.harvest.copied.len(), frames.len());
        for frame in frames {
            assert_eq!(rig.scratch_word(store, *frame).unwrap(), u64::from(store) * 10_000 + frame);
            rig.window.leave_scratch(StoreId(store), frozen.harvest.copied[0]);
        }
        frozen.scratch_base + frozen.copies.gpa()
    };
    let first = freeze(&mut rig, 1, &scattered);
    rig.window.drop_scratch(StoreId(1));
    assert_eq!(private_pages(first, count), count);
    let mut second = freeze(&mut rig, 2, &scattered);
    assert_eq!(second, first, "the memory is used again");
    // One that comes before that was written back has memory of its own, and of both the larger stays.
    let third = freeze(&mut rig, 3, &scattered[..5]);
    assert_ne!(third, second);
    rig.window.drop_scratch(StoreId(2));
    rig.window.drop_scratch(StoreId(3));
    second = freeze(&mut rig, 4, &scattered[..5]);
    assert_eq!(second, first);
    rig.window.drop_scratch(StoreId(4));
    assert_eq!(private_pages(first, count), 5, "what a freeze did not need is given back");
    rig.window.drop_spare();
    assert_eq!(private_pages(first, count), 0);
}

/// Kept pages that grow by their neighbours are no more stretches than before: they were counted twice, and all was moved.
#[test]
fn stretches_that_grow_are_still_few_enough_to_stay() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let single: Vec<u64> = (10..410).step_by(10).collect();
    let pairs: Vec<u64> = single.iter().flat_map(|&frame| [frame, frame + 1]).collect();
    for (store, frames) in (1..).zip([&single, &pairs]) {
        frames.iter().for_each(|frame| rig.write(*frame, 7));
        let (frozen, _file) = rig.freeze_with(Dirty::Logged(&[]), store, 130, SmallExtents::CopyInPlace);
        assert_eq!((frozen.harvest.copied.len(), frozen.harvest.moved.len()), (single.len(), 0));
    }
    // Others are too many.
    (15..415).step_by(10).for_each(|frame| rig.write(frame, 7));
    let (frozen, _file) = rig.freeze_with(Dirty::Logged(&[]), 3, 130, SmallExtents::CopyInPlace);
    assert!(frozen.harvest.copied.is_empty() && !frozen.harvest.moved.is_empty());
}

#[test]
fn a_freeze_has_its_memory_before_if_it_is_to_copy_much() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let scattered: Vec<u64> = (0..2 * PAGES).step_by(4).collect();
    let file = Memfd::new("store", PageCount(2 * PAGES)).unwrap();
    for (log, has_memory) in [(log_of(0..2 * PAGES), false), (log_of(scattered.iter().copied()), true)] {
        scattered.iter().for_each(|frame| rig.write(*frame, 3000 + frame));
        rig.window.prepare_copies(&log);
        // Neither an address nor a page is asked for any more.
        inject::fail_after(0);
        let frozen =
            rig.window.freeze(Dirty::Logged(&[]), StoreId(1), file.as_fd(), asked(10_000, SmallExtents::CopyInPlace));
        let failed = inject::stop();
        assert_eq!((frozen.is_ok(), failed), (has_memory, !has_memory), "{frozen:?}");
    }
    assert!(scattered.iter().all(|frame| rig.scratch_word(1, *frame).unwrap() == 3000 + frame));
}

#[test]
fn single_pages_of_a_store_trap_and_those_between_do_not() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let file = Memfd::new("store", PageCount(2 * PAGES)).unwrap();
    let source = Source::Store { store: StoreId(1), origin: PageOrigin(0) };
    let run = |frame: u64| {
        let source = if frame.is_multiple_of(2) { source } else { Source::Anonymous };
        Run { pages: frames(frame..frame + 1), source }
    };
    let runs: Vec<Run> = (0..100).map(run).collect();
    rig.window.map(&runs, &[(StoreId(1), file.as_fd())], HugePages::Never).unwrap();
    (0..50).for_each(|half| assert_eq!(rig.word(2 * half + 1), 0));
    assert_eq!(rig.word(200), 200, "what was mapped behind them is");
    let mut traps = Vec::new();
    let uffd = Userfaultfd::from_fd(rig.window.userfaultfd().unwrap().try_clone_to_owned().unwrap());
    uffd.read(&mut traps, 16).unwrap();
    assert_eq!(traps, []);
    for frame in [0, 42, 98] {
        let memory = rig.window.memory().clone();
        let reader = thread::spawn(move || memory.read_obj::<u64>(GuestAddress(frame << 12)).unwrap());
        while traps.is_empty() {
            uffd.read(&mut traps, 16).unwrap();
        }
        assert_eq!(traps.drain(..).map(|trap| trap.address).collect::<Vec<_>>(), [rig.window.base() + (frame << 12)]);
        rig.window.zero(frames(frame..frame + 1));
        assert_eq!(reader.join().unwrap(), 0);
    }
}

#[test]
fn only_pages_that_were_seen_are_copied() {
    let Some(rig) = Rig::new(ALL) else { return };
    let ram = [frames(0..70)];
    let mut window = HostWindow::reserve(&ram, Place::Anywhere, ALL).unwrap();
    let run = Run { pages: ram[0], source: Source::Store { store: ROOT, origin: PageOrigin(0) } };
    window.map(&[run], &[(ROOT, rig.root.as_fd())], HugePages::Never).unwrap();
    window.memory().write_obj(9u64, GuestAddress(66 << 12)).unwrap();
    let file = Memfd::new("store", PageCount(70)).unwrap();
    let log = [SlotLog { first: Gfn(0), words: vec![0, u64::MAX] }];
    let frozen =
        window.freeze(Dirty::Logged(&log), StoreId(1), file.as_fd(), asked(100, SmallExtents::CopyInPlace)).unwrap();
    assert_eq!(frozen.harvest.private(), [frames(66..67)]);
}

#[test]
fn the_limit_of_mappings_holds() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    (0..PAGES).step_by(4).for_each(|frame| rig.write(frame, 1));
    let (frozen, _file) = rig.freeze(Dirty::Every, 1, 42);
    assert_eq!(frozen.harvest.private().len() as u64, PAGES / 4);
    assert_eq!(frozen.harvest.moved.len(), 20);
    assert!(rig.window.runs().count() <= 42);
}

/// Every call that a freeze makes fails once. Afterwards everything is as it was, and the next freeze forgets nothing.
#[test]
fn a_freeze_that_fails_changes_nothing() {
    let written = || (10..20).chain(200..210).chain(PAGES - 5..PAGES + 5).chain([1500]);
    for (short, calls) in
        [SmallExtents::Remap, SmallExtents::CopyInPlace].into_iter().flat_map(|short| (0..40).map(move |n| (short, n)))
    {
        let Some(mut rig) = Rig::new(ALL) else { return };
        written().for_each(|frame| rig.write(frame, 4000 + frame));
        let runs: Vec<Run> = rig.window.runs().collect();
        let file = Memfd::new("store", PageCount(2 * PAGES)).unwrap();
        inject::fail_after(calls);
        let frozen = rig.window.freeze(Dirty::Logged(&[]), StoreId(1), file.as_fd(), asked(1000, short));
        let failed = inject::stop();
        let Err(error) = frozen else {
            // What is advice only may be refused.
            assert!(!failed || short == SmallExtents::CopyInPlace, "a failure that nobody noticed");
            assert!(calls > if short == SmallExtents::Remap { 15 } else { 1 }, "only {calls} calls");
            continue;
        };
        assert!(!matches!(error, WindowError::Torn { .. }), "{error}");
        assert_eq!(rig.window.runs().collect::<Vec<_>>(), runs);
        assert!(written().all(|frame| rig.word(frame) == 4000 + frame), "{calls}: {error}");
        assert_eq!(rig.word(500), 500);
        let (frozen, _file) = rig.freeze(Dirty::Logged(&[]), 2, 1000);
        let pages: u64 = frozen.harvest.private().iter().map(|range| range.count().0).sum();
        assert_eq!(pages, written().count() as u64, "{calls}: {error}");
        assert!(written().all(|frame| rig.scratch_word(2, frame).unwrap() == 4000 + frame));
    }
}

#[test]
fn no_private_page_is_missed_while_the_kernel_moves_pages_about() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let compact = "/proc/sys/vm/compact_memory";
    if let Err(error) = fs::write(compact, "1") {
        return skip(Lack::Proc, format!("{compact}: {error}"));
    }
    let stop = Arc::new(AtomicBool::new(false));
    let compactor = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = fs::write(compact, "1");
                thread::sleep(Duration::from_millis(1));
            }
        })
    };
    for store in 1..60 {
        (0..PAGES).for_each(|frame| rig.write(frame, frame ^ u64::from(store)));
        let (frozen, file) = rig.freeze(Dirty::Every, store, 1000);
        assert_eq!(frozen.harvest.private(), [frames(0..PAGES)]);
        let mut bytes = vec![0; PAGES as usize * 4096];
        rig.window.read_scratch(StoreId(store), Gfn(0), &mut bytes).unwrap();
        Alias::new(&file, Arc::clone(&rig.uffd)).unwrap().fill(PageIndex(0), &bytes).unwrap();
        rig.window.drop_scratch(StoreId(store));
        assert!((0..PAGES).all(|frame| rig.word(frame) == frame ^ u64::from(store)));
    }
    stop.store(true, Ordering::Relaxed);
    compactor.join().unwrap();
}

#[test]
fn a_planted_page_is_found_out() {
    let Some(rig) = Rig::new(ALL) else { return };
    let alias = Alias::new(&rig.root, Arc::clone(&rig.uffd)).unwrap();
    let error = alias.fill(PageIndex(3), &[0; 4096]).unwrap_err();
    assert!(matches!(error, crate::sys::FillError::Planted(PageIndex(3))), "{error}");
}

#[test]
fn runs_that_make_no_sense_are_refused() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let store = |origin| Source::Store { store: ROOT, origin: PageOrigin(origin) };
    for (pages, source) in [
        (frames(2 * PAGES - 1..2 * PAGES + 1), Source::Anonymous),
        (frames(5..5), Source::Anonymous),
        (frames(5..6), store(6)),
        (frames(5..6), Source::Store { store: StoreId(9), origin: PageOrigin(0) }),
    ] {
        let run = Run { pages, source };
        let error = rig.window.map(&[run], &[(ROOT, rig.root.as_fd())], HugePages::Never).unwrap_err();
        assert!(matches!(error, WindowError::BadRun(bad) if bad == run), "{error}");
    }
}

#[test]
fn what_is_given_back_reads_zero_and_is_not_dirty() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    (0..200).chain(PAGES + 10..PAGES + 20).for_each(|frame| rig.write(frame, 1));
    let given = rig.window.balloon(&[frames(64..192), frames(PAGES - 4..PAGES + 15), frames(5000..6000)], 1000);
    assert_eq!(given, [frames(64..192), frames(PAGES - 4..PAGES + 15)]);
    for frame in [64, 191, PAGES - 1, PAGES + 10] {
        assert_eq!(rig.word(frame), 0, "{frame}");
    }
    assert_eq!((rig.word(63), rig.word(192), rig.word(PAGES - 5), rig.word(PAGES + 15)), (1, 1, PAGES - 5, 1));
    rig.write(100, 9);
    // The log tells of the time before.
    let (frozen, _file) = rig.freeze(Dirty::Logged(&log_of((0..200).chain(PAGES..PAGES + 64))), 1, 1000);
    assert_eq!(frozen.harvest.private(), [0..64, 100..101, 192..200, PAGES + 15..PAGES + 20].map(frames));
    assert_eq!((rig.word(99), rig.word(PAGES - 1)), (0, 0));
}

#[test]
fn stretches_without_a_mapping_to_spare_stay_as_they_are() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let odd: Vec<GfnRange> = (0..PAGES).step_by(8).map(|frame| frames(frame..frame + 2 + frame % 16 / 4)).collect();
    let given = rig.window.balloon(&odd, 20);
    assert_eq!(given.len(), 9);
    assert!(given.iter().all(|part| part.count().0 == 4), "{given:?}");
    assert_eq!(rig.window.runs().count(), 20);
    assert_eq!((rig.word(32), rig.word(16), rig.word(given[0].start().0)), (32, 16, 0));
    // Anonymous memory takes none, nor does what makes one of many.
    assert_eq!(rig.window.balloon(&[frames(PAGES + 3..PAGES + 9)], 20), [frames(PAGES + 3..PAGES + 9)]);
    assert_eq!(rig.window.balloon(&[frames(0..PAGES)], 20), [frames(0..PAGES)]);
    assert_eq!(rig.window.runs().count(), 1);
}

/// A freeze in a copy of the process: nothing moves, no call but the copy is made, and if that fails nothing has happened.
#[test]
fn a_freeze_in_a_copy_leaves_all_pages_where_they_are() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let written = || (10..300).chain([500]).chain(PAGES + 5..PAGES + 40);
    written().for_each(|frame| rig.write(frame, 6000 + frame));
    let failed = rig.window.freeze_in_copy(1000, || Err(io::ErrorKind::OutOfMemory.into()));
    assert!(matches!(failed, Err(WindowError::Call { .. })), "{failed:?}");
    assert!(rig.window.freeze_in_copy(6, || panic!("three stretches are too many")).unwrap().is_none());
    let mut copies = 0;
    let harvest = rig
        .window
        .freeze_in_copy(1000, || {
            copies += 1;
            Ok(())
        })
        .unwrap()
        .unwrap();
    let private = [10..300, 500..501, PAGES + 5..PAGES + 40].map(frames);
    assert_eq!((copies, harvest.moved.as_slice(), harvest.copied.as_slice()), (1, &[][..], &private[..]));
    assert_eq!(harvest.private(), private);
    assert!(written().all(|frame| rig.word(frame) == 6000 + frame));
    rig.write(20, 1);
    let (next, _file) = rig.freeze_with(Dirty::Logged(&log_of(20..21)), 2, 1000, SmallExtents::CopyInPlace);
    assert_eq!(next.harvest.private(), [frames(20..21)], "what stayed is frozen");
}

/// The window of a guest that has frozen in a copy, and that store, written back.
fn kept_rig() -> Option<(Rig, Memfd)> {
    let mut rig = Rig::new(ALL)?;
    let file = Memfd::new("store", PageCount(2 * PAGES)).unwrap();
    let written = || (10..300).chain(PAGES + 5..PAGES + 40);
    written().for_each(|frame| rig.write(frame, 6000 + frame));
    rig.window.freeze_in_copy(1000, || Ok(())).unwrap().unwrap();
    let mut bytes = vec![0; 290 << 12];
    for (start, count) in [(10, 290), (PAGES + 5, 35)] {
        let bytes = &mut bytes[..count << 12];
        rig.window.area.copy_out(Gfn(start), bytes).unwrap();
        Alias::new(&file, Arc::clone(&rig.uffd)).unwrap().fill(PageIndex(start), bytes).unwrap();
    }
    Some((rig, file))
}

#[test]
fn what_is_shed_is_in_the_store_and_what_was_written_stays() {
    let Some((mut rig, file)) = kept_rig() else { return };
    rig.write(50, 1);
    rig.write(299, 2);
    rig.window.balloon(&[frames(PAGES + 30..PAGES + 40)], 1000);
    let asked = [frames(10..300), frames(PAGES + 5..PAGES + 40)];
    let dedup = rig.window.dedup(Dirty::Logged(&log_of(60..61)), StoreId(1), file.as_fd(), &asked).unwrap();
    assert_eq!(dedup.pages, [10..300, PAGES + 5..PAGES + 30].map(frames));
    drop(dedup);
    let store = Source::Store { store: StoreId(1), origin: PageOrigin(0) };
    let of_store = rig.window.runs().filter(|run| run.source == store).map(|run| run.pages);
    assert_eq!(of_store.collect::<Vec<_>>(), [10..300, PAGES + 5..PAGES + 30].map(frames));
    let want = |frame| match frame {
        50 => 1,
        299 => 2,
        frame => 6000 + frame,
    };
    assert!((10..300).chain(PAGES + 5..PAGES + 30).all(|frame| rig.word(frame) == want(frame)));
    assert_eq!((rig.word(9), rig.word(300), rig.word(PAGES + 35)), (9, 300, 0));
    // What was written since the freeze, or told by the log, is dirty; nothing else is, nor is it private any more.
    let (next, _file) = rig.freeze_with(Dirty::Logged(&log_of(20..21)), 2, 1000, SmallExtents::Remap);
    assert_eq!(next.harvest.private(), [50..51, 60..61, 299..300].map(frames));
    let again = rig.window.dedup(Dirty::Logged(&[]), StoreId(1), file.as_fd(), &asked).unwrap();
    assert_eq!(again.pages, []);
}

/// Every call of it fails once: everything is as it was, what was written is still dirty, and the next try does it.
#[test]
fn dedup_that_fails_changes_nothing() {
    for calls in 0.. {
        let Some((mut rig, file)) = kept_rig() else { return };
        rig.write(50, 1);
        let before: Vec<Run> = rig.window.runs().collect();
        inject::fail_after(calls);
        let dedup = rig.window.dedup(Dirty::Logged(&[]), StoreId(1), file.as_fd(), &[frames(10..300)]);
        let failed = inject::stop();
        let done = match dedup {
            Ok(dedup) => dedup.pages == [frames(10..300)],
            Err(WindowError::Torn { .. }) => panic!("one failure does not tear a window"),
            Err(_) => false,
        };
        assert_eq!(done, !failed, "call {calls}");
        let want = |frame| if frame == 50 { 1 } else { 6000 + frame };
        assert!((10..300).all(|frame| rig.word(frame) == want(frame)), "call {calls}");
        if !done {
            assert_eq!(rig.window.runs().collect::<Vec<_>>(), before, "call {calls}");
            let dedup = rig.window.dedup(Dirty::Logged(&[]), StoreId(1), file.as_fd(), &[frames(10..300)]).unwrap();
            assert_eq!(dedup.pages, [frames(10..300)]);
        }
        let (next, _file) = rig.freeze_with(Dirty::Logged(&[]), 2, 1000, SmallExtents::CopyInPlace);
        assert_eq!(next.harvest.private(), [frames(50..51)], "call {calls}");
        if done {
            assert!(calls > 5, "{calls} calls can fail");
            return;
        }
    }
}
