//! The VM of a VM process: from empty and prepared to running, frozen, paused.

mod freeze;

pub(super) use freeze::Freeze;

use super::WINDOW_BASE;
use super::chips::Line;
use super::cpuid::Cpuid;
use super::facts::{Facts, Known};
use super::filter::{FilterError, Thread};
use super::floor::{Floor, Load, NextNews, Unavailable};
use super::isolate::{self, IsolateError};
use super::keeper;
use super::kick::{install_handler, interrupt_thread};
use super::kvm::{DirtyLog, KvmError, KvmVm};
use super::linux::{LinuxError, LinuxMachine};
use super::mailbox::Greeting;
use super::mmio::Mmio;
use super::ports::Ports;
use super::registers::{Registers, RegistersError};
use super::state::{LinuxState, MachineState, PackedState};
use super::touch::{Touched, Way};
use super::vcpu::{Buses, Vcpu};
use crate::api::MAX_VCPUS;
use crate::boot::linux::{self, LoadError, Plan};
use crate::devices::serial::Console;
use crate::devices::virtio::{Outcome, Pair, Wanted};
use crate::host::system_call_filter;
use crate::layout::devices::COM1_IRQ;
use crate::layout::ram_ranges;
use crate::wire::{Expect, FromVm, HostFeatures, Identity, Isolation, Machine, MachineShape, Origin, RunState, Start};
use guest_mem::window::host::{Features, HostWindow, HugePages, Place, WindowError};
use guest_mem::{Protection, Run, StoreId};
use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::unistd::Pid;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use vmm_sys_util::errno;

/// Something that a VM process was told to do went wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum VmError {
    #[error("{0:?}: the built-in guest has one vCPU, a Linux guest from 1 to {MAX_VCPUS}")]
    VcpuCount(MachineShape),
    #[error("/dev/kvm: {0}")]
    OpenKvm(errno::Error),
    #[error("signal handler: {0}")]
    Handler(errno::Error),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Window(#[from] WindowError),
    #[error("registers: {0}")]
    Registers(#[from] RegistersError),
    #[error("registers could not be read after the pages had moved: {0}")]
    Save(String),
    #[error("moved pages are lost: {0}")]
    Harvest(WindowError),
    #[error("after the pages had moved: {0}")]
    GoOn(Unavailable),
    #[error("isolation: {0}")]
    Isolate(#[from] IsolateError),
    #[error("system call filter: this kernel has none ({0}), and no guest runs without: see `offshoot doctor`")]
    NoFilter(io::Error),
    #[error("system call filter: {0}")]
    Filter(#[from] FilterError),
    #[error("keeper: {0}")]
    Keeper(Errno),
    #[error("thread of a vCPU: {0}")]
    Thread(io::Error),
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error("protect memory: {0}")]
    Protect(io::Error),
    #[error("the VM was started before")]
    StartedTwice,
    #[error("the server's socket: {0}")]
    Server(io::Error),
    #[error("the VM was not started")]
    NotStarted,
    #[error("{stores} stores and {fds} descriptors for {machine:?}")]
    DescriptorCount { stores: usize, fds: usize, machine: Machine },
    #[error("{0:?} is no start for this machine")]
    WrongMachine(Machine),
    #[error(transparent)]
    Linux(#[from] LinuxError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("no state was expected")]
    NothingExpected,
    #[error("a state that means nothing: {0}")]
    State(#[from] postcard::Error),
    #[error("a state of {state} vCPUs for a machine of {machine}")]
    StateShape { state: usize, machine: usize },
    #[error("look at pages that were copied ahead: {0}")]
    Look(vm_memory::GuestMemoryError),
    #[error("event page: {0}")]
    EventPage(vm_memory::GuestMemoryError),
    #[error("serial console: {0}")]
    Serial(String),
}

impl VmError {
    /// Whether the VM must not run on.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Save(_) | Self::Harvest(_) | Self::GoOn(_) | Self::Window(WindowError::Torn { .. }))
    }
}

/// What to prepare.
#[derive(Debug)]
pub(super) struct Preparation<'a> {
    pub shape: MachineShape,
    pub isolation: Isolation,
    pub features: HostFeatures,
    pub cage: &'a Path,
    pub server: Pid,
    /// What is known of KVM already.
    pub known: &'a Known,
}

/// A KVM VM with its window, and the threads of its vCPUs.
#[derive(Debug)]
pub(super) struct Vm {
    shape: MachineShape,
    traps: bool,
    tsc_khz: u64,
    kvm: KvmVm,
    /// The devices of a Linux guest.
    linux: Option<LinuxMachine>,
    window: HostWindow,
    floor: Arc<Floor>,
    threads: Vec<JoinHandle<()>>,
    keeper: Pid,
    /// Mappings the window may have.
    max_runs: u32,
    started: bool,
    /// The state that a fork most likely starts from.
    expected: Option<MachineState>,
    /// How pages are touched for it, and those that were.
    way: Way,
    touched: Touched,
    /// What a fork that has not got its state yet does then.
    becoming: Option<RunState>,
    /// The log has every write since the last freeze.
    log_tells_all: bool,
}

impl Vm {
    /// Makes the VM, isolates the process, and leaves everything waiting for a [`start`](Self::start).
    ///
    /// The order: what needs `/dev` and `/proc`, then the isolation, while there is one thread, then the threads.
    pub fn prepare(preparation: &Preparation<'_>) -> Result<Self, VmError> {
        let &Preparation { shape, isolation, features, cage, server, known } = preparation;
        let vcpus_max = match shape.machine {
            Machine::Monitor => 1,
            Machine::Linux => MAX_VCPUS,
        };
        if shape.vcpus == 0 || shape.vcpus > vcpus_max {
            return Err(VmError::VcpuCount(shape));
        }
        system_call_filter().map_err(VmError::NoFilter)?;
        let max_runs = known.max_runs;
        let filters = &known.filters;
        let kvm = Kvm::new().map_err(VmError::OpenKvm)?;
        let ram = ram_ranges(shape.ram);
        let reserve = || HostWindow::reserve(&ram, Place::Fixed(WINDOW_BASE), features_of(features));
        let window = isolate::without_admin(reserve)??;
        let vm = KvmVm::new(&kvm, &ram, window.base(), shape.machine)?;
        let Facts { cpuid, access } = known.facts(&kvm, shape.machine)?;
        let cpuid = Cpuid::new(&cpuid, shape);
        let way = Way::of(shape.machine, &kvm);
        let mut vcpus = Vec::new();
        let mut switches = Vec::new();
        let mut tsc_khz = 0;
        for number in 0..shape.vcpus {
            let fd = vm.make_vcpu(number, &cpuid.of_vcpu(number))?;
            let registers = Registers::of_fresh(access.clone(), &fd)?;
            // Not every host tells; the guest then knows that it does not know.
            tsc_khz = fd.get_tsc_khz().unwrap_or(0).into();
            let (vcpu, stop) = Vcpu::new(number.into(), fd, registers, (way, shape.machine));
            vcpus.push(vcpu);
            switches.push(stop);
        }
        let console = match shape.machine {
            Machine::Monitor => Console::default(),
            Machine::Linux => Console::new(Arc::new(Line::new(vm.fd(), COM1_IRQ))),
        };
        let floor = Arc::new(Floor::new(switches, console).map_err(VmError::Thread)?);
        let linux = match shape.machine {
            Machine::Monitor => None,
            Machine::Linux => Some(LinuxMachine::new(vm.fd(), window.memory(), &floor)?),
        };
        install_handler().map_err(VmError::Handler)?;
        isolate::limit(isolation, shape.vcpus, shape.ram)?;
        isolate::isolate(isolation, known.jail.unwrap_or(cage))?;
        isolate::die_with(server)?;

        let ports = Ports::new(Arc::clone(&floor), window.memory().clone(), shape.machine);
        let mmio = Mmio::new(linux.as_ref().map(LinuxMachine::virtio).unwrap_or_default());
        let buses = Buses { ports, mmio };
        let spawn = |vcpu: Vcpu| vcpu.spawn(Arc::clone(&floor), buses.clone(), Arc::clone(filters));
        let threads = vcpus.into_iter().map(spawn).collect::<io::Result<_>>().map_err(VmError::Thread)?;
        let keeper = keeper::start(server, filters.of_keeper()).map_err(VmError::Keeper)?;
        // While the vCPUs do the same. From here on a keeper that is left behind is the server's to end.
        filters.confine(Thread::Main).inspect_err(|_| keeper::end(keeper))?;
        drop(floor.await_standing()?);
        let traps = features.userfaultfd;
        Ok(Self {
            shape,
            traps,
            tsc_khz,
            kvm: vm,
            linux,
            window,
            floor,
            threads,
            keeper,
            max_runs,
            started: false,
            expected: None,
            way,
            touched: Touched::default(),
            becoming: None,
            log_tells_all: false,
        })
    }

    /// What the server is told of a prepared VM, and the descriptor that goes with it.
    pub fn ready(&self) -> (FromVm, Option<BorrowedFd<'_>>) {
        let ready = FromVm::Ready { keeper: self.keeper.as_raw(), window_base: self.window.base() };
        (ready, self.window.userfaultfd())
    }

    /// Where the main thread and the vCPUs meet.
    pub fn floor(&self) -> &Arc<Floor> {
        &self.floor
    }

    /// Maps the window that the VM will most likely start with, with copies of what it will most likely write, gives the
    /// vCPUs what they will most likely start from, and has the first of them touch the copies.
    pub fn expect(&mut self, expected: Expect, fds: &[OwnedFd]) -> Result<(), VmError> {
        if self.started {
            return Err(VmError::StartedTwice);
        }
        let Expect { runs, stores, ahead, state } = expected;
        let stores = self.named(&stores, fds)?;
        self.map(&runs, &stores, HugePages::Never)?;
        ahead.iter().for_each(|pages| self.window.copy_ahead(*pages));
        self.expected = state.map(|state| state.unpack()).transpose()?;
        let vcpus = self.expected.iter().flat_map(|state| &state.vcpus).enumerate();
        let ahead = if self.way == Way::Not || self.expected.is_none() { Vec::new() } else { ahead };
        self.touched.note(self.window.memory(), &ahead).map_err(VmError::Look)?;
        let pages = |number| if number == 0 { ahead.clone() } else { Vec::new() };
        self.floor.load(vcpus.map(|(n, vcpu)| Load::Expected(Box::new(vcpu.clone()), pages(n))).collect());
        drop(self.floor.await_standing()?);
        Ok(())
    }

    /// Maps over what was mapped before.
    fn map(&mut self, runs: &[Run], stores: &[(StoreId, BorrowedFd<'_>)], huge: HugePages) -> Result<(), VmError> {
        self.window.map(runs, stores, huge)?;
        let over = self.touched.mapped_over(runs);
        if !over.is_empty() {
            self.kvm.forget_writes(&over)?;
        }
        Ok(())
    }

    fn named<'a>(&self, stores: &[StoreId], fds: &'a [OwnedFd]) -> Result<Vec<(StoreId, BorrowedFd<'a>)>, VmError> {
        if stores.len() != fds.len() {
            let machine = self.shape.machine;
            return Err(VmError::DescriptorCount { stores: stores.len(), fds: fds.len(), machine });
        }
        Ok(stores.iter().copied().zip(fds.iter().map(AsFd::as_fd)).collect())
    }

    /// Becomes the VM that `start` describes. The server is told when it runs, or stands; a fork does so when it has its
    /// [state](Self::load).
    pub fn start(&mut self, start: Start, fds: &[OwnedFd]) -> Result<(), VmError> {
        if self.started {
            return Err(VmError::StartedTwice);
        }
        let Start { identity, runs, stores, read_only, origin, activity, ahead } = start;
        let (stores_fds, kernel) = match (&origin, fds) {
            (Origin::Linux(_), [stores @ .., kernel]) => (stores, Some(kernel)),
            _ => (fds, None),
        };
        let stores = self.named(&stores, stores_fds)?;
        let huge = match origin {
            Origin::Monitor | Origin::Linux(_) => HugePages::Advised,
            Origin::Fork { .. } => HugePages::Never,
        };
        self.map(&runs, &stores, huge)?;
        ahead.iter().for_each(|pages| self.window.copy_ahead(*pages));
        read_only.iter().try_for_each(|pages| self.protect(*pages, Protection::ReadOnly)).map_err(VmError::Protect)?;
        self.log_tells_all = matches!(origin, Origin::Fork { .. });
        if !self.log_tells_all {
            // The first freeze turns the log on, and takes every private page: until then huge pages are worth more.
            self.kvm.set_log(DirtyLog::Off)?;
        }
        self.started = true;
        match (origin, &mut self.linux, kernel) {
            (Origin::Monitor, None, _) => {
                self.greet(&identity, None)?;
                self.floor.start_from(vec![Load::Monitor; self.threads.len()], activity, NextNews::FirstSign);
            }
            (Origin::Fork { index }, None, _) => {
                self.greet(&identity, Some(index))?;
                self.becoming = Some(activity);
            }
            (Origin::Linux(plan), Some(machine), Some(kernel)) => {
                machine.renew_generation()?;
                let entry = self.load_kernel(kernel, &plan)?;
                let mut loads = vec![Load::Linux(None); self.threads.len()];
                loads[0] = Load::Linux(Some(entry));
                self.floor.start_from(loads, activity, NextNews::Unknown);
            }
            (Origin::Fork { .. }, Some(machine), _) => {
                machine.renew_generation()?;
                machine.notify(identity)?;
                self.becoming = Some(activity);
            }
            (origin, ..) => {
                let machine = if matches!(origin, Origin::Monitor) { Machine::Monitor } else { Machine::Linux };
                return Err(VmError::WrongMachine(machine));
            }
        }
        Ok(())
    }

    /// Goes on from `state`, as the fork that was [started](Self::start).
    pub fn load(&mut self, state: &PackedState) -> Result<(), VmError> {
        self.go_on_from(state.unpack()?)
    }

    /// The same, from the state that was last [expected](Self::expect).
    pub fn load_expected(&mut self) -> Result<(), VmError> {
        let state = self.expected.take().ok_or(VmError::NothingExpected)?;
        self.go_on_from(state)
    }

    fn go_on_from(&mut self, mut state: MachineState) -> Result<(), VmError> {
        self.expected = None;
        let activity = self.becoming.take().ok_or(VmError::NotStarted)?;
        match (&self.linux, state.linux.take()) {
            (None, None) => {
                let loads = self.loads(state)?;
                self.floor.start_from(loads, activity, NextNews::FirstSign);
            }
            (Some(machine), Some(beside)) => self.start_linux_fork(machine, state, &beside, activity)?,
            (Some(_), None) => return Err(VmError::WrongMachine(Machine::Monitor)),
            (None, Some(_)) => return Err(VmError::WrongMachine(Machine::Linux)),
        }
        Ok(())
    }

    fn greet(&self, identity: &Identity, child: Option<u32>) -> Result<(), VmError> {
        let greeting = Greeting { identity, mem_pages: self.shape.ram.0, tsc_khz: self.tsc_khz, child };
        greeting.deliver(self.window.memory()).map_err(VmError::EventPage)
    }

    fn load_kernel(&self, kernel: &OwnedFd, plan: &Plan) -> Result<u64, VmError> {
        let mut kernel = File::from(kernel.try_clone().map_err(VmError::Thread)?);
        Ok(linux::load(self.window.memory(), self.shape, &mut kernel, plan)?)
    }

    /// The vCPUs get their state first: what interrupts them then is not lost. Then they run.
    fn start_linux_fork(
        &self,
        machine: &LinuxMachine,
        state: MachineState,
        beside: &LinuxState,
        activity: RunState,
    ) -> Result<(), VmError> {
        self.floor.load(self.loads(state)?);
        drop(self.floor.await_standing()?);
        machine.restore(beside)?;
        // The notice of the fork, and resets of its parent's connections before it.
        self.floor.send_errand();
        self.floor.ask(activity);
        Ok(())
    }

    /// Takes over what the main thread keeps of a machine's state; gives what the vCPUs start from.
    fn loads(&self, state: MachineState) -> Result<Vec<Load>, VmError> {
        let (has, wants) = (state.vcpus.len(), self.threads.len());
        if has != wants {
            return Err(VmError::StateShape { state: has, machine: wants });
        }
        let mut shared = self.floor.lock();
        shared.console.load(&state.serial).map_err(VmError::Serial)?;
        shared.mailbox.load(state.mailbox);
        Ok(state.vcpus.into_iter().map(|vcpu| Load::Saved(Box::new(vcpu))).collect())
    }

    /// Asks the guest to power off.
    pub fn stop(&self) {
        match &self.linux {
            Some(machine) => machine.push_power_button(),
            None => {
                self.floor.lock().mailbox.stop();
                self.floor.notify();
            }
        }
    }

    /// Asks the guest to have so many pages in its balloon. The monitor is asked by lines.
    pub fn set_balloon(&self, pages: u64) {
        if let Some(machine) = &self.linux {
            machine.set_balloon(pages);
        }
    }

    /// Asks the guest how it is off for memory, as soon as it runs.
    pub fn ask_statistics(&self) {
        if let (Some(machine), true) = (&self.linux, self.started) {
            machine.ask_statistics();
            self.run_errand();
        }
    }

    /// Rings when a socket of a guest's connection is ready.
    pub fn socket_bell(&self) -> Option<RawFd> {
        self.linux.as_ref().map(|machine| machine.sockets().bell())
    }

    /// Has a vCPU see to the sockets that are ready.
    pub fn serve_sockets(&self) {
        if self.linux.as_ref().is_some_and(|machine| machine.sockets().look()) {
            self.run_errand();
        }
    }

    /// Has the guest asked for a connection to one of its ports. How that ended, where it is known at once.
    pub fn connect(&self, wanted: Wanted) -> Option<Outcome> {
        let Some(machine) = self.linux.as_ref().filter(|_| self.started) else { return Some(Outcome::Refused) };
        if !machine.sockets().connect(wanted) {
            return Some(Outcome::Full);
        }
        self.run_errand();
        None
    }

    /// The server's answer to a request of the guest's.
    pub fn answer_connect(&self, tag: u64, socket: Option<OwnedFd>) {
        if let Some(machine) = &self.linux {
            machine.sockets().answer(Pair::from_u64(tag), socket);
            self.run_errand();
        }
    }

    fn run_errand(&self) {
        self.floor.send_errand();
        self.threads.first().into_iter().for_each(interrupt_thread);
    }

    /// Asks the guest to tell of its free pages, which are gone then. It keeps them until the next freeze.
    pub fn begin_hinting(&self) {
        if let Some(machine) = &self.linux {
            machine.begin_hinting();
        }
    }

    /// Has the vCPUs run or stand. The server is told when they do.
    pub fn ask(&mut self, activity: RunState) -> Result<(), VmError> {
        if !self.started {
            return Err(VmError::NotStarted);
        }
        if let Some(becoming) = &mut self.becoming {
            *becoming = activity;
            return Ok(());
        }
        self.floor.ask(activity);
        if activity == RunState::Paused {
            self.interrupt();
        }
        Ok(())
    }

    fn interrupt(&self) {
        self.threads.iter().for_each(interrupt_thread);
    }

    fn interrupt_those(&self, vcpus: &[usize]) {
        vcpus.iter().for_each(|&number| interrupt_thread(&self.threads[number]));
    }
}

fn features_of(features: HostFeatures) -> Features {
    Features { userfaultfd: features.userfaultfd, pagemap_scan: features.pagemap_scan }
}
