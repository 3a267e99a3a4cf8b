//! Brings pages that have not been written back where they belong: into their store or into swap, read from wherever they are.

use super::{Error, LEFT_BATCH, Manager, WRITEBACK_BATCH};
use crate::addr::cluster::by_clusters;
use crate::addr::{GfnRange, PAGE_SIZE, PageCount, PageOrigin, PageRange};
use crate::effect::Effects;
use crate::ids::{StoreId, VmId};
use crate::object::Loss;
use crate::ops::{CopyFrom, Destination, Placed, WritebackJob};
use crate::store::{FileStore, Store, StoreFactory};
use crate::swap::{Fetch, Swap};
use crate::window::Window;
use std::io;
use std::ops::Range;

/// Where a job's bytes are now.
enum ReadOutcome {
    /// In the staging buffer.
    Here,
    /// On their way from swap, or about to be copied.
    Coming,
    /// Nowhere.
    Lost(Loss),
}

impl<S: StoreFactory, W: Window> Manager<S, W> {
    /// Brings a job's pages where they belong: `to` is where those go that are not zero. Nothing is done where they are
    /// coming.
    pub(super) fn run_job(&mut self, job: &WritebackJob, to: Destination) -> Result<Fetch, Error> {
        let pages = PageRange::new(job.pages.start(), PageCount(job.pages.count().0.min(WRITEBACK_BATCH.0)));
        let job = WritebackJob { pages, ..*job };
        let (placed, done) = match self.read(&job)? {
            ReadOutcome::Here => self.place(&job, to),
            ReadOutcome::Coming => return Ok(Fetch::Coming),
            ReadOutcome::Lost(loss) => (vec![(pages, Placed::Lost(loss))], Ok(())),
        };
        let mut effects = Effects::default();
        self.family.written_back(&job, &placed, &mut effects);
        self.carry_out(effects);
        if let (CopyFrom::Scratch(holder), Ok(())) = (job.from, &done) {
            self.leave_scratch(holder, job.store, job.pages);
        }
        self.rest(job.store);
        done.map(|()| Fetch::Here)
    }

    /// Writes back all pages that `vm` is to have in its scratch ranges, where those have gone.
    pub(super) fn find_lost(&mut self, vm: VmId) {
        let Some(window) = self.windows.get(&vm) else { return };
        let jobs = self.family.jobs_of(vm).into_iter();
        let gone: Vec<WritebackJob> = jobs
            .filter(|job| {
                let page = &mut self.staging[..PAGE_SIZE];
                let read = window.read_scratch(job.store, in_scratch(job.pages).start(), page);
                read.is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock)
            })
            .collect();
        for store in gone.into_iter().map(|job| job.store) {
            let mut effects = Effects::default();
            self.family.lose_in_flight(store, &mut effects);
            self.carry_out(effects);
        }
    }

    /// Pages have been written back: what they had in a scratch range is given back as it becomes much.
    fn leave_scratch(&mut self, holder: VmId, store: StoreId, pages: PageRange) {
        if self.family.objects().accounts.stores.get(&store).is_none_or(|account| account.scratch.is_none()) {
            return;
        }
        let left = self.left.entry(store).or_insert(pages);
        if left.end() == pages.start() {
            *left = PageRange::between(left.start(), pages.end());
        } else if *left != pages {
            // Few pages here and there go with the rest, at the end.
            *left = pages;
        }
        if left.count() >= LEFT_BATCH {
            let left = self.left.remove(&store).expect("looked at above");
            self.window_do(holder, |window| window.leave_scratch(store, in_scratch(left)));
        }
    }

    /// Lets go of what only filling needs, unless the store is filled on.
    pub(super) fn rest(&mut self, id: StoreId) {
        if self.is_written_back(id)
            && let Some(store) = self.stores.get_mut(&id)
        {
            store.rest();
        }
    }

    /// Reads a job's bytes into the staging buffer.
    fn read(&mut self, job: &WritebackJob) -> Result<ReadOutcome, Error> {
        let pages = job.pages;
        let buf = &mut self.staging[..pages.len_bytes()];
        match job.from {
            CopyFrom::Lost(loss) => return Ok(ReadOutcome::Lost(loss)),
            CopyFrom::Zero => buf.fill(0),
            CopyFrom::Scratch(holder) => {
                let gone = || Err(io::ErrorKind::NotFound.into());
                let window = self.windows.get(&holder);
                match window.map_or_else(gone, |w| w.read_scratch(job.store, in_scratch(pages).start(), buf)) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ReadOutcome::Coming),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        log::error!("pages {pages:?} for store {:?} are lost: {error}", job.store);
                        return Ok(ReadOutcome::Lost(Loss::Process));
                    }
                    // Its holder lives, and so do the pages.
                    Err(source) => return Err(Error::Read { store: job.store, pages, source }),
                }
            }
            CopyFrom::Swap { object, page, first } => match self.factory.swap().get(first, buf) {
                Ok(Fetch::Here) => {
                    self.swap_counts.swap_in_pages += pages.count().0;
                    // What has arrived is brought once: whoever needs it too asks again.
                    self.family.retry_put_off();
                }
                Ok(Fetch::Coming) => return Ok(ReadOutcome::Coming),
                Err(error) => {
                    self.lose(object, PageRange::new(page, pages.count()), &error);
                    return Ok(ReadOutcome::Lost(Loss::Swap));
                }
            },
            CopyFrom::Store(from, first) => {
                match self.stores.get(&from) {
                    Some(store) => store.read(first, buf).map_err(|source| Error::Read { store: from, pages, source }),
                    None => self.files[&from].read(first, buf).map_err(|source| Error::File { pages, source }),
                }?;
            }
        }
        Ok(ReadOutcome::Here)
    }

    /// Puts the staged pages of a job where they go, but for long stretches of zeros. What was placed, from the start,
    /// and why not all of it.
    fn place(&mut self, job: &WritebackJob, to: Destination) -> (Vec<(PageRange, Placed)>, Result<(), Error>) {
        let bytes = |part: PageRange| {
            let from = (part.start().0 - job.pages.start().0) as usize * PAGE_SIZE;
            from..from + part.len_bytes()
        };
        let mut placed = Vec::new();
        for (pages, outcome) in split_zeros(job.pages, &self.staging[..job.pages.len_bytes()], self.zero_run) {
            if outcome == Placed::Zero {
                placed.push((pages, outcome));
                continue;
            }
            let parts: Vec<PageRange> = match to {
                Destination::Store => vec![pages],
                Destination::Swap => by_clusters(pages).collect(),
            };
            for part in parts {
                let outcome = match to {
                    Destination::Store => None,
                    Destination::Swap => self.put_staged(part, bytes(part)),
                };
                if outcome.is_none()
                    && let Err(error) = self.fill(job.store, part, bytes(part))
                {
                    return (placed, Err(error));
                }
                placed.push((part, outcome.unwrap_or(Placed::Stored)));
                let copied = self.copied.entry(job.store).or_default();
                copied.pages += part.count().0;
                if !matches!(job.from, CopyFrom::Scratch(_)) {
                    copied.copy_ups += part.count().0;
                }
            }
        }
        (placed, Ok(()))
    }

    /// Puts staged pages into their store.
    pub(super) fn fill(&mut self, id: StoreId, pages: PageRange, staged: Range<usize>) -> Result<(), Error> {
        self.touches(id, pages);
        let store = self.stores.get_mut(&id).expect("a slot names a store that is there");
        let first = pages.start();
        store.fill(first, &self.staging[staged]).map_err(|source| {
            if source.kind() != io::ErrorKind::AlreadyExists {
                // What did get in would be in the way of the next try.
                store.punch(first, pages.count());
            }
            Error::Fill { store: id, pages, source }
        })
    }
}

/// Where a scratch range has these pages of the freeze's store: at the frames where they were then.
fn in_scratch(pages: PageRange) -> GfnRange {
    PageOrigin(0).frames(pages)
}

/// Cuts a batch into what is to be stored and long stretches of zeros.
fn split_zeros(pages: PageRange, bytes: &[u8], zero_run: u64) -> Vec<(PageRange, Placed)> {
    let zero: Vec<bool> = bytes.chunks_exact(PAGE_SIZE).map(is_zero).collect();
    let mut placed: Vec<(PageRange, Placed)> = Vec::new();
    let mut at = pages.start();
    for stretch in zero.chunk_by(|a, b| a == b) {
        let count = stretch.len() as u64;
        let range = PageRange::new(at, PageCount(count));
        at = range.end();
        let outcome = if stretch[0] && count >= zero_run { Placed::Zero } else { Placed::Stored };
        match placed.last_mut() {
            Some((last, Placed::Stored)) if outcome == Placed::Stored => {
                *last = PageRange::between(last.start(), range.end());
            }
            _ => placed.push((range, outcome)),
        }
    }
    placed
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().fold(0, |all, byte| all | byte) == 0
}
