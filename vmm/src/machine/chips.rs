//! The devices of a Linux guest's machine that KVM emulates: saved, restored, and interrupted by ours.

use super::kvm::{KvmError, during};
use super::state::ChipsState;
use crate::devices::interrupt::Interrupt;
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use std::sync::Arc;

const CONTROLLERS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Reads all of them. The vCPUs stand still.
pub(super) fn save(vm: &VmFd) -> Result<ChipsState, KvmError> {
    let mut controllers = CONTROLLERS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
    for controller in &mut controllers {
        vm.get_irqchip(controller).map_err(during("KVM_GET_IRQCHIP"))?;
    }
    Ok(ChipsState {
        controllers,
        timer: vm.get_pit2().map_err(during("KVM_GET_PIT2"))?,
        clock: vm.get_clock().map_err(during("KVM_GET_CLOCK"))?,
    })
}

/// Makes them what `state` says. The vCPUs have their state, and stand still.
///
/// The clock goes on from where it stood, or, where the kernel tells the time of day with it, from where it would be by
/// now.
pub(super) fn restore(vm: &VmFd, state: &ChipsState) -> Result<(), KvmError> {
    for controller in &state.controllers {
        vm.set_irqchip(controller).map_err(during("KVM_SET_IRQCHIP"))?;
    }
    vm.set_pit2(&state.timer).map_err(during("KVM_SET_PIT2"))?;
    let kvm_clock_data { clock, flags, realtime, .. } = state.clock;
    let clock = kvm_clock_data { clock, flags: flags & KVM_CLOCK_REALTIME, realtime, ..Default::default() };
    vm.set_clock(&clock).map_err(during("KVM_SET_CLOCK"))
}

/// A line of the I/O APIC.
///
/// It is raised by a call that comes back when the interrupt is in the controllers' state: no freeze can miss it, as it
/// could one that is still on its way through an eventfd.
#[derive(Debug)]
pub(super) struct Line {
    vm: Arc<VmFd>,
    number: u32,
}

impl Line {
    /// Line `number` of this VM.
    pub fn new(vm: &Arc<VmFd>, number: u32) -> Self {
        Self { vm: Arc::clone(vm), number }
    }
}

impl Interrupt for Line {
    fn pulse(&self) {
        for level in [true, false] {
            if let Err(error) = self.vm.set_irq_line(self.number, level) {
                log::error!("KVM_IRQ_LINE {}: {error}", self.number);
            }
        }
    }
}
