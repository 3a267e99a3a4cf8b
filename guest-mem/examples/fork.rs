//! A VMM that forks its guest, all in one process. The guest counts, in steps that its VMM gives it, and says each number.
#![allow(unsafe_code)] // a memory slot of KVM's is an address of this process

use guest_mem::{Gfn, GfnRange, Local, PageCount};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::error::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// `again: add [0x2000], bx; mov ax, [0x2000]; out 0x10, ax; jmp again`, for a processor in real mode.
const CODE: [u8; 11] = [0x01, 0x1e, 0x00, 0x20, 0xa1, 0x00, 0x20, 0xe7, 0x10, 0xeb, 0xf5];

/// A KVM VM over guest memory, which it keeps for as long as KVM has it.
struct Machine {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Machine {
    fn new(kvm: &Kvm, memory: GuestMemoryMmap) -> Result<Self, Box<dyn Error>> {
        let vm = kvm.create_vm()?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: The memory stays where it is until the machine is dropped, and the machine drops the VM first.
            unsafe { vm.set_user_memory_region(region)? };
        }
        Ok(Self { vcpu: vm.create_vcpu(0)?, _vm: vm, _memory: memory })
    }

    /// Begins at the code, and counts in steps of `step`.
    fn start(&mut self, step: u64) -> Result<(), Box<dyn Error>> {
        let mut sregs = self.vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs)?;
        let (rip, rbx, rflags) = (0x1000, step, 2);
        Ok(self.vcpu.set_regs(&kvm_bindings::kvm_regs { rip, rbx, rflags, ..Default::default() })?)
    }

    /// Runs until the guest says a number.
    fn next(&mut self) -> Result<u16, Box<dyn Error>> {
        match self.vcpu.run()? {
            VcpuExit::IoOut(0x10, &[low, high]) => Ok(u16::from_le_bytes([low, high])),
            exit => Err(format!("the guest does something else: {exit:?}").into()),
        }
    }

    /// Finishes the `out` that the guest is in the middle of: its registers say so from then on.
    fn stop(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        self.vcpu.run().expect_err("it does not begin anything else");
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Goes on where another machine has stopped, in steps of its own.
    fn go_on_from(&mut self, other: &Self, step: u64) -> Result<(), Box<dyn Error>> {
        self.vcpu.set_sregs(&other.vcpu.get_sregs()?)?;
        let mut regs = other.vcpu.get_regs()?;
        regs.rbx = step;
        Ok(self.vcpu.set_regs(&regs)?)
    }
}

/// Forks the guest, and the fork.
pub fn main() -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::new()?;
    let family = Local::new(vec![GfnRange::new(Gfn(0), PageCount(256))])?;
    let parent = family.launch()?;
    family.memory(parent)?.write_slice(&CODE, GuestAddress(0x1000))?;
    let mut parents = Machine::new(&kvm, family.memory(parent)?)?;
    parents.start(1)?;
    assert_eq!([parents.next()?, parents.next()?, parents.next()?], [1, 2, 3]);

    // No vCPU runs while its VM is forked.
    parents.stop();
    let child = family.fork(parent)?;
    let mut childs = Machine::new(&kvm, family.memory(child)?)?;
    childs.go_on_from(&parents, 10)?;
    let (said_by_child, said_by_parent) = ([childs.next()?, childs.next()?], [parents.next()?, parents.next()?]);
    println!("the child says {said_by_child:?}, the parent {said_by_parent:?}");
    assert_eq!((said_by_child, said_by_parent), ([13, 23], [4, 5]), "both go on from 3, each for itself");

    // A fork of the fork, whose parent has gone.
    childs.stop();
    let grandchild = family.fork(child)?;
    let mut grandchilds = Machine::new(&kvm, family.memory(grandchild)?)?;
    grandchilds.go_on_from(&childs, 100)?;
    drop(childs);
    family.exit(child)?;
    assert_eq!(grandchilds.next()?, 123);
    println!("{:?}", family.stats()?);
    Ok(())
}
