//! The store under a manager, on disks that fail, are full, and lie: the model's world, and whatever happens there.

use super::super::extents::BLOCK;
use super::super::store::Limits;
use super::super::*;
use super::rig::{Disk, assert_sound, next, store};
use crate::model::interleavings::{Player, run_seeds, seeds};
use crate::model::rng::Rng;
use crate::model::swap::WorldSwap;
use crate::model::world::World;
use std::cell::Cell;
use std::time::Duration;

const LENGTH: usize = 250;

/// The store, and whether something comes that nobody has been told of.
struct OnDisk {
    store: SwapStore,
    coming: Cell<bool>,
}

impl OnDisk {
    fn heard(&self, fetch: Fetch) -> Fetch {
        self.coming.set(self.coming.get() || fetch == Fetch::Coming);
        fetch
    }
}

impl WorldSwap for OnDisk {
    fn end_reads(&mut self) -> bool {
        while self.store.books.sums.reads > 0 {
            next(&mut self.store);
        }
        self.coming.take()
    }

    fn is_reading(&self) -> bool {
        self.coming.get()
    }

    fn pages(&self) -> usize {
        self.store.stats().slots_used as usize
    }
}

impl Swap for OnDisk {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        self.store.put(pages)
    }

    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        self.store.get(first, buf).map(|fetch| self.heard(fetch))
    }

    fn expect(&mut self, first: SwapSlot, count: PageCount) -> PageCount {
        let coming = self.store.expect(first, count);
        self.coming.set(self.coming.get() || coming.0 > 0);
        coming
    }

    fn get_expected(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        self.store.get_expected(first, buf).map(|fetch| self.heard(fetch))
    }

    fn count_hits(&mut self, pages: PageCount) {
        self.store.count_hits(pages);
    }

    fn free(&mut self, first: SwapSlot, count: PageCount) {
        self.store.free(first, count);
    }

    fn used(&self) -> Option<Vec<(SwapSlot, PageCount)>> {
        self.store.used()
    }
}

/// What a disk does next.
fn change(disk: &Disk, deadly: bool, rng: &mut Rng) {
    let block = rng.below(disk.blocks());
    match rng.below(60) {
        0 => disk.fail_writes(),
        1 | 2 => disk.take_writes(),
        3 if deadly => drop(disk.bad_reads.lock().unwrap().insert(block)),
        4 if deadly => disk.bad_reads.lock().unwrap().clear(),
        5 if deadly => *disk.forgets.lock().unwrap() = true,
        6 | 7 => *disk.forgets.lock().unwrap() = false,
        8 if deadly => disk.bytes.lock().unwrap()[block as usize * BLOCK + rng.below(64) as usize] ^= 4,
        _ => {}
    }
}

/// Nobody reads a wrong byte, no slot is leaked, and nobody fails who need not.
#[test]
fn whatever_happens_on_a_disk_that_fails_is_full_and_lies() {
    run_seeds(seeds(10_000, LENGTH), LENGTH, |seed, stage, ops| {
        let mut rng = Rng::new(!seed);
        let disk = Disk::new(rng.pick(&[12, 40, 400]));
        let bytes = rng.pick(&[0, 1 << 10, 4 << 10]);
        let limits = Limits {
            tier: bytes,
            hard: bytes + (4 << 10),
            cache: bytes / 4,
            wanted: 4,
            stale: 4,
            rest: Duration::ZERO,
            threads: 2,
        };
        let swap = |_: &_| OnDisk { store: store(&disk, limits), coming: Cell::new(false) };
        let mut player = Player::new(stage, World::with_swap(&stage.layout, swap));
        for &op in ops {
            change(&disk, stage.deadly, &mut rng);
            player.step(op);
        }
        disk.take_writes();
        player.end(|swap| assert_sound(&swap.store));
    });
}
