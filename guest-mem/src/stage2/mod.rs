//! Stage-2 tables: which source supplies each guest frame of a VM, as a radix tree whose tables are shared.
//!
//! The tree has the shape of the hardware's (4 levels of 512 entries; tests use tiny ones) and leaves at the lower
//! three. Tables are shared as in Phillips' *shared page tables* (2002): a fork shares the whole tree by adding one to the
//! root's use count, and the first change below a shared table copies that table and nothing else. `cursor` is the only
//! code that changes one.
//!
//! The tree is the *authority on what is visible*: a page that no table shows is freed, so it is no cache that could be
//! rebuilt from the object chains afterwards. What a frame shows is found here, in as many steps as there are levels,
//! however deep the chain is that it came from. A leaf says nothing about residency: eviction and swap-in touch no table.

mod cursor;
mod entry;
mod rmap;

pub use cursor::Cursor;
pub(crate) use entry::MAX_STORES;
pub use entry::{Entry, TableId, View};
pub(crate) use rmap::TableLooks;

use crate::addr::{Gfn, GfnRange, PageCount, PageRange};
use crate::ids::Run;
use crate::space::runs::push_run;
use crate::steps::step;
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
    /// Its *use count* (Phillips 2002): entries above and VMs that point to it. Above one, nobody changes it.
    pub(crate) uses: u32,
    pub(crate) entries: Box<[Entry]>,
    /// Where runs begin, one bit for each entry: it is a table's, or says something else than the one before it goes on to say.
    /// Who lists what a table shows looks at the runs, and not at the entries.
    starts: Box<[u64]>,
}

/// Whether more than one tree leads to a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableSharing {
    Own,
    Shared,
}

impl Table {
    /// The entry behind the run that begins at, or goes on with, this one.
    fn run_end(&self, index: usize) -> usize {
        let (word, bit) = ((index + 1) / WORD, (index + 1) % WORD);
        let first = self.starts.get(word).map_or(0, |bits| bits & u64::MAX << bit);
        let rest = self.starts.iter().enumerate().skip(word + 1).map(|(word, &bits)| (word, bits));
        let next = std::iter::once((word, first)).chain(rest).find(|&(_, bits)| bits != 0);
        next.map_or(self.entries.len(), |(word, bits)| word * WORD + bits.trailing_zeros() as usize)
    }

    /// Notes whether a run begins at an entry, which may have changed, or the one before it.
    fn mark(&mut self, index: usize, span: PageCount) {
        let Some(entry) = self.entries.get(index) else { return };
        let goes_on = index > 0 && entry.continues(self.entries[index - 1], span);
        let bit = 1 << (index % WORD);
        if goes_on { self.starts[index / WORD] &= !bit } else { self.starts[index / WORD] |= bit }
    }
}

/// Bits of a word of [`Table::starts`].
const WORD: usize = u64::BITS as usize;

/// All tables of a family.
#[derive(Debug)]
pub struct Stage2 {
    shape: Shape,
    tables: slab::Slab<Table>,
}

impl Stage2 {
    /// No tables yet.
    pub fn new(shape: Shape) -> Self {
        Self { shape, tables: slab::Slab::new() }
    }

    /// The tree's dimensions.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How many tables there are.
    pub fn tables(&self) -> usize {
        self.tables.len()
    }

    /// A root that knows nothing, used once.
    pub fn new_root(&mut self) -> TableId {
        self.insert_run(self.shape.levels, Gfn(0), View::Empty)
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
        let span = self.shape.entry_span(t.level).0;
        let mut index = 0;
        while index < t.entries.len() {
            let end = t.run_end(index);
            let pages = GfnRange::from(t.first.0 + index as u64 * span..t.first.0 + end as u64 * span);
            match t.entries[index].view(pages.start()) {
                View::Empty => {}
                View::Leaf(source) => push_run(dropped, Run { pages, source }),
                View::Table(below) => self.release(below, dropped),
            }
            index = end;
        }
    }

    /// The known part of `range` as runs, in order, neighbours that continue each other as one.
    pub fn runs(&self, root: TableId, range: GfnRange) -> Vec<Run> {
        self.runs_of(root, &[range])
    }

    /// The same of many stretches: sorted, and apart from each other.
    pub fn runs_of(&self, root: TableId, all: &[GfnRange]) -> Vec<Run> {
        let mut runs = Vec::with_capacity(all.len());
        self.for_each_leaf(root, all, TableSharing::Own, &mut |run, _| push_run(&mut runs, run));
        runs
    }

    /// The leaves of `all` (sorted, apart from each other) below `table`, those that continue each other in it as one, and
    /// whether only one tree has them.
    pub(crate) fn for_each_leaf(
        &self,
        table: TableId,
        all: &[GfnRange],
        above: TableSharing,
        out: &mut dyn FnMut(Run, TableSharing),
    ) {
        let t = self.table(table);
        let sharing = if t.uses > 1 { TableSharing::Shared } else { above };
        let span = self.shape.entry_span(t.level).0;
        let end = Gfn(t.first.0 + self.shape.table_span(t.level).0);
        let (mut at, mut rest) = (t.first, all);
        while at < end {
            rest = &rest[rest.iter().take_while(|pages| pages.end() <= at || pages.is_empty()).count()..];
            let Some(next) = rest.first().filter(|pages| pages.start() < end) else { return };
            step();
            let index = (next.start().max(at).0 - t.first.0) / span;
            let run_end = t.run_end(index as usize) as u64;
            let pages = GfnRange::from(t.first.0 + index * span..t.first.0 + run_end * span);
            let touched = &rest[..rest.iter().take_while(|other| other.start() < pages.end()).count()];
            match t.entries[index as usize].view(pages.start()) {
                View::Empty => {}
                View::Leaf(source) => {
                    touched.iter().for_each(|part| out(Run { pages: pages.intersect(*part), source }, sharing));
                }
                View::Table(below) => self.for_each_leaf(below, touched, sharing, out),
            }
            at = pages.end();
        }
    }

    /// How many tables there would be if these trees shared none.
    pub(crate) fn unshared(&self, roots: impl Iterator<Item = TableId>) -> u64 {
        let mut known = HashMap::new();
        roots.map(|root| self.count_below(root, &mut known)).sum()
    }

    fn count_below(&self, table: TableId, known: &mut HashMap<TableId, u64>) -> u64 {
        if let Some(&count) = known.get(&table) {
            return count;
        }
        let below =
            entries(self.shape, self.table(table)).filter_map(|(pages, entry)| match entry.view(pages.start()) {
                View::Table(below) => Some(below),
                View::Empty | View::Leaf(_) => None,
            });
        let count = 1 + below.map(|below| self.count_below(below, known)).sum::<u64>();
        known.insert(table, count);
        count
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = TableId> {
        self.tables.iter().map(|(id, _)| TableId(id as u32))
    }

    pub(crate) fn table(&self, id: TableId) -> &Table {
        step();
        &self.tables[id.0 as usize]
    }

    fn table_mut(&mut self, id: TableId) -> &mut Table {
        &mut self.tables[id.0 as usize]
    }

    /// A table all of whose entries say together what `view`, which is no table, says.
    fn insert_run(&mut self, level: u32, first: Gfn, view: View) -> TableId {
        let (count, span) = (1 << self.shape.bits, self.shape.entry_span(level).0);
        let entries: Box<[Entry]> = (0..count).map(|i| Entry::new(view, Gfn(first.0 + i * span))).collect();
        let mut starts = vec![0; entries.len().div_ceil(WORD)];
        starts[0] = 1;
        self.insert(level, first, entries, starts.into())
    }

    fn insert(&mut self, level: u32, first: Gfn, entries: Box<[Entry]>, starts: Box<[u64]>) -> TableId {
        TableId(self.tables.insert(Table { level, first, uses: 1, entries, starts }) as u32)
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

impl Run {
    /// Which pages of its store it shows.
    pub(crate) fn indexes(self) -> Option<PageRange> {
        self.source.store().map(|(_, origin)| origin.pages(self.pages))
    }
}
