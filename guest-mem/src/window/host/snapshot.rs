//! A freeze in which nothing moves, and what makes up for it later.
//!
//! The process makes a copy of itself, copy-on-write, and the frozen pages are read there until they have been written back.
//! All of them stay in this window as well: whoever touches them goes on at once, and huge pages stay huge. What that costs is
//! memory: pages that have been written back are here once more. So the window [gives them up](HostWindow::dedup), stretch by
//! stretch.

use super::dirty::Cleanness;
use super::freeze::PrivatePages;
use super::moves::SHORT;
use super::{Dirty, HostWindow, WindowError, during};
use crate::addr::{GfnRange, PageCount, PageOrigin};
use crate::ids::{Source, StoreId};
use crate::sys::Area;
use crate::window::Harvest;
use std::io;
use std::os::fd::BorrowedFd;

/// Pages that a window keeps no longer. Dropping it gives their memory back, which takes time: the guest may run before.
#[derive(Debug)]
pub struct Deduped {
    /// Which: the store is mapped there now.
    pub pages: Vec<GfnRange>,
    _before: Option<Area>,
}

impl HostWindow {
    /// A shorter stretch of kept pages is not worth a mapping of its own.
    pub const SHED_LEAST: PageCount = PageCount(SHORT + 1);

    /// Freezes all private pages where they are, for a VM of whose writes no log was kept: `copy` makes a copy-on-write copy
    /// of this process's memory, to read them from at the same addresses. `None`, and nothing has changed, where they are in
    /// so many stretches that a child could not map them.
    ///
    /// Nobody touches the window meanwhile, as with [`move_out`](Self::move_out).
    ///
    /// # Errors
    /// A system call failed, or `copy` did: everything is as it was, and what was dirty is remembered.
    pub fn freeze_in_copy(
        &mut self,
        max_runs: u32,
        copy: impl FnOnce() -> io::Result<()>,
    ) -> Result<Option<Harvest>, WindowError> {
        let trust = self.mark(Dirty::Every);
        let PrivatePages { dirty: private, clean, .. } = self.find_private(trust)?;
        let limit = (max_runs as usize).saturating_sub(self.runs.count()) / 2;
        if self.kept.iter().count() + private.len() > limit {
            return Ok(None);
        }
        self.drop_clean(&clean)?;
        if let Some((first, last)) = private.first().zip(private.last()) {
            copy().map_err(during("copying the process of", GfnRange::between(first.start(), last.end())))?;
        }
        self.kept.add_all(private.iter().copied());
        self.forget_dirty();
        Ok(Some(Harvest { copied: private, ..Harvest::default() }))
    }

    /// Maps `file`, which is `store`, in the place of `pages` that are kept since a freeze into it, all of which have
    /// written back. What was written since then stays, and is dirty.
    ///
    /// Nobody touches the window meanwhile. Pages that are not kept any more are left alone.
    ///
    /// # Errors
    /// A system call failed: everything is as it was, but for [`WindowError::Torn`], after which the VM must not run.
    pub fn dedup(
        &mut self,
        dirty: Dirty<'_>,
        store: StoreId,
        file: BorrowedFd<'_>,
        pages: &[GfnRange],
    ) -> Result<Deduped, WindowError> {
        self.mark(dirty);
        let kept = pages.iter().flat_map(|&pages| self.kept.within(pages));
        let pages: Vec<GfnRange> = kept.filter(|part| part.count() >= Self::SHED_LEAST).collect();
        if pages.is_empty() {
            return Ok(Deduped { pages, _before: None });
        }
        let mut written = Vec::new();
        for stretch in &pages {
            self.pending.split(*stretch, |part, cleanness| match cleanness {
                Cleanness::Dirty => written.push(part),
                Cleanness::Clean => {}
            });
        }
        let before = self.scratches.make().map_err(WindowError::NoScratch)?;
        self.exchange(&before, &pages, file, |window| {
            written.iter().try_for_each(|part| window.put(&before, *part).map_err(during("UFFDIO_COPY", *part)))
        })?;
        for stretch in &pages {
            self.mapped(*stretch, Source::Store { store, origin: PageOrigin(0) });
            self.kept.remove(*stretch);
        }
        Ok(Deduped { pages, _before: Some(before) })
    }

    /// Puts pages that were moved out into the window once more, where no page is: over what the store has, or will have.
    fn put(&self, from: &Area, pages: GfnRange) -> io::Result<()> {
        let Some(uffd) = &self.uffd else { return Err(io::ErrorKind::Unsupported.into()) };
        let mut bytes = vec![0; pages.len_bytes()];
        from.copy_out(pages.start(), &mut bytes)?;
        let (start, _) = self.area.host(pages)?;
        uffd.copy(start, &bytes).map_err(|(_, error)| error)
    }
}
