//! What grows with what: steps are looks at objects and at tables, and nothing here takes the time.

use crate::addr::{Gfn, GfnRange, PageCount, PageIndex, PageOrigin, PageRange};
use crate::check::Part;
use crate::effect::{Effect, Effects};
use crate::family::Family;
use crate::ids::{Source, StoreId, SwapSlot, VmId};
use crate::object::{Backing, Slot};
use crate::ops::{CopyFrom, Fault, Placed, WritebackJob};
use crate::stage2::Shape;
use crate::steps::steps;
use crate::window::Harvest;
use rangemap::RangeSet;

/// 1 TiB, in small tables.
const SHAPE: Shape = Shape { bits: 4, levels: 7, leaf_levels: 6 };
const GIB: u64 = 1 << 18;

fn launched(pages: u64) -> (Family, VmId) {
    let mut family = Family::new(SHAPE);
    let vm = family.launch(&[(0..pages).into()], &[]);
    (family, vm)
}

fn freeze(family: &mut Family, vm: VmId, pages: GfnRange) -> StoreId {
    let mut effects = Effects::default();
    let store = family.begin_freeze(vm);
    let harvest = Harvest { moved: vec![pages], moved_private: vec![pages], ..Harvest::default() };
    family.finish_freeze(vm, &harvest, PageCount(0), &mut effects);
    family.tidy(&mut effects);
    store
}

fn write_back(family: &mut Family) {
    while let Some(job) = family.next_job(PageCount(64)) {
        family.written_back(&job, &[(job.pages, Placed::Stored)], &mut Effects::default());
    }
}

/// Takes the page that a VM sees to swap.
fn evict(family: &mut Family, vm: VmId, gfn: u64) {
    let page = GfnRange::one(Gfn(gfn));
    let found = family.shown(vm, page)[0].found.expect("a page");
    let victims = family.victims(found.object, found.indexes(page));
    family.evicted(&victims, Some(SwapSlot(1 << 20 | gfn)), &mut Effects::default());
}

/// So many generations, all of which live on: the first wrote page 0, each of the others one of `pages` in turn.
fn deep(depth: u64, ram: u64, pages: u64) -> (Family, VmId) {
    let (mut family, mut vm) = launched(ram);
    freeze(&mut family, vm, (0..1).into());
    for generation in 1..depth {
        vm = family.fork(vm, usize::MAX);
        let page = 16 + (generation % pages);
        freeze(&mut family, vm, (page..page + 1).into());
    }
    write_back(&mut family);
    (family, vm)
}

/// A parent that wrote pages 0 to 63, and so many children, each of which wrote the first 32 of them again.
fn wide(children: u64, ram: u64) -> (Family, VmId, VmId) {
    let (mut family, parent) = launched(ram);
    freeze(&mut family, parent, (0..64).into());
    let all: Vec<VmId> = (0..children).map(|_| family.fork(parent, usize::MAX)).collect();
    for &child in &all {
        freeze(&mut family, child, (0..32).into());
    }
    write_back(&mut family);
    (family, parent, all[all.len() / 2])
}

/// What a guest's fault asks at a frame, whose page is in swap.
fn fault(family: &Family, vm: VmId, gfn: u64) -> u64 {
    let ((), steps) = steps(|| {
        assert!(matches!(family.fault(vm, Gfn(gfn)), Fault::SwapIn(_)));
        family.exclusive_swap_in(vm, Gfn(gfn));
        let cluster = GfnRange::from(gfn / 16 * 16..gfn / 16 * 16 + 16);
        assert_eq!(family.swapped(vm, cluster).len(), 1);
        family.at_hand(vm, cluster);
        family.trapping_zeros(vm, cluster);
    });
    steps
}

/// A trap went down the chain, two to four times: 0.7 µs at depth 10, and 1.3 ms at 2,000.
#[test]
fn a_trap_costs_the_same_at_any_depth_and_size_and_in_any_company() {
    let at = |depth, ram| {
        let (mut family, last) = deep(depth, ram, 8);
        evict(&mut family, last, 0);
        assert!(depth == 1 || family.chain_depth(last) == depth);
        fault(&family, last, 0)
    };
    let least = at(10, GIB);
    assert_eq!([at(4000, GIB), at(10, 1024 * GIB)], [least; 2]);
    let among = |children| {
        let (mut family, _, child) = wide(children, GIB);
        evict(&mut family, child, 5);
        assert!(family.exclusive_swap_in(child, Gfn(5)).is_some());
        fault(&family, child, 5)
    };
    assert_eq!(among(10), among(5000));
}

/// What a copy-up is to be copied from was looked for in all generations below, for each batch that was copied and once more when
/// it was.
#[test]
fn a_copy_up_costs_the_same_at_any_depth() {
    let at = |depth| {
        let (mut family, last) = deep(depth, GIB, 8);
        family.begin_freeze(last);
        let harvest = Harvest { moved: vec![(0..2).into()], moved_private: vec![(1..2).into()], ..Harvest::default() };
        family.finish_freeze(last, &harvest, PageCount(0), &mut Effects::default());
        let mut copied = Vec::new();
        let ((), steps) = steps(|| {
            while let Some(job) = family.next_job(PageCount(64)) {
                copied.push(job.from);
                family.written_back(&job, &[(job.pages, Placed::Stored)], &mut Effects::default());
            }
        });
        assert_eq!(copied[0], CopyFrom::Store(StoreId(0), PageIndex(0)));
        family.tidy(&mut Effects::default());
        family.check_invariants().unwrap();
        steps
    };
    assert_eq!(at(10), at(1000));
}

/// Whether others see a page was a look at the table of each VM.
#[test]
fn exclusive_swap_in_gives_up_after_a_few_looks() {
    let alone = |children| {
        let (mut family, parent, _) = wide(children, GIB);
        evict(&mut family, parent, 5);
        let (alone, steps) = steps(|| family.is_alone(parent, Gfn(5)));
        (alone, steps)
    };
    let ((few, _), (many, most), (more, still)) = (alone(10), alone(100), alone(5000));
    assert!(few, "all children have pages of their own there");
    assert!(!many && !more, "nobody goes through all of them for one page");
    assert_eq!(most, still);
}

/// Zeros were told to those who see them by a look at every VM; so was what a VM has to itself, after a census.
#[test]
fn what_concerns_one_vm_costs_the_same_in_any_company() {
    let costs = |children| {
        let (mut family, _, child) = wide(children, GIB);
        let whole = PageRange::from(0..512);
        let (counts, counting) = steps(|| family.page_counts(child, &RangeSet::new()));
        assert_eq!((counts.private, counts.shared), (32, 32));
        let store = freeze(&mut family, child, (64..128).into());
        let (_, seeing) =
            steps(|| assert_eq!(family.seen(store, whole, None), RangeSet::from_iter(std::iter::once(64..128))));
        let job = family.next_job(PageCount(64)).expect("64 pages");
        let mut effects = Effects::default();
        let ((), telling) = steps(|| family.written_back(&job, &[(job.pages, Placed::Zero)], &mut effects));
        assert!(effects.0.contains(&Effect::Zero(child, (64..128).into())));
        [counting, seeing, telling]
    };
    assert_eq!(costs(10), costs(5000));
    let deep = |depth| {
        let (family, last) = deep(depth, GIB, 8);
        steps(|| family.page_counts(last, &RangeSet::new())).1
    };
    assert!(deep(2000) <= 2 * deep(20), "by what it sees, not by its chain");
}

/// Who sees a page takes one look at each distinct table, and a thousand VMs share one tree; those that have not, since each
/// changed another page, share the table that shows this one.
#[test]
fn the_reverse_map_looks_at_each_distinct_table_once() {
    let (mut family, parent) = launched(GIB);
    let store = freeze(&mut family, parent, (0..64).into());
    let tables = family.stage2.tables();
    let children: Vec<VmId> = (0..1000).map(|_| family.fork(parent, usize::MAX)).collect();
    assert_eq!(family.stage2.tables(), tables, "a fork adds to a use count, and copies no table");
    let ask = |family: &Family| {
        let mut viewers = Vec::new();
        let ask = || {
            family.viewers(store, (7..8).into(), |vm, run| {
                assert_eq!(run.pages, (7..8).into());
                viewers.push(vm);
                std::ops::ControlFlow::Continue(())
            })
        };
        let (_, steps) = steps(ask);
        viewers.sort_unstable();
        (viewers, steps as usize)
    };
    let all: Vec<VmId> = std::iter::once(parent).chain(children.iter().copied()).collect();
    let (viewers, looks) = ask(&family);
    assert_eq!(viewers, all);
    assert!(looks <= tables + 16, "{looks} looks for {} VMs that share {tables} tables", all.len());
    for &child in &children {
        freeze(&mut family, child, (GIB / 2..GIB / 2 + 1).into());
    }
    let (viewers, looks) = ask(&family);
    assert_eq!(viewers, all);
    assert!(looks <= 2 * family.objects.len() + family.stage2.tables(), "{looks} looks");
    for &child in &children[1..] {
        freeze(&mut family, child, (7..8).into());
    }
    assert_eq!(ask(&family).0, all[..2]);
    family.check_invariants().unwrap();
}

#[test]
fn a_check_costs_no_more_than_objects_times_leaves() {
    let wide = |children| steps(|| wide(children, GIB).0.check_invariants().unwrap()).1;
    let deep = |depth| steps(|| deep(depth, GIB, 1 << 16).0.check_invariants().unwrap()).1;
    assert!(wide(400) <= 5 * wide(100), "linear in a family of VMs that see as much as ever");
    assert!(deep(240) <= 20 * deep(60), "every generation sees what all before it wrote");
}

/// A check of 2 GiB that were in swap, cluster by cluster, held everybody up for a third of a second.
#[test]
fn a_part_of_a_check_costs_the_same_whatever_the_ram() {
    let most = |ram: u64| {
        let (mut family, vm) = launched(ram);
        family.begin_freeze(vm);
        let moved: Vec<GfnRange> = (0..ram / 32).map(|at| (at * 32..at * 32 + 16).into()).collect();
        let harvest = Harvest { moved: moved.clone(), moved_private: moved, ..Harvest::default() };
        family.finish_freeze(vm, &harvest, PageCount(0), &mut Effects::default());
        write_back(&mut family);
        let frames = family.check_parts(PageCount(1 << 10)).into_iter().filter(|part| matches!(part, Part::Frames(_)));
        let mut broken = Vec::new();
        let costs = frames.map(|part| steps(|| family.check_part(part, &mut broken)).1).max();
        assert_eq!(broken, Vec::<String>::new());
        costs.expect("there is RAM")
    };
    let (small, large) = (most(1 << 12), most(1 << 15));
    assert!(large <= small + small / 8, "{small} steps for 16 MiB, {large} for 128 MiB");
}

/// Pages that are nobody's any more, or are another object's from then on, were gone over as a whole before anybody was heard: all
/// that a VM had, one by one, where its memory was in swap.
#[test]
fn an_exit_takes_steps_that_cost_the_same_whatever_there_was() {
    const SMALL: u64 = 1 << 14;
    let costs = |ram: u64| {
        let (mut family, parent) = launched(ram);
        let scattered = |family: &mut Family, vm, first: u64| {
            family.begin_freeze(vm);
            let moved: Vec<GfnRange> = (0..ram / 4).map(|at| (at * 4 + first..at * 4 + first + 1).into()).collect();
            let harvest = Harvest { moved: moved.clone(), moved_private: moved, ..Harvest::default() };
            family.finish_freeze(vm, &harvest, PageCount(0), &mut Effects::default());
        };
        scattered(&mut family, parent, 0);
        let child = family.fork(parent, usize::MAX);
        scattered(&mut family, child, 1);
        write_back(&mut family);
        let (mut exits, mut most) = (0, 0);
        // The first is merged into what its child has, and then all of that goes.
        for vm in [parent, child] {
            // Its leaves are listed, and looked up one by one later.
            let leaves = family.stage2_runs(family.vm(vm)).len() as u64;
            exits = exits.max(steps(|| family.exit(vm, &mut Effects::default())).1 - leaves);
            while !family.is_tidy() {
                if ram == SMALL {
                    family.check_invariants().unwrap();
                }
                most = most.max(steps(|| family.tidy(&mut Effects::default())).1);
            }
        }
        family.check_invariants().unwrap();
        assert_eq!((family.objects.len(), family.stage2.tables()), (0, 0));
        [exits, most]
    };
    let (small, large) = (costs(SMALL), costs(4 * SMALL));
    assert!(
        small.iter().zip(&large).all(|(small, large)| *large <= 2 * small),
        "{small:?} {large:?} of four times as much"
    );
}

/// Runs on a stack that is enough for a few hundred calls one in the other.
fn on_a_small_stack(action: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(128 << 10).spawn(action).unwrap().join().unwrap();
}

/// A chain as long as 5,000 objects ended the server, and all VMs with it: a look down called itself for each object that
/// had a part of what was looked for.
#[test]
fn a_look_down_a_chain_is_no_recursion() {
    const DEPTH: u64 = 100_000;
    on_a_small_stack(|| {
        let (mut family, _) = launched(GIB);
        let objects = &mut family.objects;
        let mut top = None;
        for page in 0..DEPTH {
            let store = StoreId(page as u32);
            objects.accounts.open_store(store, VmId(1));
            let object = objects.stack(top.map(|object| Backing { object, origin: PageOrigin(0) }));
            objects.put(object, (page..page + 1).into(), Slot::InFlight(store));
            // A copy-up over a copy-up, and so on: all that is to be copied is at the bottom.
            let below = |page| Source::Store { store: StoreId(page as u32), origin: PageOrigin(0) };
            let last = page.checked_sub(1).map_or(Slot::InFlight(store), |page| Slot::CopyUp(store, below(page)));
            objects.put(object, (DEPTH..DEPTH + 1).into(), last);
            top = Some(object);
        }
        let all = GfnRange::from(0..DEPTH + 2);
        let segments = objects.resolve(top, PageOrigin(0), all);
        assert_eq!(segments.len() as u64, DEPTH + 2);
        assert!(segments.iter().zip(all.iter()).all(|(segment, page)| segment.pages.start() == page));
        let gap = segments[DEPTH as usize];
        let job = family.job(top.unwrap(), (DEPTH..DEPTH + 1).into(), gap.found.unwrap().slot);
        let bottom = WritebackJob { object: segments[0].found.unwrap().object, store: StoreId(0), ..job };
        assert_eq!(
            job,
            WritebackJob {
                from: CopyFrom::Scratch(VmId(1)),
                pages: (DEPTH..DEPTH + 1).into(),
                needed_by: top.unwrap(),
                ..bottom
            }
        );
        // Families are dropped, too.
        drop(family);
    });
}

/// The verbs of a family whose generations are all there.
#[test]
fn a_deep_family_is_counted_checked_and_taken_apart_on_a_small_stack() {
    const DEPTH: u64 = 300;
    on_a_small_stack(|| {
        let (mut family, last) = deep(DEPTH, GIB, 1 << 16);
        assert_eq!(family.page_counts(last, &RangeSet::new()).shared, DEPTH - 1);
        family.check_invariants().unwrap();
        let mut effects = Effects::default();
        let all = GfnRange::from(0..GIB);
        assert!(family.to_dedup(last, StoreId(0), PageCount(1), PageCount(1), 9).is_empty());
        assert_eq!(family.at_hand(last, all).iter().map(|pages| pages.count().0).sum::<u64>(), DEPTH);
        family.balloon(last, &[all], &mut effects);
        let vms: Vec<VmId> = family.vms().map(|(vm, _)| vm).collect();
        vms.into_iter().for_each(|vm| family.exit(vm, &mut effects));
        while !family.is_tidy() {
            family.tidy(&mut effects);
        }
        assert_eq!((family.objects.len(), family.stage2.tables()), (0, 0));
    });
}
