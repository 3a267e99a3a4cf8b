//! Quotas: how many VMs there may be, how many below one that was launched, how fast guests get children, and how long a VM
//! lives.
//!
//! | quota | whose | what counts |
//! | --- | --- | --- |
//! | `serve --max-vms N` | the server's | all VMs that are listed |
//! | `launch --max-children N` | the launched VM's and that of all its descendants, in one | its descendants that are listed, whoever forked them |
//! | [`Rate`] | the same VMs', in one | children that guests ask for themselves |
//! | `--ttl DURATION` | one VM's | time since it was asked for |
//!
//! * VMs that have ended count until they are removed: they are listed, and have logs.
//! * The limit of a launched VM outlives that VM: who descends from it stays under it, and nobody starts to count anew.
//! * A request is granted whole or not at all: of a fork that asks for more than there may be, no child is made.
//! * A child ends when its parent would, unless the client that forks it says otherwise; a guest cannot. Time goes on while a
//!   VM is paused.

use crate::api::{ErrorKind, Failure};
use crate::server::Server;
use crate::server::clients::deadlines::Deadline;
use crate::server::ids::Generation;
use crate::server::registry::vm::Vm;
use crate::units::count;
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What VMs have in common with the one that was launched, from which they descend.
#[derive(Debug)]
pub struct Lineage {
    /// What that was called. Children of all of them are called after it.
    pub name: Rc<str>,
    /// How many may descend from it at a time.
    pub max_children: Option<u32>,
    /// Where the sockets of all of them are, with `{name}` for their names, if each has one.
    pub vsock: Option<PathBuf>,
    /// How many children guests have asked for lately.
    asked: RefCell<Rate>,
}

impl Lineage {
    /// That of a VM that is launched.
    pub fn new(name: &str, max_children: Option<u32>, vsock: Option<PathBuf>) -> Rc<Self> {
        Rc::new(Self { name: name.into(), max_children, vsock, asked: RefCell::default() })
    }

    /// A guest asks for so many children.
    ///
    /// # Errors
    /// Its relatives and it have asked for too many lately.
    pub fn ask(&self, children: u32, now: Instant) -> Result<(), Failure> {
        match self.asked.borrow_mut().take(children, now) {
            true => Ok(()),
            false => Err(Failure::new(
                ErrorKind::Limit,
                format!(
                    "guests of the family of {:?} have forked {BURST} times at once, and get {PER_SECOND} children a second",
                    self.name
                ),
            )),
        }
    }
}

/// Children that the guests of a family may ask for at once, and in each second where they go on asking.
const BURST: u32 = 256;
const PER_SECOND: u32 = 64;

/// How fast something happens: so much at once, and then as fast as it is forgotten.
#[derive(Debug, Default)]
struct Rate {
    /// When all is forgotten.
    until: Option<Instant>,
}

impl Rate {
    /// It is to happen so many times. Whether it may; if not, it does not count.
    fn take(&mut self, times: u32, now: Instant) -> bool {
        let each = Duration::from_secs(1) / PER_SECOND;
        let until = self.until.map_or(now, |until| until.max(now)) + each * times;
        let fits = until <= now + each * BURST;
        if fits {
            self.until = Some(until);
        }
        fits
    }
}

/// So many more are asked for where there are `there`, and may be `most`.
fn admit(most: Option<u32>, there: usize, more: usize) -> Result<(), u32> {
    match most {
        Some(most) if there.saturating_add(more) > most as usize => Err(most),
        _ => Ok(()),
    }
}

/// What is left of the time of a VM that ends then.
pub fn left_ms(expires: Option<Instant>, now: Instant) -> Option<u64> {
    expires.map(|at| at.saturating_duration_since(now).as_millis() as u64)
}

/// When a VM ends that is asked for now, with a time to live in milliseconds.
///
/// # Errors
/// It is none.
pub fn expires(ttl_ms: Option<u64>, now: Instant) -> Result<Option<Instant>, Failure> {
    match ttl_ms {
        Some(0) => Err(Failure::bad_request("a time to live of 0: at least a millisecond")),
        // Longer than a clock can count is for ever.
        ttl => Ok(ttl.and_then(|ms| now.checked_add(Duration::from_millis(ms)))),
    }
}

impl Server {
    /// Whether there may be so many VMs more: children of `parent`, or a family of their own.
    pub fn check_quotas(&self, parent: Option<Generation>, more: usize) -> Result<(), Failure> {
        let limit = |why: String| Failure::new(ErrorKind::Limit, why);
        let all = self.registry.vms.iter();
        if let Err(most) = admit(self.registry.max_vms, all.len(), more) {
            let (there, ended) = (count(all.len() as u64, "VM"), all.filter(|vm| !vm.is_alive()).count());
            return Err(limit(format!(
                "{there} ({ended} of them ended) and {more} more: this server may list {most} (serve --max-vms); `rm` makes room"
            )));
        }
        let Some(parent) = parent.and_then(|parent| self.registry.vms.get(parent)) else { return Ok(()) };
        let lineage = &parent.ancestry.lineage;
        if lineage.max_children.is_none() {
            return Ok(());
        }
        let below = |vm: &&Vm| vm.parent().is_some() && Rc::ptr_eq(&vm.ancestry.lineage, lineage);
        let there = self.registry.vms.iter().filter(below).count();
        admit(lineage.max_children, there, more).map_err(|most| {
            let first = &lineage.name;
            let why = format!("VM {:?}: {there} descend from {first:?}, and {more} more are asked for: it may have {most} (launch --max-children)", parent.name);
            limit(why).about(&parent.name)
        })
    }

    /// Has a VM end then.
    pub fn live_until(&mut self, generation: Generation, expires: Option<Instant>) {
        let (Some(at), Some(vm)) = (expires, self.registry.vms.get_mut(generation)) else { return };
        vm.expires = expires;
        self.deadlines.set_at(at, Deadline::TimeToLive(generation));
    }

    /// The time of a VM is over. Of one that had not started nothing stays, as if it had failed.
    pub fn time_is_over(&mut self, generation: Generation) {
        self.start_failed(generation, "its time to live is over");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_admitted_as_there_may_be() {
        assert_eq!(admit(None, 1_000_000, 1000), Ok(()));
        assert_eq!(admit(Some(3), 1, 2), Ok(()));
        assert_eq!(admit(Some(3), 2, 2), Err(3));
        assert_eq!(admit(Some(0), 0, 1), Err(0));
        assert_eq!(admit(Some(3), 5, 0), Err(3), "the limit is lower than what there is");
        assert_eq!(admit(Some(u32::MAX), usize::MAX, usize::MAX), Err(u32::MAX));
    }

    #[test]
    fn guests_fork_as_fast_as_the_rate_after_a_burst() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut rate = Rate::default();
        for _ in 0..4 {
            assert!(rate.take(64, now));
        }
        assert!(!rate.take(1, now), "the burst is over");
        assert!(!rate.take(65, now + second) && rate.take(64, now + second), "what is refused does not count");
        assert!(!rate.take(1, now + second));
        // What is not used for long is no more than a burst.
        assert!(!rate.take(257, now + 1000 * second) && rate.take(256, now + 1000 * second));
        // In the long run it is the rate, however the asking is spread.
        let begun = now + 2000 * second;
        let granted = (0..100_000_u32).filter(|tick| rate.take(1, begun + *tick * second / 1000)).count();
        assert!((6_400..=6_400 + 256).contains(&granted), "{granted} in 100 s");
    }

    #[test]
    fn the_rate_is_one_of_all_that_descend_from_a_vm() {
        let (lineage, now) = (Lineage::new("base", Some(4), None), Instant::now());
        let relative = Rc::clone(&lineage);
        lineage.ask(256, now).unwrap();
        let refused = relative.ask(1, now).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Limit);
        assert!(refused.message.contains("\"base\""), "{refused}");
    }

    #[test]
    fn time_to_live_by_a_clock_of_ours() {
        let now = Instant::now();
        let at = expires(Some(1500), now).unwrap();
        assert_eq!(left_ms(at, now), Some(1500));
        assert_eq!(left_ms(at, now + Duration::from_millis(1499)), Some(1));
        assert_eq!(left_ms(at, now + Duration::from_secs(2)), Some(0));
        assert_eq!((expires(None, now).unwrap(), left_ms(None, now)), (None, None));
        assert!(expires(Some(0), now).is_err());
        assert_eq!(
            expires(Some(u64::MAX), now).map(|at| at.is_some()).ok(),
            Some(now.checked_add(Duration::from_millis(u64::MAX)).is_some())
        );
    }
}
