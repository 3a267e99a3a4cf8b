//! What a Linux guest's machine has and the monitor's has not.

use super::chips::{self, Line};
use super::floor::Floor;
use super::kvm::KvmError;
use super::mailbox::Memory;
use super::state::LinuxState;
use crate::devices::interrupt::Interrupt;
use crate::devices::virtio::{
    Balloon, Child, ConfigChange, DEVICES, Device, Host, Kind, Noticed, Outcome, Outside, Pair, Requests, Rng, Sink,
    Transport, Vsock,
};
use crate::layout::devices::{GENERATION_IRQ, POWER_IRQ, VIRTIO_IRQ};
use crate::layout::linux::GENERATION_ID;
use crate::wire::{FromVm, Identity};
use guest_mem::GfnRange;
use kvm_ioctls::VmFd;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Something about a Linux guest's machine went wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinuxError {
    #[error("/dev/urandom: {0}")]
    Random(io::Error),
    #[error("watch sockets: {0}")]
    Sockets(io::Error),
    #[error("generation id: {0}")]
    GenerationId(GuestMemoryError),
    #[error("{0}")]
    Device(String),
    #[error("a state of {state} virtio devices for a machine of {machine}")]
    DeviceCount { state: usize, machine: usize },
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Virtio devices in the order of their addresses. The main thread takes one only while the vCPUs stand: a vCPU that
/// has one may wait in guest memory for the server.
#[derive(Debug, Default)]
pub(super) struct VirtioDevices(pub Vec<Mutex<Transport>>);

/// What the balloon gives back goes to the main thread.
#[derive(Debug)]
struct GiveBack(Arc<Floor>);

impl Sink for GiveBack {
    fn give_back(&self, pages: Vec<GfnRange>) {
        self.0.give_back(pages);
    }

    fn resized(&self, pages: u64) {
        self.0.tell(self.0.lock(), FromVm::BalloonSize { pages });
    }

    fn statistics(&self, figures: Vec<(u16, u64)>) {
        self.0.tell(self.0.lock(), FromVm::GuestStats(figures));
    }

    fn hinted(&self) {
        self.0.tell(self.0.lock(), FromVm::Hinted);
    }
}

/// What the socket device says goes to the server.
#[derive(Debug)]
struct Peer(Arc<Floor>);

impl Host for Peer {
    fn connected(&self, tag: u64, outcome: Outcome) {
        self.0.tell(self.0.lock(), FromVm::Connected { tag, outcome });
    }

    fn ask(&self, pair: Pair) {
        self.0.tell(self.0.lock(), FromVm::Connect { tag: pair.to_u64(), port: pair.host });
    }

    fn noticed(&self, noticed: Noticed) {
        self.0.tell(self.0.lock(), FromVm::Noticed(noticed));
    }
}

/// The devices beside the vCPUs.
#[derive(Debug)]
pub(super) struct LinuxMachine {
    vm: Arc<VmFd>,
    memory: Memory,
    random: File,
    virtio: Arc<VirtioDevices>,
    balloon: Arc<Requests>,
    balloon_changes: Vec<ConfigChange>,
    sockets: Arc<Outside>,
    generation: Line,
    power: Line,
}

impl LinuxMachine {
    /// The devices of a machine that has not run. The process can still open files.
    pub fn new(vm: &Arc<VmFd>, memory: &Memory, floor: &Arc<Floor>) -> Result<Self, LinuxError> {
        let random = File::open("/dev/urandom").map_err(LinuxError::Random)?;
        let balloon = Arc::new(Requests::default());
        let sockets = Arc::new(Outside::new().map_err(LinuxError::Sockets)?);
        let mut balloon_changes = Vec::new();
        let mut virtio = Vec::new();
        for (kind, number) in DEVICES.iter().zip(VIRTIO_IRQ..) {
            let device: Box<dyn Device> = match kind {
                Kind::Rng => Box::new(Rng::new(random.try_clone().map_err(LinuxError::Random)?)),
                Kind::Balloon => Box::new(Balloon::new(Box::new(GiveBack(Arc::clone(floor))), Arc::clone(&balloon))),
                Kind::Vsock => Box::new(Vsock::new(Box::new(Peer(Arc::clone(floor))), Arc::clone(&sockets))),
            };
            let line = Arc::new(Line::new(vm, number));
            let transport = Transport::new(device, line, memory.clone());
            if *kind == Kind::Balloon {
                balloon_changes.push(transport.config_change());
            }
            virtio.push(Mutex::new(transport));
        }
        Ok(Self {
            vm: Arc::clone(vm),
            memory: memory.clone(),
            random,
            virtio: Arc::new(VirtioDevices(virtio)),
            balloon,
            balloon_changes,
            sockets,
            generation: Line::new(vm, GENERATION_IRQ),
            power: Line::new(vm, POWER_IRQ),
        })
    }

    /// The virtio devices, for the vCPUs.
    pub fn virtio(&self) -> Arc<VirtioDevices> {
        Arc::clone(&self.virtio)
    }

    /// Writes a generation id that no VM ever had. The machine has not run.
    pub fn renew_generation(&mut self) -> Result<(), LinuxError> {
        let mut id = [0; 16];
        self.random.read_exact(&mut id).map_err(LinuxError::Random)?;
        self.memory.write_slice(&id, GuestAddress(GENERATION_ID)).map_err(LinuxError::GenerationId)
    }

    /// The guest, a child which has not run, is told so as soon as it does, if it has an agent.
    pub fn notify(&mut self, Identity { name, generation }: Identity) -> Result<(), LinuxError> {
        let mut entropy = [0; 32];
        self.random.read_exact(&mut entropy).map_err(LinuxError::Random)?;
        self.sockets.notify(Child { name, generation, entropy });
        Ok(())
    }

    /// Everything but the vCPUs. They stand.
    pub fn save(&self) -> Result<LinuxState, LinuxError> {
        let save = |device: &Mutex<Transport>| device.lock().unwrap_or_else(PoisonError::into_inner).save();
        Ok(LinuxState { chips: chips::save(&self.vm)?, virtio: self.virtio.0.iter().map(save).collect() })
    }

    /// Becomes the saved machine, and tells the guest that it is another one now. The vCPUs have their state, and stand.
    pub fn restore(&self, state: &LinuxState) -> Result<(), LinuxError> {
        let (has, wants) = (state.virtio.len(), self.virtio.0.len());
        if has != wants {
            return Err(LinuxError::DeviceCount { state: has, machine: wants });
        }
        for (device, saved) in self.virtio.0.iter().zip(&state.virtio) {
            device.lock().unwrap_or_else(PoisonError::into_inner).load(saved).map_err(LinuxError::Device)?;
        }
        chips::restore(&self.vm, &state.chips)?;
        self.generation.pulse();
        self.announce_ended_hinting();
        Ok(())
    }

    /// The sockets of its guest's connections.
    pub fn sockets(&self) -> &Arc<Outside> {
        &self.sockets
    }

    /// Asks the guest to have so many pages in its balloon.
    pub fn set_balloon(&self, pages: u64) {
        self.balloon.set_target(pages);
        self.announce_balloon();
    }

    /// Asks the guest how it is off for memory. A vCPU passes that on, by
    /// [`attend`](super::mmio::Mmio::attend).
    pub fn ask_statistics(&self) {
        self.balloon.ask_statistics();
    }

    /// Asks the guest to tell of its free pages, and to keep them.
    pub fn begin_hinting(&self) {
        self.balloon.begin_hinting();
        self.announce_balloon();
    }

    /// What the guest tells of from now on is too late. It does not know yet: a fork of it has to be told as well.
    pub fn end_hinting(&self) {
        self.balloon.end_hinting();
    }

    /// Has the guest look, if a hinting is over: it uses its free pages again.
    pub fn announce_ended_hinting(&self) {
        if self.balloon.take_ended_hinting() {
            self.announce_balloon();
        }
    }

    fn announce_balloon(&self) {
        self.balloon_changes.iter().for_each(ConfigChange::announce);
    }

    /// Pushes the power button.
    pub fn push_power_button(&self) {
        self.power.pulse();
    }
}
