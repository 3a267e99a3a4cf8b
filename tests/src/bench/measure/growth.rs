//! What grows with what, in the memory manager's books: each row is a figure of a large family beside that of a small one.

use crate::aim::Aim;
use crate::bench::Bench;
use crate::books::{self, Books, Nothing, freeze, freeze_as, write_back};
use crate::entry::Figure;
use crate::stats::{Samples, timed};
use crate::{Result, fail};
use guest_mem::{Gfn, GfnRange, Harvest, PageCount, Touch, VmId};
use rangemap::RangeSet;
use std::hint::black_box;

const GIB: u64 = 1 << 18;
const SMALL_RAM: u64 = GIB;
const LARGE_RAM: u64 = 1024 * GIB;
const FLAT: u64 = 10;
const DEEP: u64 = 4000;
const FEW: u64 = 10;
const MANY: u64 = 5000;
/// So much longer, at most, takes what does not grow, or grows no faster than it may.
const AT_MOST: Aim = Aim::AtMost(2.0);
/// The page that all see and nobody has written since.
const OLD: Gfn = Gfn(0);

pub fn run(bench: &mut Bench) -> Result<()> {
    let depths = [("depth 10", deep(FLAT, SMALL_RAM)?), ("depth 4,000", deep(DEEP, SMALL_RAM)?)];
    one_vm(bench, depths)?;
    let sizes = [("1 GiB", deep(FLAT, SMALL_RAM)?), ("1 TiB", deep(FLAT, LARGE_RAM)?)];
    one_vm(bench, sizes)?;
    let crowds = [("10 VMs", wide(FEW)?), ("5,000 VMs", wide(MANY)?)];
    one_vm(bench, crowds)?;
    exit_by_pages(bench)?;
    dedup_by_kept(bench)?;
    census(bench)?;
    checks(bench)?;
    bench.note("guest-mem alone, without a kernel: windows and stores hold nothing, and no guest runs");
    Ok(())
}

/// A family, and the VM of it that is looked at.
struct Family {
    books: Books,
    vm: VmId,
}

impl Family {
    fn launched(ram: u64) -> Result<Self> {
        let (books, vm) = books::launched(PageCount(ram))?;
        Ok(Self { books, vm })
    }

    /// The VM writes these pages, and is frozen.
    fn write(&mut self, pages: std::ops::Range<u64>) -> Result<()> {
        freeze(&mut self.books, self.vm, pages.into()).map(drop)
    }

    fn evict_all(&mut self) -> Result<()> {
        match self.books.evict_some(PageCount(u64::MAX)).stopped {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}

/// So many generations, all of which live on. The first wrote pages 0 to 15, each of the others one of eight others.
fn deep(depth: u64, ram: u64) -> Result<Family> {
    let mut family = Family::launched(ram)?;
    family.write(0..16)?;
    for generation in 1..depth {
        family.vm = family.books.fork(family.vm, Nothing::default())?;
        let page = 16 + generation % 8;
        family.write(page..page + 1)?;
        write_back(&mut family.books)?;
    }
    if family.books.family().chain_depth(family.vm) == depth { Ok(family) } else { fail("generations are missing") }
}

/// A parent that wrote pages 0 to 63, and children, each of which wrote 32 of them again. One of them is looked at.
fn wide(vms: u64) -> Result<Family> {
    let mut family = Family::launched(SMALL_RAM)?;
    family.write(0..64)?;
    let parent = family.vm;
    let children = (1..vms).map(|_| family.books.fork(parent, Nothing::default()));
    let children: Vec<VmId> = children.collect::<std::result::Result<_, _>>()?;
    for &child in &children {
        family.vm = child;
        family.write(32..64)?;
        write_back(&mut family.books)?;
    }
    family.vm = children[children.len() / 2];
    Ok(family)
}

/// Samples a small family and a large one by turns; the figure of each is divided by its `size`.
fn beside<F>(
    bench: &mut Bench,
    of: &str,
    [(small, few), (large, many)]: [(&str, &mut F); 2],
    size: impl Fn(&F) -> f64,
    mut sample: impl FnMut(&mut F) -> Result<f64>,
) -> Result<()> {
    let [mut least, mut most] = [(); 2].map(|()| Samples::default());
    // What the first ones find cold is no figure.
    sample(few)?;
    sample(many)?;
    for _ in bench.rounds(200, 60) {
        least.push(sample(few)? / size(few));
        most.push(sample(many)? / size(many));
    }
    let reference = Some((small, &least));
    bench.figure(&Figure { of: format!("{of}, {large}"), unit: "us", subject: &most, reference, aim: AT_MOST });
    Ok(())
}

/// What concerns one VM, which sees as much in the one family as in the other.
fn one_vm(bench: &mut Bench, families: [(&str, Family); 2]) -> Result<()> {
    let [(small, mut few), (large, mut many)] = families;
    let mut row = |bench: &mut Bench, of: &str, sample: &mut dyn FnMut(&mut Family) -> Result<f64>| {
        beside(bench, of, [(small, &mut few), (large, &mut many)], |_| 1.0, sample)
    };
    row(bench, "page counts", &mut page_counts)?;
    row(bench, "zero batch", &mut zeros)?;
    row(bench, "dedup batch", &mut |family| {
        let copied = Harvest { copied: vec![(512..1024).into()], ..Harvest::default() };
        let store = freeze_as(&mut family.books, family.vm, &copied)?;
        write_back(&mut family.books)?;
        let books = &family.books;
        let (pages, us) = timed(|| books.to_dedup(family.vm, store, PageCount(17), PageCount(256)));
        let pages = pages?;
        if pages.is_empty() { fail("nothing to give up") } else { Ok(us) }
    })?;
    row(bench, "exit", &mut |family| exit(family, 64))?;
    row(bench, "fault", &mut fault)?;
    row(bench, "exclusive swap-in", &mut swap_in)
}

fn page_counts(family: &mut Family) -> Result<f64> {
    let (none, books) = (RangeSet::new(), family.books.family());
    let (counts, us) = timed(|| books.page_counts(family.vm, &none));
    if counts.shared > 0 { Ok(us) } else { fail("a VM that shares nothing") }
}

/// What a guest touches that is in swap, as it is asked about: no read.
fn fault(family: &mut Family) -> Result<f64> {
    const TIMES: u32 = 100;
    family.evict_all()?;
    let (books, vm) = (family.books.family(), family.vm);
    let ((), us) = timed(|| (0..TIMES).for_each(|_| drop(black_box(books.fault(vm, black_box(OLD))))));
    Ok(us / f64::from(TIMES))
}

/// A write to a page in swap, which asks whether anybody else sees it.
fn swap_in(family: &mut Family) -> Result<f64> {
    family.evict_all()?;
    let (books, vm) = (&mut family.books, family.vm);
    let (served, us) = timed(|| books.fault(vm, OLD, Touch::Write));
    served?;
    Ok(us)
}

/// 64 pages that turn out to be zero.
fn zeros(family: &mut Family) -> Result<f64> {
    // What is hidden by this, and freed, is another's business.
    let clean = |family: &mut Family, writes_zeros| {
        family.books.window_mut(family.vm).expect("it lives").writes_zeros = writes_zeros;
    };
    clean(family, true);
    family.write(128..192)?;
    let (books, mut more) = (&mut family.books, true);
    let (written, us) = timed(|| books.write_back(guest_mem::manager::WRITEBACK_BATCH));
    more &= written?;
    clean(family, false);
    if more {
        write_back(&mut family.books)?;
    }
    Ok(us)
}

/// The end of a child that has written so many pages, every second one.
fn exit(family: &mut Family, pages: u64) -> Result<f64> {
    let child = family.books.fork(family.vm, Nothing::default())?;
    let moved: Vec<GfnRange> = (0..pages).map(|page| (1024 + 2 * page..1025 + 2 * page).into()).collect();
    freeze_as(&mut family.books, child, &Harvest { moved_private: moved.clone(), moved, ..Harvest::default() })?;
    write_back(&mut family.books)?;
    let books = &mut family.books;
    let (gone, us) = timed(|| books.exit(child));
    gone?;
    write_back(books)?;
    Ok(us)
}

/// An exit costs as much as there was that only that VM saw.
fn exit_by_pages(bench: &mut Bench) -> Result<()> {
    let [mut few, mut many] = [(256, wide(FEW)?), (4096, wide(FEW)?)];
    let both = [("256 pages", &mut few), ("4,096 pages", &mut many)];
    beside(bench, "exit per page", both, |(pages, _)| *pages as f64, |(pages, family)| exit(family, *pages))
}

/// A batch of what a window keeps, by how much it keeps.
fn dedup_by_kept(bench: &mut Bench) -> Result<()> {
    let kept = |ram| {
        let mut family = Family::launched(ram)?;
        let copied = Harvest { copied: vec![(0..ram).into()], ..Harvest::default() };
        let store = freeze_as(&mut family.books, family.vm, &copied)?;
        // As much as is looked at: the rest may be written back when it likes.
        for _ in 0..128 {
            family.books.write_back(guest_mem::manager::WRITEBACK_BATCH)?;
        }
        Ok::<_, crate::Error>((store, family))
    };
    let [mut few, mut many] = [kept(SMALL_RAM)?, kept(LARGE_RAM)?];
    let both = [("1 GiB kept", &mut few), ("1 TiB kept", &mut many)];
    beside(
        bench,
        "dedup batch",
        both,
        |_| 1.0,
        |(store, family)| {
            let books = &family.books;
            let (pages, us) = timed(|| books.to_dedup(family.vm, *store, PageCount(17), PageCount(4096)));
            let count: u64 = pages?.iter().map(|pages| pages.count().0).sum();
            if count == 4096 { Ok(us) } else { fail(format!("{count} pages to give up")) }
        },
    )
}

/// The figures of a family, by its tables.
fn census(bench: &mut Bench) -> Result<()> {
    // Both are larger than caches, or the larger one would pay for its memory and not for its tables.
    let [mut few, mut many] = [wide(1000)?, wide(MANY)?];
    let tables = |family: &Family| family.books.family().totals().tables as f64;
    let both = [("1,000 VMs", &mut few), ("5,000 VMs", &mut many)];
    beside(bench, "census per table", both, tables, |family| {
        let books = family.books.family();
        Ok(timed(|| black_box(books.totals())).1)
    })
}

/// A check, by the objects and by the leaves that all VMs see.
fn checks(bench: &mut Bench) -> Result<()> {
    let check = |family: &mut Family| {
        let books = family.books.family();
        let (checked, us) = timed(|| books.check_invariants());
        checked.map_err(|broken| broken.join("; "))?;
        Ok(us)
    };
    let by_vms = |family: &Family| family.books.family().vms().count() as f64;
    let [mut few, mut many] = [wide(100)?, wide(bench.pick(1000, 400))?];
    let large = format!("{} VMs", by_vms(&many));
    beside(bench, "check per object", [("100 VMs", &mut few), (&large, &mut many)], by_vms, check)?;
    let growing = |depth: u64| {
        let mut family = Family::launched(SMALL_RAM)?;
        for page in 0..depth {
            family.write(16 * page..16 * page + 1)?;
            write_back(&mut family.books)?;
            family.vm = family.books.fork(family.vm, Nothing::default())?;
        }
        Ok::<_, crate::Error>(family)
    };
    let [mut few, mut many] = [growing(60)?, growing(bench.pick(240, 180))?];
    let large = format!("depth {}", by_vms(&many) - 1.0);
    let by_both = |family: &Family| by_vms(family) * by_vms(family);
    beside(bench, "check per object and leaf", [("depth 60", &mut few), (&large, &mut many)], by_both, check)
}
