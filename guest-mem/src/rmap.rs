//! The reverse map: who sees a page.
//!
//! A page has one address in all address spaces of its family (Torvalds 2004), and address spaces share tables. So the
//! list of distinct tables that cover an address *is* the reverse map: one look per table finds everybody.

use crate::addr::{Gfn, GfnRange, PageCount};
use crate::stage2::{Shape, Stage2, TableId, View, entries_in};
use crate::window::{Source, StoreId};
use rangemap::RangeSet;
use std::collections::HashMap;

/// The distinct tables of a family, by level and by the region they cover.
#[derive(Debug)]
pub struct ReverseMap {
    shape: Shape,
    levels: Vec<HashMap<u64, Vec<TableId>>>,
}

impl ReverseMap {
    pub(crate) fn new(shape: Shape) -> Self {
        Self { shape, levels: vec![HashMap::new(); shape.levels as usize] }
    }

    fn region(&self, level: u32, first: Gfn) -> u64 {
        first.0 / self.shape.table_span(level).0
    }

    pub(crate) fn add(&mut self, level: u32, first: Gfn, table: TableId) {
        let region = self.region(level, first);
        self.levels[level as usize - 1].entry(region).or_default().push(table);
    }

    pub(crate) fn remove(&mut self, level: u32, first: Gfn, table: TableId) {
        let region = self.region(level, first);
        let tables = self.levels[level as usize - 1].get_mut(&region).expect("a table is listed in its region");
        tables.swap_remove(tables.iter().position(|&t| t == table).expect("a table is listed once"));
        if tables.is_empty() {
            self.levels[level as usize - 1].remove(&region);
        }
    }

    /// The distinct tables at `level` whose region holds `gfn`.
    pub fn tables(&self, level: u32, gfn: Gfn) -> &[TableId] {
        self.levels[level as usize - 1].get(&self.region(level, gfn)).map_or(&[], Vec::as_slice)
    }

    /// The frames of `range` at which any VM of the family sees `store`. Looks no further where it has found somebody.
    pub fn seen(&self, stage2: &Stage2, range: GfnRange, store: StoreId) -> RangeSet<u64> {
        let mut seen = RangeSet::new();
        for level in 1..=self.shape.leaf_levels {
            let span = self.shape.table_span(level).0;
            let mut first = range.start().0 / span * span;
            while first < range.end().0 {
                let part = range.intersect(GfnRange::new(Gfn(first), PageCount(span)));
                for &table in self.tables(level, Gfn(first)) {
                    if seen.gaps(&part.raw()).next().is_none() {
                        break;
                    }
                    for (pages, entry) in entries_in(self.shape, stage2.table(table), part) {
                        if matches!(entry.view(pages.start()), View::Leaf(Source::Store { store: s, .. }) if s == store)
                        {
                            seen.insert(pages.intersect(range).raw());
                        }
                    }
                }
                first += span;
            }
        }
        seen
    }

    /// Compares the lists with a scan of all tables (invariant 7).
    ///
    /// # Errors
    /// What does not agree.
    pub fn check(&self, stage2: &Stage2) -> Result<(), String> {
        let listed: usize = self.levels.iter().flat_map(HashMap::values).map(Vec::len).sum();
        if listed != stage2.tables() {
            return Err(format!("7: {listed} tables listed, {} exist", stage2.tables()));
        }
        for id in stage2.ids() {
            let table = stage2.table(id);
            if !self.tables(table.level, table.first).contains(&id) {
                return Err(format!("7: table {id:?} of level {} is not listed at {}", table.level, table.first));
            }
        }
        Ok(())
    }
}
