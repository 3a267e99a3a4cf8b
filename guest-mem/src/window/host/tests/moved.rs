//! Parts of windows that move.

use super::shared::{AT, share};
use super::*;
use std::fs::File;
use std::os::fd::OwnedFd;

/// Whether a page is there, as a device finds that writes it to a file.
fn is_there(rig: &Rig, frame: u64) -> bool {
    let (_out, into) = std::io::pipe().unwrap();
    let mut into = File::from(OwnedFd::from(into));
    rig.window.memory().write_all_volatile_to(GuestAddress(frame << 12), &mut into, 4096).is_ok()
}

fn is_writable(rig: &Rig, frame: u64) -> bool {
    let mut zeros = File::open("/dev/zero").unwrap();
    rig.window.memory().read_exact_volatile_from(GuestAddress(frame << 12), &mut zeros, 8).is_ok()
}

/// Frames 900 to 1500 are of all kinds, and 100 to 700 are free.
fn mixed() -> Option<(Rig, Memfd)> {
    let mut rig = Rig::new(ALL)?;
    let file = Memfd::new("shared", PageCount(AT.end - AT.start)).unwrap();
    share(&mut rig, &file);
    (920..1000).chain(PAGES..PAGES + 50).chain(AT).for_each(|frame| rig.write(frame, 7000 + frame));
    rig.window.protect(frames(940..960), Protection::ReadOnly).unwrap();
    rig.window.protect(frames(AT.start + 10..AT.start + 20), Protection::ReadOnly).unwrap();
    rig.window.unmap(frames(100..700)).unwrap();
    Some((rig, file))
}

/// The words of frames 900 to 1500, wherever they are, and which of them are read-only.
fn assert_mixed(rig: &Rig, first: u64) {
    for frame in 900..1500 {
        let word = match frame {
            920..1000 => 7000 + frame,
            _ if (PAGES..PAGES + 50).contains(&frame) || AT.contains(&frame) => 7000 + frame,
            _ if frame < PAGES => frame,
            _ => 0,
        };
        assert_eq!(rig.word(first + frame - 900), word, "frame {frame} from {first} on");
    }
    for frame in [930, 950, 970, AT.start + 5, AT.start + 15] {
        let read_only = (940..960).contains(&frame) || (AT.start + 10..AT.start + 20).contains(&frame);
        if read_only {
            assert!(!is_writable(rig, first + frame - 900), "frame {frame} from {first} on");
        }
    }
}

/// Private pages, what lies beneath, and what may not be written are where they have moved to, and nothing is where they were.
/// The next freeze takes what was written, wherever that was.
#[test]
fn what_moves_is_what_it_was() {
    let Some((mut rig, file)) = mixed() else { return };
    rig.window.move_pages(frames(900..1500), Gfn(100)).unwrap();
    assert_mixed(&rig, 100);
    assert!([900, PAGES, AT.start, 1499].into_iter().all(|frame| !is_there(&rig, frame)) && is_there(&rig, 1500));
    let source = Source::Store { store: ROOT, origin: PageOrigin(-800) };
    assert_eq!(rig.window.runs().nth(1), Some(Run { pages: frames(100..100 + PAGES - 900), source }));
    let shared = frames(AT.start - 800..AT.end - 800);
    assert_eq!(rig.window.shared().collect::<Vec<_>>(), [shared]);
    rig.write(AT.start - 800, 3);
    let mut word = [0; 8];
    nix::sys::uio::pread(&file, &mut word, 0).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 3, "it is shared as before");
    rig.write(AT.start - 800, 7000 + AT.start);
    // Nobody has a log of where the pages are now.
    let (frozen, _store) = rig.freeze(Dirty::Logged(&[]), 1, 1000);
    let private = [120..200, 224..274].map(frames);
    assert_eq!(frozen.harvest.private(), private);
    assert_eq!([120, 150, 230].map(|frame| rig.scratch_word(1, frame).unwrap()), [7920, 7950, 8030]);
    // Back again.
    let Some((mut rig, _file)) = mixed() else { return };
    rig.window.move_pages(frames(900..1500), Gfn(100)).unwrap();
    rig.window.move_pages(frames(100..700), Gfn(900)).unwrap();
    assert_mixed(&rig, 900);
    assert!(rig.window.move_pages(frames(900..901), Gfn(2 * PAGES)).is_err(), "beyond RAM");
}

/// `mremap` takes traps away: a touch would have planted zeros for everybody.
#[test]
fn a_hole_that_moves_traps_on() {
    let Some(mut rig) = Rig::new(ALL) else { return };
    let file = Memfd::new("store", PageCount(2 * PAGES)).unwrap();
    let run = Run { pages: frames(100..200), source: Source::Store { store: StoreId(1), origin: PageOrigin(0) } };
    rig.window.map(&[run], &[(StoreId(1), file.as_fd())], HugePages::Never).unwrap();
    rig.window.unmap(frames(500..600)).unwrap();
    rig.window.move_pages(run.pages, Gfn(500)).unwrap();
    let uffd = Userfaultfd::from_fd(rig.window.userfaultfd().unwrap().try_clone_to_owned().unwrap());
    let memory = rig.window.memory().clone();
    let reader = thread::spawn(move || memory.read_obj::<u64>(GuestAddress(550 << 12)).unwrap());
    let mut traps = Vec::new();
    while traps.is_empty() {
        uffd.read(&mut traps, 16).unwrap();
    }
    assert_eq!(traps[0].address, rig.window.base() + (550 << 12));
    rig.window.zero(frames(550..551));
    assert_eq!(reader.join().unwrap(), 0);
    assert_eq!(crate::store::memfd::extents(&file).unwrap(), []);
}

/// Whichever call fails: everything is as it was.
#[test]
fn a_move_that_fails_changes_nothing() {
    for calls in 0.. {
        let Some((mut rig, _file)) = mixed() else { return };
        let before: Vec<Run> = rig.window.runs().collect();
        inject::fail_after(calls);
        let moved = rig.window.move_pages(frames(900..1500), Gfn(100));
        let failed = inject::stop();
        match moved {
            Ok(()) => {
                assert_mixed(&rig, 100);
                if !failed {
                    assert!(calls > 10, "only {calls} calls");
                    return;
                }
            }
            Err(WindowError::Torn { .. }) => panic!("one failure does not tear a window"),
            Err(error) => {
                assert!(failed, "{error}");
                assert_eq!(rig.window.runs().collect::<Vec<_>>(), before);
                assert_mixed(&rig, 900);
                assert!(!is_there(&rig, 100) && !is_there(&rig, 699));
                rig.window.move_pages(frames(900..1500), Gfn(100)).unwrap();
                assert_mixed(&rig, 100);
            }
        }
    }
}
