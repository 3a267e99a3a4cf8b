//! A disk that fails to order, and what tests of the store do again and again.

use super::super::device::SwapDevice;
use super::super::extents::BLOCK;
use super::super::store::Limits;
use super::super::*;
use crate::addr::PAGE_SIZE;
use std::collections::HashSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub(super) const KIB: u64 = 1 << 10;

/// A disk in memory, some blocks of which fail, and which can be told to hold writes back.
#[derive(Default)]
pub(super) struct Disk {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) bad_reads: Mutex<HashSet<u64>>,
    pub(super) bad_writes: Mutex<HashSet<u64>>,
    pub(super) held: Mutex<bool>,
    pub(super) let_go: Condvar,
    pub(super) discarded: Mutex<Vec<(u64, u64)>>,
    /// It says that it has written, and has not.
    pub(super) forgets: Mutex<bool>,
    /// Discards are not for it.
    pub(super) keeps: bool,
}

impl Disk {
    pub(super) fn new(blocks: u64) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(vec![0; blocks as usize * BLOCK]), ..Self::default() })
    }

    pub(super) fn blocks(&self) -> u64 {
        (self.bytes.lock().unwrap().len() / BLOCK) as u64
    }

    pub(super) fn hold_writes(&self) {
        *self.held.lock().unwrap() = true;
    }

    pub(super) fn let_writes_go(&self) {
        *self.held.lock().unwrap() = false;
        self.let_go.notify_all();
    }

    pub(super) fn fail_writes(&self) {
        self.bad_writes.lock().unwrap().extend(0..self.blocks());
    }

    pub(super) fn take_writes(&self) {
        self.bad_writes.lock().unwrap().clear();
    }

    pub(super) fn fail(bad: &Mutex<HashSet<u64>>, first: u64, len: usize) -> io::Result<()> {
        let bad = bad.lock().unwrap();
        match (first..first + (len / BLOCK) as u64).find(|block| bad.contains(block)) {
            Some(block) => Err(io::Error::other(format!("block {block} is bad"))),
            None => Ok(()),
        }
    }
}

impl SwapDevice for Arc<Disk> {
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
        if *self.forgets.lock().unwrap() {
            return Ok(());
        }
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
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        (self.bits() >> 16) % end
    }
}

/// A page that nothing compresses.
pub(super) fn noise(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..PAGE_SIZE / 8).flat_map(|_| rng.bits().to_le_bytes()).collect()
}

/// A page of zeros, of noise, or of something between, as the seed says.
pub(super) fn page(seed: u64) -> Vec<u8> {
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
pub(super) fn cluster(seed: u64) -> Vec<u8> {
    (0..CLUSTER.0).flat_map(|page| noise(seed << 8 | page)).collect()
}

/// The tier holds two clusters of noise, and two more may wait.
pub(super) fn tiny() -> Limits {
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

pub(super) fn store(disk: &Arc<Disk>, limits: Limits) -> SwapStore {
    SwapStore::new(Some((Box::new(Arc::clone(disk)), disk.blocks())), limits).unwrap()
}

pub(super) fn assert_sound(swap: &SwapStore) {
    assert_eq!(swap.check(), Vec::<String>::new());
}

/// Waits for the event, and takes in what there is.
pub(super) fn next(swap: &mut SwapStore) -> bool {
    let epoll = Epoll::new().unwrap();
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, swap.event().as_raw_fd(), readable).unwrap();
    assert_eq!(epoll.wait(10_000, &mut [EpollEvent::default()]).unwrap(), 1, "nothing ends");
    let came = swap.complete();
    assert_sound(swap);
    came
}

/// Waits until all jobs are done.
pub(super) fn write_back(swap: &mut SwapStore) {
    while !swap.books.sums.idle() {
        next(swap);
    }
}

/// Puts when there is room.
pub(super) fn put(swap: &mut SwapStore, pages: &[u8]) -> SwapSlot {
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
pub(super) fn fetch(swap: &mut SwapStore, first: SwapSlot, pages: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0xaa; PageCount(pages).bytes() as usize];
    while swap.get(first, &mut buf)? == Fetch::Coming {
        assert_sound(swap);
        next(swap);
    }
    assert_sound(swap);
    Ok(buf)
}

/// Clusters of noise, all on the disk only, in order.
pub(super) fn on_disk(swap: &mut SwapStore, clusters: u64) -> Vec<SwapSlot> {
    let slots = (0..clusters).map(|seed| put(swap, &cluster(seed))).collect();
    let tier = std::mem::replace(&mut swap.limits.tier, 0);
    swap.write_back();
    write_back(swap);
    swap.trim();
    swap.limits.tier = tier;
    assert_eq!(swap.stats().compressed_bytes, 0);
    slots
}

/// A path that is removed at the end of the test.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("swap-test-{name}-{}", std::process::id())))
    }

    pub(super) fn open(&self, size: Option<u64>) -> io::Result<SwapStore> {
        SwapStore::open(SwapOptions { path: Some(self.0.clone()), size, compressed: 0 })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
