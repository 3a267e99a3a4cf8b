//! The reverse map: who sees a page, and so whether anybody does, and how many do.
//!
//! ```text
//!  page ──its slot──► object ──its users──► VMs ──their tables, at that address──► who shows it where
//! ```
//!
//! The slot that names a page tells its object. Whoever sees the page shows that object, or one that is stacked on it and does
//! not hide the page: the forest knows them, each object *a list of all vmas that use it* (Lokier 2000). Stage-2 tells what
//! each of them shows there, and has the last word. It costs a look at each of these objects, one at each distinct table,
//! and the answer; VMs that cannot see the page cost nothing, however many there are, and whoever needs to know of one or
//! two viewers stops there.

use crate::addr::extents::without;
use crate::addr::{Gfn, GfnRange, PageRange};
use crate::family::Family;
use crate::ids::{Run, StoreId, VmId};
use crate::object::User;
use crate::stage2::TableLooks;
use rangemap::RangeSet;
use std::ops::ControlFlow;

/// Exclusive swap-in looks at so many objects to learn whether others see a page. Where that does not tell, the page gets
/// into its store like any other, which costs a copy and is never wrong.
const FEW: usize = 16;

impl Family {
    /// Tells who shows which of `pages` (as they count in `store`), VM by VM, for as long as `tell` goes on.
    pub(crate) fn viewers(
        &self,
        store: StoreId,
        pages: PageRange,
        mut tell: impl FnMut(VmId, Run) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut looks = TableLooks::new(&self.stage2, store);
        for (owner, _) in self.objects.accounts.owners(store) {
            if !self.objects.slots_in(owner, pages).any(|(_, slot)| slot.store() == Some(store)) {
                continue;
            }
            let users = self.objects.users(owner, pages).filter_map(|User { object, pages }| Some((object, pages?)));
            for (object, in_object) in users {
                for &vm in self.objects.get(object).mappings.keys() {
                    let books = self.vm(vm);
                    for (bounds, entry) in books.map.iter().filter(|(_, entry)| entry.object == Some(object)) {
                        let shown = looks.below(books.root, entry.origin.frames(in_object));
                        let shown = shown.iter().filter_map(|run| {
                            // Other pages of the store may have moved there.
                            let (_, origin) = run.source.store()?;
                            Some(Run { pages: run.pages.intersect(bounds).intersect(origin.frames(pages)), ..*run })
                        });
                        shown.filter(|run| !run.pages.is_empty()).try_for_each(|run| tell(vm, run))?;
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Which of `pages` of a store anybody sees but this VM. Whoever sees some of them is enough for those.
    pub(crate) fn seen(&self, store: StoreId, pages: PageRange, except: Option<VmId>) -> RangeSet<u64> {
        let mut seen = RangeSet::new();
        let mut rest = vec![pages];
        while let Some(pages) = rest.pop() {
            let (mut first, mut shown) = (None, Vec::new());
            let _ = self.viewers(store, pages, |vm, run| {
                if except == Some(vm) {
                    return ControlFlow::Continue(());
                }
                if *first.get_or_insert(vm) != vm {
                    return ControlFlow::Break(());
                }
                shown.extend(run.indexes());
                ControlFlow::Continue(())
            });
            if first.is_some() {
                shown.sort_unstable_by_key(|part| part.start());
                rest.extend(without(&[pages], &shown));
                seen.extend(shown.into_iter().map(PageRange::raw));
            }
        }
        seen
    }

    /// Whether `vm` is known to be the only one that sees the page it sees at `gfn`: a few looks have to tell.
    pub(crate) fn is_alone(&self, vm: VmId, gfn: Gfn) -> bool {
        let page = GfnRange::one(gfn);
        let Some(found) = self.shown(vm, page).first().and_then(|segment| segment.found) else { return false };
        let mut looks = self.objects.users(found.object, found.indexes(page));
        let users = looks.by_ref().take(FEW).filter(|user| user.pages.is_some());
        let mut viewers = users.flat_map(|user| self.objects.get(user.object).mappings.keys());
        viewers.all(|&viewer| viewer == vm) && looks.next().is_none()
    }
}
