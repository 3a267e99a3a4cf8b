//! A request to take memory out, as a value: what it wants next, and what it has had.
//!
//! First frozen pages go, of one family after the other; then live layers, of one VM after the other, those that stand still
//! first and of these the largest. Whoever waits for something holds up no other request.

use super::reclaim::EvictedPages;
use crate::api::Reclaimed;
use crate::server::aside::Ticket;
use crate::server::ids::{ClientId, FamilyId, Generation};
use guest_mem::{PAGE_SIZE, PageCount};
use std::collections::BTreeSet;

/// A request under way.
#[derive(Debug)]
pub struct ReclaimRequest {
    /// Who has asked.
    pub client: ClientId,
    /// The one family whose memory it is about.
    pub only: Option<FamilyId>,
    requested: u64,
    wanted: PageCount,
    taken: PageCount,
    /// Families that may have frozen pages in memory.
    left: Vec<FamilyId>,
    /// VMs whose live layers it has taken.
    frozen: BTreeSet<Generation>,
    /// The one whose live layer it takes now.
    freezing: Option<Generation>,
    layers: Layers,
    swap: Room,
}

/// Whether there is room in swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Some,
    None,
}

/// What a request knows of live layers that it may take.
#[derive(Debug, Default)]
enum Layers {
    /// Nothing.
    #[default]
    Unknown,
    /// These are to be asked about.
    ToAsk { left: Vec<Generation>, sizes: Vec<LayerSize> },
    /// Some have been, and others are to be.
    Asked { ticket: Option<Ticket>, left: Vec<Generation>, sizes: Vec<LayerSize> },
    /// All that were not empty; the next one is the last.
    Known(Vec<LayerSize>),
    /// There are none.
    Nobodys,
}

/// A live layer: whether its VM stands still, its pages, and whose it is. The larger, the sooner it goes.
pub type LayerSize = (bool, u64, Generation);

/// VMs whose live layers are asked for at a time.
const ASKED: usize = 64;

/// What a request wants next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Frozen pages of this family evicted, so many at most.
    Evict(FamilyId, PageCount),
    /// To know which VMs could give their live layers,
    AskWho,
    /// and how large these are.
    AskSizes(Vec<Generation>),
    /// This VM's live layer moved out.
    Freeze(Generation),
    /// What comes by itself.
    Wait,
    /// Nothing more.
    Done,
}

/// Whether frozen pages of a family are still on their way to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    None,
    Some,
}

impl ReclaimRequest {
    /// A request for so many bytes of these families, and of live layers, of `only` one family where that is said.
    pub fn new(client: ClientId, only: Option<FamilyId>, bytes: u64, families: Vec<FamilyId>) -> Self {
        Self {
            client,
            only,
            requested: bytes,
            wanted: PageCount(bytes.div_ceil(PAGE_SIZE as u64)),
            taken: PageCount(0),
            left: families,
            frozen: BTreeSet::new(),
            freezing: None,
            layers: Layers::Unknown,
            swap: Room::Some,
        }
    }

    /// What it wants next. `is_going` tells of a VM whether its live layer is on its way to swap.
    pub fn next(&mut self, is_going: impl Fn(Generation) -> bool) -> Next {
        if self.taken >= self.wanted {
            return Next::Done;
        }
        if let Some(&family) = self.left.last() {
            return Next::Evict(family, PageCount(self.wanted.0 - self.taken.0));
        }
        if self.freezing.is_some_and(is_going) {
            return Next::Wait;
        }
        self.freezing = None;
        // In a full swap there is no room for what is not in stores yet either.
        if self.swap == Room::None {
            return Next::Done;
        }
        match std::mem::take(&mut self.layers) {
            Layers::Unknown => Next::AskWho,
            Layers::ToAsk { mut left, sizes } => {
                let some = left.split_off(left.len().saturating_sub(ASKED));
                self.layers = Layers::Asked { ticket: None, left, sizes };
                Next::AskSizes(some)
            }
            asked @ Layers::Asked { .. } => {
                self.layers = asked;
                Next::Wait
            }
            Layers::Known(mut sizes) => {
                let Some((_, _, vm)) = sizes.pop() else { return Next::Done };
                // When all have given theirs, others may have something.
                self.layers = if sizes.is_empty() { Layers::Unknown } else { Layers::Known(sizes) };
                self.frozen.insert(vm);
                Next::Freeze(vm)
            }
            Layers::Nobodys => Next::Done,
        }
    }

    /// So many pages of the family in turn have been evicted, and no more for this reason. Whether it wants more at once.
    pub fn evicted(&mut self, pages: PageCount, end: EvictedPages, in_flight: InFlight) -> bool {
        self.taken.0 += pages.0;
        match (end, in_flight) {
            (EvictedPages::Some, _) => return true,
            (EvictedPages::Behind, _) => return false,
            // What has not settled yet can be evicted when it has.
            (EvictedPages::All, InFlight::Some) => return false,
            (EvictedPages::All, InFlight::None) => {}
            (EvictedPages::Full | EvictedPages::Failing, _) => self.swap = Room::None,
        }
        self.left.pop();
        true
    }

    /// These VMs could give their live layers.
    pub fn could_give(&mut self, vms: impl Iterator<Item = Generation>) {
        let left: Vec<Generation> = vms.filter(|vm| !self.frozen.contains(vm)).collect();
        self.layers = if left.is_empty() { Layers::Nobodys } else { Layers::ToAsk { left, sizes: Vec::new() } };
    }

    /// Their sizes will come with this ticket.
    pub fn asked(&mut self, of: Ticket) {
        if let Layers::Asked { ticket, .. } = &mut self.layers {
            *ticket = Some(of);
        }
    }

    /// Whether it has asked this.
    pub fn has_asked(&self, of: Ticket) -> bool {
        matches!(self.layers, Layers::Asked { ticket, .. } if ticket == Some(of))
    }

    /// The sizes that it has asked for.
    pub fn sizes_came(&mut self, some: impl Iterator<Item = LayerSize>) {
        if let Layers::Asked { left, mut sizes, .. } = std::mem::take(&mut self.layers) {
            sizes.extend(some.filter(|(_, pages, _)| *pages > 0));
            self.layers = if left.is_empty() {
                sizes.sort_unstable();
                Layers::Known(sizes)
            } else {
                Layers::ToAsk { left, sizes }
            };
        }
    }

    /// The live layer that it wanted is on its way.
    pub fn takes(&mut self, vm: Generation) {
        self.freezing = Some(vm);
    }

    /// Whether it takes this VM's live layer.
    pub fn is_taking(&self, vm: Generation) -> bool {
        self.freezing == Some(vm)
    }

    /// The live layer that it has taken is where it belongs, and so much of it is in swap. What swap did not take at once, it
    /// may take now.
    pub fn took(&mut self, swapped: PageCount, rest_in: Option<FamilyId>) {
        self.taken.0 += swapped.0;
        self.left.extend(rest_in.filter(|family| !self.left.contains(family)));
    }

    /// What its client is told when it is done.
    pub fn answer(&self) -> Reclaimed {
        Reclaimed { requested_bytes: self.requested, reclaimed_bytes: self.taken.bytes() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: FamilyId = FamilyId(1);
    const B: FamilyId = FamilyId(2);
    const PAGE: u64 = PAGE_SIZE as u64;

    fn request(pages: u64, families: &[FamilyId]) -> ReclaimRequest {
        ReclaimRequest::new(ClientId(1), None, pages * PAGE, families.to_vec())
    }

    fn next(request: &mut ReclaimRequest) -> Next {
        request.next(|_| false)
    }

    #[test]
    fn frozen_pages_go_first_and_no_more_than_wanted() {
        let mut request = request(10, &[A, B]);
        assert_eq!(next(&mut request), Next::Evict(B, PageCount(10)));
        assert!(request.evicted(PageCount(4), EvictedPages::Some, InFlight::None));
        assert_eq!(next(&mut request), Next::Evict(B, PageCount(6)));
        assert!(request.evicted(PageCount(1), EvictedPages::All, InFlight::None));
        assert_eq!(next(&mut request), Next::Evict(A, PageCount(5)));
        assert!(request.evicted(PageCount(5), EvictedPages::Some, InFlight::None));
        assert_eq!(next(&mut request), Next::Done);
        assert_eq!((request.answer().requested_bytes, request.answer().reclaimed_bytes), (10 * PAGE, 10 * PAGE));
    }

    #[test]
    fn what_is_on_its_way_and_a_disk_that_is_behind_are_waited_for() {
        let mut request = request(10, &[A]);
        assert!(!request.evicted(PageCount(1), EvictedPages::All, InFlight::Some));
        assert!(!request.evicted(PageCount(1), EvictedPages::Behind, InFlight::None));
        assert_eq!(next(&mut request), Next::Evict(A, PageCount(8)), "the same again");
        assert!(request.evicted(PageCount(0), EvictedPages::Full, InFlight::None));
        assert_eq!(next(&mut request), Next::Done, "nothing else has room either");
    }

    #[test]
    fn live_layers_go_one_after_the_other_the_largest_that_stands_first() {
        let mut request = request(100, &[]);
        assert_eq!(next(&mut request), Next::AskWho);
        request.could_give((1..=3).map(Generation));
        assert_eq!(next(&mut request), Next::AskSizes((1..=3).map(Generation).collect()));
        assert_eq!(next(&mut request), Next::Wait);
        request
            .sizes_came([(false, 50, Generation(1)), (true, 5, Generation(2)), (false, 0, Generation(3))].into_iter());
        assert_eq!(next(&mut request), Next::Freeze(Generation(2)));
        request.takes(Generation(2));
        assert_eq!(request.next(|vm| vm == Generation(2)), Next::Wait);
        assert!(request.is_taking(Generation(2)));
        request.took(PageCount(3), Some(A));
        assert_eq!(request.next(|_| false), Next::Evict(A, PageCount(97)), "what swap did not take at once");
        assert!(request.evicted(PageCount(2), EvictedPages::All, InFlight::None));
        assert_eq!(next(&mut request), Next::Freeze(Generation(1)));
        // Its VM has ended meanwhile, or cannot be frozen: the next, and those that have come since.
        assert_eq!(next(&mut request), Next::AskWho);
        request.could_give([1, 2].into_iter().map(Generation));
        assert_eq!(next(&mut request), Next::Done, "each gives once");
        assert_eq!(request.answer().reclaimed_bytes, 5 * PAGE);
    }

    #[test]
    fn many_layers_are_asked_for_some_at_a_time() {
        let mut request = request(100, &[]);
        assert_eq!(next(&mut request), Next::AskWho);
        request.could_give((0..100).map(Generation));
        let mut asked = 0;
        while let Next::AskSizes(some) = next(&mut request) {
            assert!(some.len() <= ASKED);
            asked += some.len();
            request.sizes_came(some.into_iter().map(|vm| (false, 1, vm)));
        }
        assert_eq!(asked, 100);
    }
}
