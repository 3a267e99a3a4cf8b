//! What a VM may not write.

use super::HostWindow;
use crate::addr::GfnRange;
use crate::ids::Source;
use crate::space::map::Protection;
use crate::sys::MapAccess;
use std::io;

impl HostWindow {
    /// Protects what is mapped at `pages`, and remembers it for what will be.
    pub(super) fn set_protection(&mut self, pages: GfnRange, protection: Protection) -> io::Result<()> {
        let parts: Vec<_> = self.ram.iter().flat_map(|ram| self.runs.within(ram.intersect(pages))).collect();
        let access = match protection {
            Protection::ReadOnly => MapAccess::Read,
            Protection::ReadWrite => MapAccess::ReadWrite,
        };
        if let Err(error) = parts.iter().try_for_each(|(part, _)| self.area.protect(*part, access)) {
            let undone = parts.iter().try_for_each(|(part, _)| self.area.protect(*part, MapAccess::ReadWrite));
            if let Err(undone) = undone.and_then(|()| self.shut(pages)) {
                log::error!("the protection of guest pages {pages:?} is not what it was: {undone}");
            }
            return Err(error);
        }
        match protection {
            Protection::ReadOnly => {
                self.read_only.add(pages);
                // What is mapped there one day is something new.
                self.unmapped.overlapping(pages.raw()).for_each(|hole| self.read_only.remove(hole.clone().into()));
            }
            Protection::ReadWrite => self.read_only.remove(pages),
        }
        parts.into_iter().for_each(|(part, source)| self.mapped(part, source));
        Ok(())
    }

    /// One call has mapped `pages`, and what is read-only of them was [shut](Self::shut): the kernel has a mapping for each
    /// stretch between.
    pub(super) fn mapped(&mut self, pages: GfnRange, source: Source) {
        match source {
            Source::Shared { .. } => self.shared.insert(pages.raw()),
            Source::Anonymous | Source::Store { .. } => self.shared.remove(pages.raw()),
        }
        self.unmapped.remove(pages.raw());
        self.runs.mapped(pages, source);
        self.read_only.within(pages).for_each(|part| self.runs.mapped(part, source));
    }

    /// Takes the right to write what is read-only from mappings that were just made.
    pub(super) fn shut(&self, pages: GfnRange) -> io::Result<()> {
        self.read_only.within(pages).try_for_each(|part| self.area.protect(part, MapAccess::Read))
    }
}
