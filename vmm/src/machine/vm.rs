//! The VM of a VM process: from empty and prepared to running, frozen, paused.

use super::WINDOW_BASE;
use super::floor::{Floor, Load, Unavailable};
use super::isolate::{self, IsolateError};
use super::kick::{install_handler, interrupt_thread};
use super::kvm::{self, DirtyLog, KvmError, KvmVm};
use super::mailbox::Greeting;
use super::ports::Ports;
use super::registers::{Registers, RegistersError};
use super::state::MachineState;
use super::vcpu::Vcpu;
use super::{keeper, now_ns};
use crate::layout::ram_ranges;
use crate::wire::{Activity, FromVm, Frozen, HostFeatures, Isolation, Origin, Shape, Start};
use guest_mem::window::host::{Dirty, Features, HostWindow, HugePages, MovedOut, Place, WindowError};
use guest_mem::{StoreId, Window};
use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use vmm_sys_util::errno;

/// Something that a VM process was told to do went wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum VmError {
    #[error("{0} vCPUs: the built-in guest has one")]
    VcpuCount(u8),
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
    #[error("isolation: {0}")]
    Isolate(#[from] IsolateError),
    #[error("keeper: {0}")]
    Keeper(Errno),
    #[error("thread of a vCPU: {0}")]
    Thread(io::Error),
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error("the VM was started before")]
    StartedTwice,
    #[error("the VM was not started")]
    NotStarted,
    #[error("{runs} stores and {fds} descriptors")]
    StoreCount { runs: usize, fds: usize },
    #[error("a state of {state} vCPUs for a machine of {machine}")]
    StateShape { state: usize, machine: usize },
    #[error("event page: {0}")]
    EventPage(vm_memory::GuestMemoryError),
    #[error("serial console: {0}")]
    Serial(String),
}

impl VmError {
    /// Whether the VM must not run on.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Save(_) | Self::Harvest(_) | Self::Window(WindowError::Torn { .. }))
    }
}

/// What to prepare.
#[derive(Debug)]
pub(super) struct Preparation<'a> {
    pub shape: Shape,
    pub isolation: Isolation,
    pub features: HostFeatures,
    pub cage: &'a Path,
    pub server: Pid,
}

/// A KVM VM with its window, and the threads of its vCPUs.
#[derive(Debug)]
pub(super) struct Vm {
    shape: Shape,
    traps: bool,
    tsc_khz: u64,
    kvm: KvmVm,
    window: HostWindow,
    floor: Arc<Floor>,
    threads: Vec<JoinHandle<()>>,
    keeper: Pid,
    started: bool,
}

impl Vm {
    /// Makes the VM, isolates the process, and leaves everything waiting for a [`start`](Self::start).
    ///
    /// The order: what needs `/dev` and `/proc`, then the isolation, while there is one thread, then the threads.
    pub fn prepare(preparation: &Preparation<'_>) -> Result<Self, VmError> {
        let &Preparation { shape, isolation, features, cage, server } = preparation;
        if shape.vcpus != 1 {
            return Err(VmError::VcpuCount(shape.vcpus));
        }
        let kvm = Kvm::new().map_err(VmError::OpenKvm)?;
        let ram = ram_ranges(shape.ram);
        let mut window = HostWindow::reserve(&ram, Place::Fixed(WINDOW_BASE), features_of(features))?;
        let vm = KvmVm::new(&kvm, &ram, window.base())?;
        window.vacate()?;
        let cpuid = kvm::supported_cpuid(&kvm)?;
        let mut vcpus = Vec::new();
        let mut switches = Vec::new();
        let mut tsc_khz = 0;
        for number in 0..shape.vcpus {
            let fd = vm.make_vcpu(number, &cpuid)?;
            let registers = Registers::of_fresh(&kvm, vm.fd(), &fd)?;
            // Not every host tells; the guest then knows that it does not know.
            tsc_khz = fd.get_tsc_khz().unwrap_or(0).into();
            let (vcpu, stop) = Vcpu::new(number.into(), fd, registers);
            vcpus.push(vcpu);
            switches.push(stop);
        }
        install_handler().map_err(VmError::Handler)?;
        isolate::isolate(isolation, cage)?;
        isolate::die_with(server)?;
        let keeper = keeper::start().map_err(VmError::Keeper)?;

        let floor = Arc::new(Floor::new(switches).map_err(VmError::Thread)?);
        let ports = Ports::new(Arc::clone(&floor), window.memory().clone());
        let spawn = |vcpu: Vcpu| vcpu.spawn(Arc::clone(&floor), ports.clone());
        let threads = vcpus.into_iter().map(spawn).collect::<io::Result<_>>().map_err(VmError::Thread)?;
        drop(floor.await_standing()?);
        let traps = features.userfaultfd;
        Ok(Self { shape, traps, tsc_khz, kvm: vm, window, floor, threads, keeper, started: false })
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

    /// Becomes the VM that `start` describes. The server is told when it runs, or stands.
    pub fn start(&mut self, start: Start, fds: &[OwnedFd]) -> Result<(), VmError> {
        if self.started {
            return Err(VmError::StartedTwice);
        }
        if start.stores.len() != fds.len() {
            return Err(VmError::StoreCount { runs: start.stores.len(), fds: fds.len() });
        }
        let stores: Vec<_> = start.stores.iter().copied().zip(fds.iter().map(AsFd::as_fd)).collect();
        let huge = match start.origin {
            Origin::Monitor => HugePages::Advised,
            Origin::Fork { .. } => HugePages::Never,
        };
        self.window.map(&start.runs, &stores, huge)?;
        let child = match &start.origin {
            Origin::Monitor => None,
            Origin::Fork { index, .. } => Some(*index),
        };
        let greeting =
            Greeting { identity: &start.identity, mem_pages: self.shape.ram.0, tsc_khz: self.tsc_khz, child };
        greeting.deliver(self.window.memory()).map_err(VmError::EventPage)?;
        let loads = match start.origin {
            Origin::Monitor => {
                // The first freeze takes every private page, and turns the log on: until then huge pages are worth more.
                self.kvm.set_log(DirtyLog::Off)?;
                vec![Load::Monitor; self.threads.len()]
            }
            Origin::Fork { state, .. } => self.restore(*state)?,
        };
        self.started = true;
        self.floor.start_from(loads, start.activity);
        Ok(())
    }

    fn restore(&self, state: MachineState) -> Result<Vec<Load>, VmError> {
        let (has, wants) = (state.vcpus.len(), self.threads.len());
        if has != wants {
            return Err(VmError::StateShape { state: has, machine: wants });
        }
        let mut shared = self.floor.lock();
        shared.console.load(&state.serial).map_err(VmError::Serial)?;
        shared.mailbox.load(state.mailbox);
        Ok(state.vcpus.into_iter().map(|vcpu| Load::Saved(Box::new(vcpu))).collect())
    }

    /// Has the vCPUs run or stand. The server is told when they do.
    pub fn ask(&self, activity: Activity) -> Result<(), VmError> {
        if !self.started {
            return Err(VmError::NotStarted);
        }
        self.floor.ask(activity);
        if activity == Activity::Paused {
            self.interrupt();
        }
        Ok(())
    }

    fn interrupt(&self) {
        self.threads.iter().for_each(interrupt_thread);
    }

    /// Moves all dirty private pages out and maps `file` in their place, with the vCPUs stopped. They run again at once
    /// if they ran and the host has traps; otherwise once the server says so.
    ///
    /// The registers are read by the vCPU threads while this one moves pages.
    pub fn freeze(&mut self, store: StoreId, file: BorrowedFd<'_>, max_runs: u32) -> Result<Frozen, VmError> {
        if !self.started {
            return Err(VmError::NotStarted);
        }
        let kicked_ns = now_ns();
        let before = self.floor.stop_and_save();
        self.interrupt();
        let frozen = self.freeze_standing(store, file, max_runs);
        let activity = match (&frozen, self.traps) {
            (Ok(_), false) => Activity::Paused,
            _ => before,
        };
        if !frozen.as_ref().is_err_and(VmError::is_fatal) {
            self.floor.go_on(activity);
        }
        let (moved, state) = frozen?;
        let frozen = match moved {
            Some(moved) => self.window.harvest(moved).map_err(VmError::Harvest)?,
            None => guest_mem::window::host::Frozen::default(),
        };
        let pause_ns = match activity {
            Activity::Running => Some(self.floor.await_running()?.saturating_sub(kicked_ns)),
            Activity::Paused => None,
        };
        Ok(Frozen {
            store,
            harvest: frozen.harvest,
            scratch_base: frozen.scratch_base,
            state: Box::new(state),
            activity,
            kicked_ns,
            pause_ns,
        })
    }

    fn freeze_standing(
        &mut self,
        store: StoreId,
        file: BorrowedFd<'_>,
        max_runs: u32,
    ) -> Result<(Option<MovedOut>, MachineState), VmError> {
        let shared = self.floor.await_standing()?;
        let (serial, mailbox) = (shared.console.save(), shared.mailbox.save());
        drop(shared);
        let moved = match self.kvm.log() {
            DirtyLog::Off => {
                let moved = self.window.move_out(Dirty::Every, store, file, max_runs)?;
                if let Err(error) = self.kvm.set_log(DirtyLog::On) {
                    log::warn!("the next freeze takes every private page again: {error}");
                }
                moved
            }
            DirtyLog::On => {
                let logs = self.kvm.log_of_slots()?;
                let moved = self.window.move_out(Dirty::Logged(&logs), store, file, max_runs)?;
                if let Err(error) = self.kvm.clear_log(&logs) {
                    log::warn!("the next freeze takes these pages again: {error}");
                }
                moved
            }
        };
        // The vCPU threads have read their registers meanwhile.
        let saved = self.floor.await_saved().map_err(|error| error.to_string());
        let vcpus = saved.and_then(|all| all.into_iter().collect()).map_err(VmError::Save)?;
        Ok((moved, MachineState { vcpus, serial, mailbox }))
    }

    /// The pages of the freeze into `store` have settled.
    pub fn drop_scratch(&mut self, store: StoreId) {
        self.window.drop_scratch(store);
    }
}

fn features_of(features: HostFeatures) -> Features {
    Features { userfaultfd: features.userfaultfd, pagemap_scan: features.pagemap_scan }
}
