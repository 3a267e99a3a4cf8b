//! Shared memory in windows.

use super::*;

const SHARED: StoreId = StoreId(7);
/// Not at the borders of words of a log.
const AT: std::ops::Range<u64> = PAGES + 100..PAGES + 400;

fn share(rig: &mut Rig, file: &Memfd) {
    let run = Run { pages: frames(AT), source: Source::Shared { store: SHARED, origin: Gfn(AT.start) } };
    rig.window.map(&[run], &[(SHARED, file.as_fd())], HugePages::Never).unwrap();
}

/// Two windows see what either writes. A log says that all pages were written, and no freeze takes one of those that are
/// shared, or moves a stretch across them.
#[test]
fn no_freeze_takes_what_is_shared() {
    for (features, everything) in [(ALL, false), (ALL, true), (Features { pagemap_scan: false, ..ALL }, true)] {
        let (Some(mut one), Some(mut other)) = (Rig::new(features), Rig::new(features)) else { return };
        let file = Memfd::new("shared", PageCount(AT.end - AT.start)).unwrap();
        share(&mut one, &file);
        share(&mut other, &file);
        for frame in (PAGES..2 * PAGES).filter(|frame| frame % 2 == 0) {
            one.write(frame, 5000 + frame);
        }
        AT.for_each(|frame| assert_eq!(other.word(frame), if frame % 2 == 0 { 5000 + frame } else { 0 }));
        other.write(AT.start + 1, 9);
        let log = log_of(PAGES..2 * PAGES);
        for (round, short) in [SmallExtents::Remap, SmallExtents::CopyInPlace].into_iter().enumerate() {
            if round > 0 {
                // What the first round has moved would trap, and nobody is here to answer.
                [AT.start - 2..AT.start, AT.end..AT.end + 2]
                    .into_iter()
                    .for_each(|pages| one.window.zero(frames(pages)));
            }
            (AT.start - 2..AT.end + 2).step_by(2).for_each(|frame| one.write(frame, 5000 + frame));
            let dirty = if everything { Dirty::Every } else { Dirty::Logged(&log) };
            // So few mappings that stretches must be joined.
            let (frozen, _file) = one.freeze_with(dirty, round as u32 + 1, 20, short);
            let taken = frozen.harvest.taken();
            assert!(!taken.is_empty() && taken.iter().all(|pages| pages.intersect(frames(AT)).is_empty()), "{taken:?}");
            assert_eq!((one.word(AT.start), one.word(AT.start + 1)), (5000 + AT.start, 9));
            one.write(AT.start + 3, 11 + round as u64);
            assert_eq!(other.word(AT.start + 3), 11 + round as u64);
        }
        assert_eq!(one.window.shared().collect::<Vec<_>>(), [frames(AT)]);
    }
}

/// It is not the guest's own to give, and not there any more for who has exited.
#[test]
fn what_is_shared_is_not_given_back_and_not_left_behind() {
    let (Some(mut one), Some(mut other)) = (Rig::new(ALL), Rig::new(ALL)) else { return };
    let file = Memfd::new("shared", PageCount(AT.end - AT.start)).unwrap();
    share(&mut one, &file);
    share(&mut other, &file);
    (PAGES..2 * PAGES).for_each(|frame| one.write(frame, 3));
    let given = one.window.balloon(&[frames(0..2 * PAGES)], 1000);
    assert_eq!(given, [frames(0..AT.start), frames(AT.end..2 * PAGES)]);
    assert_eq!([AT.start - 1, AT.start, AT.end - 1, AT.end].map(|frame| one.word(frame)), [0, 3, 3, 0]);
    one.window.retire().unwrap();
    assert_eq!(one.word(AT.start), 0);
    one.write(AT.start, 8);
    assert_eq!(other.word(AT.start), 3);
    assert_eq!(one.window.shared().count(), 0);
}

/// It can be protected like all memory, each VM for itself.
#[test]
fn what_is_shared_can_be_read_only_for_one() {
    let (Some(mut one), Some(mut other)) = (Rig::new(ALL), Rig::new(ALL)) else { return };
    let file = Memfd::new("shared", PageCount(AT.end - AT.start)).unwrap();
    share(&mut one, &file);
    share(&mut other, &file);
    one.window.protect(frames(AT.start + 10..AT.start + 20), Protection::ReadOnly).unwrap();
    other.write(AT.start + 15, 4);
    assert_eq!(one.word(AT.start + 15), 4);
    let mut bytes = fs::File::open("/dev/zero").unwrap();
    let at = GuestAddress((AT.start + 15) << 12);
    assert!(one.window.memory().read_exact_volatile_from(at, &mut bytes, 8).is_err());
    one.window.protect(frames(AT), Protection::ReadWrite).unwrap();
    one.write(AT.start + 15, 5);
    assert_eq!(other.word(AT.start + 15), 5);
}
