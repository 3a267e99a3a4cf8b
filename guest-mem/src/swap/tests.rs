//! The store as a whole, against models and on failing disks.

use super::cluster::State;
use super::device::Device;
use super::extents::BLOCK;
use super::store::Limits;
use super::*;
use crate::addr::PAGE_SIZE;
use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const KIB: u64 = 1 << 10;

/// A disk in memory, some blocks of which fail, and which can be told to hold writes back.
#[derive(Default)]
struct Disk {
    bytes: Mutex<Vec<u8>>,
    bad_reads: Mutex<HashSet<u64>>,
    bad_writes: Mutex<HashSet<u64>>,
    held: Mutex<bool>,
    let_go: Condvar,
    discarded: Mutex<Vec<(u64, u64)>>,
    /// Discards are not for it.
    keeps: bool,
}

impl Disk {
    fn new(blocks: u64) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(vec![0; blocks as usize * BLOCK]), ..Self::default() })
    }

    fn blocks(&self) -> u64 {
        (self.bytes.lock().unwrap().len() / BLOCK) as u64
    }

    fn hold_writes(&self) {
        *self.held.lock().unwrap() = true;
    }

    fn let_writes_go(&self) {
        *self.held.lock().unwrap() = false;
        self.let_go.notify_all();
    }

    fn fail_writes(&self) {
        self.bad_writes.lock().unwrap().extend(0..self.blocks());
    }

    fn take_writes(&self) {
        self.bad_writes.lock().unwrap().clear();
    }

    fn fail(bad: &Mutex<HashSet<u64>>, first: u64, len: usize) -> io::Result<()> {
        let bad = bad.lock().unwrap();
        match (first..first + (len / BLOCK) as u64).find(|block| bad.contains(block)) {
            Some(block) => Err(io::Error::other(format!("block {block} is bad"))),
            None => Ok(()),
        }
    }
}

impl Device for Arc<Disk> {
    fn read(&self, first: u64, buf: &mut [u8]) -> io::Result<()> {
        assert_eq!(buf.as_ptr().align_offset(BLOCK), 0);
        Disk::fail(&self.bad_reads, first, buf.len())?;
        let start = first as usize * BLOCK;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[start..start + buf.len()]);
        Ok(())
    }

    fn write(&self, first: u64, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(bytes.as_ptr().align_offset(BLOCK), 0);
        let held = self.held.lock().unwrap();
        drop(self.let_go.wait_while(held, |held| *held).unwrap());
        Disk::fail(&self.bad_writes, first, bytes.len())?;
        let start = first as usize * BLOCK;
        self.bytes.lock().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Whoever needs the blocks after all finds that out.
    fn discard(&self, first: u64, blocks: u64) -> io::Result<()> {
        if self.keeps {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.discarded.lock().unwrap().push((first, blocks));
        let bytes = first as usize * BLOCK..(first + blocks) as usize * BLOCK;
        self.bytes.lock().unwrap()[bytes].fill(0xdd);
        Ok(())
    }
}

/// xorshift64*: the same numbers in every run.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.bits() >> 16) % end
    }
}

/// A page that nothing compresses.
fn noise(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..PAGE_SIZE / 8).flat_map(|_| rng.bits().to_le_bytes()).collect()
}

/// A page of zeros, of noise, or of something between, as the seed says.
fn page(seed: u64) -> Vec<u8> {
    match seed % 4 {
        0 => vec![0; PAGE_SIZE],
        1 => noise(seed),
        _ => {
            let mut page = noise(seed);
            page[PAGE_SIZE / (1 + seed as usize % 7)..].fill(seed as u8);
            page
        }
    }
}

/// 16 pages of noise.
fn cluster(seed: u64) -> Vec<u8> {
    (0..CLUSTER.0).flat_map(|page| noise(seed << 8 | page)).collect()
}

/// The tier holds two clusters of noise, and two more may wait.
fn tiny() -> Limits {
    Limits {
        tier: 144 * KIB,
        hard: 288 * KIB,
        cache: 288 * KIB,
        wanted: 4,
        stale: 20,
        rest: Duration::ZERO,
        threads: 2,
    }
}

fn store(disk: &Arc<Disk>, limits: Limits) -> SwapStore {
    SwapStore::new(Some((Box::new(Arc::clone(disk)), disk.blocks())), limits).unwrap()
}

fn assert_sound(swap: &SwapStore) {
    assert_eq!(swap.check(), Vec::<String>::new());
}

/// Waits for the event, and takes in what there is.
fn next(swap: &mut SwapStore) -> bool {
    let epoll = Epoll::new().unwrap();
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, swap.event().as_raw_fd(), readable).unwrap();
    assert_eq!(epoll.wait(10_000, &mut [EpollEvent::default()]).unwrap(), 1, "nothing ends");
    let came = swap.complete();
    assert_sound(swap);
    came
}

/// Waits until all jobs are done.
fn settle(swap: &mut SwapStore) {
    while !swap.books.sums.idle() {
        next(swap);
    }
}

/// Puts when there is room.
fn put(swap: &mut SwapStore, pages: &[u8]) -> SwapSlot {
    loop {
        match swap.put(pages) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => next(swap),
            done => {
                assert_sound(swap);
                return done.unwrap();
            }
        };
    }
}

/// Gets, however long it takes.
fn fetch(swap: &mut SwapStore, first: SwapSlot, pages: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0xaa; PageCount(pages).bytes() as usize];
    while swap.get(first, &mut buf)? == Fetch::Coming {
        assert_sound(swap);
        next(swap);
    }
    assert_sound(swap);
    Ok(buf)
}

/// Clusters of noise, all on the disk only, in order.
fn on_disk(swap: &mut SwapStore, clusters: u64) -> Vec<SwapSlot> {
    let slots = (0..clusters).map(|seed| put(swap, &cluster(seed))).collect();
    let tier = std::mem::replace(&mut swap.limits.tier, 0);
    swap.write_back();
    settle(swap);
    swap.trim();
    swap.limits.tier = tier;
    assert_eq!(swap.stats().compressed_bytes, 0);
    slots
}

/// A path that is removed at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("swap-test-{name}-{}", std::process::id())))
    }

    fn open(&self, size: Option<u64>) -> io::Result<SwapStore> {
        SwapStore::open(SwapOptions { path: Some(self.0.clone()), size, compressed: 0 })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// What the model knows of a put: the seeds of its pages that are in use.
struct Known {
    first: SwapSlot,
    seeds: Vec<Option<u64>>,
}

impl Known {
    /// A run of pages in use.
    fn run(&self, rng: &mut Rng) -> (usize, usize) {
        let len = self.seeds.len() as u64;
        let start = (0..).map(|_| rng.below(len) as usize).find(|&page| self.seeds[page].is_some()).unwrap();
        let most = self.seeds[start..].iter().take_while(|seed| seed.is_some()).count();
        (start, 1 + rng.below(most as u64) as usize)
    }

    fn bytes(&self, start: usize, count: usize) -> Vec<u8> {
        self.seeds[start..start + count].iter().flat_map(|seed| page(seed.unwrap())).collect()
    }
}

/// Puts, gets, frees and completions at random. Before each step, `weather` may change the disk's mood; at the end the
/// disk must take writes.
fn compare_with_model(seed: u64, mut swap: SwapStore, mut weather: impl FnMut(u64, &mut Rng)) {
    let mut rng = Rng::new(seed);
    let mut model: Vec<Known> = Vec::new();
    let (mut taken, mut refused) = (0, 0);
    for step in 0..2500 {
        weather(step, &mut rng);
        match rng.below(10) {
            0..4 => {
                let seeds: Vec<Option<u64>> = (0..=rng.below(16)).map(|_| Some(rng.bits())).collect();
                let bytes: Vec<u8> = seeds.iter().flatten().flat_map(|&seed| page(seed)).collect();
                let before = swap.stats();
                match swap.put(&bytes) {
                    Ok(first) => {
                        taken += 1;
                        model.push(Known { first, seeds });
                    }
                    Err(error) => {
                        let kinds =
                            [io::ErrorKind::StorageFull, io::ErrorKind::ResourceBusy, io::ErrorKind::WouldBlock];
                        let full = kinds.contains(&error.kind());
                        assert!(full, "{error}");
                        assert_eq!(swap.stats().slots_used, before.slots_used);
                        refused += 1;
                        next_if_busy(&mut swap);
                    }
                }
            }
            4..7 if !model.is_empty() => {
                let known = &model[rng.below(model.len() as u64) as usize];
                let (start, count) = known.run(&mut rng);
                let mut buf = vec![0xaa; count * PAGE_SIZE];
                match swap.get(known.first.nth(start as u64), &mut buf).unwrap() {
                    Fetch::Here => assert!(buf == known.bytes(start, count), "seed {seed}, step {step}"),
                    Fetch::Coming => {}
                }
            }
            7..9 if !model.is_empty() => {
                let index = rng.below(model.len() as u64) as usize;
                let known = &mut model[index];
                let (start, count) = match known.seeds.iter().all(Option::is_some) {
                    true if rng.below(2) == 0 => (0, known.seeds.len()),
                    _ => known.run(&mut rng),
                };
                swap.free(known.first.nth(start as u64), PageCount(count as u64));
                known.seeds[start..start + count].fill(None);
                if known.seeds.iter().all(Option::is_none) {
                    model.swap_remove(index);
                }
            }
            _ => {
                swap.complete();
            }
        }
        assert_sound(&swap);
        let used: usize = model.iter().flat_map(|known| &known.seeds).flatten().count();
        assert_eq!(swap.stats().slots_used, used as u64);
    }
    weather(u64::MAX, &mut rng);
    assert!(taken > 300 && refused > 0, "{taken} puts were taken, {refused} were not");
    assert!(swap.stats().swap_write_pages > 0);
    for known in &model {
        for (index, seed) in known.seeds.iter().enumerate() {
            if let &Some(seed) = seed {
                assert!(fetch(&mut swap, known.first.nth(index as u64), 1).unwrap() == page(seed));
            }
        }
    }
    for known in &model {
        for (index, _) in known.seeds.iter().enumerate().filter(|(_, seed)| seed.is_some()) {
            swap.free(known.first.nth(index as u64), PageCount(1));
        }
    }
    settle(&mut swap);
    let SwapStats { compressed_bytes, disk_bytes, slots_used, .. } = swap.stats();
    assert_eq!((compressed_bytes, disk_bytes, slots_used), (0, 0, 0));
}

fn next_if_busy(swap: &mut SwapStore) {
    if !swap.books.sums.idle() {
        next(swap);
    }
}

#[test]
fn it_does_what_a_map_does() {
    for seed in 1..=4 {
        compare_with_model(seed, store(&Disk::new(600), tiny()), |_, _| {});
    }
}

#[test]
fn on_a_real_file_too() {
    let scratch = Scratch::new("model");
    let mut swap = scratch.open(Some(600 * BLOCK as u64)).unwrap();
    swap.limits = tiny();
    compare_with_model(5, swap, |_, _| {});
}

#[test]
fn writes_that_fail_now_and_then_lose_nothing() {
    for seed in 6..=9 {
        let disk = Disk::new(600);
        compare_with_model(seed, store(&disk, tiny()), |step, rng| match rng.below(40) {
            _ if step == u64::MAX => disk.take_writes(),
            0 => disk.fail_writes(),
            1 => disk.take_writes(),
            _ => {}
        });
    }
}

#[test]
fn the_threads_end_with_the_store() {
    let disk = Disk::new(1000);
    disk.hold_writes();
    let mut swap = store(&disk, tiny());
    for seed in 0..4 {
        swap.put(&cluster(seed)).unwrap();
    }
    disk.let_writes_go();
    drop(swap);
    assert_eq!(Arc::strong_count(&disk), 1);
}

#[test]
fn a_flipped_bit_loses_its_cluster_alone() {
    let scratch = Scratch::new("flip");
    let mut swap = scratch.open(Some(4 << 20)).unwrap();
    let slots = on_disk(&mut swap, 6);
    let place = swap.books[2].state.place().unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&scratch.0).unwrap();
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, (place.start + 3) * BLOCK as u64).unwrap();
    block[77] ^= 4;
    file.write_all_at(&block, (place.start + 3) * BLOCK as u64).unwrap();

    for (seed, &first) in slots.iter().enumerate() {
        if seed == 2 {
            let error = fetch(&mut swap, first.nth(1), 2).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            let again = fetch(&mut swap, first, 1).unwrap_err();
            assert_eq!(again.to_string(), error.to_string());
        } else {
            assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
        }
    }
    slots.iter().for_each(|&first| swap.free(first, CLUSTER));
    assert_eq!(swap.stats().disk_bytes, 0);
}

#[test]
fn data_in_the_wrong_place_is_noticed() {
    let disk = Disk::new(200);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 2);
    let places = [0, 1].map(|key| swap.books[key].state.place().unwrap());
    let from = places[0].start as usize * BLOCK;
    disk.bytes.lock().unwrap().copy_within(from..from + places[0].bytes(), places[1].start as usize * BLOCK);
    assert!(fetch(&mut swap, slots[1], 16).unwrap_err().to_string().contains("another cluster"));
    assert!(fetch(&mut swap, slots[0], 16).unwrap() == cluster(0));
}

#[test]
fn a_full_disk_refuses_and_keeps() {
    let disk = Disk::new(5 * 17);
    let mut swap = store(&disk, tiny());
    let mut slots = Vec::new();
    let error = loop {
        match swap.put(&cluster(slots.len() as u64)) {
            Ok(first) => slots.push(first),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                next(&mut swap);
            }
            Err(error) => break error,
        }
        assert_sound(&swap);
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(slots.len(), 9, "five on the disk and four in memory");
    assert_eq!(swap.capacity().disk_free, 0);
    for (seed, &first) in slots.iter().enumerate() {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
    // Zeros always fit, and a free makes room.
    let zeros = swap.put(&[0; 2 * PAGE_SIZE]).unwrap();
    assert_eq!(fetch(&mut swap, zeros, 2).unwrap(), [0; 2 * PAGE_SIZE]);
    swap.free(slots[0], CLUSTER);
    let late = put(&mut swap, &cluster(99));
    assert!(fetch(&mut swap, late, 16).unwrap() == cluster(99));
}

/// What nobody needs is discarded when it is much and the disk has nothing else to do, and no more than that.
#[test]
fn stale_blocks_are_discarded() {
    let disk = Disk::new(600);
    let mut swap = store(&disk, tiny());
    let slots: Vec<SwapSlot> = (0..12).map(|seed| put(&mut swap, &cluster(seed))).collect();
    settle(&mut swap);
    let placed: Vec<bool> = slots.iter().map(|slot| swap.books[slot.0 as usize / 16].state.place().is_some()).collect();
    assert!(placed[..6].iter().all(|&placed| placed), "{placed:?}");
    swap.free(slots[1], CLUSTER);
    settle(&mut swap);
    assert_eq!(disk.discarded.lock().unwrap().as_slice(), [], "17 blocks are few");
    let used = swap.stats().disk_bytes;
    swap.free(slots[3], CLUSTER);
    while swap.books.discarding.is_some() {
        next(&mut swap);
    }
    assert!(!disk.discarded.lock().unwrap().is_empty());
    assert_eq!(swap.stats().disk_bytes, used - 17 * BLOCK as u64);
    assert_sound(&swap);
    for (seed, &slot) in slots.iter().enumerate().filter(|(seed, _)| ![1, 3].contains(seed)) {
        assert!(fetch(&mut swap, slot, 16).unwrap() == cluster(seed as u64));
        swap.free(slot, CLUSTER);
    }
    settle(&mut swap);
    while swap.books.discarding.is_some() {
        next(&mut swap);
    }
    assert_eq!((swap.books.extents.stale_blocks(), swap.stats().disk_bytes), (0, 0), "the last are few, and all");
    assert_sound(&swap);
}

#[test]
fn a_disk_that_cannot_discard_is_told_once() {
    let disk = Arc::new(Disk { bytes: Mutex::new(vec![0; 600 * BLOCK]), keeps: true, ..Disk::default() });
    let mut swap = store(&disk, tiny());
    let slots: Vec<SwapSlot> = (0..6).map(|seed| put(&mut swap, &cluster(seed))).collect();
    settle(&mut swap);
    slots.into_iter().for_each(|slot| swap.free(slot, CLUSTER));
    while swap.books.discarding.is_some() {
        next(&mut swap);
    }
    assert!(!swap.discards && swap.stats().disk_bytes == 0);
    assert_sound(&swap);
}

#[test]
fn without_a_file_memory_is_the_limit() {
    let mut swap = SwapStore::open(SwapOptions { compressed: 200 * KIB, ..SwapOptions::default() }).unwrap();
    let slots: Vec<_> = (0..3).map(|seed| swap.put(&cluster(seed)).unwrap()).collect();
    assert_eq!(swap.put(&cluster(3)).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert!(!swap.complete());
    swap.free(slots[1], CLUSTER);
    let last = swap.put(&cluster(3)).unwrap();
    for (seed, first) in [(0, slots[0]), (2, slots[2]), (3, last)] {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed));
    }
    assert!(swap.stats().compressed_bytes <= 200 * KIB);
}

#[test]
fn a_disk_that_fails_writes_loses_nothing() {
    let disk = Disk::new(1000);
    disk.fail_writes();
    let mut limits = tiny();
    limits.rest = Duration::from_secs(3600);
    let mut swap = store(&disk, limits);
    let mut slots = Vec::new();
    let refusal = loop {
        match swap.put(&cluster(slots.len() as u64)) {
            Ok(first) => slots.push(first),
            Err(error) => break error,
        }
    };
    settle(&mut swap);
    assert!(refusal.kind() == io::ErrorKind::WouldBlock || refusal.kind() == io::ErrorKind::ResourceBusy);
    let error = swap.put(&cluster(99)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    assert!(error.to_string().contains("fails"), "{error}");
    assert_eq!((swap.stats().swap_write_pages, swap.stats().disk_bytes), (0, 0));
    for (seed, &first) in slots.iter().enumerate() {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
    // It is tried again once it has rested.
    disk.take_writes();
    swap.limits.rest = Duration::ZERO;
    let late = put(&mut swap, &cluster(99));
    settle(&mut swap);
    assert!(swap.failing.is_none() && swap.stats().swap_write_pages > 0);
    assert!(fetch(&mut swap, late, 16).unwrap() == cluster(99));
}

#[test]
fn a_bad_block_keeps_its_cluster_alone_from_the_disk() {
    let disk = Disk::new(1000);
    disk.bad_writes.lock().unwrap().insert(40);
    let mut swap = store(&disk, tiny());
    let slots: Vec<_> = (0..12).map(|seed| put(&mut swap, &cluster(seed))).collect();
    settle(&mut swap);
    assert!(swap.stats().swap_write_pages >= 9 * 16);
    for (seed, &first) in slots.iter().enumerate() {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
}

#[test]
fn a_read_error_loses_its_cluster_alone() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 8);
    let bad = swap.books[3].state.place().unwrap();
    disk.bad_reads.lock().unwrap().insert(bad.start + 5);
    for (seed, &first) in slots.iter().enumerate() {
        match fetch(&mut swap, first, 16) {
            Ok(bytes) => assert!(seed != 3 && bytes == cluster(seed as u64)),
            Err(error) => {
                assert_eq!(seed, 3);
                assert!(error.to_string().contains("is bad"), "{error}");
            }
        }
    }
    // What is lost stays so.
    disk.bad_reads.lock().unwrap().clear();
    assert!(fetch(&mut swap, slots[3], 1).is_err());
    swap.free(slots[3], CLUSTER);
    assert_eq!(swap.stats().disk_bytes, 7 * 17 * BLOCK as u64);
}

#[test]
fn what_is_on_its_way_out_is_read_from_memory() {
    let disk = Disk::new(1000);
    disk.hold_writes();
    let mut swap = store(&disk, tiny());
    let slots: Vec<_> = (0..4).map(|seed| swap.put(&cluster(seed)).unwrap()).collect();
    assert!(matches!(swap.books[0].state, State::Writing { .. }));
    assert_eq!(swap.put(&cluster(9)).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let mut buf = vec![0; CLUSTER.bytes() as usize];
    for (seed, &first) in slots.iter().enumerate() {
        assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Here);
        assert!(buf == cluster(seed as u64));
    }
    // Freed meanwhile: the blocks stay taken until the write is over.
    swap.free(slots[0], CLUSTER);
    assert!(matches!(swap.books[0].state, State::Dropped(_)));
    assert!(swap.stats().disk_bytes > 0);
    assert_sound(&swap);
    disk.let_writes_go();
    settle(&mut swap);
    slots[1..].iter().for_each(|&first| swap.free(first, CLUSTER));
    settle(&mut swap);
    assert_eq!((swap.stats().disk_bytes, swap.stats().compressed_bytes), (0, 0));
}

#[test]
fn pages_outlive_their_neighbours() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 2);
    assert!(fetch(&mut swap, slots[0].nth(5), 1).unwrap() == cluster(0)[5 * PAGE_SIZE..6 * PAGE_SIZE]);
    swap.free(slots[0], PageCount(5));
    swap.free(slots[0].nth(6), PageCount(10));
    assert!(fetch(&mut swap, slots[0].nth(5), 1).unwrap() == cluster(0)[5 * PAGE_SIZE..6 * PAGE_SIZE]);
    let error = fetch(&mut swap, slots[0].nth(4), 2).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    swap.free(slots[0].nth(5), PageCount(1));
    assert_eq!(swap.stats().disk_bytes, 17 * BLOCK as u64);
}

#[test]
fn dead_pages_in_memory_take_nothing() {
    let mut swap = store(&Disk::new(100), tiny());
    let first = swap.put(&cluster(1)).unwrap();
    swap.free(first, PageCount(12));
    assert!(swap.stats().compressed_bytes < 17 * KIB);
    assert!(fetch(&mut swap, first.nth(15), 1).unwrap() == cluster(1)[15 * PAGE_SIZE..]);
    assert_sound(&swap);
}

#[test]
fn one_read_serves_all_who_ask() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 1);
    let mut buf = vec![0; PAGE_SIZE];
    for page in 0..16 {
        assert_eq!(swap.get(slots[0].nth(page), &mut buf).unwrap(), Fetch::Coming);
    }
    assert_eq!(swap.books.sums.reads, 1);
    while !next(&mut swap) {}
    for page in 0..16 {
        assert_eq!(swap.get(slots[0].nth(page), &mut buf).unwrap(), Fetch::Here);
    }
    assert_eq!(swap.stats().swap_in_pages, 16);
    assert_eq!(swap.stats().swap_write_pages, 16);
}

/// What is expected is read once, is given without a read, and is a hit when somebody says so; a block that cannot be read
/// is lost to who needs it, not to who expected it.
#[test]
fn what_is_expected_is_here_when_somebody_comes_for_it() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 3);
    let mut buf = vec![0; 16 * PAGE_SIZE];
    assert!(swap.get_expected(slots[0], &mut buf).is_err(), "nobody has expected it");
    let bad = swap.books[1].state.place().unwrap();
    disk.bad_reads.lock().unwrap().insert(bad.start);
    assert_eq!([0, 1, 0].map(|nth| swap.expect(slots[nth], PageCount(16)).0), [16, 16, 0]);
    assert_eq!(swap.get_expected(slots[0], &mut buf).unwrap(), Fetch::Coming);
    settle(&mut swap);
    assert_eq!(swap.get_expected(slots[0], &mut buf).unwrap(), Fetch::Here);
    assert!(buf == cluster(0) && swap.get_expected(slots[1], &mut buf).is_err());
    assert_eq!((swap.stats().readahead_pages, swap.stats().readahead_hits), (32, 0));
    swap.count_hits(PageCount(16));
    assert_eq!(swap.stats().readahead_hits, 16);
    disk.bad_reads.lock().unwrap().clear();
    assert!(fetch(&mut swap, slots[1], 16).unwrap() == cluster(1));
    assert_sound(&swap);
}

#[test]
fn read_ahead_grows_with_success_and_shrinks_without() {
    let disk = Disk::new(200 * 17);
    let limits = Limits { cache: 1200 * KIB, ..tiny() };
    let mut swap = store(&disk, limits);
    let slots = on_disk(&mut swap, 150);
    assert_eq!(swap.ahead.window(), 1);
    for (seed, &first) in slots.iter().enumerate().take(40) {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
    settle(&mut swap);
    assert_eq!(swap.ahead.window(), 8);
    let stats = swap.stats();
    assert!(stats.readahead_hits >= 30 * 16 && stats.readahead_pages >= stats.readahead_hits, "{stats:?}");
    // At random, most of it goes unasked for.
    let mut rng = Rng::new(3);
    for _ in 0..60 {
        let index = 45 + rng.below(100) as usize;
        fetch(&mut swap, slots[index], 1).unwrap();
        settle(&mut swap);
    }
    assert!(swap.ahead.window() <= 2, "{:?}", swap.ahead);
}

#[test]
fn an_idle_disk_gets_the_oldest_ahead() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let first = swap.put(&cluster(0)).unwrap();
    assert!(swap.books.sums.idle(), "less than half is no reason to write");
    swap.put(&cluster(1)).unwrap();
    settle(&mut swap);
    let stats = swap.stats();
    assert_eq!((stats.writeahead_pages, stats.swap_write_pages), (16, 16));
    // Its copy stays as long as there is room, and goes at once when there is not.
    let mut buf = vec![0; PAGE_SIZE];
    assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Here);
    swap.put(&cluster(2)).unwrap();
    assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Coming);
    assert_sound(&swap);
}

#[test]
fn more_may_be_wanted_than_the_cache_holds() {
    let disk = Disk::new(1000);
    let mut limits = tiny();
    limits.cache = 0;
    let mut swap = store(&disk, limits);
    let slots = on_disk(&mut swap, 4);
    let mut buf = vec![0; PAGE_SIZE];
    for &first in &slots {
        assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Coming);
    }
    settle(&mut swap);
    for &first in &slots {
        assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Here);
    }
    assert_eq!(swap.stats().compressed_bytes, 0, "whoever has come needs no copy");
}

#[test]
fn wrong_lengths_and_slots_are_refused() {
    let mut swap = SwapStore::open(SwapOptions { compressed: 1 << 20, ..SwapOptions::default() }).unwrap();
    for len in [0, 100, PAGE_SIZE + 1, 17 * PAGE_SIZE] {
        assert_eq!(swap.put(&vec![1; len]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    let first = swap.put(&[1; PAGE_SIZE]).unwrap();
    for slot in [first.nth(1), SwapSlot(99), SwapSlot(u64::MAX)] {
        assert_eq!(swap.get(slot, &mut [0; PAGE_SIZE]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
#[should_panic(expected = "are in use")]
fn a_slot_is_freed_once() {
    let mut swap = SwapStore::open(SwapOptions { compressed: 1 << 20, ..SwapOptions::default() }).unwrap();
    let first = swap.put(&[1; 2 * PAGE_SIZE]).unwrap();
    swap.free(first, PageCount(1));
    swap.free(first, PageCount(1));
}

#[test]
fn a_file_is_private_locked_and_emptied() {
    let scratch = Scratch::new("file");
    assert_eq!(scratch.open(None).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    fs::write(&scratch.0, b"somebody's").unwrap();
    fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o644)).unwrap();
    let mut swap = scratch.open(Some(1 << 20)).unwrap();
    assert_eq!(scratch.open(None).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let metadata = fs::metadata(&scratch.0).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (1 << 20, 0o600));
    assert_eq!(swap.capacity().disk, 1 << 20);
    on_disk(&mut swap, 2);
    drop(swap);
    assert_eq!(fs::metadata(&scratch.0).unwrap().len(), 0);

    let file = OpenOptions::new().read(true).write(true).open(&scratch.0).unwrap();
    file.set_len(300 * KIB).unwrap();
    let swap = SwapStore::open_file(file, &SwapOptions::default()).unwrap();
    assert_eq!(swap.capacity(), SwapCapacity { memory: 0, disk: 300 * KIB, disk_free: 300 * KIB });
    assert_eq!(scratch.open(Some(1)).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(swap);
    assert!(scratch.open(Some(1 << 20)).is_ok());
    let null = SwapOptions { path: Some("/dev/null".into()), size: Some(1 << 20), compressed: 0 };
    assert_eq!(SwapStore::open(null).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
