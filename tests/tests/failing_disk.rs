//! A swap disk that fails: who needs what it has stops and says so, everybody else goes on, and no wrong byte is shown.

use nix::errno::Errno;
use offshoot_tests::fuse::{Faults, FaultyFile};
use offshoot_tests::{Guest, Lack, Served, TEN_SECONDS, TestHome, each, fork_settled, is_root, skip, wait_until};
use std::ops::Range;
use vmm::api::{Totals, VmState};
use vmm::client::Vm;
use vmm::units::ByteSize;

/// What each clone has for itself: 8 MiB, incompressible.
const OWN: Range<u64> = 1000..3048;
const CLONES: u32 = 6;
const DISK: u64 = 128 << 20;

/// A family on a disk that can be made to fail.
struct Family {
    // Ends before its disk does.
    home: TestHome,
    _server: Served,
    clones: Vec<Vm>,
    disk: FaultyFile,
}

impl Family {
    /// Clones that have written, with their memory where it is.
    fn new() -> Option<Self> {
        let home = TestHome::new()?;
        if !is_root() {
            skip(Lack::Root, "only root can mount a file system");
            return None;
        }
        let disk = match FaultyFile::mount(DISK) {
            Ok(disk) => disk,
            Err(error) => {
                skip(Lack::Disks, format!("no FUSE: {error}"));
                return None;
            }
        };
        let place = format!("{}:{DISK}", disk.path().display());
        let server = Served::new(&home, &["--swap", &place, "--force", "--compressed", "1M"]);
        let parent = home.launch("a", ByteSize::mib(64));
        let clones = fork_settled(&parent, CLONES);
        each(&clones, |index, clone| clone.fill(OWN, 10 + index as u64));
        Some(Self { home, _server: server, clones, disk })
    }

    /// The same, with their memory on the disk.
    fn on_disk() -> Option<Self> {
        let family = Self::new()?;
        family.evict();
        let totals = family.totals();
        assert!(totals.disk_bytes >= (u64::from(CLONES) * 7) << 20, "{totals:?}");
        Some(family)
    }

    fn evict(&self) {
        for _ in 0..3 {
            self.home.client().reclaim_all(ByteSize::mib(100)).expect("reclaim");
        }
        wait_until("the tier is written out", TEN_SECONDS, || self.totals().compressed_bytes < 3 << 20);
    }

    fn totals(&self) -> Totals {
        self.home.totals()
    }

    /// Reads everything. Whoever cannot is dead, and says why; nobody sees anything else. How many live.
    fn survivors(&self) -> usize {
        let mut alive = 0;
        for (index, clone) in self.clones.iter().enumerate() {
            let read = clone.try_verify(OWN, 10 + index as u64);
            let listed = self.home.client().list().expect("ls");
            let row = listed.iter().find(|row| row.name == clone.name()).expect("it is listed");
            match read {
                Ok(()) => {
                    assert_eq!(row.state, VmState::Running);
                    clone.fill(OWN.end..OWN.end + 10, 1);
                    clone.verify(OWN.end..OWN.end + 10, 1);
                    alive += 1;
                }
                Err(error) => {
                    let reason = row.reason.as_deref().unwrap_or_default();
                    println!("{}: {error}; {reason}", clone.name());
                    assert_eq!(row.state, VmState::Dead, "{error}");
                    assert!(reason.contains("could not be read back from swap"), "{reason}");
                    assert!(!error.to_string().contains("mismatch"), "{error}");
                }
            }
        }
        self.home.check();
        alive
    }
}

/// A block in the middle of what is used.
fn middle(disk: &FaultyFile) -> u64 {
    let used = disk.used();
    used[used.len() / 2]
}

#[test]
fn a_block_that_cannot_be_read_stops_who_needs_it() {
    let Some(family) = Family::on_disk() else { return };
    let block = middle(&family.disk);
    family.disk.fail(Faults { read: Some((block..block + 1, Errno::EIO)), write: None });
    assert_eq!(family.survivors(), CLONES as usize - 1);
    assert!(family.disk.failures().0 > 0 && family.totals().lost_pages <= 16, "{:?}", family.totals());
    // The disk is well again: what was lost stays lost, and nobody else is touched.
    family.disk.fail(Faults::default());
    assert_eq!(family.survivors(), CLONES as usize - 1);
}

#[test]
fn half_a_disk_that_cannot_be_read_stops_who_needs_it() {
    let Some(family) = Family::on_disk() else { return };
    let block = middle(&family.disk);
    family.disk.fail(Faults { read: Some((block..u64::MAX, Errno::EIO)), write: None });
    let alive = family.survivors();
    assert!((1..CLONES as usize).contains(&alive), "{alive} live");
}

#[test]
fn one_flipped_bit_is_never_shown() {
    let Some(family) = Family::on_disk() else { return };
    let mut alive = CLONES as usize;
    // A bit may be nobody's: it lies behind the end of what a cluster takes, or the cluster is in memory as well.
    for eighth in [4, 3, 5, 2, 6] {
        let used = family.disk.used();
        let block = used[used.len() * eighth / 8];
        family.disk.flip(block, 12_345);
        alive = family.survivors();
        if alive < CLONES as usize {
            break;
        }
        println!("nobody needed block {block}");
        family.disk.flip(block, 12_345);
        family.evict();
    }
    assert_eq!(alive, CLONES as usize - 1);
    assert!((1..=16).contains(&family.totals().lost_pages), "{:?}", family.totals());
}

/// What cannot be written stays in memory, and goes where the disk is well.
#[test]
fn a_block_that_cannot_be_written_is_done_without() {
    for errno in [Errno::EIO, Errno::ENOSPC] {
        let Some(family) = Family::new() else { return };
        family.disk.fail(Faults { read: None, write: Some((700..701, errno)) });
        let done = family.home.client().reclaim_all(ByteSize::mib(100)).expect("reclaim");
        println!("{errno}: {done:?}, {:?}: {:?}", family.disk.failures(), family.totals());
        assert!(family.disk.failures().1 > 0, "nothing was written there");
        // It rests for a second after a failure, and goes on.
        wait_until("the disk is written to again", TEN_SECONDS, || {
            family.home.client().reclaim_all(ByteSize::mib(100)).expect("reclaim");
            family.totals().disk_bytes >= (u64::from(CLONES) * 7) << 20
        });
        assert_eq!(family.survivors(), CLONES as usize);
        assert_eq!(family.totals().lost_pages, 0);
    }
}

#[test]
fn a_disk_that_cannot_be_written_takes_nothing_and_loses_nothing() {
    for errno in [Errno::EIO, Errno::ENOSPC] {
        let Some(family) = Family::new() else { return };
        family.disk.fail(Faults { read: None, write: Some((2000..u64::MAX, errno)) });
        let done = family.home.client().reclaim_all(ByteSize::mib(100)).expect("reclaim");
        println!("{errno}: {done:?}, {:?}: {:?}", family.disk.failures(), family.totals());
        assert!(done.reclaimed_bytes < 30 << 20, "{done:?}");
        family.home.client().set_budget(Some(ByteSize::mib(32))).expect("a budget that cannot be kept");
        assert_eq!(family.survivors(), CLONES as usize);
        let totals = family.totals();
        assert!(totals.disk_bytes <= 2000 * 4096 && totals.lost_pages == 0, "{totals:?}");
        // The disk is well again.
        family.disk.fail(Faults::default());
        wait_until("the disk is written to again", TEN_SECONDS, || family.totals().disk_bytes > 20 << 20);
        assert_eq!(family.survivors(), CLONES as usize);
    }
}
