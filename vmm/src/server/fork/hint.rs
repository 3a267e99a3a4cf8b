//! Free pages that a guest tells of before it is forked, so that they are neither copied nor shared.

use crate::server::Server;
use crate::server::clients::deadlines::Deadline;
use crate::server::freeze::queue::Purpose;
use crate::server::ids::{ForkId, Generation};
use crate::wire::ToVm;

/// Whether the guest tells of its free pages before it is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    Unasked,
    /// It is to be asked, and waited for so many milliseconds.
    Wanted(u64),
    /// It has told of so many pages.
    Asked(u64),
    Over(u64),
}

impl Server {
    /// Whether the guest is to tell of its free pages before this fork freezes it, and has not.
    pub fn asks_for_hints(&mut self, parent: Generation, fork: ForkId) -> bool {
        let Some(vm) = self.registry.vms.get(parent) else { return false };
        let can_tell = vm.can_tell() && !vm.run.is_awaited();
        let Some(op) = self.forks.get_mut(fork) else { return false };
        match op.hint {
            Hint::Wanted(_) if !can_tell => {
                op.hint = Hint::Over(0);
                false
            }
            Hint::Wanted(ms) => {
                op.hint = Hint::Asked(0);
                self.set_deadline(Some(ms), Deadline::Hint(parent, fork));
                self.tell(parent, &ToVm::HintFree);
                true
            }
            Hint::Asked(_) => true,
            Hint::Unasked | Hint::Over(_) => false,
        }
    }

    /// The fork that is the next to have this VM frozen.
    fn fork_in_turn(&self, parent: Generation) -> Option<ForkId> {
        match self.registry.vms.get(parent)?.freezes.turn()? {
            Purpose::Fork(fork) => Some(fork),
            Purpose::Swap => None,
        }
    }

    /// So many free pages have been told of, if the guest was asked.
    pub fn count_hinted(&mut self, parent: Generation, pages: u64) {
        let fork = self.fork_in_turn(parent);
        if let Some(Hint::Asked(count)) = fork.and_then(|fork| self.forks.get_mut(fork)).map(|op| &mut op.hint) {
            *count = count.saturating_add(pages);
        }
    }

    /// A guest has told of all its free pages.
    pub fn hinted(&mut self, parent: Generation) {
        if let Some(fork) = self.fork_in_turn(parent) {
            self.deadlines.met(Deadline::Hint(parent, fork));
            self.hint_late(parent, fork);
        }
    }

    /// The fork waits no longer for free pages. The guest has what it has told of back once it was frozen.
    pub fn hint_late(&mut self, parent: Generation, fork: ForkId) {
        if let Some(op) = self.forks.get_mut(fork)
            && let Hint::Asked(count) = op.hint
        {
            op.hint = Hint::Over(count);
            self.freeze(parent);
        }
    }
}
