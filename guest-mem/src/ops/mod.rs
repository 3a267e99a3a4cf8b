//! The few operations in which objects and stage-2 tables meet, one file each.

mod balloon;
mod compact;
mod dedup;
mod exit;
mod fault;
mod fork;
mod freeze;
#[cfg(test)]
mod growth;
mod launch;
mod map;
mod protect;
mod rmap_walk;
mod writeback;

pub use compact::Compaction;
pub(crate) use compact::Taking;
pub use fault::Fault;
pub use freeze::Destination;
pub use writeback::{CopyFrom, Placed, WritebackJob};

use crate::addr::PageRange;
use crate::effect::{Effect, Effects};
use crate::family::Family;
use crate::ids::{ObjectId, Run, StoreId};
use crate::object::ObjectKind;
use crate::space::runs::merge_runs;
use std::collections::BTreeSet;

impl Family {
    /// Frees stored pages that nobody sees any more: those of `replaced`, which a VM saw until now, and those that only
    /// a copy-up kept. The last thing an operation does, once the tables say who sees what.
    pub(crate) fn free_unseen(&mut self, replaced: Vec<Run>, effects: &mut Effects) {
        let mut suspects = self.objects.writeback.take_unneeded();
        let stored = |run: Run| Some((run.source.store()?.0, run.indexes()?));
        suspects.extend(merge_runs(replaced).into_iter().filter_map(stored));
        self.free_suspects(suspects, effects);
    }

    /// Frees those of these pages that nobody sees, and what only copy-ups in their place had kept.
    pub(crate) fn free_suspects(&mut self, mut suspects: Vec<(StoreId, PageRange)>, effects: &mut Effects) {
        while !suspects.is_empty() {
            let mut lighter = BTreeSet::new();
            for (store, pages) in suspects {
                self.free_pages(store, pages, &mut lighter, effects);
            }
            for object in lighter {
                self.objects.collapse(object, effects);
            }
            suspects = self.objects.writeback.take_unneeded();
        }
    }

    /// Frees pages of a store, unless somebody sees them or a copy-up is still to be copied from them. `lighter` gets the
    /// objects that lost pages.
    pub(crate) fn free_pages(
        &mut self,
        store: StoreId,
        pages: PageRange,
        lighter: &mut BTreeSet<ObjectId>,
        effects: &mut Effects,
    ) {
        let Some(kind) = self
            .objects
            .accounts
            .stores
            .get(&store)
            .map(|account| account.kind)
            .filter(|&kind| kind != ObjectKind::File)
        else {
            return;
        };
        let owners: Vec<ObjectId> = self.objects.accounts.owners(store).map(|(object, _)| object).collect();
        let seen = self.seen(store, pages, None);
        for unseen in seen.gaps(&pages.raw()) {
            for &object in &owners {
                let held = self.objects.slots_in(object, unseen.clone().into());
                let held: Vec<PageRange> =
                    held.filter(|(_, s)| s.store() == Some(store)).map(|(part, _)| part).collect();
                for part in held {
                    for free in self.objects.pending_copy_sources(object, part).gaps(&part.raw()) {
                        if kind == ObjectKind::Shared {
                            effects.push(Effect::Punch(store, free.clone().into()));
                        }
                        self.objects.vacate(object, free.into(), effects);
                        lighter.insert(object);
                    }
                }
            }
        }
    }
}
