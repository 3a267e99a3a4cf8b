//! VMs as the server lists them.

use crate::api::{AgentNotice, VmState, VmSummary};
use crate::server::freeze::queue::FreezeQueue;
use crate::server::guest::idle::IdleBalloon;
use crate::server::guest::stats::GuestMemory;
use crate::server::ids::{ClientId, FamilyId, Generation, ProcessId};
use crate::server::registry::names::Names;
use crate::server::registry::phase::Phase;
use crate::server::registry::quota::{Lineage, left_ms};
use crate::server::registry::run::RunOrder;
use crate::wire::{Machine, MachineShape};
use guest_mem::{GfnRange, PAGE_SIZE, StoreId, VmId};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Bytes of console output kept per VM.
const LOG_MAX: usize = 1 << 20;

/// What a guest printed, the last of it.
#[derive(Debug, Default)]
pub struct Log(VecDeque<u8>);

impl Log {
    /// Appends; the oldest goes where it grows too long.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let excess = self.0.len().saturating_sub(LOG_MAX);
        self.0.drain(..excess);
    }

    /// What there is, or only so many of its last lines.
    pub fn tail(&self, lines: Option<u64>) -> Vec<u8> {
        let all = || self.0.iter().copied();
        let Some(lines) = lines else { return all().collect() };
        // The end of the last line ends no line before it.
        let ended = usize::from(self.0.back() == Some(&b'\n'));
        let ends = self.0.iter().enumerate().rev().skip(ended).filter(|(_, byte)| **byte == b'\n');
        let start = match lines {
            0 => self.0.len(),
            _ => ends.skip((lines - 1).try_into().unwrap_or(usize::MAX)).map(|(at, _)| at + 1).next().unwrap_or(0),
        };
        all().skip(start).collect()
    }
}

/// Whom a VM descends from.
#[derive(Clone, Debug)]
pub struct Ancestry {
    /// The VM it was forked from, and what that was called: it may be gone by now, and another one be called so.
    pub parent: Option<(Generation, String)>,
    /// What it has in common with all that descend from the same launched VM.
    pub lineage: Rc<Lineage>,
}

impl Ancestry {
    /// Of a VM that is launched.
    pub fn none(lineage: Rc<Lineage>) -> Self {
        Self { parent: None, lineage }
    }

    /// Of a child of this VM.
    pub fn below(vm: &Vm) -> Self {
        let lineage = Rc::clone(&vm.ancestry.lineage);
        Self { parent: Some((vm.generation, vm.name.clone())), lineage }
    }
}

/// One VM.
#[derive(Debug)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Whom it descends from.
    pub ancestry: Ancestry,
    /// Its number.
    pub generation: Generation,
    /// Its size.
    pub shape: MachineShape,
    /// Where it is on its way.
    pub phase: Phase,
    /// Whether its vCPUs are to run.
    pub run: RunOrder,
    /// Its family, and its number there; none once it has ended.
    pub memory: Option<(FamilyId, VmId)>,
    /// Its process; none once it has ended.
    pub process: Option<ProcessId>,
    /// Its freezes.
    pub freezes: FreezeQueue,
    /// Whether it was launched and has not been frozen since.
    pub fresh: bool,
    /// The store of a freeze whose pages stayed in its window, and are to leave it when they have settled.
    pub deduping: Option<StoreId>,
    /// What it printed.
    pub log: Log,
    /// Clients that wait for answers to their lines.
    pub sends: HashMap<u64, ClientId>,
    /// Clients that wait for its end.
    pub waiters: Vec<ClientId>,
    /// Clients that see its console.
    pub viewers: Vec<ClientId>,
    /// Whether it is removed when it is off.
    pub remove_when_off: bool,
    /// Pages in the guest's balloon, as it says.
    pub balloon_pages: u64,
    /// Pages that are to be there as its user has it.
    pub asked_balloon: u64,
    /// What the policy for idle VMs has made of that.
    pub idle: IdleBalloon,
    /// Traps served.
    pub traps: u64,
    /// The VM that it was forked from, and the pages of which it had copies when it began.
    pub born: Option<(Generation, Vec<GfnRange>)>,
    /// When it was asked for, where it was forked, in nanoseconds of the monotonic clock.
    pub forked_ns: Option<u64>,
    /// What came of the notice of that which its agent was given.
    pub agent: Option<AgentNotice>,
    /// What the guest said of its memory.
    pub guest_memory: Option<GuestMemory>,
    /// When the server ends it.
    pub expires: Option<Instant>,
}

impl Vm {
    /// What it is doing.
    pub fn state(&self) -> VmState {
        match self.phase {
            Phase::Off | Phase::Rebooted => VmState::Off,
            Phase::Dead(_) => VmState::Dead,
            _ if self.run.is_paused() => VmState::Paused,
            _ => VmState::Running,
        }
    }

    /// Whether its vCPUs stand, or are about to, whoever wanted it.
    pub fn stands(&self) -> bool {
        self.run.stands()
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        self.phase.is_alive()
    }

    /// Whether its guest's balloon driver would answer: it has told of itself once, and its vCPUs run.
    pub fn can_tell(&self) -> bool {
        self.is_alive() && !self.stands() && self.guest_memory.is_some()
    }

    /// The VM it was forked from.
    pub fn parent(&self) -> Option<Generation> {
        self.ancestry.parent.as_ref().map(|(parent, _)| *parent)
    }

    fn summary(&self, pid: Option<i32>, parent_is_gone: bool) -> VmSummary {
        VmSummary {
            name: self.name.clone(),
            id: self.generation.0,
            parent: self.ancestry.parent.as_ref().map(|(_, name)| name.clone()),
            parent_id: self.parent().map(|parent| parent.0),
            parent_is_gone,
            state: self.state(),
            reason: match &self.phase {
                Phase::Dead(reason) => Some(reason.clone()),
                Phase::Rebooted => Some("the guest rebooted".into()),
                _ => None,
            },
            mem_pages: self.shape.ram.0,
            balloon_bytes: self.balloon_pages * PAGE_SIZE as u64,
            pid,
            ttl_ms: left_ms(self.expires.filter(|_| self.is_alive()), Instant::now()),
            max_children: self.ancestry.lineage.max_children,
        }
    }
}

/// A change of the list of VMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// This name is there from now on.
    Came(String),
    /// It is not.
    Went(String),
}

/// All VMs, oldest first.
#[derive(Debug)]
pub struct Vms {
    by_generation: BTreeMap<Generation, Vm>,
    /// What the next VM is called among all that there ever are on this host.
    next: Generation,
    names: Names,
    next_family: FamilyId,
    /// What the next line for a guest is called. A child may answer a line that its parent was told.
    next_tag: u64,
    /// How many have a Linux guest.
    linux: usize,
    /// What has changed since this was last taken, in order.
    pub news: Vec<News>,
}

impl Default for Vms {
    /// Counts from the microsecond it is: an earlier server cannot have come so far, as none launches a VM in each.
    fn default() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let next = Generation(now.as_micros() as u64);
        Self {
            by_generation: BTreeMap::new(),
            next,
            next_family: FamilyId(1),
            next_tag: 1,
            names: Names::default(),
            linux: 0,
            news: Vec::new(),
        }
    }
}

impl Vms {
    /// A number that no other VM has, had or will have.
    pub fn fresh_generation(&mut self) -> Generation {
        let fresh = self.next;
        self.next.0 += 1;
        fresh
    }

    /// A name that no other family of this server has had.
    pub fn fresh_family(&mut self) -> FamilyId {
        let fresh = self.next_family;
        self.next_family.0 += 1;
        fresh
    }

    /// A tag that no other line for a guest has had.
    pub fn fresh_tag(&mut self) -> u64 {
        let fresh = self.next_tag;
        self.next_tag += 1;
        fresh
    }

    /// So many names `PREFIX-N` for VMs that are to come, which nobody has or had.
    pub fn draw_names(&mut self, prefix: &str, count: usize) -> Vec<String> {
        self.names.draw(prefix, count)
    }

    /// A VM's row of `ls`, with its process, if it has one.
    pub fn summary(&self, vm: &Vm, pid: Option<i32>) -> VmSummary {
        vm.summary(pid, vm.parent().is_some_and(|parent| self.get(parent).is_none()))
    }

    /// Adds a VM under its name, which is free.
    pub fn insert(&mut self, vm: Vm) {
        assert!(self.names.take(&vm.name, vm.generation), "names are unique");
        self.news.push(News::Came(vm.name.clone()));
        self.linux += usize::from(vm.shape.machine == Machine::Linux);
        self.by_generation.insert(vm.generation, vm);
    }

    /// Forgets a VM.
    pub fn remove(&mut self, generation: Generation) -> Option<Vm> {
        let vm = self.by_generation.remove(&generation)?;
        self.names.free(&vm.name);
        self.linux -= usize::from(vm.shape.machine == Machine::Linux);
        self.news.push(News::Went(vm.name.clone()));
        Some(vm)
    }

    /// Whether any has a Linux guest.
    pub fn any_linux(&self) -> bool {
        self.linux > 0
    }

    /// The VM of a name.
    pub fn find(&self, name: &str) -> Option<&Vm> {
        self.names.whose(name).and_then(|generation| self.by_generation.get(&generation))
    }

    /// A VM, if it is still listed.
    pub fn get(&self, generation: Generation) -> Option<&Vm> {
        self.by_generation.get(&generation)
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, generation: Generation) -> Option<&mut Vm> {
        self.by_generation.get_mut(&generation)
    }

    /// All of them, oldest first.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Vm> {
        self.by_generation.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_log() {
        let tail = |text: &str, lines| {
            let mut log = Log::default();
            log.push(text.as_bytes());
            String::from_utf8(log.tail(lines)).unwrap()
        };
        assert_eq!(tail("a\nb\nc\n", None), "a\nb\nc\n");
        for (text, lines, last) in [
            ("a\nb\nc\n", 0, ""),
            ("a\nb\nc\n", 1, "c\n"),
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc\n", 3, "a\nb\nc\n"),
            ("a\nb\nc\n", u64::MAX, "a\nb\nc\n"),
            ("a\nb", 1, "b"),
            ("\n\n", 1, "\n"),
            ("", 1, ""),
        ] {
            assert_eq!(tail(text, Some(lines)), last, "{lines} of {text:?}");
        }
    }

    #[test]
    fn no_server_gives_an_id_that_an_earlier_one_gave() {
        let mut earlier = Vms::default();
        let ids = [earlier.fresh_generation(), earlier.fresh_generation()];
        std::thread::sleep(std::time::Duration::from_millis(1));
        let later = Vms::default().fresh_generation();
        assert!(ids[0] < ids[1] && ids[1] < later, "{ids:?} {later:?}");
        assert!(later.0 < 1 << 53, "programs that read JSON keep numbers in doubles");
    }
}
