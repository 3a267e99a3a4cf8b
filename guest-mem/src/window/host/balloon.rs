//! Gives back pages that the guest does not need.

use super::{HostWindow, WindowError, during};
use crate::addr::GfnRange;
use crate::ids::Source;
use crate::sys::Advice;
use rangemap::RangeSet;
use std::cmp::Reverse;

impl HostWindow {
    /// Drops what the guest has in `pages` and shows anonymous memory there, which never traps: whatever touches it later
    /// reads zeros. Guest and devices may run. Returns the pages of which this is true now, sorted; frames outside of RAM
    /// and those of shared memory are none of them.
    ///
    /// A store beneath shows again where private pages are dropped, so each stretch over a store takes a mapping of its
    /// own. Where the window would get more than `max_runs` by that, the shortest stretches stay as they are.
    pub fn balloon(&mut self, pages: &[GfnRange], max_runs: usize) -> Vec<GfnRange> {
        let asked: RangeSet<u64> =
            pages.iter().filter(|pages| pages.start() < pages.end()).map(|pages| pages.raw()).collect();
        let within = |ram: &GfnRange| {
            let ram = *ram;
            asked
                .overlapping(ram.raw())
                .map(move |part| GfnRange::from(part.clone()).intersect(ram))
                .collect::<Vec<_>>()
        };
        let mut stretches: Vec<GfnRange> = self.own_ram().iter().flat_map(within).collect();
        stretches.sort_unstable_by_key(|stretch| Reverse(stretch.count()));
        let mut done = RangeSet::new();
        for stretch in stretches {
            if let Err(error) = self.give_back(stretch, max_runs, &mut done) {
                log::error!("pages that were to be given back stay: {error}");
                break;
            }
        }
        let done: Vec<GfnRange> = done.into_iter().map(GfnRange::from).collect();
        for &part in &done {
            self.given_back.add(part);
            self.kept.remove(part);
        }
        done
    }

    fn give_back(&mut self, stretch: GfnRange, max_runs: usize, done: &mut RangeSet<u64>) -> Result<(), WindowError> {
        let parts: Vec<(GfnRange, Source)> = self.runs.within(stretch).collect();
        let covers_store = parts.iter().any(|(_, source)| matches!(source, Source::Store { .. }));
        if covers_store && self.runs.count_with(stretch) <= max_runs.max(self.runs.count()) {
            self.area.map_anonymous(stretch).map_err(during("mmap", stretch))?;
            // A kernel without huge pages refuses the advice, and needs none.
            self.area.hint(stretch, Advice::Small);
            self.shut(stretch).map_err(during("mprotect", stretch))?;
            self.mapped(stretch, Source::Anonymous);
            done.insert(stretch.raw());
            return Ok(());
        }
        for (part, _) in parts.into_iter().filter(|(_, source)| *source == Source::Anonymous) {
            let dropped = self.area.advise(part, Advice::DropPrivate);
            dropped.map_err(during("madvise(MADV_DONTNEED)", part))?;
            done.insert(part.raw());
        }
        Ok(())
    }
}
