//! A machine that stands still, as plain data.

use crate::devices::{serial, virtio};
use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Everything of a VM but its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Its vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// The serial console.
    pub serial: serial::State,
    /// What is under way between the monitor and the server.
    pub mailbox: MailboxState,
    /// What only a Linux guest's machine has.
    pub linux: Option<LinuxState>,
}

/// A [`MachineState`] on its way from a VM to its children: the server passes it on, and does not look into it.
#[derive(Clone, PartialEq, Eq)]
pub struct PackedState(Vec<u8>);

impl PackedState {
    /// Packs a state.
    pub fn pack(state: &MachineState) -> Self {
        Self(postcard::to_allocvec(state).expect("plain data can be encoded"))
    }

    /// What is in it.
    ///
    /// # Errors
    /// It is no state: a VM process is broken or hostile.
    pub fn unpack(&self) -> Result<MachineState, postcard::Error> {
        postcard::from_bytes(&self.0)
    }
}

impl std::fmt::Debug for PackedState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedState({} bytes)", self.0.len())
    }
}

// As bytes, and not one by one.
impl Serialize for PackedState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for PackedState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = PackedState;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<PackedState, E> {
                Ok(PackedState(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

/// The parts of a Linux guest's machine that are not a vCPU's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LinuxState {
    /// Its interrupt controllers, timer and clock.
    pub chips: ChipsState,
    /// Its virtio devices, in the order of their addresses.
    pub virtio: Vec<virtio::State>,
}

/// The devices that KVM emulates.
#[derive(Clone, Serialize, Deserialize)]
pub struct ChipsState {
    /// The two old interrupt controllers, and the I/O APIC.
    pub controllers: [kvm_irqchip; 3],
    /// The interval timer.
    pub timer: kvm_pit_state2,
    /// The paravirtual clock.
    pub clock: kvm_clock_data,
}

impl std::fmt::Debug for ChipsState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChipsState").field("timer", &self.timer).field("clock", &self.clock).finish_non_exhaustive()
    }
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// The XSAVE area, as long as this host's.
    pub xsave: Vec<u32>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// All model-specific registers that this host's KVM can both read and set; not the TSC where `tsc` has it.
    pub msrs: Vec<kvm_msr_entry>,
    /// Its local interrupt controller and timer, where the machine has any.
    pub lapic: Option<kvm_lapic_state>,
    /// Pending exceptions, interrupts and the like.
    pub events: kvm_vcpu_events,
    /// Running or halted.
    pub mp: kvm_mp_state,
    /// The guest's clock.
    pub tsc: Tsc,
}

/// What the guest's time stamp counter shows. A fork goes on from where its parent stood, and never back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tsc {
    /// The host's, plus this: exact on the same host.
    Offset(u64),
    /// The value when it was saved, for hosts that do not tell the offset. It stands still from save to restore.
    Value(u64),
}

impl Tsc {
    /// Whether it is right for as long as the vCPU does not run.
    pub fn stands_still(self) -> bool {
        matches!(self, Self::Offset(_))
    }
}

/// What is under way between the monitor and the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxState {
    /// The line that the guest has not answered. A fork answers it too.
    pub in_flight: Option<u64>,
    /// The guest asked to be forked and waits for the outcome.
    pub fork_pending: bool,
}
