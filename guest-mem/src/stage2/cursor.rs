//! The only writer of stage-2 tables.

use super::{Entry, Stage2, TableId, View};
use crate::addr::{Gfn, GfnRange, PageCount};
use crate::ids::{Run, Source};
use crate::space::runs::push_run;

/// Changes one VM's tree: every table it changes is that VM's alone, copied first if it was shared.
pub struct Cursor<'a> {
    stage2: &'a mut Stage2,
    root: &'a mut TableId,
}

impl<'a> Cursor<'a> {
    /// A cursor on the tree of `root`, which is replaced if it is shared and gets changed.
    pub fn new(stage2: &'a mut Stage2, root: &'a mut TableId) -> Self {
        Self { stage2, root }
    }

    /// Makes `run.source` supply `run.pages`. Appends what supplied them before to `replaced`; others may still see it.
    pub fn set(&mut self, run: Run, replaced: &mut Vec<Run>) {
        self.set_all(&[run.pages], run.source, replaced);
    }

    /// The same of many stretches: sorted, and apart from each other.
    pub fn set_all(&mut self, all: &[GfnRange], source: Source, replaced: &mut Vec<Run>) {
        self.write_all(all, View::Leaf(source), replaced);
    }

    /// Nothing is at `pages` any more.
    pub fn clear(&mut self, pages: GfnRange, replaced: &mut Vec<Run>) {
        self.write_all(&[pages], View::Empty, replaced);
    }

    /// `view` is no table.
    fn write_all(&mut self, all: &[GfnRange], view: View, replaced: &mut Vec<Run>) {
        if all.iter().any(|pages| !pages.is_empty()) {
            *self.root = self.own(*self.root);
            self.set_below(*self.root, all, view, replaced);
        }
    }

    /// Goes over the entries that `all` touches, each of which lies in this table at least in part.
    fn set_below(&mut self, table: TableId, all: &[GfnRange], new: View, replaced: &mut Vec<Run>) {
        let shape = self.stage2.shape();
        let t = self.stage2.table(table);
        let (level, first, count) = (t.level, t.first, t.entries.len() as u64);
        let span = shape.entry_span(level).0;
        let end = Gfn(first.0 + count * span);
        let (mut at, mut rest) = (first, all);
        while at < end {
            rest = &rest[rest.iter().take_while(|pages| pages.end() <= at || pages.is_empty()).count()..];
            let Some(next) = rest.first().filter(|pages| pages.start() < end) else { return };
            let index = (next.start().max(at).0 - first.0) / span;
            let pages = GfnRange::new(Gfn(first.0 + index * span), PageCount(span));
            let view = self.stage2.table(table).entries[index as usize].view(pages.start());
            if next.intersect(pages) == pages && (level <= shape.leaf_levels || new == View::Empty) {
                match view {
                    View::Empty => {}
                    View::Leaf(source) => push_run(replaced, Run { pages, source }),
                    View::Table(below) => self.stage2.release(below, replaced),
                }
                self.write(table, pages.start(), new);
            } else {
                let within = rest.partition_point(|other| other.start() < pages.end());
                self.set_in_entry(table, pages.start(), view, &rest[..within], new, replaced);
            }
            at = pages.end();
        }
    }

    /// Sets a part of what the entry at `first`, which holds `view`, covers.
    fn set_in_entry(
        &mut self,
        table: TableId,
        first: Gfn,
        view: View,
        all: &[GfnRange],
        new: View,
        replaced: &mut Vec<Run>,
    ) {
        let level = self.stage2.table(table).level;
        let below = match view {
            View::Table(below) => self.own(below),
            leaf => self.stage2.insert_run(level - 1, first, leaf),
        };
        self.write(table, first, View::Table(below));
        self.set_below(below, all, new, replaced);
        if let Some(view) = self.uniform(below)
            && (level <= self.stage2.shape().leaf_levels || view == View::Empty)
        {
            self.stage2.release(below, &mut Vec::new());
            self.write(table, first, view);
        }
    }

    /// The table itself if nobody shares it, else a copy in its place.
    fn own(&mut self, table: TableId) -> TableId {
        let t = self.stage2.table_mut(table);
        if t.uses == 1 {
            return table;
        }
        t.uses -= 1;
        let (level, first, entries, starts) = (t.level, t.first, t.entries.clone(), t.starts.clone());
        let span = self.stage2.shape().entry_span(level).0;
        for (i, entry) in entries.iter().enumerate() {
            if let View::Table(below) = entry.view(Gfn(first.0 + i as u64 * span)) {
                self.stage2.table_mut(below).uses += 1;
            }
        }
        self.stage2.insert(level, first, entries, starts)
    }

    /// What all frames below a table have in common, if they do: one source, or none.
    fn uniform(&self, table: TableId) -> Option<View> {
        let t = self.stage2.table(table);
        let view = t.entries[0].view(t.first);
        let is_uniform = !matches!(view, View::Table(_)) && t.run_end(0) == t.entries.len();
        is_uniform.then_some(view)
    }

    fn write(&mut self, table: TableId, first: Gfn, view: View) {
        let span = self.stage2.shape().entry_span(self.stage2.table(table).level);
        let t = self.stage2.table_mut(table);
        assert_eq!(t.uses, 1, "a shared table is changed by nobody");
        let index = ((first.0 - t.first.0) / span.0) as usize;
        t.entries[index] = Entry::new(view, first);
        t.mark(index, span);
        t.mark(index + 1, span);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Shape;
    use super::*;
    use crate::addr::PageOrigin;
    use crate::ids::StoreId;

    const TINY: Shape = Shape { bits: 2, levels: 3, leaf_levels: 2 };

    fn run(start: u64, count: u64, store: Option<u32>) -> Run {
        Run {
            pages: GfnRange::new(Gfn(start), PageCount(count)),
            source: store.map_or(Source::Anonymous, |s| Source::Store { store: StoreId(s), origin: PageOrigin(0) }),
        }
    }

    fn set(stage2: &mut Stage2, root: &mut TableId, r: Run) -> Vec<Run> {
        let mut replaced = Vec::new();
        Cursor::new(stage2, root).set(r, &mut replaced);
        replaced
    }

    fn at(stage2: &Stage2, root: TableId, gfn: u64) -> Source {
        stage2.runs(root, (gfn..gfn + 1).into())[0].source
    }

    /// Runs begin where each table says that they do.
    fn check_starts(s: &Stage2) {
        for table in s.ids().map(|id| s.table(id)) {
            let span = s.shape().entry_span(table.level);
            let continues = |&index: &usize| !table.entries[index].continues(table.entries[index - 1], span);
            let ends: Vec<usize> = (1..table.entries.len()).filter(continues).chain([table.entries.len()]).collect();
            let told = std::iter::successors(Some(table.run_end(0)), |&at| {
                (at < table.entries.len()).then(|| table.run_end(at))
            });
            assert_eq!(told.collect::<Vec<_>>(), ends);
        }
    }

    /// Every sequence of three sets on two sharing trees, against an array of sources each.
    #[test]
    fn every_short_sequence_of_changes_to_shared_trees() {
        let ranges: Vec<(u64, u64)> = vec![(0, 64), (0, 16), (4, 4), (5, 1), (3, 6), (15, 34)];
        let choices: Vec<(usize, usize)> = (0..2).flat_map(|vm| (0..ranges.len()).map(move |r| (vm, r))).collect();
        for &a in &choices {
            for &b in &choices {
                for &c in &choices {
                    let mut s = Stage2::new(TINY);
                    let mut first = s.new_root();
                    set(&mut s, &mut first, run(0, 64, None));
                    let mut roots = [first, s.share(first)];
                    let mut model = [[None; 64]; 2];
                    for (step, (vm, r)) in [a, b, c].into_iter().enumerate() {
                        let (start, count) = ranges[r];
                        let store = Some(step as u32);
                        let replaced = set(&mut s, &mut roots[vm], run(start, count, store));
                        let total: u64 = replaced.iter().map(|r| r.pages.count().0).sum();
                        assert!(total <= count);
                        model[vm][start as usize..(start + count) as usize].fill(store);
                        for vm in 0..2 {
                            for g in 0..64u64 {
                                let want = run(g, 1, model[vm][g as usize]).source;
                                assert_eq!(at(&s, roots[vm], g), want);
                            }
                            let all = s.runs(roots[vm], GfnRange::between(Gfn(0), Gfn(64)));
                            assert_eq!(all.iter().map(|r| r.pages.count().0).sum::<u64>(), 64);
                            assert!(all.windows(2).all(|w| w[0].source != w[1].source));
                        }
                        check_starts(&s);
                    }
                    let mut dropped = Vec::new();
                    s.release(roots[0], &mut dropped);
                    s.release(roots[1], &mut dropped);
                    assert_eq!(s.tables(), 0);
                }
            }
        }
    }

    /// What is cleared is known no more, of this VM alone, and tables that know nothing go.
    #[test]
    fn what_is_cleared_takes_no_tables() {
        let mut s = Stage2::new(TINY);
        let mut parent = s.new_root();
        set(&mut s, &mut parent, run(0, 64, Some(1)));
        let mut child = s.share(parent);
        let mut replaced = Vec::new();
        Cursor::new(&mut s, &mut child).clear((3..9).into(), &mut replaced);
        assert_eq!(replaced, [run(3, 6, Some(1))]);
        assert_eq!(s.runs(child, (0..64).into()), [run(0, 3, Some(1)), run(9, 55, Some(1))]);
        assert_eq!(s.runs(parent, (0..64).into()), [run(0, 64, Some(1))]);
        check_starts(&s);
        Cursor::new(&mut s, &mut child).clear((0..64).into(), &mut Vec::new());
        assert_eq!(s.runs(child, (0..64).into()), []);
        set(&mut s, &mut child, run(20, 1, Some(2)));
        Cursor::new(&mut s, &mut child).clear((20..21).into(), &mut Vec::new());
        assert_eq!(s.tables(), 1 + 1 + 4, "a root of its own, beside that of the parent and its tables");
        check_starts(&s);
    }

    #[test]
    fn a_fork_shares_every_table_and_a_change_copies_one_path() {
        let mut s = Stage2::new(Shape::X86_64);
        let mut parent = s.new_root();
        set(&mut s, &mut parent, run(0, 1 << 20, None));
        assert_eq!(s.tables(), 2, "4 GiB of one source are four big leaves below a root");
        for i in 0..512 {
            set(&mut s, &mut parent, run(i * 513, 1, Some(1)));
        }
        let tables = s.tables();
        let mut child = s.share(parent);
        assert_eq!(s.tables(), tables);
        set(&mut s, &mut child, run(7, 1, Some(2)));
        assert_eq!(s.tables(), tables + 4);
        assert_eq!(at(&s, parent, 7), Source::Anonymous);
    }

    #[test]
    fn a_table_whose_leaves_continue_each_other_becomes_a_big_leaf() {
        let mut s = Stage2::new(TINY);
        let mut root = s.new_root();
        set(&mut s, &mut root, run(0, 64, None));
        for g in 0..4 {
            set(&mut s, &mut root, run(g, 1, Some(9)));
        }
        assert_eq!(s.tables(), 5, "a root and four tables below it, all of big leaves");
        assert_eq!(at(&s, root, 3), run(0, 1, Some(9)).source);
    }
}
