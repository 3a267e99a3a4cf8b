//! Which stored pages are evicted next.
//!
//! By clusters, the one that got into its store first goes first: guests' access bits are not cheap to get, so age is
//! all that is known. The second chance is swap itself: a page that is needed again soon after it was evicted (a
//! *refault*) comes back young, and where refaults are many, it is passed over once.
//!
//! What only idle VMs see goes before all of it. That is known without looking: an object counts the active ones that show
//! it, a store the active objects that have pages of it, and each of these counts changes only where one becomes 0 or 1.
//!
//! A cluster is named by its store, which stays the same when objects are collapsed. An entry of the queue may be out of
//! date: it is skipped when its turn comes.

use crate::addr::PageRange;
use crate::addr::cluster::{clusters, pages_of};
use crate::ids::{Batch, StoreId};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// Evictions at least this recent are too recent, however little is left in memory.
const RECENT: u32 = 64;
/// Refaults are counted over this many evictions at a time…
const WINDOW: u32 = 64;
/// …and are many from this number on, in this window and the last.
const MANY: u32 = 32;

/// The clusters that have pages in a store, by age.
#[derive(Debug, Default)]
pub(crate) struct ReclaimQueue {
    listed: HashMap<StoreId, BTreeMap<u64, QueuePlace>>,
    /// Clusters that are listed.
    count: usize,
    queue: VecDeque<QueueEntry>,
    /// Stores of which only idle VMs see pages, and those among them that have listed clusters.
    idle: BTreeSet<StoreId>,
    idle_listed: BTreeSet<StoreId>,
    next_turn: Turn,
    /// Evictions so far, wrapping.
    batches: u32,
    /// Refaults in this window, and in the one before.
    refaults: [u32; 2],
    /// Entries that were looked at.
    #[cfg(test)]
    pub steps: u64,
}

/// A place in the queue; later ones are higher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Turn(u64);

/// A cluster's place.
#[derive(Clone, Copy, Debug)]
struct QueuePlace {
    turn: Turn,
    /// It came back soon after it was evicted, and has not been passed over yet.
    refaulted: bool,
}

#[derive(Clone, Copy, Debug)]
struct QueueEntry {
    turn: Turn,
    store: StoreId,
    cluster: u64,
}

/// Whether pages were evicted too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Return {
    /// Not long ago.
    Refault,
    /// Long ago.
    Late,
}

impl ReclaimQueue {
    /// Pages have got into their store. What is listed keeps its place.
    pub fn written_back(&mut self, store: StoreId, pages: PageRange) {
        for cluster in clusters(pages) {
            if !self.listed.get(&store).is_some_and(|listed| listed.contains_key(&cluster)) {
                self.push(store, cluster, false);
            }
        }
    }

    /// Pages of an eviction are back: their cluster is the youngest now.
    pub fn came_back(&mut self, store: StoreId, pages: PageRange, how: Return) {
        for cluster in clusters(pages) {
            self.push(store, cluster, how == Return::Refault);
        }
    }

    /// Whether an eviction was not long ago: with so much more memory as is in use now, it would not have been.
    pub fn returned(&self, batch: Batch) -> Return {
        let resident = u32::try_from(self.count).unwrap_or(u32::MAX);
        if self.batches.wrapping_sub(batch.0) <= resident.max(RECENT) { Return::Refault } else { Return::Late }
    }

    /// Pages were needed again.
    pub fn count_return(&mut self, how: Return) {
        self.refaults[0] += u32::from(how == Return::Refault);
    }

    /// A number for what is evicted now.
    pub fn next_batch(&mut self) -> Batch {
        self.batches = self.batches.wrapping_add(1);
        if self.batches.is_multiple_of(WINDOW) {
            self.refaults = [0, self.refaults[0]];
        }
        Batch(self.batches)
    }

    fn has_many_refaults(&self) -> bool {
        self.refaults[0] + self.refaults[1] > MANY
    }

    /// Where the queue ends now.
    pub fn end(&self) -> Turn {
        self.next_turn
    }

    /// Takes the oldest cluster out, if it was listed before `end`.
    pub fn take_oldest(&mut self, end: Turn) -> Option<(StoreId, PageRange)> {
        while let Some(entry) = self.queue.pop_front() {
            if entry.turn >= end {
                self.queue.push_front(entry);
                return None;
            }
            self.count_steps(1);
            let QueueEntry { store, cluster, turn } = entry;
            match self.listed.get(&store).and_then(|listed| listed.get(&cluster)) {
                Some(place) if place.turn == turn && place.refaulted && self.has_many_refaults() => {
                    self.push(store, cluster, false);
                }
                Some(place) if place.turn == turn => {
                    self.unlist(store, cluster);
                    return Some((store, pages_of(cluster)));
                }
                _ => {}
            }
        }
        None
    }

    /// Takes out some cluster that only idle VMs see, of the oldest store that has one.
    pub fn take_idle(&mut self) -> Option<(StoreId, PageRange)> {
        self.count_steps(1);
        let store = *self.idle_listed.first()?;
        let cluster = *self.listed[&store].keys().next().expect("it has listed clusters");
        self.unlist(store, cluster);
        Some((store, pages_of(cluster)))
    }

    /// Only idle VMs see pages of this store; or others do as well.
    pub fn set_idle(&mut self, store: StoreId, idle: bool) {
        if idle {
            self.idle.insert(store);
            if self.listed.contains_key(&store) {
                self.idle_listed.insert(store);
            }
        } else {
            self.idle.remove(&store);
            self.idle_listed.remove(&store);
        }
    }

    /// Whether what is known of idle stores is right: these are all there are.
    pub fn idle_is_sound(&self, idle: &BTreeSet<StoreId>) -> bool {
        let listed = self.idle.iter().filter(|store| self.listed.contains_key(store));
        self.idle == *idle && listed.eq(&self.idle_listed)
    }

    /// A cluster that was taken out was not evicted: it has its turn after all others.
    pub fn put_back(&mut self, store: StoreId, pages: PageRange) {
        clusters(pages).for_each(|cluster| self.push(store, cluster, false));
    }

    /// The store is gone.
    pub fn forget(&mut self, store: StoreId) {
        self.count -= self.listed.remove(&store).map_or(0, |listed| listed.len());
        self.set_idle(store, false);
        self.compact();
    }

    /// Whether all clusters of these pages have a turn.
    pub fn has(&self, store: StoreId, pages: PageRange) -> bool {
        self.listed.get(&store).is_some_and(|listed| clusters(pages).all(|cluster| listed.contains_key(&cluster)))
    }

    fn push(&mut self, store: StoreId, cluster: u64, refaulted: bool) {
        let turn = self.next_turn;
        self.next_turn.0 += 1;
        let before = self.listed.entry(store).or_default().insert(cluster, QueuePlace { turn, refaulted });
        self.count += usize::from(before.is_none());
        if self.idle.contains(&store) {
            self.idle_listed.insert(store);
        }
        self.queue.push_back(QueueEntry { turn, store, cluster });
        self.compact();
    }

    fn unlist(&mut self, store: StoreId, cluster: u64) {
        let listed = self.listed.get_mut(&store).expect("a listed cluster's store");
        self.count -= usize::from(listed.remove(&cluster).is_some());
        if listed.is_empty() {
            self.listed.remove(&store);
            self.idle_listed.remove(&store);
        }
    }

    fn count_steps(&mut self, _steps: usize) {
        #[cfg(test)]
        (self.steps += _steps as u64);
    }

    /// Keeps what is out of date from being most of the queue.
    fn compact(&mut self) {
        if self.queue.len() > 2 * self.count + 64 {
            self.count_steps(self.queue.len());
            let listed = &self.listed;
            let turn = |entry: &QueueEntry| listed.get(&entry.store)?.get(&entry.cluster).map(|place| place.turn);
            self.queue.retain(|entry| turn(entry) == Some(entry.turn));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::cluster::CLUSTER;
    use crate::addr::{PageCount, PageIndex};

    const STORE: StoreId = StoreId(1);

    fn pages(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageCount(count))
    }

    fn take(queue: &mut ReclaimQueue) -> Option<u64> {
        queue.take_oldest(queue.end()).map(|(_, pages)| pages.start().0 / CLUSTER.0)
    }

    #[test]
    fn the_oldest_goes_first_and_what_comes_back_is_young() {
        let mut queue = ReclaimQueue::default();
        queue.written_back(STORE, pages(0, 40));
        queue.written_back(STORE, pages(0, 64));
        assert_eq!(take(&mut queue), Some(0));
        queue.came_back(STORE, pages(3, 1), Return::Late);
        queue.came_back(STORE, pages(17, 2), Return::Late);
        assert_eq!([(); 5].map(|()| take(&mut queue)), [Some(2), Some(3), Some(0), Some(1), None]);
    }

    #[test]
    fn entries_out_of_date_do_not_pile_up() {
        let mut queue = ReclaimQueue::default();
        for _ in 0..1000 {
            queue.came_back(STORE, pages(0, 64), Return::Late);
        }
        assert!(queue.queue.len() <= 72, "{}", queue.queue.len());
        queue.forget(STORE);
        assert_eq!((queue.count, take(&mut queue)), (0, None));
    }

    /// A working set that does not fit: what has just come back is passed over once, and nothing is passed over for ever.
    #[test]
    fn many_refaults_give_a_second_chance() {
        let mut queue = ReclaimQueue::default();
        for _ in 0..=MANY {
            let batch = queue.next_batch();
            let how = queue.returned(batch);
            queue.count_return(how);
        }
        queue.came_back(STORE, pages(0, 16), Return::Refault);
        queue.written_back(STORE, pages(16, 16));
        let end = queue.end();
        assert_eq!(queue.take_oldest(end), Some((STORE, pages(16, 16))));
        assert_eq!(queue.take_oldest(end), None);
        assert_eq!(take(&mut queue), Some(0));
        for _ in 0..2 * WINDOW {
            queue.next_batch();
        }
        queue.came_back(STORE, pages(0, 16), Return::Refault);
        assert_eq!(take(&mut queue), Some(0), "few refaults");
    }
}
