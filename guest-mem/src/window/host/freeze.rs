//! Takes a window's dirty private pages: moves them out of the guest's sight and puts an empty store in their place, or
//! copies them.

use super::dirty::{Candidate, Cleanness, Density};
use super::moves::{COPIED_MOST, MovePlan, SHORT, SmallExtents, plan};
use super::{Dirty, HostWindow, SlotLog, WindowError, during};
use crate::addr::extents::{merged, push, union, without};
use crate::addr::{Gfn, GfnRange, PAGE_SHIFT, PageCount, PageOrigin};
use crate::ids::{Source, StoreId};
use crate::sys::{Advice, Area, MapAccess};
use crate::window::{Along, Harvest};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// What a freeze took out of a window.
#[derive(Debug, Default)]
pub struct FrozenPages {
    /// Which pages.
    pub harvest: Harvest,
    /// Host address where guest-physical address 0 would stand in the scratch range. 0 where nothing was taken.
    pub scratch_base: u64,
    /// Frame of the scratch range where copies begin.
    pub copies: Gfn,
}

/// A freeze half done: the pages have moved, and which of them are private is not known yet. The guest may run when the
/// others have been [copied](HostWindow::copy).
#[derive(Debug)]
#[must_use = "the moved pages are known to nobody until they are harvested"]
pub struct MovedOut {
    store: StoreId,
    plan: MovePlan,
    /// Private pages that were found before the move.
    found: Vec<GfnRange>,
    /// Pages that are private if the log told the truth, and nobody has dropped them since.
    told: Vec<GfnRange>,
}

/// What a freeze is asked for besides what is dirty.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Mappings that the window may have afterwards.
    pub max_runs: u32,
    /// What becomes of short stretches.
    pub short: SmallExtents,
    /// Pages that are taken along though they are clean.
    pub along: &'a Along,
}

/// What a window has in its dirty ranges.
#[derive(Default)]
pub(super) struct PrivatePages {
    /// Dirty pages, those told included.
    pub dirty: Vec<GfnRange>,
    /// Pages that the log says are dirty, and that we did not look at.
    told: Vec<GfnRange>,
    /// Private copies of clean pages, but for those that are kept.
    pub clean: Vec<GfnRange>,
}

/// Whether the dirty bits came page by page from somebody who saw the writes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    Log,
    Nothing,
}

/// So many copies (1 MiB) get their memory before the guest stands still: as much as is supplied in about a millisecond.
const MANY_COPIES: u64 = 256;

/// Pages that left the window, with what lies beneath them: what it takes to put them back.
type Moved = Vec<(GfnRange, Source)>;

impl MovedOut {
    /// The stretches to copy: sorted, not adjacent.
    pub fn copies(&self) -> &[GfnRange] {
        &self.plan.copies
    }
}

impl HostWindow {
    /// [Moves out](Self::move_out), [copies](Self::copy), and [harvests](Self::harvest).
    ///
    /// # Errors
    /// As both.
    pub fn freeze(
        &mut self,
        dirty: Dirty<'_>,
        store: StoreId,
        file: BorrowedFd<'_>,
        asked: Asked<'_>,
    ) -> Result<FrozenPages, WindowError> {
        match self.move_out(dirty, store, file, asked)? {
            Some(moved) => {
                self.copy(store, moved.copies())?;
                self.harvest(&moved)
            }
            None => Ok(FrozenPages::default()),
        }
    }

    /// Gets memory for the copies of a freeze that is about to begin, if these logs tell of many: the guest may run, and
    /// would stand still for longer than the copies themselves take. Whatever goes wrong here goes wrong again in the freeze.
    pub fn prepare_copies(&mut self, logs: &[SlotLog]) {
        let most = logs.iter().flat_map(|log| &log.words).map(|word| u64::from(word.count_ones())).sum::<u64>();
        if most < MANY_COPIES || self.scratches.is_prepared(PageCount(most)) {
            return;
        }
        let short = |pages: &GfnRange| pages.count().0 <= SHORT;
        let copies = logs.iter().flat_map(SlotLog::pages).filter(short).map(|pages| pages.count().0).sum::<u64>();
        if copies >= MANY_COPIES {
            self.scratches.prepare(PageCount(copies.min(COPIED_MOST)));
        }
    }

    /// Moves all dirty private pages into a scratch range and maps the still empty `file` in their place, its page `n` at
    /// guest frame `n`; touches of what it does not hold trap. With [`SmallExtents::CopyInPlace`], short stretches stay, and
    /// are to be [copied](Self::copy) into the scratch range. With [`SmallExtents::Remap`], those that stayed earlier are
    /// moved as well, written or not. Private copies of other clean pages are dropped where we come across them. What is to be
    /// taken [along](Asked::along) is. If nothing is dirty and private, nothing is touched.
    ///
    /// Nobody touches the window meanwhile: vCPUs, devices, kernel threads that work for them (with a local APIC in the
    /// kernel KVM faults guest pages in from workers of its own: they are drained first). Afterwards the window has at
    /// most `max_runs` mappings, if joining stretches of private pages can do it.
    ///
    /// # Errors
    /// A system call failed: everything is as it was, and what was dirty is remembered for the next freeze. Except for
    /// [`WindowError::Torn`], after which the VM must not run.
    pub fn move_out(
        &mut self,
        dirty: Dirty<'_>,
        store: StoreId,
        file: BorrowedFd<'_>,
        asked: Asked<'_>,
    ) -> Result<Option<MovedOut>, WindowError> {
        let Asked { max_runs, mut short, along } = asked;
        if short == SmallExtents::Remap {
            self.mark_kept();
        }
        let kept = along.copies.iter().flat_map(|&pages| self.kept.within(pages));
        kept.for_each(|pages| self.pending.mark(pages));
        let trust = self.mark(dirty);
        let mut found = self.find_private(trust)?;
        // A run in the middle of a mapping makes three of one: here, or in the windows of children.
        let limit = (max_runs as usize).saturating_sub(self.runs.count()) / 2;
        let too_many =
            || self.kept.iter().count() + found.dirty.len() > limit && self.stretches_with(&found.dirty) > limit;
        if short == SmallExtents::CopyInPlace && too_many() {
            short = SmallExtents::Remap;
            self.mark_kept();
            found = self.find_private(trust)?;
        }
        self.drop_clean(&found.clean)?;
        if found.dirty.is_empty() {
            self.forget_dirty();
            return Ok(None);
        }

        let mut plan = plan(&found.dirty, &self.own_ram(), limit, short);
        if plan.moves.len() + along.moves.len() <= limit {
            plan.moves = union(&plan.moves, &along.moves);
            plan.copies = without(&plan.copies, &along.moves);
        }
        let copies = PageCount(plan.copies.iter().map(|pages| pages.count().0).sum());
        let scratch = self.scratches.make_for(copies).map_err(WindowError::NoScratch)?;
        self.exchange(&scratch.area, &plan.moves, file, |_| Ok(()))?;

        let source = Source::Store { store, origin: PageOrigin(0) };
        for pages in &plan.moves {
            self.mapped(*pages, source);
            self.kept.remove(*pages);
        }
        self.forget_dirty();
        self.scratches.keep(store, scratch, &plan.copies);
        Ok(Some(MovedOut { store, plan, found: found.dirty, told: found.told }))
    }

    /// In how many stretches pages stay if these do as well.
    fn stretches_with(&self, pages: &[GfnRange]) -> usize {
        let all = merged(&self.kept.iter().collect::<Vec<_>>(), pages);
        let (mut count, mut end) = (0, Gfn(0));
        for pages in all {
            count += usize::from(pages.start() >= end);
            end = end.max(pages.end());
        }
        count
    }

    /// Marks what is dirty, by what the caller knows and by what the VMM wrote. Shared memory never is.
    pub(super) fn mark(&mut self, dirty: Dirty<'_>) -> Trust {
        let trust = match dirty {
            Dirty::Every => {
                self.pending.mark_every();
                Trust::Nothing
            }
            Dirty::Logged(logs) => {
                logs.iter().for_each(|log| self.pending.mark_log(log));
                Trust::Log
            }
        };
        self.pending.take_writes(&self.memory);
        // Logs tell of shared memory, too, and of what was there before it was unmapped.
        let others: Vec<GfnRange> = self.not_own().collect();
        others.into_iter().for_each(|pages| self.pending.unmark(pages));
        trust
    }

    /// Copies stretches, or some of them, that the freeze into `store` leaves where they are: nobody has touched the window
    /// since.
    ///
    /// # Errors
    /// They are none of that freeze's. The VM must not run.
    pub fn copy(&self, store: StoreId, copies: &[GfnRange]) -> Result<(), WindowError> {
        let Some((first, last)) = copies.first().zip(copies.last()) else { return Ok(()) };
        let copied = self.scratches.copy_in(store, &self.area, copies);
        copied.map_err(during("copying", GfnRange::between(first.start(), last.end())))
    }

    /// Frozen pages that stayed are to be taken again.
    fn mark_kept(&mut self) {
        self.kept.iter().for_each(|pages| self.pending.mark(pages));
    }

    pub(super) fn forget_dirty(&mut self) {
        self.pending.clear();
        self.given_back.clear();
    }

    /// [Looks](Self::look) what was taken, and [keeps](Self::keep) it. The guest may run meanwhile.
    ///
    /// # Errors
    /// The pagemap cannot be read: the moved pages are lost, and the VM must not run on.
    pub fn harvest(&mut self, out: &MovedOut) -> Result<FrozenPages, WindowError> {
        let frozen = self.look(out)?;
        self.keep(&frozen.harvest);
        self.scratches.harvested(out.store, frozen.harvest.private());
        Ok(frozen)
    }

    /// Learns exactly which of the moved pages are private: only those may be read.
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest).
    pub fn look(&self, out: &MovedOut) -> Result<FrozenPages, WindowError> {
        let MovedOut { store, plan, found, told } = out;
        // What was copied was found, and is all private.
        let mut private: Vec<GfnRange> =
            if plan.moves.is_empty() { Vec::new() } else { without(&without(found, told), &plan.copies) };
        let area = self.scratches.area(*store).map_err(WindowError::NoScratch)?;
        for range in told {
            let (start, len) = area.host(*range).map_err(during("looking up", *range))?;
            let scan = self.pagemap.private(start..start + len as u64, |bytes| {
                private.push(frames(&bytes, area.base()));
            });
            scan.map_err(during("scanning the pagemap", *range))?;
        }
        private.sort_unstable_by_key(|range| range.start());
        let mut moved_private = Vec::with_capacity(private.len());
        private.into_iter().for_each(|range| push(&mut moved_private, range));
        let (moved, copied) = (plan.moves.clone(), plan.copies.clone());
        let harvest = Harvest { moved, copied, moved_private };
        Ok(FrozenPages { harvest, scratch_base: area.base(), copies: self.scratches.copies() })
    }

    /// Takes note of what a freeze took: what was copied has stayed, unless it was given back meanwhile.
    pub fn keep(&mut self, harvest: &Harvest) {
        let given_back: Vec<GfnRange> = self.given_back.iter().collect();
        self.kept.add_all(without(&harvest.copied, &given_back));
    }

    /// Looks for private pages wherever something may be dirty. To look costs as much as to move: where the log says
    /// that all pages of a stretch were written, we take its word and [look later](Self::harvest). Where none was written but
    /// such that stayed at an earlier freeze, there is nothing to look for.
    pub(super) fn find_private(&mut self, trust: Trust) -> Result<PrivatePages, WindowError> {
        let base = self.area.base();
        let mut found = PrivatePages::default();
        for Candidate { pages: range, density } in self.pending.candidates() {
            let told = density == Density::All && trust == Trust::Log && range.count().0 > SHORT;
            if told && !self.given_back.touches(range) {
                push(&mut found.dirty, range);
                push(&mut found.told, range);
                continue;
            }
            // Pages that stayed are private for as long as they do.
            if trust == Trust::Log && !self.pending.has_besides(range, &self.kept) {
                self.pending.split(range, |pages, cleanness| match cleanness {
                    Cleanness::Dirty => push(&mut found.dirty, pages),
                    Cleanness::Clean => {}
                });
                continue;
            }
            let (start, len) = self.area.host(range).map_err(during("looking up", range))?;
            let (pending, kept) = (&self.pending, &self.kept);
            let scan = self.pagemap.private(start..start + len as u64, |bytes| {
                pending.split(frames(&bytes, base), |pages, cleanness| match cleanness {
                    Cleanness::Dirty => push(&mut found.dirty, pages),
                    Cleanness::Clean => found.clean.extend(without(&[pages], &kept.within(pages).collect::<Vec<_>>())),
                });
            });
            scan.map_err(during("scanning the pagemap", range))?;
        }
        Ok(found)
    }

    /// Drops private copies of clean pages that have a store beneath them.
    pub(super) fn drop_clean(&self, clean: &[GfnRange]) -> Result<(), WindowError> {
        for range in clean {
            for (pages, source) in self.runs.within(*range) {
                if matches!(source, Source::Store { .. }) {
                    let done = self.area.advise(pages, Advice::DropPrivate);
                    done.map_err(during("madvise(MADV_DONTNEED)", pages))?;
                }
            }
        }
        Ok(())
    }

    /// Moves `moves` out and the store in, and does what comes `then`; or changes nothing.
    pub(super) fn exchange(
        &mut self,
        scratch: &Area,
        moves: &[GfnRange],
        file: BorrowedFd<'_>,
        then: impl FnOnce(&Self) -> Result<(), WindowError>,
    ) -> Result<(), WindowError> {
        let mut moved = Moved::new();
        let done = self.lift(scratch, moves, &mut moved);
        let done = done.and_then(|()| self.lay(moves, file)).and_then(|()| then(self));
        let Err(failed) = done else { return Ok(()) };
        if let Err(cause) = self.put_back(scratch, moves, &moved) {
            return Err(WindowError::Torn { failed: Box::new(failed), cause });
        }
        // What was moved out and back may be mappings of their own now.
        moved.into_iter().for_each(|(pages, source)| self.mapped(pages, source));
        Err(failed)
    }

    /// The kernel moves the page tables of what is registered entry by entry, five times slower than whole: so the
    /// traps go first.
    fn lift(&self, scratch: &Area, moves: &[GfnRange], moved: &mut Moved) -> Result<(), WindowError> {
        for range in moves {
            self.unregister(*range).map_err(during("UFFDIO_UNREGISTER", *range))?;
            for (pages, source) in self.runs.within(*range) {
                self.area.move_to(scratch, pages).map_err(during("mremap", pages))?;
                moved.push((pages, source));
            }
        }
        Ok(())
    }

    /// At no moment may a touch read a hole of the store untrapped.
    fn lay(&self, moves: &[GfnRange], file: BorrowedFd<'_>) -> Result<(), WindowError> {
        for pages in moves {
            self.map_shut(*pages, file).map_err(during("mmap", *pages))?;
            self.register(*pages).map_err(during("UFFDIO_REGISTER", *pages))?;
            let opened = self.area.protect(*pages, MapAccess::ReadWrite).and_then(|()| self.shut(*pages));
            opened.map_err(during("mprotect", *pages))?;
        }
        Ok(())
    }

    fn map_shut(&self, pages: GfnRange, file: BorrowedFd<'_>) -> io::Result<()> {
        self.area.map_private(pages, file, PageOrigin(0).page(pages.start()), MapAccess::None)
    }

    /// Undoes [`lift`](Self::lift), over whatever part of the store was mapped, and traps again.
    fn put_back(&self, scratch: &Area, moves: &[GfnRange], moved: &Moved) -> io::Result<()> {
        moved.iter().try_for_each(|(pages, _)| scratch.move_to(&self.area, *pages))?;
        let runs = moves.iter().flat_map(|range| self.runs.within(*range));
        let mut stores = runs.filter(|(_, source)| matches!(source, Source::Store { .. }));
        stores.try_for_each(|(pages, _)| self.register(pages))
    }
}

/// The guest frames at these host addresses of an area.
fn frames(bytes: &Range<u64>, base: u64) -> GfnRange {
    ((bytes.start - base) >> PAGE_SHIFT..(bytes.end - base) >> PAGE_SHIFT).into()
}
