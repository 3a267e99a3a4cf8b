//! Maps runs.

use super::{HostWindow, HugePages, WindowError, during};
use crate::addr::{Gfn, GfnRange, PageIndex};
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

    fn has_room(&self, pages: GfnRange) -> bool {
        !pages.is_empty() && self.ram.iter().any(|ram| ram.intersect(pages) == pages)
    }

    fn map_run(&mut self, run: &Run, stores: &[(StoreId, BorrowedFd<'_>)], huge: HugePages) -> Result<(), WindowError> {
        let place = |store, origin: Gfn| {
            let file = stores.iter().find(|(id, _)| *id == store).map(|(_, file)| *file);
            let first = run.pages.start().0.checked_sub(origin.0).map(PageIndex);
            file.zip(first).ok_or(WindowError::BadRun(*run))
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

/// Whether a huge page fits in.
fn has_room_for_huge(pages: GfnRange) -> bool {
    pages.start().0.next_multiple_of(HUGE) + HUGE <= pages.end().0
}
