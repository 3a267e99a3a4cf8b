//! Stage-2 tables: which source supplies each guest frame of a VM, as a radix tree whose tables are shared.
//!
//! The tree has the shape of the hardware's (4 levels of 512 entries; tests use tiny ones) and leaves at the lower
//! three. A fork shares the whole tree by adding one to the root's use count. The first change below a shared table
//! copies that table and nothing else (shared page tables: Phillips 2002); `cursor` is the only code that changes one.
//!
//! A leaf says nothing about residency: eviction and swap-in touch no table. The tree is a *cache* of what the object
//! chains say and can be rebuilt from them at any time.

mod cursor;
mod entry;

pub use cursor::Cursor;
pub use entry::{Entry, TableId, View};

use crate::addr::{Gfn, GfnRange, PageCount};
use crate::rmap::ReverseMap;
use crate::window::{Run, Source};
use std::collections::HashMap;

/// The tree's dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `log2` of the entries of a table.
    pub bits: u32,
    /// Levels of tables; 1 is the lowest.
    pub levels: u32,
    /// Levels, from 1, whose entries may be leaves.
    pub leaf_levels: u32,
}

impl Shape {
    /// As the processor's: 4 KiB, 2 MiB and 1 GiB leaves in 256 TiB of guest-physical space.
    pub const X86_64: Self = Self { bits: 9, levels: 4, leaf_levels: 3 };

    /// Guest frames below one entry of a table at `level`.
    pub fn entry_span(self, level: u32) -> PageCount {
        PageCount(1 << (self.bits * (level - 1)))
    }

    /// Guest frames below a whole table at `level`.
    pub fn table_span(self, level: u32) -> PageCount {
        PageCount(1 << (self.bits * level))
    }
}

/// A table. It is owned by everything that points to it, in equal parts.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) level: u32,
    /// First frame it covers.
    pub(crate) first: Gfn,
    /// Entries above and VMs that point to it. Above one, nobody changes it.
    pub(crate) uses: u32,
    pub(crate) entries: Box<[Entry]>,
}

/// All tables of a family.
#[derive(Debug)]
pub struct Stage2 {
    shape: Shape,
    tables: slab::Slab<Table>,
    rmap: ReverseMap,
}

impl Stage2 {
    /// No tables yet.
    pub fn new(shape: Shape) -> Self {
        Self { shape, tables: slab::Slab::new(), rmap: ReverseMap::new(shape) }
    }

    /// The tree's dimensions.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How many tables there are.
    pub fn tables(&self) -> usize {
        self.tables.len()
    }

    /// The family's lists of distinct tables, by the region they cover.
    pub fn rmap(&self) -> &ReverseMap {
        &self.rmap
    }

    /// A root that knows nothing, used once.
    pub fn new_root(&mut self) -> TableId {
        self.insert(self.shape.levels, Gfn(0), vec![Entry::default(); 1 << self.shape.bits].into())
    }

    /// One more user of the whole tree below `root`. Costs the same at any size.
    pub fn share(&mut self, root: TableId) -> TableId {
        self.table_mut(root).uses += 1;
        root
    }

    /// One user of `table` less. Appends the leaves of the tables that went with it to `dropped`.
    pub fn release(&mut self, table: TableId, dropped: &mut Vec<Run>) {
        let t = self.table_mut(table);
        t.uses -= 1;
        if t.uses > 0 {
            return;
        }
        let t = self.tables.remove(table.0 as usize);
        self.rmap.remove(t.level, t.first, table);
        for (first, entry) in entries(self.shape, &t) {
            match entry.view(first.start()) {
                View::Empty => {}
                View::Leaf(source) => push_run(dropped, Run { pages: first, source }),
                View::Table(below) => self.release(below, dropped),
            }
        }
    }

    /// What supplies `gfn`; none where the tree does not know.
    pub fn walk(&self, root: TableId, gfn: Gfn) -> Option<Source> {
        let mut table = self.table(root);
        loop {
            let span = self.shape.entry_span(table.level).0;
            let index = (gfn.0 - table.first.0) / span;
            let entry = *table.entries.get(usize::try_from(index).ok()?)?;
            match entry.view(Gfn(table.first.0 + index * span)) {
                View::Empty => return None,
                View::Leaf(source) => return Some(source),
                View::Table(below) => table = self.table(below),
            }
        }
    }

    /// Whether the tree below `root` is the only one that shows the stored page it shows at `gfn`.
    pub fn is_alone(&self, root: TableId, gfn: Gfn) -> bool {
        let shown = self.walk(root, gfn);
        let mut table = root;
        loop {
            let t = self.table(table);
            if t.uses > 1 {
                return false;
            }
            match self.entry_at(t, gfn) {
                View::Table(below) => table = below,
                View::Empty => return false,
                View::Leaf(_) => break,
            }
        }
        let shows = |table: &&TableId| match self.entry_at(self.table(**table), gfn) {
            View::Leaf(source) => Some(source) == shown,
            _ => false,
        };
        let tables = (1..=self.shape.leaf_levels).flat_map(|level| self.rmap.tables(level, gfn));
        tables.filter(shows).count() == 1
    }

    /// What a table says of a frame that it covers.
    fn entry_at(&self, table: &Table, gfn: Gfn) -> View {
        let span = self.shape.entry_span(table.level).0;
        let index = (gfn.0 - table.first.0) / span;
        table.entries[index as usize].view(Gfn(table.first.0 + index * span))
    }

    /// The known part of `range` as runs, in order, neighbours that continue each other as one.
    pub fn runs(&self, root: TableId, range: GfnRange) -> Vec<Run> {
        let mut runs = Vec::new();
        self.collect(root, range, &mut runs);
        runs
    }

    fn collect(&self, table: TableId, range: GfnRange, runs: &mut Vec<Run>) {
        for (pages, entry) in entries_in(self.shape, self.table(table), range) {
            match entry.view(pages.start()) {
                View::Empty => {}
                View::Leaf(source) => push_run(runs, Run { pages: pages.intersect(range), source }),
                View::Table(below) => self.collect(below, range, runs),
            }
        }
    }

    /// How many of the given roots lead to each table.
    pub fn viewers(&self, roots: impl Iterator<Item = TableId>) -> HashMap<TableId, u32> {
        let mut viewers = HashMap::new();
        let mut level: Vec<TableId> = Vec::new();
        for root in roots {
            *viewers.entry(root).or_insert_with(|| {
                level.push(root);
                0
            }) += 1;
        }
        while !level.is_empty() {
            let mut below = Vec::new();
            for table in level {
                let above = viewers[&table];
                let t = self.table(table);
                for (pages, entry) in entries(self.shape, t) {
                    if let View::Table(child) = entry.view(pages.start()) {
                        *viewers.entry(child).or_insert_with(|| {
                            below.push(child);
                            0
                        }) += above;
                    }
                }
            }
            level = below;
        }
        viewers
    }

    /// Tables below `root`, itself included, as if it shared none.
    pub fn tables_below(&self, root: TableId) -> usize {
        1 + entries(self.shape, self.table(root))
            .filter_map(|(pages, entry)| match entry.view(pages.start()) {
                View::Table(below) => Some(self.tables_below(below)),
                _ => None,
            })
            .sum::<usize>()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = TableId> {
        self.tables.iter().map(|(id, _)| TableId(id as u32))
    }

    pub(crate) fn table(&self, id: TableId) -> &Table {
        &self.tables[id.0 as usize]
    }

    fn table_mut(&mut self, id: TableId) -> &mut Table {
        &mut self.tables[id.0 as usize]
    }

    fn insert(&mut self, level: u32, first: Gfn, entries: Box<[Entry]>) -> TableId {
        let id = TableId(self.tables.insert(Table { level, first, uses: 1, entries }) as u32);
        self.rmap.add(level, first, id);
        id
    }
}

/// Every entry of a table, with the frames below it.
pub(crate) fn entries(shape: Shape, table: &Table) -> impl Iterator<Item = (GfnRange, Entry)> {
    let span = shape.entry_span(table.level);
    let first = table.first;
    table
        .entries
        .iter()
        .enumerate()
        .map(move |(i, &entry)| (GfnRange::new(Gfn(first.0 + i as u64 * span.0), span), entry))
}

/// The entries of a table that have frames of `range` below them, with all the frames below them.
pub(crate) fn entries_in(shape: Shape, table: &Table, range: GfnRange) -> impl Iterator<Item = (GfnRange, Entry)> {
    let span = shape.entry_span(table.level).0;
    let covered = GfnRange::new(table.first, shape.table_span(table.level)).intersect(range);
    let (from, to) = if covered.is_empty() {
        (0, 0)
    } else {
        ((covered.start().0 - table.first.0) / span, (covered.end().0 - table.first.0).div_ceil(span))
    };
    let first = table.first.0;
    (from..to).map(move |i| (GfnRange::new(Gfn(first + i * span), PageCount(span)), table.entries[i as usize]))
}

/// Appends a run, as one with the last where it continues it.
pub(crate) fn push_run(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.pages.end() == run.pages.start() && last.source == run.source => {
            last.pages = GfnRange::between(last.pages.start(), run.pages.end());
        }
        _ => runs.push(run),
    }
}

/// Makes runs of one source and neighbouring frames one, whatever order they came in.
pub(crate) fn merge_runs(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.pages.start());
    let mut merged = Vec::with_capacity(runs.len());
    for run in runs {
        push_run(&mut merged, run);
    }
    merged
}

impl Source {
    /// Whether a page of this source is `store`'s page at the same place.
    pub(crate) fn is_store(self, store: crate::window::StoreId) -> bool {
        matches!(self, Self::Store { store: s, .. } if s == store)
    }
}
