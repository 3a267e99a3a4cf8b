//! The balloon: the guest gives pages back when it is asked to, and tells of pages that are free just now.
//!
//! | queue | carries |
//! | --- | --- |
//! | inflate | arrays of page numbers: these go into the balloon |
//! | deflate | the same: the guest uses these again |
//! | statistics | one buffer, which the device keeps: it gives it back to ask for new ones |
//! | hinting | commands, and buffers that are free pages, which the guest keeps until the hinting is over |
//! | reporting | buffers that are free pages |
//!
//! The last three are there as far as the guest wants them, and their numbers follow each other: so Linux counts them.
//!
//! In all three ways pages are gone before the guest hears that they are. It may use them again at any time without a word:
//! they read zero, but for those that the machine had no mapping to spare for, which keep their bytes. A hinted page belongs
//! to the guest's driver until its notification is over, whatever the guest does with it later; so to drop it then is no race.

use super::device::{Broken, Device, Memory};
use super::hint;
use guest_mem::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageCount};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const QUEUE_SIZES: [u16; 5] = [64; 5];
const ID: u32 = 5;
/// The guest tells how it is off for memory.
const STATISTICS: u64 = 1 << 1;
/// The guest may take pages out of the balloon before it kills for want of memory.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest tells of its free pages when it is asked to.
const FREE_PAGE_HINT: u64 = 1 << 3;
/// The guest tells of free pages.
const FREE_PAGE_REPORTING: u64 = 1 << 5;
/// Most bytes of page numbers in one request: 256 MiB of pages. Linux sends a kilobyte.
const NUMBERS_MAX: usize = 256 << 10;
/// Most figures in one buffer of statistics. Linux knows 16.
const FIGURES_MAX: usize = 64;
/// A figure: its tag in 2 bytes, its value in 8.
const FIGURE_LEN: usize = 10;

/// What a queue carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// The queues of a guest that wants these features, in the order of their numbers.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    let wanted = move |feature: u64, role| (features & feature != 0).then_some(role);
    let optional = [
        wanted(STATISTICS, Role::Statistics),
        wanted(FREE_PAGE_HINT, Role::Hinting),
        wanted(FREE_PAGE_REPORTING, Role::Reporting),
    ];
    [Role::Inflate, Role::Deflate].into_iter().chain(optional.into_iter().flatten())
}

/// Where what a guest gives back, and says, goes.
pub trait Sink: Debug + Send {
    /// Takes pages of RAM, sorted and apart. They are gone when this returns.
    fn give_back(&self, pages: Vec<GfnRange>);

    /// So many pages are in the balloon, says the guest.
    fn resized(&self, pages: u64);

    /// How the guest is off for memory: figures, each with its tag of the specification.
    fn statistics(&self, figures: Vec<(u16, u64)>);

    /// The guest has told of all its free pages.
    fn hinted(&self);
}

/// What the machine asks of the guest. A guest that runs is told of a new target or command by
/// [`ConfigChange`](super::ConfigChange); statistics are asked for by [`Transport::attend`](super::Transport::attend).
#[derive(Debug, Default)]
pub struct Requests {
    target: AtomicU32,
    command: hint::Command,
    statistics: AtomicBool,
}

impl Requests {
    /// How many pages are to be in the balloon: as many as can be counted, where that is more.
    pub fn set_target(&self, pages: u64) {
        self.target.store(u32::try_from(pages).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    fn target(&self) -> u32 {
        self.target.load(Ordering::Relaxed)
    }

    /// The guest is to tell how it is off for memory.
    pub fn ask_statistics(&self) {
        self.statistics.store(true, Ordering::Relaxed);
    }

    /// The guest is to tell of its free pages, and to keep them.
    pub fn begin_hinting(&self) {
        self.command.begin();
    }

    /// The guest may use again what it has told of.
    pub fn end_hinting(&self) {
        self.command.end();
    }

    /// Whether a hinting has ended, here or in the machine that this is a fork of, and the guest is to be told to look.
    pub fn take_ended_hinting(&self) -> bool {
        self.command.take_untold()
    }
}

/// The device. What is in the balloon is the guest's affair.
#[derive(Debug)]
pub struct Balloon {
    sink: Box<dyn Sink>,
    requests: Arc<Requests>,
    features: u64,
    actual: u32,
    /// The hinting that the guest answers.
    hinting: Option<u32>,
    /// The guest's buffer for statistics.
    buffer: Option<u16>,
}

/// All of it as plain data. What the machine asked for and the guest has not seen is the parent's affair.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    target: u32,
    actual: u32,
    command: hint::Saved,
    hinting: Option<u32>,
    buffer: Option<u16>,
}

impl Balloon {
    /// An empty balloon.
    pub fn new(sink: Box<dyn Sink>, requests: Arc<Requests>) -> Self {
        Self { sink, requests, features: 0, actual: 0, hinting: None, buffer: None }
    }

    /// `num_pages`, `actual`, `free_page_hint_cmd_id` and `poison_val`.
    fn config(&self) -> [u8; 16] {
        let words = [self.requests.target(), self.actual, self.requests.command.shown(), 0].map(u32::to_le_bytes);
        std::array::from_fn(|at| words[at / 4][at % 4])
    }

    fn set_actual(&mut self, pages: u32) {
        if self.actual != pages {
            self.actual = pages;
            self.sink.resized(pages.into());
        }
    }

    /// A command, or a free page of the hinting that the guest answers. Whether it has told of all.
    fn hint<M>(&mut self, chain: DescriptorChain<M>, memory: &Memory, pages: &mut Vec<GfnRange>) -> Result<bool, Broken>
    where
        M: Deref<Target = Memory> + Clone,
    {
        if let Some(buffer) = chain.clone().readable().next() {
            if buffer.len() as usize != size_of::<u32>() {
                return Err(Broken);
            }
            let command: u32 = memory.read_obj(buffer.addr()).map_err(|_| Broken)?;
            let before = self.hinting.take();
            self.hinting = Some(command).filter(|command| self.requests.command.is(*command));
            // What is said of an earlier hinting ends none.
            return Ok(command == hint::STOP && before.is_some_and(|before| self.requests.command.is(before)));
        }
        if self.hinting.is_some_and(|command| self.requests.command.is(command)) {
            reported(chain, memory, pages)?;
        }
        Ok(false)
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

/// The figures in a buffer of statistics.
fn figures<M>(chain: DescriptorChain<M>, memory: &Memory) -> Result<Vec<(u16, u64)>, Broken>
where
    M: Deref<Target = Memory> + Clone,
{
    let mut bytes = Vec::new();
    for buffer in chain.readable() {
        let (start, len) = (bytes.len(), buffer.len() as usize);
        if start + len > FIGURES_MAX * FIGURE_LEN {
            return Err(Broken);
        }
        bytes.resize(start + len, 0);
        memory.read_slice(&mut bytes[start..], buffer.addr()).map_err(|_| Broken)?;
    }
    let (all, []) = bytes.as_chunks::<FIGURE_LEN>() else { return Err(Broken) };
    let figure = |[a, b, value @ ..]: &[u8; FIGURE_LEN]| (u16::from_le_bytes([*a, *b]), u64::from_le_bytes(*value));
    Ok(all.iter().map(figure).collect())
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
        STATISTICS | DEFLATE_ON_OOM | FREE_PAGE_HINT | FREE_PAGE_REPORTING
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

    fn notified(&mut self, index: usize, queues: &mut [Queue], memory: &Memory) -> Result<bool, Broken> {
        let queue = &mut queues[index];
        let role = roles(self.features).nth(index).ok_or(Broken)?;
        let mut heads = Vec::new();
        let mut pages = Vec::new();
        let mut told = Vec::new();
        let mut hinted = false;
        // Not more than there can be: a guest that goes on adding does not keep us here.
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else { break };
            let head = chain.head_index();
            match role {
                Role::Inflate => numbered(chain, memory, &mut pages)?,
                Role::Reporting => reported(chain, memory, &mut pages)?,
                Role::Hinting => hinted |= self.hint(chain, memory, &mut pages)?,
                // What comes out of the balloon reads zero whenever it is touched.
                Role::Deflate => {}
                Role::Statistics => {
                    told = figures(chain, memory)?;
                    // There is one at a time; of more, the last is kept.
                    heads.extend(self.buffer.replace(head));
                    continue;
                }
            }
            heads.push(head);
        }
        let pages = merged(pages);
        if !pages.is_empty() {
            self.sink.give_back(pages);
        }
        if !told.is_empty() {
            self.sink.statistics(told);
        }
        if hinted {
            self.sink.hinted();
        }
        for &head in &heads {
            queue.add_used(memory, head, 0).map_err(|_| Broken)?;
        }
        Ok(!heads.is_empty() && queue.needs_notification(memory).map_err(|_| Broken)?)
    }

    fn agreed(&mut self, features: u64) {
        self.features = features;
    }

    fn attend(&mut self, queues: &mut [Queue], memory: &Memory) -> Result<bool, Broken> {
        if !self.requests.statistics.swap(false, Ordering::Relaxed) {
            return Ok(false);
        }
        // A guest that has its buffer is about to tell anyway.
        let at = roles(self.features).position(|role| role == Role::Statistics);
        let queue = at.and_then(|at| queues.get_mut(at)).filter(|queue| queue.ready());
        let (Some(queue), Some(head)) = (queue, self.buffer.take()) else { return Ok(false) };
        queue.add_used(memory, head, 0).map_err(|_| Broken)?;
        queue.needs_notification(memory).map_err(|_| Broken)
    }

    fn reset(&mut self) {
        (self.features, self.hinting, self.buffer) = (0, None, None);
        self.set_actual(0);
    }

    fn save(&self) -> Vec<u8> {
        let saved = Saved {
            target: self.requests.target(),
            actual: self.actual,
            command: self.requests.command.save(),
            hinting: self.hinting,
            buffer: self.buffer,
        };
        postcard::to_stdvec(&saved).expect("numbers can be written down")
    }

    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        let saved: Saved =
            postcard::from_bytes(saved).map_err(|e| format!("{} bytes are no balloon: {e}", saved.len()))?;
        self.requests.set_target(saved.target.into());
        self.requests.command.load(saved.command);
        (self.actual, self.hinting, self.buffer) = (saved.actual, saved.hinting, saved.buffer);
        Ok(())
    }
}
