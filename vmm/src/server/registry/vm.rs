//! VMs as the server lists them.

use crate::api::{VmState, VmSummary};
use crate::server::clients::connection::ClientId;
use crate::server::fork::op::ForkId;
use crate::server::freeze::queue::FreezeQueue;
use crate::server::inspect::guest_stats::GuestMemory;
use crate::server::memory::idle::IdleBalloon;
use crate::server::procs::process::ProcessId;
use crate::server::registry::names::Names;
use crate::wire::{Machine, MachineShape};
use guest_mem::{GfnRange, PAGE_SIZE, StoreId, VmId};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Names a VM of this server, and is the guest's generation id; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// Names a family of this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FamilyId(pub u64);

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

    /// What there is.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().copied().collect()
    }
}

/// Where a VM is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Launched by this client, and not at its prompt yet.
    Launching(Option<ClientId>),
    /// A child of this fork, which has not shown its first sign of life.
    Forking(ForkId),
    /// It is a VM like any other.
    Live,
    /// Its guest powered off.
    Off,
    /// Its guest reset the machine, which is not started again: memory and devices of a clone are not what it booted with.
    Rebooted,
    /// It ended otherwise.
    Dead(String),
}

/// How far a VM is kept from growing, unknown to its user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hold {
    /// It is not.
    #[default]
    Free,
    /// Its vCPUs are to stand.
    Stopping,
    /// They stand.
    Held,
    /// They are to run again.
    Releasing,
}

/// One VM.
#[derive(Debug)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// The name of the VM it was forked from.
    pub parent: Option<String>,
    /// Its number.
    pub generation: Generation,
    /// Its size.
    pub shape: MachineShape,
    /// Where it is on its way.
    pub phase: Phase,
    /// Whether its vCPUs stand still because somebody asked for it.
    pub paused: bool,
    /// Its family, and its number there; none once it has ended.
    pub memory: Option<(FamilyId, VmId)>,
    /// Its process; none once it has ended.
    pub process: Option<ProcessId>,
    /// Its freezes.
    pub freezes: FreezeQueue,
    /// Whether it was launched and has not been frozen since.
    pub fresh: bool,
    /// The store of a freeze whose pages stayed in its window, and are to leave it when they have settled.
    pub shedding: Option<StoreId>,
    /// Whether it stands still to keep the budget.
    pub hold: Hold,
    /// Clients that asked for a pause while it was let go.
    pub late_pausers: Vec<ClientId>,
    /// What it printed.
    pub log: Log,
    /// Clients that wait for answers to their lines.
    pub sends: HashMap<u64, ClientId>,
    /// Clients that wait for its end.
    pub waiters: Vec<ClientId>,
    /// Clients that wait until it stands still, or runs.
    pub pausers: Vec<ClientId>,
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
    /// What the guest said of its memory.
    pub guest_memory: Option<GuestMemory>,
}

impl Vm {
    /// What it is doing.
    pub fn state(&self) -> VmState {
        match self.phase {
            Phase::Off | Phase::Rebooted => VmState::Off,
            Phase::Dead(_) => VmState::Dead,
            _ if self.paused => VmState::Paused,
            _ => VmState::Running,
        }
    }

    /// Whether its vCPUs stand, or are about to, whoever wanted it.
    pub fn stands(&self) -> bool {
        self.paused || matches!(self.hold, Hold::Stopping | Hold::Held)
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        !matches!(self.phase, Phase::Off | Phase::Rebooted | Phase::Dead(_))
    }

    /// Its row of `ls`.
    pub fn summary(&self, pid: Option<i32>) -> VmSummary {
        VmSummary {
            name: self.name.clone(),
            parent: self.parent.clone(),
            state: self.state(),
            reason: match &self.phase {
                Phase::Dead(reason) => Some(reason.clone()),
                Phase::Rebooted => Some("the guest rebooted".into()),
                _ => None,
            },
            mem_pages: self.shape.ram.0,
            balloon_bytes: self.balloon_pages * PAGE_SIZE as u64,
            pid,
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
#[derive(Debug, Default)]
pub struct Vms {
    by_generation: BTreeMap<Generation, Vm>,
    names: Names,
    /// How many have a Linux guest.
    linux: usize,
    /// What has changed since this was last taken, in order.
    pub news: Vec<News>,
}

impl Vms {
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

    /// Their names.
    pub fn names(&self) -> &Names {
        &self.names
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
