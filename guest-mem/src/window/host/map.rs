//! Maps runs, unmaps and moves them.

use super::{HostWindow, HugePages, WindowError, during};
use crate::addr::{Distance, Gfn, GfnRange, PageOrigin};
use crate::ids::{Run, Source, StoreId};
use crate::sys::{Advice, MapAccess};
use crate::window::Window;
use std::io;
use std::os::fd::BorrowedFd;

/// Pages of a huge page.
const HUGE: u64 = 512;

impl HostWindow {
    /// Maps `runs`, and traps touches of what their stores do not hold, but for shared memory, whose files can be written.
    /// Whoever could touch the window stands still, and none of the pages is private.
    ///
    /// # Errors
    /// A run is out of place, or a system call failed: the window may show anything where the runs are.
    pub fn map(
        &mut self,
        runs: &[Run],
        stores: &[(StoreId, BorrowedFd<'_>)],
        huge: HugePages,
    ) -> Result<(), WindowError> {
        if let Some(bad) = runs.iter().find(|run| !self.has_room(run.pages)) {
            return Err(WindowError::BadRun(*bad));
        }
        // All stores come first, since one call registers however many mappings stand in a row, and what lies between them
        // is mapped anew, untrapped, behind it.
        for adjacent in runs.chunk_by(|run, next| run.pages.end() == next.pages.start()) {
            let stores_run = |run: &&Run| matches!(run.source, Source::Store { .. });
            for run in adjacent.iter().filter(stores_run) {
                self.map_run(run, stores, huge)?;
            }
            let trapping = adjacent.iter().find(stores_run).zip(adjacent.iter().rfind(stores_run));
            if let Some((first, last)) = trapping {
                let pages = GfnRange::between(first.pages.start(), last.pages.end());
                self.register(pages).map_err(during("UFFDIO_REGISTER", pages))?;
            }
            for run in adjacent.iter().filter(|run| !stores_run(run)) {
                self.map_run(run, stores, huge)?;
            }
        }
        Ok(())
    }

    /// Unmaps pages of RAM: a touch of one is an error from now on, which a vCPU's `KVM_RUN` returns (`EFAULT`), and a thread
    /// dies of (`SIGSEGV`). What the guest has written there is gone, and may be written again once something is mapped.
    ///
    /// # Errors
    /// They are not in one range of RAM, or the system call failed: nothing has changed.
    pub fn unmap(&mut self, pages: GfnRange) -> Result<(), WindowError> {
        if !self.has_room(pages) {
            return Err(WindowError::BadRun(Run { pages, source: Source::Anonymous }));
        }
        self.area.clear(pages).map_err(during("munmap", pages))?;
        self.runs.unmapped(pages);
        self.shared.remove(pages.raw());
        self.unmapped.insert(pages.raw());
        self.kept.remove(pages);
        self.read_only.remove(pages);
        self.given_back.add(pages);
        // Who waits there would wait for ever.
        self.wake(pages);
        Ok(())
    }

    /// Has from `to` on, where nothing is mapped, what it has at `from`, private pages and all, and nothing there any more. Page
    /// tables move, and no bytes. Whoever could touch one of these places keeps out: a touch on the way is an error.
    ///
    /// Whoever keeps a log has written pages by the frames where they were. So all of them count as dirty.
    ///
    /// # Errors
    /// One of the places is not in one range of RAM, or a system call failed: everything is as it was, but for
    /// [`WindowError::Torn`], after which the VM must not run.
    pub fn move_pages(&mut self, from: GfnRange, to: Gfn) -> Result<(), WindowError> {
        let by = Distance::between(from.start(), to);
        let there = from.moved(by);
        if let Some(pages) = [from, there].into_iter().find(|&pages| !self.has_room(pages)) {
            return Err(WindowError::BadRun(Run { pages, source: Source::Anonymous }));
        }
        let parts: Vec<(GfnRange, Source)> = self.runs.within(from).collect();
        let mut moved = Vec::new();
        if let Err(failed) = self.carry(from, &parts, by, &mut moved) {
            return Err(match self.carry_back(from, &parts, by, &moved) {
                Ok(()) => failed,
                Err(cause) => WindowError::Torn { failed: Box::new(failed), cause },
            });
        }
        self.carried(from, &parts, by);
        if let Err(error) = self.area.clear(from) {
            log::warn!("what was left of guest pages {from:?}, which cannot be touched: {error}");
        }
        Ok(())
    }

    /// At no moment may a touch read a hole of a store untrapped: `mremap` takes the traps away.
    fn carry(
        &self,
        from: GfnRange,
        parts: &[(GfnRange, Source)],
        by: Distance,
        moved: &mut Vec<GfnRange>,
    ) -> Result<(), WindowError> {
        self.area.protect(from, MapAccess::None).map_err(during("mprotect", from))?;
        self.unregister(from).map_err(during("UFFDIO_UNREGISTER", from))?;
        for &(pages, _) in parts {
            self.area.move_within(pages, pages.moved(by)).map_err(during("mremap", pages))?;
            moved.push(pages);
        }
        for pages in of_stores(parts) {
            self.register(pages.moved(by)).map_err(during("UFFDIO_REGISTER", pages))?;
        }
        self.open(from.moved(by), self.read_only.within(from).map(|part| part.moved(by)))
            .map_err(during("mprotect", from))
    }

    /// Undoes [`carry`](Self::carry), whatever part of it was done.
    fn carry_back(
        &self,
        from: GfnRange,
        parts: &[(GfnRange, Source)],
        by: Distance,
        moved: &[GfnRange],
    ) -> io::Result<()> {
        moved.iter().try_for_each(|&pages| self.area.protect(pages.moved(by), MapAccess::None))?;
        moved.iter().try_for_each(|&pages| self.area.move_within(pages.moved(by), pages))?;
        self.area.clear(from.moved(by))?;
        of_stores(parts).try_for_each(|pages| self.register(pages))?;
        self.open(from, self.read_only.within(from))
    }

    /// Mapped pages may be touched, and written but for these.
    fn open(&self, pages: GfnRange, read_only: impl Iterator<Item = GfnRange>) -> io::Result<()> {
        self.area.protect(pages, MapAccess::ReadWrite)?;
        read_only.into_iter().try_for_each(|part| self.area.protect(part, MapAccess::Read))
    }

    /// Takes note of what has moved.
    fn carried(&mut self, from: GfnRange, parts: &[(GfnRange, Source)], by: Distance) {
        let there = from.moved(by);
        for set in [&mut self.kept, &mut self.read_only] {
            let pages: Vec<GfnRange> = set.within(from).collect();
            set.remove(from);
            set.add_all(pages.into_iter().map(|pages| pages.moved(by)));
        }
        self.runs.unmapped(from);
        self.shared.remove(from.raw());
        self.unmapped.insert(from.raw());
        parts.iter().for_each(|&(pages, source)| self.mapped(pages.moved(by), source.moved(by)));
        [from, there].into_iter().for_each(|pages| self.given_back.add(pages));
        self.pending.mark(there);
        // Who waits there would wait for ever.
        self.wake(from);
    }

    fn has_room(&self, pages: GfnRange) -> bool {
        !pages.is_empty() && self.ram.iter().any(|ram| ram.intersect(pages) == pages)
    }

    fn map_run(&mut self, run: &Run, stores: &[(StoreId, BorrowedFd<'_>)], huge: HugePages) -> Result<(), WindowError> {
        let place = |store, origin: PageOrigin| {
            let file = stores.iter().find(|(id, _)| *id == store).map(|(_, file)| *file);
            let pages = origin.pages(run.pages);
            let is_whole = pages.count() == run.pages.count();
            file.filter(|_| is_whole).map(|file| (file, pages.start())).ok_or(WindowError::BadRun(*run))
        };
        match run.source {
            Source::Anonymous => {
                self.area.map_anonymous(run.pages).map_err(during("mmap", run.pages))?;
                // A kernel without huge pages refuses the advice, and needs none.
                match huge {
                    HugePages::Advised => self.area.hint(run.pages, Advice::Huge),
                    HugePages::Never if has_room_for_huge(run.pages) => self.area.hint(run.pages, Advice::Small),
                    HugePages::Never => {}
                }
            }
            Source::Store { store, origin } => {
                let (file, first) = place(store, origin)?;
                let map = self.area.map_private(run.pages, file, first, MapAccess::ReadWrite);
                map.map_err(during("mmap", run.pages))?;
            }
            Source::Shared { store, origin } => {
                let (file, first) = place(store, origin)?;
                self.area.map_shared(run.pages, file, first).map_err(during("mmap", run.pages))?;
            }
        }
        self.shut(run.pages).map_err(during("mprotect", run.pages))?;
        self.mapped(run.pages, run.source);
        Ok(())
    }

    pub(super) fn register(&self, pages: GfnRange) -> io::Result<()> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        let (start, len) = self.area.host(pages)?;
        uffd.register(start, len)
    }

    pub(super) fn unregister(&self, pages: GfnRange) -> io::Result<()> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        let (start, len) = self.area.host(pages)?;
        uffd.unregister(start, len)
    }
}

/// Those that show a store whose holes trap.
fn of_stores(parts: &[(GfnRange, Source)]) -> impl Iterator<Item = GfnRange> {
    parts.iter().filter(|(_, source)| matches!(source, Source::Store { .. })).map(|&(pages, _)| pages)
}

/// Whether a huge page fits in.
fn has_room_for_huge(pages: GfnRange) -> bool {
    pages.start().0.next_multiple_of(HUGE) + HUGE <= pages.end().0
}
