//! Shared memory in windows, and parts of RAM where nothing is mapped.

use super::*;

const SHARED: StoreId = StoreId(7);
/// Not at the borders of words of a log.
pub(super) const AT: std::ops::Range<u64> = PAGES + 100..PAGES + 400;

pub(super) fn share(rig: &mut Rig, file: &Memfd) {
    let run =
        Run { pages: frames(AT), source: Source::Shared { store: SHARED, origin: PageOrigin::at(Gfn(AT.start)) } };
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

/// A log may tell of what was there before, and a stretch of private pages begins before it and ends behind it.
#[test]
fn no_freeze_maps_what_is_unmapped() {
    for everything in [false, true] {
        let Some(mut rig) = Rig::new(ALL) else { return };
        (0..2 * PAGES).for_each(|frame| rig.write(frame, frame + 7));
        let holes = [100..400, PAGES - 3..PAGES + 70].map(frames);
        holes.iter().for_each(|pages| rig.window.unmap(*pages).unwrap());
        let log = log_of(0..2 * PAGES);
        let dirty = if everything { Dirty::Every } else { Dirty::Logged(&log) };
        let (frozen, _file) = rig.freeze(dirty, 1, 1000);
        let rest = [0..100, 400..PAGES - 3, PAGES + 70..2 * PAGES].map(frames);
        assert_eq!(frozen.harvest.private(), rest);
        let mapped = rig.window.runs().map(|run| run.pages).collect::<Vec<_>>();
        assert!(mapped.iter().all(|run| holes.iter().all(|hole| hole.intersect(*run).is_empty())), "{mapped:?}");
        let run = Run { pages: holes[0], source: Source::Anonymous };
        rig.window.map(&[run], &[], HugePages::Never).unwrap();
        assert_eq!((rig.word(100), rig.word(399)), (0, 0));
        rig.write(200, 5);
        let again = rig.freeze(dirty, 2, 1000).0;
        assert_eq!(again.harvest.private(), [frames(200..201)]);
    }
    let Some(mut rig) = Rig::new(ALL) else { return };
    rig.window.unmap(frames(50..60)).unwrap();
    rig.window.protect(frames(40..70), Protection::ReadOnly).unwrap();
    let run = Run { pages: frames(50..60), source: Source::Anonymous };
    rig.window.map(&[run], &[], HugePages::Never).unwrap();
    rig.write(55, 3);
    assert_eq!((rig.word(55), rig.word(45)), (3, 45), "what is new is not what was protected");
    let Some(mut rig) = Rig::new(ALL) else { return };
    assert!(rig.window.unmap(frames(2 * PAGES - 1..2 * PAGES + 1)).is_err(), "beyond RAM");
    inject::fail_after(0);
    assert!(rig.window.unmap(frames(5..6)).is_err());
    inject::stop();
    assert_eq!(rig.word(5), 5);
}
