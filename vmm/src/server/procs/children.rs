//! Whose the server's children are: VM processes, their keepers and copies; and what is left of those that have ended.

use crate::server::ids::ProcessId;
use nix::unistd::Pid;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// When children are looked for that a VM process has left behind.
const STRAYS: Duration = Duration::from_millis(200);
/// How soon a memory that outlives its processes is looked at again.
const LINGER: Duration = Duration::from_millis(5);

/// The children that are known.
#[derive(Debug, Default)]
pub struct Children {
    whose: HashMap<Pid, ProcessId>,
    /// When to look for those that nobody knows.
    strays_at: Option<Instant>,
    /// VM processes that have ended, and whose memory a worker of KVM's holds on to.
    lingering: BTreeSet<ProcessId>,
}

impl Children {
    /// This child belongs to a VM process.
    pub fn adopt(&mut self, child: Pid, process: ProcessId) {
        self.whose.insert(child, process);
    }

    /// Whether it is known whose a child is.
    pub fn knows(&self, child: Pid) -> bool {
        self.whose.contains_key(&child)
    }

    /// A child has been reaped: its number may soon be another's. Whose it was.
    pub fn reaped(&mut self, child: Pid) -> Option<ProcessId> {
        self.whose.remove(&child)
    }

    /// A VM process has ended, and may have left others behind.
    pub fn may_have_strays(&mut self, now: Instant) {
        self.strays_at.get_or_insert(now + STRAYS);
    }

    /// Whether it is time to look for children that nobody knows. As long as a memory lingers, whoever has doubled itself
    /// meanwhile is still there.
    pub fn is_time_for_strays(&mut self, now: Instant) -> bool {
        let due = self.strays_at.is_some_and(|at| at <= now);
        if due {
            self.strays_at = (!self.lingering.is_empty()).then(|| now + STRAYS);
        }
        due
    }

    /// All processes of a VM process have ended, and its memory has not.
    pub fn linger(&mut self, process: ProcessId) {
        self.lingering.insert(process);
    }

    /// Its memory has, too.
    pub fn is_gone(&mut self, process: ProcessId) {
        self.lingering.remove(&process);
    }

    /// Those whose memory has not.
    pub fn lingering(&self) -> Vec<ProcessId> {
        self.lingering.iter().copied().collect()
    }

    /// When there is something to look after.
    pub fn next_look(&self, now: Instant) -> Option<Instant> {
        let lingering = (!self.lingering.is_empty()).then(|| now + LINGER);
        self.strays_at.into_iter().chain(lingering).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strays_are_looked_for_once_and_again_while_a_memory_lingers() {
        let start = Instant::now();
        let mut children = Children::default();
        assert!(!children.is_time_for_strays(start));
        children.may_have_strays(start);
        children.may_have_strays(start + STRAYS / 2);
        assert_eq!(children.next_look(start), Some(start + STRAYS), "as of the first");
        assert!(!children.is_time_for_strays(start + STRAYS / 2));
        assert!(children.is_time_for_strays(start + STRAYS));
        assert!(!children.is_time_for_strays(start + 2 * STRAYS));
        assert_eq!(children.next_look(start), None);
        children.linger(ProcessId(1));
        assert_eq!(children.next_look(start), Some(start + LINGER));
        children.may_have_strays(start);
        assert!(children.is_time_for_strays(start + STRAYS));
        assert!(children.is_time_for_strays(start + 2 * STRAYS));
        children.is_gone(ProcessId(1));
        assert!(children.is_time_for_strays(start + 3 * STRAYS), "once more");
        assert!(!children.is_time_for_strays(start + 4 * STRAYS));
    }

    #[test]
    fn a_number_that_was_reaped_is_nobodys() {
        let (mut children, pid) = (Children::default(), Pid::from_raw(7));
        children.adopt(pid, ProcessId(1));
        assert!(children.knows(pid));
        assert_eq!(children.reaped(pid), Some(ProcessId(1)));
        assert_eq!((children.knows(pid), children.reaped(pid)), (false, None));
    }
}
