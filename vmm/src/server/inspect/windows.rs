//! Whether what a process maps is what the books say of its VM's window.

use crate::procfs::Mapping;
use guest_mem::{Gfn, GfnRange, PageIndex, PageOrigin, Run, Source};
use rangemap::RangeSet;

/// Whether mappings show a run: the file that it should be (any, where the store is gone because all of it is zero), at
/// the right offset, private unless it is shared memory, writable but for what is `read_only`, without holes.
pub fn check_run(
    run: &Run,
    inode: Option<u64>,
    read_only: &RangeSet<u64>,
    (mappings, base): (&[Mapping], u64),
) -> Result<(), String> {
    let mut at = run.pages.start();
    let first = mappings.partition_point(|mapping| frame(mapping.addresses.end, base) <= at);
    let touched = mappings[first..].iter().take_while(|m| frame(m.addresses.start, base) < run.pages.end());
    for mapping in touched {
        let pages = GfnRange::between(frame(mapping.addresses.start, base), frame(mapping.addresses.end, base));
        let part = pages.intersect(run.pages);
        if part.is_empty() {
            continue;
        }
        if part.start() > at {
            return Err(format!("nothing is mapped at {at}"));
        }
        let private = !matches!(run.source, Source::Shared { .. });
        if mapping.private != private {
            let kind = if private { "private" } else { "shared" };
            return Err(format!("the mapping at {} is not {kind}", part.start()));
        }
        let wrong = match mapping.writable {
            true => read_only.overlapping(part.raw()).next().map(|pages| part.intersect(pages.clone().into()).start()),
            false => read_only.gaps(&part.raw()).next().map(|pages| Gfn(pages.start)),
        };
        if let Some(at) = wrong {
            let may = if mapping.writable { "can be written, and must not be" } else { "cannot be written" };
            return Err(format!("memory at {at} {may}"));
        }
        if inode.is_some_and(|inode| inode != mapping.inode) {
            return Err(format!("inode {} is mapped, {inode:?} should be", mapping.inode));
        }
        if let Some((_, origin)) = run.source.store() {
            let first = PageIndex::of_offset(mapping.offset);
            if PageOrigin::of(first, pages.start()) != origin {
                return Err(format!("page {:#x} of the store is mapped at {}", first.0, pages.start()));
            }
        }
        at = part.end();
    }
    if at < run.pages.end() { Err(format!("nothing is mapped at {at}")) } else { Ok(()) }
}

/// The guest frame at a host address.
pub fn frame(address: u64, base: u64) -> Gfn {
    Gfn::of_gpa(address.saturating_sub(base))
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_mem::StoreId;

    const BASE: u64 = 1 << 30;

    fn mapping(pages: std::ops::Range<u64>, writable: bool) -> Mapping {
        let addresses = BASE + (pages.start << 12)..BASE + (pages.end << 12);
        Mapping { addresses, private: true, writable, offset: pages.start << 12, inode: 7 }
    }

    /// A VM that may not write some of its pages was said to be broken, and one that had come to may would not have been.
    #[test]
    fn a_window_protects_what_the_books_say() {
        let source = Source::Store { store: StoreId(1), origin: PageOrigin(0) };
        let run = Run { pages: (0..30).into(), source };
        let read_only: RangeSet<u64> = [10..15, 15..20].into_iter().collect();
        let check = |mappings: &[Mapping]| check_run(&run, Some(7), &read_only, (mappings, BASE));
        let all = [mapping(0..10, true), mapping(10..20, false), mapping(20..30, true)];
        assert_eq!(check(&all), Ok(()));
        let [first, middle, last] = all;
        let cases = [
            (vec![mapping(0..30, true)], "can be written"),
            (vec![mapping(0..12, true), mapping(12..20, false), last.clone()], "can be written"),
            (vec![first.clone(), mapping(10..22, false), mapping(22..30, true)], "cannot be written"),
            (vec![first.clone(), middle.clone()], "nothing is mapped"),
            (vec![first.clone(), last.clone()], "nothing is mapped"),
            (vec![first, middle, Mapping { offset: 0, ..last }], "page 0x0 of the store"),
        ];
        for (mappings, what) in cases {
            let told = check(&mappings).unwrap_err();
            assert!(told.contains(what), "{told}");
        }
    }
}
