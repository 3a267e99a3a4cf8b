//! The store: put, get, free.

use super::books::Books;
use super::cluster::{ClusterState, bits, slot};
use super::device::{FileDevice, SwapDevice};
use super::extents::BLOCK;
use super::packed::Packer;
use super::pool::{DiskPool, Outcome};
use super::read::ReadAhead;
use super::{Fetch, Swap};
use crate::addr::cluster::CLUSTER;
use crate::addr::{PAGE_SIZE, PageCount};
use crate::ids::SwapSlot;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// What a [`SwapStore`] is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwapOptions {
    /// A regular file, made if it is not there and **emptied** if it is, or a block device. Without one, what does not
    /// fit into memory is refused.
    pub path: Option<PathBuf>,
    /// How many bytes of it are used; otherwise a file's length, or a device's.
    pub size: Option<u64>,
    /// How many bytes of compressed pages are kept in memory before they go to the disk. What waits to be written may
    /// take a quarter on top, the cache of what was read an eighth (at least 256 KiB and 1 MiB).
    pub compressed: u64,
}

/// What a [`SwapStore`] holds and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SwapStats {
    /// Memory that compressed pages take: the tier, what is on its way out, and copies of what is on the disk.
    pub compressed_bytes: u64,
    /// Taken on the disk.
    pub disk_bytes: u64,
    /// Slots in use.
    pub slots_used: u64,
    /// Pages that were put.
    pub swap_out_pages: u64,
    /// Pages that were written to the disk.
    pub swap_write_pages: u64,
    /// Pages that `get` gave.
    pub swap_in_pages: u64,
    /// Pages read from the disk before anybody asked.
    pub readahead_pages: u64,
    /// Pages of clusters that were read ahead and then asked for.
    pub readahead_hits: u64,
    /// Pages whose writing began before the tier was over its limit.
    pub writeahead_pages: u64,
}

/// What fits into a [`SwapStore`], in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SwapCapacity {
    /// The limit of the tier in memory.
    pub memory: u64,
    /// The disk's size.
    pub disk: u64,
    /// What is free of that.
    pub disk_free: u64,
}

/// Evicted pages, in memory and on a disk. The [module](super) tells how.
///
/// It owns its file, which is locked, and its threads, which end with it. All pages end with it too.
#[derive(Debug)]
pub struct SwapStore {
    pub(super) books: Books,
    pub(super) pool: Option<DiskPool>,
    pub(super) limits: Limits,
    pub(super) ahead: ReadAhead,
    /// When the last write failed, unless one has succeeded since.
    pub(super) failing: Option<Instant>,
    /// The disk wants to be told of blocks that nobody needs.
    pub(super) discards: bool,
    /// What was done so far; what is there is added when it is asked for.
    pub(super) counters: SwapStats,
    /// This store's number in its frames.
    pub(super) run: u64,
    sequence: u64,
    packer: Packer,
    event: Arc<EventFd>,
}

/// How much of what, in bytes if nothing else is said.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// What is in memory only.
    pub tier: u64,
    /// That, and what is on its way out.
    pub hard: u64,
    /// Copies of what was read.
    pub cache: u64,
    /// Clusters that somebody is expected to come for.
    pub wanted: u64,
    /// So many stale blocks are worth a discard.
    pub stale: u64,
    /// How long a disk rests on which a write has failed.
    pub rest: Duration,
    /// Threads that read and write.
    pub threads: usize,
}

/// They wait for the disk most of the time, and a disk is quick when it is asked for several things at once.
const THREADS: usize = 4;

impl Limits {
    /// For a tier of so many bytes before a disk.
    pub fn new(tier: u64) -> Self {
        let cluster = CLUSTER.bytes();
        Self {
            tier,
            hard: tier.saturating_add((tier / 4).max(4 * cluster)),
            cache: (tier / 8).max(16 * cluster),
            wanted: 256,
            stale: (16 << 20) / BLOCK as u64,
            rest: Duration::from_secs(1),
            threads: THREADS,
        }
    }
}

impl SwapStore {
    /// Opens the swap file, if there is one, and starts the threads.
    ///
    /// # Errors
    /// The file cannot be opened; `WouldBlock`: another server has it; `InvalidInput`: no size is known, or it is larger
    /// than the device. Otherwise the host has no descriptors or threads left.
    pub fn open(options: SwapOptions) -> io::Result<Self> {
        match &options.path {
            None => Self::new(None, Limits { hard: options.compressed, ..Limits::new(options.compressed) }),
            Some(path) => Self::on_file(FileDevice::open(path, options.size)?, options.compressed),
        }
    }

    /// As [`open`](Self::open) with a file that is open already, for reading and writing; the options' path is not
    /// looked at.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn open_file(file: File, options: &SwapOptions) -> io::Result<Self> {
        Self::on_file(FileDevice::new(file, options.size)?, options.compressed)
    }

    fn on_file(device: FileDevice, compressed: u64) -> io::Result<Self> {
        let blocks = device.blocks();
        Self::new(Some((Box::new(device), blocks)), Limits::new(compressed))
    }

    /// A store on a device of so many blocks.
    pub(super) fn new(disk: Option<(Box<dyn SwapDevice>, u64)>, limits: Limits) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (pool, blocks) = match disk {
            Some((device, blocks)) => (Some(DiskPool::start(device, Arc::clone(&event), limits.threads)?), blocks),
            None => (None, 0),
        };
        Ok(Self {
            books: Books::new(blocks),
            pool,
            limits,
            ahead: ReadAhead::default(),
            failing: None,
            discards: true,
            counters: SwapStats::default(),
            run: RandomState::new().hash_one(blocks),
            sequence: 0,
            packer: Packer::default(),
            event,
        })
    }

    /// Becomes readable when reads or writes have ended: time for [`complete`](Self::complete).
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Takes in what the threads have done. Tells whether something came that a `get` had found
    /// [coming](Fetch::Coming), or that is [expected](Swap::expect): whoever waits asks again.
    pub fn complete(&mut self) -> bool {
        let Some(pool) = &self.pool else { return false };
        // It is nonblocking, and empty if nobody has written since.
        let _ = self.event.read();
        let mut came = false;
        for done in pool.collect() {
            match done.outcome {
                Outcome::Read(result) => came |= self.was_read(done.key, result),
                Outcome::Written(result) => self.written(done.key, result),
                Outcome::Discarded(result) => self.discarded(result),
            }
        }
        self.trim();
        self.write_back();
        self.discard();
        came
    }

    /// What it holds and has done.
    pub fn stats(&self) -> SwapStats {
        let capacity = self.capacity();
        SwapStats {
            compressed_bytes: self.books.sums.memory(),
            disk_bytes: capacity.disk - capacity.disk_free,
            slots_used: self.books.sums.slots,
            ..self.counters
        }
    }

    /// Another limit for the tier in memory. What is over it is written out, if there is a disk.
    pub fn set_compressed(&mut self, bytes: u64) {
        let Limits { rest, threads, wanted, stale, .. } = self.limits;
        let limits = Limits { rest, threads, wanted, stale, ..Limits::new(bytes) };
        self.limits = if self.pool.is_some() { limits } else { Limits { hard: bytes, ..limits } };
        self.trim();
        self.write_back();
    }

    /// What fits, and how much is free.
    pub fn capacity(&self) -> SwapCapacity {
        let extents = &self.books.extents;
        let bytes = |blocks: u64| blocks * BLOCK as u64;
        SwapCapacity {
            memory: self.limits.tier,
            disk: bytes(extents.total()),
            disk_free: bytes(self.books.free_blocks()),
        }
    }

    /// Whether so many bytes more may wait in memory.
    fn has_room(&self, bytes: u64) -> bool {
        self.books.sums.dirty + self.books.sums.writing + bytes <= self.limits.hard
    }

    /// Why there is no room, in a word.
    fn no_room(&self) -> io::Error {
        let sums = &self.books.sums;
        if sums.writes + sums.dropped > 0 || self.books.discarding.is_some() {
            io::Error::new(io::ErrorKind::WouldBlock, "the swap disk is behind")
        } else if self.failing.is_some() {
            io::Error::new(io::ErrorKind::ResourceBusy, "the swap disk fails, and memory for compressed pages is full")
        } else {
            io::Error::new(io::ErrorKind::StorageFull, "swap is full")
        }
    }
}

impl Swap for SwapStore {
    fn put(&mut self, pages: &[u8]) -> io::Result<SwapSlot> {
        let count = whole_pages(pages.len())?;
        self.write_back();
        if !self.has_room(0) && pages.iter().any(|&byte| byte != 0) {
            return Err(self.no_room());
        }
        let packed = self.packer.pack(pages);
        if !packed.is_zero() && !self.has_room(packed.footprint()) {
            return Err(self.no_room());
        }
        let key = self.books.insert(self.sequence, count, packed);
        self.sequence += 1;
        self.counters.swap_out_pages += count.0;
        self.trim();
        self.write_back();
        Ok(slot(key))
    }

    fn get(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        let count = whole_pages(buf.len())?;
        let found = self.books.find(first, count);
        let (key, page) = found.ok_or_else(|| {
            let message = format!("swap slots {:#x}+{} are not in use", first.0, count.0);
            io::Error::new(io::ErrorKind::InvalidInput, message)
        })?;
        match &self.books[key].state {
            ClusterState::Zero => buf.fill(0),
            ClusterState::Memory(packed) | ClusterState::Writing { packed, .. } => packed.unpack(page as usize, buf)?,
            ClusterState::Clean { packed, .. } => {
                packed.unpack(page as usize, buf)?;
                self.used(key);
                self.trim();
            }
            &ClusterState::Disk(place) => {
                self.demand(key, place);
                return Ok(Fetch::Coming);
            }
            &ClusterState::Reading { place, keep } => {
                self.await_read(key, place, keep);
                return Ok(Fetch::Coming);
            }
            ClusterState::Lost { loss, .. } => return Err(loss.error()),
            ClusterState::Dropped(_) => unreachable!("slot {first:?} is in use"),
        }
        self.counters.swap_in_pages += count.0;
        Ok(Fetch::Here)
    }

    fn expect(&mut self, first: SwapSlot, count: PageCount) -> PageCount {
        self.books.find(first, count).map_or(PageCount(0), |(key, _)| self.look_ahead(key))
    }

    fn get_expected(&mut self, first: SwapSlot, buf: &mut [u8]) -> io::Result<Fetch> {
        let found = self.books.find(first, whole_pages(buf.len())?);
        match found.map(|(key, _)| &self.books[key].state) {
            None | Some(ClusterState::Disk(_) | ClusterState::Lost { .. }) => Err(io::ErrorKind::NotFound.into()),
            Some(ClusterState::Reading { .. }) => Ok(Fetch::Coming),
            Some(_) => self.get(first, buf),
        }
    }

    fn count_hits(&mut self, pages: PageCount) {
        self.counters.readahead_hits += pages.0;
    }

    fn collect(&mut self) {
        self.complete();
    }

    fn completions(&self) -> Option<Arc<EventFd>> {
        Some(Arc::clone(&self.event))
    }

    fn free(&mut self, first: SwapSlot, count: PageCount) {
        let found = self.books.find(first, count);
        let (key, page) = found.unwrap_or_else(|| panic!("swap slots {:#x}+{} are in use", first.0, count.0));
        if self.books.kill(key, bits(page, count)) != 0 {
            self.shrink(key);
        } else {
            match self.books[key].state {
                ClusterState::Writing { place, .. } | ClusterState::Reading { place, .. } => {
                    self.books.turn(key, ClusterState::Dropped(place));
                }
                _ => self.books.remove(key),
            }
        }
        self.write_back();
        self.discard();
    }
}

/// How many pages a buffer holds that must be 1 to 16 whole ones.
fn whole_pages(bytes: usize) -> io::Result<PageCount> {
    let pages = PageCount::covering(bytes as u64);
    if pages.bytes() == bytes as u64 && (1..=CLUSTER.0).contains(&pages.0) {
        return Ok(pages);
    }
    let message = format!("{bytes} bytes are not 1 to {} whole pages of {PAGE_SIZE}", CLUSTER.0);
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}
