//! One KVM VM with the built-in guest.
#![allow(unsafe_code)] // memory slots

use super::memory::Show;
use super::{PAGE, Window};
use crate::{Result, fail};
use firmware::abi::{self, COM1, DOORBELL, Doorbell, IMAGE_BASE, WAIT, at, wake};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_fpu, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

const COM1_LSR: u16 = COM1 + 5;

/// What all VMs of a process use.
pub struct Platform {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Platform {
    /// This host's.
    pub fn open() -> Result<Self> {
        let kvm = Kvm::new()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self { kvm, cpuid })
    }
}

/// Why the VMM has control again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest rang.
    Rang(Doorbell),
    /// It waits, and has been told that there is nothing.
    Waits,
}

/// Registers of a guest that waits.
#[derive(Clone)]
pub struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
}

/// Bytes of guest-physical address space that `ram` bytes take: there is a hole below 4 GiB.
pub fn span(ram: u64) -> u64 {
    if ram <= abi::HOLE_START { ram } else { ram + (abi::HOLE_END - abi::HOLE_START) }
}

/// A VM, its vCPU and its memory.
pub struct Vm {
    vcpu: VcpuFd,
    vm: VmFd,
    window: Window,
    ram: u64,
    wake: u32,
    tag: u64,
}

impl Vm {
    /// KVM VM, memory slots, vCPU, in the best order: slots first; no interrupt controller at all.
    pub fn new(platform: &Platform, window: Window, ram: u64) -> Result<Self> {
        let vm = platform.kvm.create_vm()?;
        let low = ram.min(abi::HOLE_START);
        for (slot, (at, len)) in [(0, low), (abi::HOLE_END, ram - low)].into_iter().enumerate() {
            if len > 0 {
                set_slot(&vm, slot as u32, &window, at, len, 0)?;
            }
        }
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&platform.cpuid)?;
        Ok(Self { vcpu, vm, window, ram, wake: 0, tag: 0 })
    }

    /// A VM of that memory with the guest at its prompt.
    pub fn boot(platform: &Platform, ram: u64, show: Show<'_>) -> Result<Self> {
        let window = Window::showing(span(ram), show)?;
        window.write(IMAGE_BASE, firmware::IMAGE);
        let mut vm = Self::new(platform, window, ram)?;
        vm.start()?;
        Ok(vm)
    }

    /// Runs the image, which is in memory, to its prompt.
    pub fn start(&mut self) -> Result<()> {
        let window = &self.window;
        window.set_u64(at::MEM_PAGES, self.ram / PAGE);
        window.set_u64(at::GENERATION, 1);
        window.set_u64(at::TSC_KHZ, self.vcpu.get_tsc_khz().unwrap_or(0).into());
        window.write(at::NAME, b"bare");
        window.set_u32(at::NAME_LEN, 4);
        window.set_u64(at::EVENT, 1);
        let mut sregs = self.vcpu.get_sregs()?;
        let regs = vmm::boot::monitor::registers(&mut sregs);
        self.vcpu.set_sregs(&sregs)?;
        self.vcpu.set_regs(&regs)?;
        while self.run()? != Exit::Waits {}
        Ok(())
    }

    /// Logs which pages are written from now on.
    pub fn log_writes(&self) -> Result<()> {
        set_slot(&self.vm, 0, &self.window, 0, self.ram.min(abi::HOLE_START), KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Its memory.
    pub fn window(&self) -> &Window {
        &self.window
    }

    /// Lets KVM do what it does at a VM's first run.
    pub fn warm(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        // It says that it was interrupted.
        let _ = self.vcpu.run();
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Completes the access in flight and reads the registers.
    pub fn save(&mut self) -> Result<State> {
        self.warm();
        Ok(State { regs: self.vcpu.get_regs()?, sregs: self.vcpu.get_sregs()?, fpu: self.vcpu.get_fpu()? })
    }

    /// Takes over registers.
    pub fn load(&self, state: &State) -> Result<()> {
        self.vcpu.set_sregs(&state.sregs)?;
        self.vcpu.set_regs(&state.regs)?;
        self.vcpu.set_fpu(&state.fpu)?;
        Ok(())
    }

    /// Runs to the next exit that matters.
    pub fn run(&mut self) -> Result<Exit> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoIn(WAIT, data)) => {
                    let bits = std::mem::take(&mut self.wake);
                    data.copy_from_slice(&bits.to_le_bytes());
                    if bits == 0 {
                        return Ok(Exit::Waits);
                    }
                }
                Ok(VcpuExit::IoOut(DOORBELL, &[a, b, c, d])) => {
                    let rang = Doorbell::from_u32(u32::from_le_bytes([a, b, c, d]));
                    return Ok(Exit::Rang(rang.ok_or("a doorbell that there is none")?));
                }
                Ok(VcpuExit::IoIn(COM1_LSR, data)) => data[0] = 0x60,
                Ok(VcpuExit::IoOut(COM1, _)) => {}
                Ok(other) => return fail(format!("the guest of a reference: {other:?}")),
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends the guest a line, and runs it until it has answered with `ok`.
    pub fn send(&mut self, line: &str) -> Result<()> {
        self.tag += 1;
        self.window.set_u64(at::INBOX_TAG, self.tag);
        self.window.write(at::INBOX_TEXT, line.as_bytes());
        self.window.set_u32(at::INBOX_LEN, line.len() as u32);
        self.wake = wake::INBOX;
        while self.run()? != Exit::Rang(Doorbell::Answer) {}
        let mut answer = vec![0; self.window.u32_at(at::OUTBOX_LEN).min(200) as usize];
        self.window.read(at::OUTBOX_TEXT, &mut answer);
        // Let it wait: then it has done with the line.
        while self.run()? != Exit::Waits {}
        if answer.starts_with(b"ok") {
            return Ok(());
        }
        fail(format!("the guest of a reference answers {line:?} with {}", String::from_utf8_lossy(&answer)))
    }
}

fn set_slot(vm: &VmFd, slot: u32, window: &Window, at: u64, len: u64, flags: u32) -> Result<()> {
    let userspace_addr = window.base() + at;
    let region = kvm_userspace_memory_region { slot, flags, guest_phys_addr: at, memory_size: len, userspace_addr };
    // SAFETY: The addresses are the window's, which lives as long as the VM, and nobody else's.
    Ok(unsafe { vm.set_user_memory_region(region) }?)
}
