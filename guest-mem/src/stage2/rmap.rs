//! The tables' half of the reverse map: where trees show a page. [Who sees it](crate::family::Family::viewers) begins at the
//! object that has it.
//!
//! A page has one address in an address space, in all of them the same unless it was moved. To find it in one takes one look: the
//! *group* lists the address spaces, and each is looked at there (Torvalds 2004). Address spaces share tables (Phillips
//! 2002), so a table that a thousand of them lead to is looked at once.

use super::{Stage2, TableId, View, entries_in};
use crate::addr::GfnRange;
use crate::ids::{Run, StoreId};
use crate::space::runs::push_run;
use std::collections::HashMap;
use std::rc::Rc;

/// Looks for pages of one store in many trees, at each distinct table once.
pub(crate) struct TableLooks<'a> {
    stage2: &'a Stage2,
    store: StoreId,
    known: HashMap<(TableId, GfnRange), Rc<[Run]>>,
}

impl<'a> TableLooks<'a> {
    pub fn new(stage2: &'a Stage2, store: StoreId) -> Self {
        Self { stage2, store, known: HashMap::new() }
    }

    /// Which frames of `range` show the store in the tree below `table`.
    pub fn below(&mut self, table: TableId, range: GfnRange) -> Rc<[Run]> {
        if let Some(runs) = self.known.get(&(table, range)) {
            return Rc::clone(runs);
        }
        let mut runs = Vec::new();
        let stage2 = self.stage2;
        for (pages, entry) in entries_in(stage2.shape(), stage2.table(table), range) {
            match entry.view(pages.start()) {
                View::Leaf(source) if source.is_store(self.store) => {
                    push_run(&mut runs, Run { pages: pages.intersect(range), source });
                }
                View::Leaf(_) | View::Empty => {}
                View::Table(below) => self.below(below, range).iter().for_each(|&run| push_run(&mut runs, run)),
            }
        }
        let runs: Rc<[Run]> = runs.into();
        self.known.insert((table, range), Rc::clone(&runs));
        runs
    }
}
