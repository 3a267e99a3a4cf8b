//! The threads that read and write.

use super::device::{Aligned, SwapDevice};
use super::extents::DiskExtent;
use super::frame::{self, Tag};
use super::packed::Packed;
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use vmm_sys_util::eventfd::EventFd;

/// A frame to be read or written.
#[derive(Debug)]
pub struct DiskJob {
    /// The cluster.
    pub key: usize,
    /// The frame's place, which stays taken until the job is done.
    pub place: DiskExtent,
    /// Whose frame it is.
    pub tag: Tag,
    /// What is to be done.
    pub work: Work,
}

/// What is to be done with a frame.
#[derive(Debug)]
pub enum Work {
    /// Read it: somebody waits.
    Demand,
    /// Read it, nobody waits yet.
    Ahead,
    /// Write it, unless the cluster is gone by then.
    Write(Weak<Packed>),
    /// Nobody needs what is there; these are blocks of no cluster.
    Discard,
}

/// A job that is done.
#[derive(Debug)]
pub struct DiskDone {
    /// The cluster.
    pub key: usize,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a job.
#[derive(Debug)]
pub enum Outcome {
    /// The frame was read, or its bytes are lost: they were asked for twice.
    Read(io::Result<Packed>),
    /// The frame is on the disk, or was not needed any more.
    Written(io::Result<()>),
    /// The disk knows that these blocks are not needed.
    Discarded(io::Result<()>),
}

/// The threads, ended and joined when it is dropped; jobs that have not begun are forgotten then.
#[derive(Debug)]
pub struct DiskPool {
    shared: Arc<PoolShared>,
    threads: Vec<JoinHandle<()>>,
}

struct PoolShared {
    device: Box<dyn SwapDevice>,
    queue: Mutex<Queue>,
    wake: Condvar,
    done: Mutex<Vec<DiskDone>>,
    event: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Queue {
    /// One for each kind of [`Work`], the most urgent first.
    jobs: [VecDeque<DiskJob>; 4],
    closed: bool,
}

/// So many frames that lie in a row are one read or write.
const MERGED: usize = 8;
/// Jobs that are looked at for one that follows.
const NEARBY: usize = 64;

impl DiskPool {
    /// Starts `threads` threads, which write to `event` when something is done.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start(device: Box<dyn SwapDevice>, event: Arc<EventFd>, threads: usize) -> io::Result<Self> {
        let queue = Mutex::default();
        let shared = Arc::new(PoolShared { device, queue, wake: Condvar::new(), done: Mutex::default(), event });
        let mut pool = Self { shared, threads: Vec::new() };
        for _ in 0..threads {
            let shared = Arc::clone(&pool.shared);
            pool.threads.push(thread::Builder::new().name("swap-io".into()).spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    /// Hands a job in.
    pub fn submit(&self, job: DiskJob) {
        lock(&self.shared.queue).jobs[job.work.urgency()].push_back(job);
        self.shared.wake.notify_one();
    }

    /// Takes what is done.
    pub fn collect(&self) -> Vec<DiskDone> {
        mem::take(&mut *lock(&self.shared.done))
    }
}

impl Drop for DiskPool {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("swap: a thread has panicked");
            }
        }
    }
}

impl Work {
    fn urgency(&self) -> usize {
        match self {
            Self::Demand => 0,
            Self::Ahead => 1,
            Self::Write(_) => 2,
            Self::Discard => 3,
        }
    }
}

impl Queue {
    /// The most urgent job, and those of its kind whose frames follow its on the disk: what was evicted in order may lie in
    /// two places by turns, where two rounds of eviction or of write-out met.
    fn next_run(&mut self) -> Option<Vec<DiskJob>> {
        let jobs = self.jobs.iter_mut().find(|jobs| !jobs.is_empty())?;
        let mut run = vec![jobs.pop_front()?];
        while run.len() < MERGED {
            let end = run[run.len() - 1].place.end();
            let Some(next) = jobs.iter().take(NEARBY).position(|job| job.place.start == end) else { break };
            run.extend(jobs.remove(next));
        }
        Some(run)
    }
}

impl PoolShared {
    fn work(&self) {
        let mut buffer = Aligned::default();
        while let Some(run) = self.wait() {
            let done = match run[0].work {
                Work::Demand | Work::Ahead => self.read(&run, &mut buffer),
                Work::Write(_) => self.write(&run, &mut buffer),
                Work::Discard => run.iter().map(|job| self.discard(job)).collect(),
            };
            lock(&self.done).extend(done);
            if let Err(error) = self.event.write(1) {
                log::error!("swap: nobody is told of what is done: {error}");
            }
        }
    }

    /// Jobs, or nothing at the end.
    fn wait(&self) -> Option<Vec<DiskJob>> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some(run) = queue.next_run() {
                return Some(run);
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reads all frames at once, and once more by itself each that did not come well.
    fn read(&self, run: &[DiskJob], buffer: &mut Aligned) -> Vec<DiskDone> {
        let whole = buffer.slice(length(run));
        let mut got: Vec<Option<Packed>> = Vec::new();
        if self.device.read(run[0].place.start, whole).is_ok() {
            let frames = split(run, whole);
            got.extend(run.iter().zip(frames).map(|(job, frame)| frame::decode(frame, job.tag).ok()));
        }
        got.resize_with(run.len(), || None);
        let done = |(job, got): (&DiskJob, Option<Packed>)| {
            let packed = got.map_or_else(|| self.read_one(job, buffer), Ok);
            DiskDone { key: job.key, outcome: Outcome::Read(packed) }
        };
        run.iter().zip(got).map(done).collect()
    }

    fn discard(&self, job: &DiskJob) -> DiskDone {
        let done = self.device.discard(job.place.start, job.place.blocks);
        DiskDone { key: job.key, outcome: Outcome::Discarded(done) }
    }

    fn read_one(&self, job: &DiskJob, buffer: &mut Aligned) -> io::Result<Packed> {
        let frame = buffer.slice(job.place.bytes());
        self.device.read(job.place.start, frame).map_err(|error| context("read", job.place, &error))?;
        frame::decode(frame, job.tag)
    }

    /// Writes all frames at once; if that fails, each by itself.
    fn write(&self, run: &[DiskJob], buffer: &mut Aligned) -> Vec<DiskDone> {
        // A cluster that is gone still has its place: anything may be written there.
        let packed: Vec<Option<Arc<Packed>>> = run.iter().map(DiskJob::packed).collect();
        let whole = buffer.slice(length(run));
        for ((job, packed), frame) in run.iter().zip(&packed).zip(split_mut(run, whole)) {
            match packed {
                Some(packed) => frame::encode(packed, job.tag, frame),
                None => frame.fill(0),
            }
        }
        let wanted = packed.iter().any(Option::is_some);
        let written = if wanted { self.device.write(run[0].place.start, whole) } else { Ok(()) };
        let done = |(job, frame): (&DiskJob, &[u8])| {
            let result = match &written {
                Ok(()) => Ok(()),
                Err(error) if run.len() == 1 => Err(context("write", job.place, error)),
                Err(_) => {
                    let alone = self.device.write(job.place.start, frame);
                    alone.map_err(|error| context("write", job.place, &error))
                }
            };
            DiskDone { key: job.key, outcome: Outcome::Written(result) }
        };
        run.iter().zip(split(run, whole)).map(done).collect()
    }
}

impl std::fmt::Debug for PoolShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolShared").field("queue", &self.queue).field("done", &self.done).finish_non_exhaustive()
    }
}

impl DiskJob {
    fn packed(&self) -> Option<Arc<Packed>> {
        match &self.work {
            Work::Write(packed) => packed.upgrade(),
            Work::Demand | Work::Ahead | Work::Discard => None,
        }
    }
}

fn length(run: &[DiskJob]) -> usize {
    run.iter().map(|job| job.place.bytes()).sum()
}

fn split<'a>(run: &[DiskJob], mut whole: &'a [u8]) -> Vec<&'a [u8]> {
    run.iter().map(|job| whole.split_off(..job.place.bytes()).expect("the run's length")).collect()
}

fn split_mut<'a>(run: &[DiskJob], mut whole: &'a mut [u8]) -> Vec<&'a mut [u8]> {
    run.iter().map(|job| whole.split_off_mut(..job.place.bytes()).expect("the run's length")).collect()
}

fn context(what: &str, place: DiskExtent, error: &io::Error) -> io::Error {
    let message = format!("swap: {what} of blocks {:#x}+{}: {error}", place.start, place.blocks);
    io::Error::new(error.kind(), message)
}

/// Nothing is left half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
