//! Moves a window's dirty private pages out of the guest's sight and puts an empty store in their place.

use super::dirty::Cleanness;
use super::{Dirty, HostWindow, WindowError, during, moves};
use crate::addr::{Gfn, GfnRange, PAGE_SHIFT, PageIndex};
use crate::sys::{Access, Advice, Area};
use crate::window::{Harvest, Source, StoreId};
use std::io;
use std::os::fd::BorrowedFd;

/// What a freeze took out of a window.
#[derive(Debug)]
pub struct Frozen {
    /// Which pages.
    pub harvest: Harvest,
    /// Host address where guest-physical address 0 would stand in the scratch range. 0 where nothing was moved.
    pub scratch_base: u64,
}

/// The private pages of a window, told apart.
struct Found {
    dirty: Vec<GfnRange>,
    clean: Vec<GfnRange>,
}

/// Pages that left the window, with what lies beneath them: what it takes to put them back.
type Moved = Vec<(GfnRange, Source)>;

impl HostWindow {
    /// Moves all dirty private pages into a scratch range and maps the still empty `file` in their place, its page `n`
    /// at guest frame `n`; touches of what it does not hold trap. Private copies of clean pages are dropped. If nothing
    /// is dirty and private, nothing is touched and the harvest is empty.
    ///
    /// Nobody touches the window meanwhile: vCPUs, devices, kernel threads that work for them (with a local APIC in the
    /// kernel KVM faults guest pages in from workers of its own: they are drained first). Afterwards the window has at most `max_runs`
    /// mappings, if joining stretches of private pages can do it.
    ///
    /// # Errors
    /// A system call failed: everything is as it was, and what was dirty is remembered for the next freeze. Except for
    /// [`WindowError::Torn`], after which the VM must not run.
    pub fn freeze(
        &mut self,
        dirty: Dirty<'_>,
        store: StoreId,
        file: BorrowedFd<'_>,
        max_runs: u32,
    ) -> Result<Frozen, WindowError> {
        match dirty {
            Dirty::Every => self.pending.mark_every(),
            Dirty::Logged(logs) => logs.iter().for_each(|log| self.pending.mark_log(log)),
        }
        self.pending.take_writes(&self.memory);
        let t=std::time::Instant::now();
        let found = self.find_private()?; let t1=t.elapsed();
        self.drop_clean(&found.clean)?; eprintln!("    find {:?} clean {} ranges {:?}", t1, found.clean.len(), t.elapsed()-t1);
        if found.dirty.is_empty() {
            self.pending.clear();
            return Ok(Frozen { harvest: Harvest::default(), scratch_base: 0 });
        }

        // A run in the middle of a mapping makes three of one.
        let limit = (max_runs as usize).saturating_sub(self.runs.count()) / 2;
        let moved = moves::plan(&found.dirty, &self.ram, limit);
        let scratch = self.scratches.make().map_err(WindowError::NoScratch)?;
        self.exchange(&scratch, &moved, file)?;

        let source = Source::Store { store, origin: Gfn(0) };
        moved.iter().for_each(|pages| self.runs.mapped(*pages, source));
        self.pending.clear();
        let scratch_base = scratch.base();
        self.scratches.keep(store, scratch, found.dirty.clone());
        Ok(Frozen { harvest: Harvest { moved, private: found.dirty }, scratch_base })
    }

    /// Looks for private pages wherever something may be dirty.
    fn find_private(&mut self) -> Result<Found, WindowError> {
        let base = self.area.base();
        let mut found = Found { dirty: Vec::new(), clean: Vec::new() };
        for range in self.pending.ranges() {
            let (start, len) = self.area.host(range).map_err(during("looking up", range))?;
            let pending = &self.pending;
            let scan = self.pagemap.private(start..start + len as u64, |bytes| {
                let frames = (bytes.start - base) >> PAGE_SHIFT..(bytes.end - base) >> PAGE_SHIFT;
                pending.split(frames.into(), |pages, cleanness| match cleanness {
                    Cleanness::Dirty => push(&mut found.dirty, pages),
                    Cleanness::Clean => push(&mut found.clean, pages),
                });
            });
            scan.map_err(during("scanning the pagemap", range))?;
        }
        Ok(found)
    }

    /// Drops private copies of clean pages that have a store beneath them.
    fn drop_clean(&self, clean: &[GfnRange]) -> Result<(), WindowError> {
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

    /// Moves `moves` out and the store in, or changes nothing.
    fn exchange(
        &mut self,
        scratch: &Area,
        moves: &[GfnRange],
        file: BorrowedFd<'_>,
    ) -> Result<(), WindowError> {
        let mut moved = Moved::new();
        let t0=std::time::Instant::now();
        let done = self.move_out(scratch, moves, &mut moved); let t1=t0.elapsed(); let done=done.and_then(|()| self.move_in(moves, file));
        eprintln!("    moves {} pieces {} out {:?} in {:?}",moves.len(),moved.len(),t1,t0.elapsed()-t1);
        let Err(failed) = done else { return Ok(()) };
        if let Err(cause) = self.put_back(scratch, moves, &moved) {
            return Err(WindowError::Torn { failed: Box::new(failed), cause });
        }
        // What was moved out and back may be mappings of their own now.
        moved.into_iter().for_each(|(pages, source)| self.runs.mapped(pages, source));
        Err(failed)
    }

    /// The kernel moves the page tables of what is registered entry by entry, five times slower than whole: so the
    /// traps go first.
    fn move_out(
        &self,
        scratch: &Area,
        moves: &[GfnRange],
        moved: &mut Moved,
    ) -> Result<(), WindowError> {
        for range in moves {
            let t=std::time::Instant::now();self.unregister(*range).map_err(during("UFFDIO_UNREGISTER", *range))?;
            if range.count().0>1000 {eprintln!("     {range:?} unregister {:?}",t.elapsed());}
            for (pages, source) in self.runs.within(*range) {
                self.area.move_to(scratch, pages).map_err(during("mremap", pages))?;
                moved.push((pages, source));
            }
        }
        Ok(())
    }

    /// At no moment may a touch read a hole of the store untrapped.
    fn move_in(&self, moves: &[GfnRange], file: BorrowedFd<'_>) -> Result<(), WindowError> {
        for pages in moves {
            self.map_shut(*pages, file).map_err(during("mmap", *pages))?;
            self.register(*pages).map_err(during("UFFDIO_REGISTER", *pages))?;
            self.area.protect(*pages, Access::ReadWrite).map_err(during("mprotect", *pages))?;
        }
        Ok(())
    }

    fn map_shut(&self, pages: GfnRange, file: BorrowedFd<'_>) -> io::Result<()> {
        self.area.map_private(pages, file, PageIndex(pages.start().0), Access::None)
    }

    /// Undoes [`move_out`](Self::move_out), over whatever part of the store was mapped, and traps again.
    fn put_back(&self, scratch: &Area, moves: &[GfnRange], moved: &Moved) -> io::Result<()> {
        moved.iter().try_for_each(|(pages, _)| scratch.move_to(&self.area, *pages))?;
        let runs = moves.iter().flat_map(|range| self.runs.within(*range));
        let mut stores = runs.filter(|(_, source)| matches!(source, Source::Store { .. }));
        stores.try_for_each(|(pages, _)| self.register(pages))
    }
}

/// Appends `pages` to sorted ranges, joining it to the last where it continues that.
fn push(ranges: &mut Vec<GfnRange>, pages: GfnRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == pages.start() => *last = GfnRange::between(last.start(), pages.end()),
        _ => ranges.push(pages),
    }
}
