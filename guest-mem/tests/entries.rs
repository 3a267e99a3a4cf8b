//! Map entries on real windows: what is protected, shared and moved, as threads of this process see it.

use guest_mem::local::{Error, Options};
use guest_mem::manager::Error as Cause;
use guest_mem::swap::{SwapOptions, SwapStore};
use guest_mem::{Gfn, GfnRange, Local, LocalVm, PageCount, Protection, Sharing};
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 256;

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * 4096)
}

/// Writes a page the way a device does that reads a file into it: the kernel refuses where a guest would be stopped.
fn write(family: &Local, vm: LocalVm, page: u64, word: u64) -> bool {
    let memory = family.memory(vm).unwrap();
    let mut words = File::open("/dev/zero").expect("a source of bytes");
    let may = memory.read_exact_volatile_from(at(page), &mut words, 4096).is_ok();
    if may {
        memory.write_obj(word, at(page)).expect("it may be written");
    }
    may
}

fn read(family: &Local, vm: LocalVm, page: u64) -> u64 {
    family.memory(vm).unwrap().read_obj(at(page)).expect("a page of RAM")
}

fn resident(family: &Local) -> u64 {
    family.stats().unwrap().totals.resident
}

fn sound(family: &Local) {
    let broken = family.inspect(|manager| {
        let mut broken = Vec::new();
        manager.check_stores(&mut broken);
        broken.extend(manager.family().check_invariants().err().into_iter().flatten());
        broken
    });
    assert_eq!(broken.unwrap(), Vec::<String>::new());
}

/// A child protects parts of its parent's memory; both go on, with the same pages.
#[test]
fn a_child_protects_parts_of_its_memory() {
    let family = Local::new(vec![GfnRange::from(0..PAGES)]).expect("this test needs userfaultfd");
    let parent = family.launch().unwrap();
    (0..PAGES).for_each(|page| family.memory(parent).unwrap().write_obj(page + 1, at(page)).unwrap());
    let child = family.fork(parent).unwrap();
    family.write_back().unwrap();
    let stored = resident(&family);
    family.protect(child, GfnRange::from(10..20), Protection::ReadOnly).unwrap();
    family.protect(child, GfnRange::from(100..180), Protection::ReadOnly).unwrap();
    assert_eq!(resident(&family), stored, "nothing is copied");
    for page in [9, 10, 19, 20, 99, 150, 180] {
        let may = write(&family, child, page, 1000 + page);
        assert_eq!(may, !(10..20).contains(&page) && !(100..180).contains(&page), "page {page}");
        assert!(write(&family, parent, page, 2000 + page));
    }
    // Freezes take what was written around and within: the mappings that they lay are protected as those before.
    assert_eq!((90..200).filter(|page| write(&family, child, *page, 3000 + page)).count(), 30);
    let grandchild = family.fork(child).unwrap();
    family.write_back().unwrap();
    for vm in [child, grandchild] {
        assert!(!write(&family, vm, 15, 0) && !write(&family, vm, 150, 0));
        assert_eq!([15, 150, 95].map(|page| read(&family, vm, page)), [16, 151, 3095]);
    }
    family.protect(grandchild, GfnRange::from(0..PAGES), Protection::ReadWrite).unwrap();
    assert!(write(&family, grandchild, 150, 7) && !write(&family, child, 150, 0));
    (90..200).for_each(|page| assert!(write(&family, grandchild, page, 4000 + page)));
    let last = family.fork(grandchild).unwrap();
    family.write_back().unwrap();
    assert_eq!([90, 150, 199].map(|page| read(&family, last, page)), [4090, 4150, 4199]);
    assert_eq!([90, 150, 199].map(|page| read(&family, child, page)), [3090, 151, 3199]);
    sound(&family);
    // What is given back reads zero, and stays as protected as it was.
    assert_eq!(family.balloon(child, &[GfnRange::from(140..160)]).unwrap(), [GfnRange::from(140..160)]);
    assert_eq!((read(&family, child, 150), write(&family, child, 150, 1)), (0, false));
    let runs = family.inspect(move |manager| {
        let window = manager.window(child.id()).unwrap();
        (manager.family().runs(child.id()).len() as u64, window.runs().count() as u64)
    });
    let (told, mapped) = runs.unwrap();
    assert_eq!(told, mapped);
    sound(&family);
}

/// `MAP_SHARED | MAP_ANONYMOUS`: a launch makes it, children have it, and all of them see what one of them writes, before a
/// fork and after it. What they write beside it is their own.
#[test]
fn relatives_see_each_others_writes_in_shared_memory() {
    let options = Options::default().shared(vec![GfnRange::from(50..70), GfnRange::from(200..201)]);
    let family = Local::with_options(vec![GfnRange::from(0..PAGES)], options).expect("this test needs userfaultfd");
    let parent = family.launch().unwrap();
    (0..PAGES).for_each(|page| assert!(write(&family, parent, page, page + 1)));
    let child = family.fork(parent).unwrap();
    let grandchild = family.fork(child).unwrap();
    family.write_back().unwrap();
    let all = [parent, child, grandchild];
    assert!(all.iter().all(|&vm| (0..PAGES).all(|page| read(&family, vm, page) == page + 1)));
    for (writer, page) in all.into_iter().zip([50, 69, 200]) {
        assert!(write(&family, writer, page, 1000 + page) && write(&family, writer, 49, page));
        assert_eq!(all.map(|vm| read(&family, vm, page)), [1000 + page; 3]);
    }
    assert_eq!(all.map(|vm| read(&family, vm, 49)), [50, 69, 200]);
    // Of all pages, those that are shared are there once, whoever has them, and nothing of them is frozen or evicted.
    let shared = |family: &Local| family.inspect(|manager| manager.shared_resident()).unwrap();
    assert_eq!(shared(&family), PageCount(21));
    let totals = family.stats().unwrap().totals;
    assert_eq!((totals.resident, totals.shared), (PAGES - 21, 21));
    sound(&family);
    // They are nobody's own to give back.
    let given = family.balloon(child, &[GfnRange::from(40..80)]).unwrap();
    assert_eq!(given, [GfnRange::from(40..50), GfnRange::from(70..80)]);
    assert_eq!([40, 50, 70].map(|page| read(&family, child, page)), [0, 1050, 0]);
    // Another launch has memory of its own there.
    let other = family.launch().unwrap();
    assert_eq!(read(&family, other, 50), 0);
    assert!(write(&family, other, 50, 7));
    assert_eq!((read(&family, parent, 50), shared(&family)), (1050, PageCount(22)));
    // It lasts as long as one of those who have it.
    let memory = family.memory(parent).unwrap();
    family.exit(parent).unwrap();
    family.exit(child).unwrap();
    assert_eq!(memory.read_obj::<u64>(at(50)).unwrap(), 0, "what is left of a VM shares nothing");
    memory.write_obj(3u64, at(50)).unwrap();
    assert_eq!((read(&family, grandchild, 50), shared(&family)), (1050, PageCount(22)));
    let last = family.fork(grandchild).unwrap();
    family.protect(last, GfnRange::from(45..55), Protection::ReadOnly).unwrap();
    assert!(!write(&family, last, 50, 0) && write(&family, grandchild, 50, 12));
    assert_eq!(read(&family, last, 50), 12);
    sound(&family);
    [other, grandchild, last].into_iter().for_each(|vm| family.exit(vm).unwrap());
    assert_eq!(shared(&family), PageCount(0));
    assert_eq!(family.stats().unwrap().totals.shared, 0);
}

#[test]
fn shared_memory_is_a_part_of_memory() {
    let shared = |pages: &[(u64, u64)]| {
        let shared = pages.iter().map(|&(start, end)| GfnRange::from(start..end)).collect();
        Local::with_options(vec![GfnRange::from(0..PAGES)], Options::default().shared(shared)).map(drop)
    };
    assert!(shared(&[(0, PAGES)]).is_ok());
    for pages in [&[(PAGES - 1, PAGES + 1)][..], &[(10, 10)], &[(10, 20), (15, 25)]] {
        assert!(matches!(shared(pages), Err(Error::BadMemory(_))), "{pages:?}");
    }
}

fn pages(range: Range<u64>) -> GfnRange {
    range.into()
}

/// Whether the page is there, as a device finds that writes it to a file.
fn is_there(family: &Local, vm: LocalVm, page: u64) -> bool {
    // The kernel looks at what is written to a pipe, and not at what goes to the null device.
    let (_out, into) = std::io::pipe().expect("a pipe");
    let mut into = File::from(OwnedFd::from(into));
    family.memory(vm).unwrap().write_all_volatile_to(at(page), &mut into, 4096).is_ok()
}

/// What is unmapped is gone for that VM alone, and freed with the last who sees it; what is mapped there is fresh, or shared
/// with those that are forked from then on.
#[test]
fn a_vm_unmaps_and_maps_parts_of_its_memory() {
    let family = Local::new(vec![pages(0..PAGES)]).expect("this test needs userfaultfd");
    let parent = family.launch().unwrap();
    (0..PAGES).for_each(|page| assert!(write(&family, parent, page, page + 1)));
    let child = family.fork(parent).unwrap();
    family.write_back().unwrap();
    assert_eq!(resident(&family), PAGES);
    family.unmap(child, pages(10..20)).unwrap();
    family.unmap(child, pages(100..140)).unwrap();
    for page in [9, 10, 19, 20, 99, 100, 139, 140] {
        let gone = (10..20).contains(&page) || (100..140).contains(&page);
        assert_eq!(is_there(&family, child, page), !gone, "page {page}");
        assert_eq!(read(&family, parent, page), page + 1);
    }
    assert_eq!(resident(&family), PAGES, "the parent sees all of them");
    // Freezes take what is around, and nothing across.
    (90..150).filter(|page| !(100..140).contains(page)).for_each(|page| assert!(write(&family, child, page, page)));
    let grandchild = family.fork(child).unwrap();
    family.write_back().unwrap();
    assert!(!is_there(&family, grandchild, 120) && read(&family, grandchild, 99) == 99);
    sound(&family);
    family.map(child, pages(100..120), Sharing::Shared).unwrap();
    family.map(child, pages(120..140), Sharing::CopyOnWrite).unwrap();
    assert_eq!(
        [100, 119, 120, 139].map(|page| read(&family, child, page)),
        [0; 4],
        "nothing of its parent shows again"
    );
    (100..140).for_each(|page| assert!(write(&family, child, page, 1000 + page)));
    let sibling = family.fork(child).unwrap();
    family.write_back().unwrap();
    (100..140).for_each(|page| assert_eq!(read(&family, sibling, page), 1000 + page));
    (100..140).for_each(|page| assert!(write(&family, sibling, page, 2000 + page)));
    assert_eq!([100, 119, 120, 139].map(|page| read(&family, child, page)), [2100, 2119, 1120, 1139]);
    assert!(!is_there(&family, grandchild, 110), "who was forked before has none of it");
    sound(&family);
    // A part of what is shared goes with the last who has it.
    let shared = || family.inspect(|manager| manager.shared_resident()).unwrap();
    family.unmap(child, pages(105..110)).unwrap();
    assert_eq!((shared(), read(&family, sibling, 107)), (PageCount(20), 2107));
    family.unmap(sibling, pages(100..108)).unwrap();
    assert_eq!((shared(), read(&family, child, 104)), (PageCount(17), 2104));
    sound(&family);
    family.exit(child).unwrap();
    family.exit(grandchild).unwrap();
    family.unmap(parent, pages(0..PAGES)).unwrap();
    family.map(parent, pages(0..PAGES), Sharing::CopyOnWrite).unwrap();
    family.write_back().unwrap();
    assert_eq!((read(&family, parent, 15), shared()), (0, PageCount(12)));
    sound(&family);
}

#[test]
fn what_cannot_be_mapped_or_unmapped_is_told() {
    let family = Local::new(vec![pages(0..100), pages(200..PAGES)]).expect("this test needs userfaultfd");
    let vm = family.launch().unwrap();
    family.unmap(vm, pages(40..50)).unwrap();
    let map = |range| family.map(vm, pages(range), Sharing::Shared).map_err(cause);
    let unmap = |range| family.unmap(vm, pages(range)).map_err(cause);
    let overlap = pages(50..60);
    assert!(matches!(map(45..60), Err(Cause::Overlaps { with, .. }) if with == overlap));
    assert!(matches!(map(120..130), Err(Cause::Map { .. })), "no memory of this family's");
    for error in [map(PAGES..PAGES + 1), map(40..40), unmap(250..PAGES + 1), unmap(7..7)] {
        assert!(matches!(error, Err(Cause::OutOfBounds { .. })), "{error:?}");
    }
    for error in [unmap(45..46), unmap(30..45), unmap(90..210)] {
        assert!(matches!(error, Err(Cause::NotMapped { .. })), "{error:?}");
    }
    let before = family.inspect(|manager| manager.shared_resident()).unwrap();
    assert_eq!(before, PageCount(0));
    assert_eq!((read(&family, vm, 30), read(&family, vm, 55)), (0, 0));
    map(40..50).unwrap();
    sound(&family);
}

/// What is shared with relatives, written, protected, given back and in swap moves, and none of it is copied; relatives have
/// theirs where they had it. What was moved is frozen, inherited and evicted like all.
#[test]
fn a_vm_moves_parts_of_its_memory() {
    let swap = SwapStore::open(SwapOptions { path: None, size: None, compressed: 8 << 20 }).unwrap();
    let options = Options::default().shared(vec![pages(60..70)]).swap(Arc::new(Mutex::new(swap)));
    let family = Local::with_options(vec![pages(0..PAGES)], options).expect("this test needs userfaultfd");
    let parent = family.launch().unwrap();
    (0..PAGES).for_each(|page| assert!(write(&family, parent, page, page + 1)));
    family.unmap(parent, pages(150..PAGES)).unwrap();
    let child = family.fork(parent).unwrap();
    family.write_back().unwrap();
    let stored = resident(&family);
    (20..30).for_each(|page| assert!(write(&family, child, page, 1000 + page)));
    family.protect(child, pages(30..35), Protection::ReadOnly).unwrap();
    assert_eq!(family.balloon(child, &[pages(40..45)]).unwrap(), [pages(40..45)]);
    family.evict_some(PageCount(80)).unwrap();
    family.move_pages(child, pages(10..110), Gfn(150)).unwrap();
    let word = |page: u64| match page {
        20..30 => 1000 + page,
        40..45 => 0,
        _ => page + 1,
    };
    let seen = |vm, from: u64| (10..110).all(|page| read(&family, vm, from + page - 10) == word(page));
    let old = |vm| (0..150).all(|page| read(&family, vm, page) == page + 1);
    assert!(seen(child, 150) && old(parent));
    assert!([10, 60, 109].iter().all(|&page| !is_there(&family, child, page)) && is_there(&family, child, 9));
    assert!(!write(&family, child, 170, 0) && write(&family, child, 169, 1029));
    assert_eq!(resident(&family), stored, "nothing is copied");
    assert!(write(&family, child, 200, 61) && write(&family, parent, 61, 62), "it is shared as before");
    assert_eq!((read(&family, parent, 60), read(&family, child, 201)), (61, 62));
    sound(&family);
    // Something else is where it was, and children have both where their parent has them.
    family.map(child, pages(10..60), Sharing::CopyOnWrite).unwrap();
    (10..60).for_each(|page| assert!(write(&family, child, page, 2000 + page)));
    let grandchild = family.fork(child).unwrap();
    family.write_back().unwrap();
    for vm in [child, grandchild] {
        assert!(seen(vm, 150) && (10..60).all(|page| read(&family, vm, page) == 2000 + page));
    }
    sound(&family);
    // Down, and home again, over what was frozen elsewhere.
    family.unmap(grandchild, pages(0..60)).unwrap();
    family.move_pages(grandchild, pages(150..250), Gfn(10)).unwrap();
    assert!(seen(grandchild, 10) && old(parent) && seen(child, 150));
    family.evict_some(PageCount(1000)).unwrap();
    let last = family.fork(grandchild).unwrap();
    family.exit(parent).unwrap();
    family.exit(child).unwrap();
    family.write_back().unwrap();
    assert!(seen(grandchild, 10) && seen(last, 10));
    sound(&family);
    family.exit(grandchild).unwrap();
    family.exit(last).unwrap();
    family.write_back().unwrap();
    let totals = family.stats().unwrap().totals;
    assert_eq!((totals.objects, totals.stores, totals.tables), (0, 0, 0));
}

#[test]
fn what_cannot_be_moved_is_told() {
    let family = Local::new(vec![pages(0..100), pages(200..PAGES)]).expect("this test needs userfaultfd");
    let vm = family.launch().unwrap();
    (0..100).for_each(|page| assert!(write(&family, vm, page, page)));
    family.unmap(vm, pages(40..50)).unwrap();
    family.unmap(vm, pages(210..220)).unwrap();
    let go = |range, to| family.move_pages(vm, pages(range), Gfn(to)).map_err(cause);
    assert!(matches!(go(0..11, 40), Err(Cause::Overlaps { with, .. }) if with == pages(50..51)));
    assert!(matches!(go(50..60, 45), Err(Cause::Overlaps { with, .. }) if with == pages(50..55)));
    assert!(matches!(go(35..45, 210), Err(Cause::NotMapped { .. })));
    assert!(matches!(go(0..10, 120), Err(Cause::Map { .. })), "no memory of this family's");
    for error in [go(0..0, 40), go(0..5, PAGES - 2), go(0..5, PAGES), go(0..5, u64::MAX), go(250..PAGES + 1, 40)] {
        assert!(matches!(error, Err(Cause::OutOfBounds { .. })), "{error:?}");
    }
    (0..40).for_each(|page| assert_eq!(read(&family, vm, page), page));
    go(0..10, 40).unwrap();
    go(40..50, 210).unwrap();
    assert_eq!((read(&family, vm, 215), is_there(&family, vm, 45)), (5, false));
    sound(&family);
}

fn cause(error: Error) -> Cause {
    match error {
        Error::Memory { cause, .. } => cause,
        other => panic!("{other}"),
    }
}
