//! Who touches memory in order that is in swap, and what is to be brought ahead of it.
//!
//! A touch of what is in memory traps nobody, so all that is known of a VM is where it finds a page missing. Who reads in
//! order finds one where that which was brought for it ends: this says that all before was used, and the next window is
//! twice as large. Who is not heard of there has its window forgotten, and starts anew wherever it touches next.
//!
//! ```text
//!   touched         brought into stores          read from the disk, and kept compressed
//!   ───────┬──────────────────────────────┬─────────────────────────────────────────────────┬───────
//!        start                           next: a touch here is the sign to go on          read_to
//! ```
//!
//! So the disk is a window ahead of the stores, and these are a window ahead of the touches. Numbers here are those of
//! clusters.

use crate::addr::PageCount;
use crate::ids::VmId;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;

/// The first window.
const FIRST: u64 = 2;
/// The largest window: 2 MiB.
const LARGEST: u64 = 32;
/// Streams of a VM that are told apart.
const STREAMS: usize = 4;

/// The streams of a family.
#[derive(Debug, Default)]
pub(crate) struct Streams(HashMap<VmId, VecDeque<TouchStream>>);

#[derive(Debug)]
struct TouchStream {
    start: u64,
    next: u64,
    read_to: u64,
    window: u64,
    /// What was read ahead, in order, and has not been used as far as we know: clusters, and pages of each.
    read: VecDeque<(u64, PageCount)>,
}

/// What follows from a touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Next {
    /// The VM touches memory in order.
    pub in_order: bool,
    /// To be brought into stores.
    pub bring: Range<u64>,
    /// To be read, and kept.
    pub read: Range<u64>,
    /// Pages that were read ahead, and were of use.
    pub hits: PageCount,
}

impl Streams {
    /// `vm` finds a page of `cluster` missing. There is room for windows of `most` clusters; `is_there` tells whether
    /// nothing of a cluster is in swap only.
    pub fn touched(&mut self, vm: VmId, cluster: u64, most: u64, is_there: impl Fn(u64) -> bool) -> Next {
        let streams = self.0.entry(vm).or_default();
        let goes_on = |stream: &TouchStream| {
            let passed = stream.next..cluster;
            (stream.start..stream.next + LARGEST).contains(&cluster) && passed.clone().all(&is_there)
        };
        let Some(at) = streams.iter().position(goes_on) else {
            streams.truncate(STREAMS - 1);
            streams.push_front(TouchStream::starting(cluster));
            return Next::default();
        };
        let mut stream = streams.remove(at).expect("its place was just found");
        let next = stream.go_on(cluster, most);
        streams.push_front(stream);
        next
    }

    /// Pages were read ahead for `vm`.
    pub fn note(&mut self, vm: VmId, cluster: u64, pages: PageCount) {
        let mut streams = self.0.get_mut(&vm).into_iter().flatten();
        if pages.0 > 0
            && let Some(stream) = streams.find(|stream| (stream.start..stream.read_to).contains(&cluster))
        {
            stream.read.push_back((cluster, pages));
        }
    }

    /// The VM is gone.
    pub fn forget(&mut self, vm: VmId) {
        self.0.remove(&vm);
    }
}

impl TouchStream {
    fn starting(cluster: u64) -> Self {
        Self { start: cluster, next: cluster + 1, read_to: cluster + 1, window: 0, read: VecDeque::new() }
    }

    fn go_on(&mut self, cluster: u64, most: u64) -> Next {
        let used = self.read.partition_point(|(read, _)| *read <= cluster);
        let hits = PageCount(self.read.drain(..used).map(|(_, pages)| pages.0).sum());
        if cluster < self.next {
            // It has caught up with what is on its way.
            return Next { in_order: self.window > 0, hits, ..Next::default() };
        }
        self.window = (self.window * 2).clamp(FIRST, LARGEST).min(most);
        self.start = cluster;
        self.next = cluster + self.window.max(1);
        let bring = cluster + 1..self.next;
        let read = self.read_to.max(cluster + 1)..self.next + (self.window * 2).min(LARGEST).min(most);
        self.read_to = self.read_to.max(read.end);
        Next { in_order: true, bring, read, hits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId(1);

    fn touch(streams: &mut Streams, cluster: u64) -> Next {
        streams.touched(VM, cluster, u64::MAX, |_| false)
    }

    #[test]
    fn windows_grow_where_each_is_used_to_its_end() {
        let mut streams = Streams::default();
        let mut at = 10;
        assert_eq!(touch(&mut streams, at), Next::default());
        at += 1;
        let mut read_to = at + 1;
        for window in [2, 4, 8, 16, 32, 32, 32] {
            let next = touch(&mut streams, at);
            let ahead = at + window + (2 * window).min(32);
            assert_eq!((next.in_order, next.bring, next.read), (true, at + 1..at + window, read_to..ahead));
            (at, read_to) = (at + window, ahead);
        }
        // Somewhere else: a new beginning.
        assert_eq!(touch(&mut streams, 1000), Next::default());
        assert_eq!(touch(&mut streams, 1001).bring, 1002..1003);
    }

    #[test]
    fn what_was_read_ahead_is_a_hit_when_it_has_been_passed() {
        let mut streams = Streams::default();
        touch(&mut streams, 0);
        let read = touch(&mut streams, 1).read;
        assert_eq!(read, 2..7);
        read.for_each(|cluster| streams.note(VM, cluster, PageCount(16)));
        streams.note(VM, 100, PageCount(16));
        let caught_up = touch(&mut streams, 2);
        assert_eq!(caught_up, Next { in_order: true, hits: PageCount(16), ..Next::default() });
        assert_eq!(touch(&mut streams, 3).hits, PageCount(16));
        assert_eq!(touch(&mut streams, 50).hits, PageCount(0), "nobody knows of the rest");
    }

    /// What is in memory is passed without a trap.
    #[test]
    fn a_stream_goes_on_behind_what_is_there() {
        let mut streams = Streams::default();
        touch(&mut streams, 0);
        assert!(!streams.touched(VM, 3, u64::MAX, |cluster| cluster == 1).in_order, "it has jumped over cluster 2");
        touch(&mut streams, 10);
        let next = streams.touched(VM, 13, u64::MAX, |cluster| [11, 12].contains(&cluster));
        assert_eq!((next.in_order, next.bring), (true, 14..15));
    }

    #[test]
    fn a_few_streams_are_told_apart_and_room_bounds_each() {
        let mut streams = Streams::default();
        for round in 0..3 {
            for stream in 0..STREAMS as u64 {
                assert_eq!(streams.touched(VM, stream * 1000 + round, 1, |_| false).in_order, round > 0);
            }
        }
        let none = streams.touched(VM, 3003, 0, |_| false);
        assert!(none.in_order && none.bring.is_empty() && none.read.is_empty(), "{none:?}");
        streams.forget(VM);
        assert!(!touch(&mut streams, 2).in_order);
    }
}
