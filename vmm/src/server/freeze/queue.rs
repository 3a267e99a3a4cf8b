//! The freezes of one VM: those that wait for their turn, and those that are under way.

use super::op::{FreezeAction, FreezeEvent, FreezeOp};
use crate::server::ids::ForkId;
use guest_mem::StoreId;
use std::collections::VecDeque;

/// Who wants a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// A fork, for its children.
    Fork(ForkId),
    /// Reclaim, to have the live layer in swap.
    Swap,
}

/// A freeze under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Freeze {
    purpose: Purpose,
    store: StoreId,
    op: FreezeOp,
}

/// A step of a freeze: whose, of which store, and what is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Who wanted it.
    pub purpose: Purpose,
    /// Its store.
    pub store: StoreId,
    /// What is to be done.
    pub action: FreezeAction,
    /// Whether that is all.
    pub last: Last,
}

/// Whether something is still to come of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// It is.
    No,
    /// Nothing is.
    Yes,
}

/// The freezes of a VM, in their order. There is no other before what one takes is known.
#[derive(Debug, Default)]
pub struct FreezeQueue {
    waiting: VecDeque<Purpose>,
    under_way: VecDeque<Freeze>,
}

impl FreezeQueue {
    /// Somebody wants a freeze, after all others.
    pub fn push(&mut self, purpose: Purpose) {
        self.waiting.push_back(purpose);
    }

    /// Who has the next turn, if it is now.
    pub fn turn(&self) -> Option<Purpose> {
        self.waiting.front().copied().filter(|_| self.taking().is_none())
    }

    /// Whoever has the turn needs no freeze, or gets none.
    pub fn skip(&mut self) -> Option<Purpose> {
        self.turn()?;
        self.waiting.pop_front()
    }

    /// Whoever has the turn has its freeze: the process has been told of it.
    pub fn begin(&mut self, store: StoreId) {
        let purpose = self.skip().expect("somebody has the turn");
        self.under_way.push_back(Freeze { purpose, store, op: FreezeOp::Asked });
    }

    /// The store of the freeze under way of which it is not known what it takes.
    pub fn taking(&self) -> Option<StoreId> {
        self.under_way.back().filter(|freeze| freeze.op.is_taking()).map(|freeze| freeze.store)
    }

    /// Whether no freeze waits, and of none under way it is unknown what it takes.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.taking().is_none()
    }

    /// Something has happened to the freeze with this store, or, where nobody says of which, to the one that takes. `None`
    /// where there is none.
    pub fn on(&mut self, store: Option<StoreId>, event: FreezeEvent) -> Option<Step> {
        let at = match store {
            Some(store) => self.under_way.iter().position(|freeze| freeze.store == store)?,
            None => self.under_way.len().checked_sub(1)?,
        };
        Some(self.step(at, event))
    }

    fn step(&mut self, at: usize, event: FreezeEvent) -> Step {
        let freeze = &mut self.under_way[at];
        let (purpose, store, action);
        (freeze.op, action) = freeze.op.on(event);
        (purpose, store) = (freeze.purpose, freeze.store);
        let last = if freeze.op == FreezeOp::Over { Last::Yes } else { Last::No };
        if last == Last::Yes {
            self.under_way.remove(at);
        }
        Step { purpose, store, action, last }
    }

    /// The VM has ended: what is to be done of freezes under way, and who has waited for nothing.
    pub fn died(&mut self) -> (Vec<Step>, Vec<Purpose>) {
        let steps = (0..self.under_way.len()).map(|_| self.step(0, FreezeEvent::Died)).collect();
        (steps, self.waiting.drain(..).collect())
    }
}
