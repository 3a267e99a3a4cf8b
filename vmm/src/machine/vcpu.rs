//! A vCPU and its thread.

use super::filter::{Filters, Thread};
use super::floor::{After, Floor, Load, Task};
use super::kick::StopSwitch;
use super::mmio::Mmio;
use super::ports::{Ports, Read};
use super::registers::{Registers, RegistersError};
use super::touch::{TouchError, Way};
use crate::boot;
use crate::wire::{FromVm, Machine};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use thiserror::Error;

/// What a vCPU's accesses reach.
#[derive(Clone, Debug)]
pub(super) struct Buses {
    pub ports: Ports,
    pub mmio: Mmio,
}

/// A vCPU did not become what it was to start from.
#[derive(Debug, Error)]
enum LoadError {
    #[error("registers: {0}")]
    Registers(#[from] RegistersError),
    #[error("pages touched ahead: {0}")]
    Touch(#[from] TouchError),
}

/// A vCPU, which lives as long as the process and belongs to its thread.
#[derive(Debug)]
pub(super) struct Vcpu {
    number: usize,
    fd: &'static mut VcpuFd,
    stop: StopSwitch,
    registers: Registers,
    way: Way,
    machine: Machine,
    /// The last `KVM_RUN` has left registers behind.
    shared: bool,
}

impl Vcpu {
    /// Takes a vCPU that has not run, for the life of the process; gives the switch that stops it as well.
    pub fn new(number: usize, fd: VcpuFd, registers: Registers, (way, machine): (Way, Machine)) -> (Self, StopSwitch) {
        let (stop, fd) = StopSwitch::of(Box::leak(Box::new(fd)));
        (Self { number, fd, stop, registers, way, machine, shared: false }, stop)
    }

    /// Starts the thread, which waits on the floor for something to do.
    ///
    /// # Errors
    /// Of `pthread_create`.
    pub fn spawn(mut self, floor: Arc<Floor>, buses: Buses, filters: Arc<Filters>) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(format!("vcpu{}", self.number)).spawn(move || self.work(&floor, &buses, &filters))
    }

    fn work(&mut self, floor: &Floor, buses: &Buses, filters: &Filters) {
        if let Err(error) = filters.confine(Thread::Vcpu) {
            return floor.die(format!("system call filter: {error}"));
        }
        // KVM starts a worker of its own at a VM's first KVM_RUN: let that be now, not when a fork waits for it.
        self.stop.set();
        if let Ok(exit) = self.fd.run() {
            return floor.die(describe(&exit));
        }
        loop {
            match floor.next_task(self.number) {
                Task::Load(load) => {
                    if let Err(error) = self.load(load) {
                        floor.end(FromVm::StartFailed(format!("vCPU {}: {error}", self.number)));
                    }
                }
                Task::Save => {
                    let shared = self.shared.then(|| self.fd.sync_regs());
                    let state = self.registers.save(self.fd, shared.as_ref());
                    floor.saved(self.number, state.map_err(|error| error.to_string()));
                }
                Task::Attend => buses.mmio.attend(),
                Task::Run(after) => {
                    if after == After::Standing {
                        self.tell_of_pause();
                    }
                    let ended = self.run(buses).and_then(|()| {
                        let ended = self.registers.end_page_workers(self.fd);
                        ended.map_err(|error| format!("pages under way: {error}"))
                    });
                    if let Err(why) = ended {
                        floor.die(why);
                    }
                }
            }
        }
    }

    /// A guest whose clock went on while it stood would take that for a processor that hangs: its watchdog is told that the
    /// host stopped it.
    fn tell_of_pause(&self) {
        if self.machine == Machine::Linux
            && let Err(error) = self.fd.kvmclock_ctrl()
        {
            // EINVAL: it does not use that clock.
            log::debug!("KVM_KVMCLOCK_CTRL: {error}");
        }
    }

    fn load(&mut self, load: Load) -> Result<(), LoadError> {
        self.shared = false;
        match load {
            Load::Expected(state, pages) => {
                let regs = state.regs;
                self.registers.expect(self.fd, *state)?;
                self.way.touch(self.fd, self.stop, &regs, &pages)?;
                self.registers.learn(self.fd)?;
            }
            Load::Saved(state) => self.registers.restore(self.fd, &state)?,
            Load::Monitor => {
                let mut state = self.registers.fresh().clone();
                state.regs = boot::monitor::registers(&mut state.sregs);
                self.registers.restore(self.fd, &state)?;
            }
            Load::Linux(entry) => {
                let mut state = self.registers.fresh().clone();
                for set in boot::linux::MSRS {
                    state.msrs.iter_mut().filter(|msr| msr.index == set.index).for_each(|msr| msr.data = set.data);
                }
                if let Some(entry) = entry {
                    state.regs = boot::linux::registers(entry, &mut state.sregs);
                }
                self.registers.restore(self.fd, &state)?;
            }
        }
        Ok(())
    }

    /// Runs until the vCPU is to stop. It stops only where `KVM_RUN` says that it was interrupted: KVM completes a port
    /// access in flight before it does.
    fn run(&mut self, Buses { ports, mmio }: &Buses) -> Result<(), String> {
        self.shared = false;
        loop {
            match self.fd.run() {
                Err(error) if error.errno() == libc::EINTR => return Ok(()),
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
                Ok(VcpuExit::IoIn(port, data)) => {
                    let read = ports.read(self.number, port, data).map_err(|error| memory_error(&error))?;
                    if read == Read::Stopping && self.registers.can_share() {
                        return self.finish_sharing();
                    }
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    ports.write(port, data).map_err(|error| memory_error(&error))?;
                }
                Ok(VcpuExit::MmioRead(address, data)) => mmio.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => mmio.write(address, data),
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => return Err(describe(&exit)),
            }
        }
    }

    /// Completes the access in flight, of a vCPU that is to stop, and has `KVM_RUN` leave registers behind as it does:
    /// that saves three calls.
    fn finish_sharing(&mut self) -> Result<(), String> {
        let each = [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents];
        each.into_iter().for_each(|reg| self.fd.set_sync_valid_reg(reg));
        let left = self.fd.run().map(|exit| describe(&exit));
        each.into_iter().for_each(|reg| self.fd.clear_sync_valid_reg(reg));
        match left {
            Err(error) if error.errno() == libc::EINTR => {
                self.shared = true;
                Ok(())
            }
            Err(error) => Err(format!("KVM_RUN: {error}")),
            Ok(exit) => Err(format!("a vCPU that is to stop runs on: {exit}")),
        }
    }
}

fn memory_error(error: &vm_memory::GuestMemoryError) -> String {
    format!("guest memory: {error}")
}

/// Why a vCPU cannot go on.
fn describe(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::Shutdown => "the guest crashed (triple fault)".into(),
        VcpuExit::Hlt => "the guest halted, and nothing can wake it".into(),
        VcpuExit::InternalError => {
            "KVM could not emulate an instruction of the guest (a host whose KVM interprets guest kernels, without VMX or \
             SVM, runs the built-in guest and no stock Linux kernel: see `offshoot doctor`)"
                .into()
        }
        VcpuExit::FailEntry(reason, cpu) => {
            format!("the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}")
        }
        VcpuExit::MemoryFault { flags, gpa, size } => {
            format!("KVM cannot supply guest memory at {gpa:#x} ({size} bytes, flags {flags:#x})")
        }
        other => format!("KVM_RUN returned with {other:?}"),
    }
}
