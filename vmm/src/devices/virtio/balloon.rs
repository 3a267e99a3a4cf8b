//! The balloon: the guest gives pages back when it is asked to, and tells of pages that are free just now.
//!
//! | queue | carries |
//! | --- | --- |
//! | 0, inflate | arrays of page numbers: these go into the balloon |
//! | 1, deflate | the same: the guest uses these again |
//! | 2, reporting | buffers that are free pages |
//!
//! Both ways pages are gone before the guest hears that they are. It may use them again at any time without a word: they
//! read zero, but for those that the machine had no mapping to spare for, which keep their bytes.

use super::device::{Broken, Device, Memory};
use guest_mem::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageCount};
use std::fmt::Debug;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const QUEUE_SIZES: [u16; 3] = [64; 3];
const INFLATE: usize = 0;
const REPORTING: usize = 2;
const ID: u32 = 5;
/// The guest may take pages out of the balloon before it kills for want of memory.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest tells of free pages.
const FREE_PAGE_REPORTING: u64 = 1 << 5;
/// Most bytes of page numbers in one request: 256 MiB of pages. Linux sends a kilobyte.
const NUMBERS_MAX: usize = 256 << 10;

/// Where the pages go that a guest gives back.
pub trait Sink: Debug + Send {
    /// Takes pages of RAM, sorted and apart. They are gone when this returns.
    fn give_back(&self, pages: Vec<GfnRange>);

    /// So many pages are in the balloon, says the guest.
    fn resized(&self, pages: u64);
}

/// How many pages are to be in the balloon: set by the machine, read by the guest. A guest that runs is told of a change
/// by [`ConfigChange`](super::ConfigChange).
#[derive(Debug, Default)]
pub struct Target(AtomicU32);

impl Target {
    /// Asks for so many; as many as can be counted, where that is more.
    pub fn set(&self, pages: u64) {
        self.0.store(u32::try_from(pages).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The device. Its state is two numbers: what is in the balloon is the guest's affair.
#[derive(Debug)]
pub struct Balloon {
    sink: Box<dyn Sink>,
    target: Arc<Target>,
    actual: u32,
}

impl Balloon {
    /// An empty balloon.
    pub fn new(sink: Box<dyn Sink>, target: Arc<Target>) -> Self {
        Self { sink, target, actual: 0 }
    }

    /// `num_pages` and `actual`.
    fn config(&self) -> [u8; 8] {
        let [target, actual] = [self.target.get(), self.actual].map(u64::from);
        (actual << 32 | target).to_le_bytes()
    }

    fn set_actual(&mut self, pages: u32) {
        if self.actual != pages {
            self.actual = pages;
            self.sink.resized(pages.into());
        }
    }
}

/// The pages whose numbers are in the buffers of a request.
fn numbered<M>(chain: DescriptorChain<M>, memory: &Memory, pages: &mut Vec<GfnRange>) -> Result<(), Broken>
where
    M: Deref<Target = Memory> + Clone,
{
    let mut total = 0;
    for buffer in chain.readable() {
        let len = buffer.len() as usize;
        total += len;
        if total > NUMBERS_MAX || !len.is_multiple_of(size_of::<u32>()) {
            return Err(Broken);
        }
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, buffer.addr()).map_err(|_| Broken)?;
        for number in bytes.as_chunks().0 {
            let first = Gfn(u32::from_le_bytes(*number).into());
            if !memory.check_range(GuestAddress(first.gpa()), PAGE_SIZE) {
                return Err(Broken);
            }
            pages.push(GfnRange::new(first, PageCount(1)));
        }
    }
    Ok(())
}

/// The whole pages that are the buffers of a report.
fn reported<M>(chain: DescriptorChain<M>, memory: &Memory, pages: &mut Vec<GfnRange>) -> Result<(), Broken>
where
    M: Deref<Target = Memory> + Clone,
{
    for buffer in chain.writable() {
        if !memory.check_range(buffer.addr(), buffer.len() as usize) {
            return Err(Broken);
        }
        let (start, end) = (buffer.addr().0, buffer.addr().0 + u64::from(buffer.len()));
        pages.push(GfnRange::between(Gfn(start.div_ceil(PAGE_SIZE as u64)), Gfn(end >> PAGE_SHIFT)));
    }
    Ok(())
}

/// The same pages, sorted and apart.
fn merged(mut pages: Vec<GfnRange>) -> Vec<GfnRange> {
    pages.retain(|range| !range.is_empty());
    pages.sort_unstable_by_key(|range| range.start());
    let mut merged: Vec<GfnRange> = Vec::new();
    for range in pages {
        match merged.last_mut() {
            Some(last) if range.start() <= last.end() => {
                *last = GfnRange::between(last.start(), last.end().max(range.end()));
            }
            _ => merged.push(range),
        }
    }
    merged
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | FREE_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at).copied()).unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        const ACTUAL: u64 = 4;
        if let (ACTUAL, Ok(pages)) = (offset, data.try_into()) {
            self.set_actual(u32::from_le_bytes(pages));
        }
    }

    fn notified(&mut self, index: usize, queue: &mut Queue, memory: &Memory) -> Result<bool, Broken> {
        let mut heads = Vec::new();
        let mut pages = Vec::new();
        // Not more than there can be: a guest that goes on adding does not keep us here.
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else { break };
            heads.push(chain.head_index());
            match index {
                INFLATE => numbered(chain, memory, &mut pages)?,
                REPORTING => reported(chain, memory, &mut pages)?,
                // What comes out of the balloon reads zero whenever it is touched.
                _ => {}
            }
        }
        let pages = merged(pages);
        if !pages.is_empty() {
            self.sink.give_back(pages);
        }
        for &head in &heads {
            queue.add_used(memory, head, 0).map_err(|_| Broken)?;
        }
        Ok(!heads.is_empty() && queue.needs_notification(memory).map_err(|_| Broken)?)
    }

    fn reset(&mut self) {
        self.set_actual(0);
    }

    fn save(&self) -> Vec<u8> {
        self.config().to_vec()
    }

    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        let saved: [u8; 8] = saved.try_into().map_err(|_| format!("{} bytes are no balloon", saved.len()))?;
        let both = u64::from_le_bytes(saved);
        self.target.set(both & u64::from(u32::MAX));
        self.actual = (both >> 32) as u32;
        Ok(())
    }
}
