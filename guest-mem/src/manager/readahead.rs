//! Pages that are brought before anybody touches them, since those before them were touched in order.

use super::{Manager, WRITEBACK_BATCH};
use crate::addr::cluster::{CLUSTER, clusters, pages_of};
use crate::addr::{Gfn, GfnRange, PageCount, PageIndex, PageRange};
use crate::ids::{StoreId, VmId};
use crate::reclaim::readahead::Streams;
use crate::reclaim::{Return, SwapIn};
use crate::store::StoreFactory;
use crate::swap::{Fetch, Swap};
use crate::window::Window;
use std::collections::VecDeque;
use std::ops::Range;

/// Clusters that are looked up for reads at a time: so many frames that lie in a row are one read.
const READS: usize = 8;

/// What is to be brought ahead of touches.
#[derive(Debug)]
pub(super) struct Readahead {
    pub(super) streams: Streams,
    /// Clusters to be brought into stores, as far as they have been read.
    bring: VecDeque<(VmId, u64)>,
    /// Clusters to be read and kept.
    read: VecDeque<(VmId, u64)>,
    /// There is room for windows of so many clusters.
    room: u64,
}

impl Default for Readahead {
    fn default() -> Self {
        Self { streams: Streams::default(), bring: VecDeque::new(), read: VecDeque::new(), room: u64::MAX }
    }
}

/// In which order pages of a cluster get into their stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SwapInOrder {
    /// Somebody waits for this page, may need no other, and is woken when it is there.
    First(WaitedPage),
    /// The same, and the page is that VM's alone, who is about to write it: it goes into its live layer.
    Live(WaitedPage),
    /// Who waits will soon need all of them.
    All,
}

/// A page in swap that a VM waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WaitedPage {
    pub vm: VmId,
    /// Where it waits.
    pub gfn: Gfn,
    /// Which page of its object it sees there.
    pub page: PageIndex,
}

/// Pages of one store that were read from swap, and where they are in the staging buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StagedPart {
    pub pages: PageRange,
    pub store: StoreId,
    pub staged: Range<usize>,
}

impl SwapInOrder {
    /// Who waits for which page, if it goes first.
    pub fn first(self) -> Option<WaitedPage> {
        match self {
            Self::First(waited) | Self::Live(waited) => Some(waited),
            Self::All => None,
        }
    }

    /// The parts of what was read in the order of `stretches`.
    pub fn parts(self, stretches: &[(PageRange, StoreId)]) -> Vec<StagedPart> {
        let mut parts = Vec::new();
        let mut from = 0;
        for &(stretch, store) in stretches {
            let first = match self.first() {
                Some(waited) => PageRange::one(waited.page).intersect(stretch),
                None => stretch,
            };
            let cuts = match first.is_empty() {
                true => [stretch, first, first],
                false => [
                    first,
                    PageRange::between(stretch.start(), first.start()),
                    PageRange::between(first.end(), stretch.end()),
                ],
            };
            for pages in cuts.into_iter().filter(|pages| !pages.is_empty()) {
                let at = from + PageRange::between(stretch.start(), pages.start()).len_bytes();
                parts.push(StagedPart { pages, store, staged: at..at + pages.len_bytes() });
            }
            from += stretch.len_bytes();
        }
        if let Some(waited) = self.first() {
            parts.sort_by_key(|part| !part.pages.contains(waited.page));
        }
        parts
    }
}

impl<S: StoreFactory, W: Window> Manager<S, W> {
    /// There is room for so many pages that nobody has asked for yet.
    pub fn set_room_ahead(&mut self, pages: PageCount) {
        self.ahead.room = pages.0 / CLUSTER.0;
        let most = usize::try_from(self.ahead.room).unwrap_or(usize::MAX);
        self.ahead.bring.truncate(most);
        self.ahead.read.truncate(most);
    }

    /// Whether pages are to be brought that nobody has asked for yet.
    pub fn has_ahead(&self) -> bool {
        !self.ahead.bring.is_empty() || !self.ahead.read.is_empty()
    }

    /// `vm` needs a page that is in swap only: notes what it will need if it goes on in order.
    pub(super) fn look_ahead(&mut self, vm: VmId, gfn: Gfn) -> SwapInOrder {
        let family = &self.family;
        let is_there = |cluster| family.swapped(vm, pages_of(cluster)).is_empty();
        let cluster = clusters(GfnRange::one(gfn)).start;
        let next = self.ahead.streams.touched(vm, cluster, self.ahead.room, is_there);
        self.factory.swap().count_hits(next.hits);
        // The first of a stream have not been read.
        let late = next.read.start..next.read.end.min(next.bring.end);
        late.clone().for_each(|cluster| self.expect(vm, cluster));
        self.ahead.bring.extend(next.bring.map(|cluster| (vm, cluster)));
        self.ahead.read.extend((late.end.max(next.read.start)..next.read.end).map(|cluster| (vm, cluster)));
        if next.in_order { SwapInOrder::All } else { SwapInOrder::First(self.waited(vm, gfn)) }
    }

    /// A page in swap that `vm` waits for.
    pub(super) fn waited(&self, vm: VmId, gfn: Gfn) -> WaitedPage {
        let page = self.family.page_at(vm, gfn).expect("a page in swap is one of a store");
        WaitedPage { vm, gfn, page }
    }

    fn expect(&mut self, vm: VmId, cluster: u64) {
        for read in self.family.swapped(vm, pages_of(cluster)) {
            let pages = self.factory.swap().expect(read.first, read.count);
            self.ahead.streams.note(vm, cluster, pages);
        }
    }

    /// Brings some pages that nobody has asked for yet, as far as they have come from the disk. Whether there is more to do
    /// at once.
    pub fn bring_ahead(&mut self) -> bool {
        let mut waits = false;
        for _ in 0..WRITEBACK_BATCH.0 / CLUSTER.0 {
            let Some(&(vm, cluster)) = self.ahead.bring.front() else { break };
            let reads = self.family.swapped(vm, pages_of(cluster));
            waits = reads.iter().any(|read| self.bring(read) == Fetch::Coming);
            if waits {
                break;
            }
            if !reads.is_empty() {
                // It may have come this far, and nobody has heard of it yet.
                self.window_do(vm, |window| window.wake(pages_of(cluster)));
            }
            self.ahead.bring.pop_front();
        }
        for _ in 0..READS {
            let Some((vm, cluster)) = self.ahead.read.pop_front() else { break };
            self.expect(vm, cluster);
        }
        (!waits && !self.ahead.bring.is_empty()) || !self.ahead.read.is_empty()
    }

    /// Where that does not work, whoever needs the pages will see.
    fn bring(&mut self, read: &SwapIn) -> Fetch {
        let buf = &mut self.staging[..read.count.bytes() as usize];
        match self.factory.swap().get_expected(read.first, buf) {
            Ok(Fetch::Coming) => return Fetch::Coming,
            Ok(Fetch::Here) => {
                if let Err(error) = self.place_read(read, SwapInOrder::All, Return::Late) {
                    log::debug!("pages that nobody has asked for: {error}");
                    self.ahead.bring.clear();
                }
            }
            Err(error) => log::debug!("pages that nobody has asked for: {error}"),
        }
        Fetch::Here
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_that_is_waited_for_goes_first() {
        let pages = |start, count| PageRange::new(PageIndex(start), PageCount(count));
        let part = |store, start: u64, count: u64, at: usize| StagedPart {
            pages: pages(start, count),
            store: StoreId(store),
            staged: at << 12..(at + count as usize) << 12,
        };
        let stretches = [(pages(16, 4), StoreId(1)), (pages(24, 4), StoreId(2))];
        assert_eq!(SwapInOrder::All.parts(&stretches), [part(1, 16, 4, 0), part(2, 24, 4, 4)]);
        let waited = WaitedPage { vm: VmId(1), gfn: Gfn(7), page: PageIndex(25) };
        let first = [part(2, 25, 1, 5), part(1, 16, 4, 0), part(2, 24, 1, 4), part(2, 26, 2, 6)];
        assert_eq!(SwapInOrder::First(waited).parts(&stretches), first);
    }
}
