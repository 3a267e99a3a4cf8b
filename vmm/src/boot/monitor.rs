//! Registers of a vCPU that is about to run the monitor.
//!
//! We put the vCPU right into 64-bit user mode, as if the monitor's own entry for PVH loaders had run: no instruction
//! runs in kernel mode, no page of the image is written, and nothing depends on how a host's KVM emulates `ltr` or
//! `iretq`. There is no interrupt table: an exception shuts the machine down, and only a bug raises one.

use firmware::abi;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 0x620;
/// LME, LMA.
const EFER: u64 = 0x500;
/// Bit 1 is always set. Interrupts stay off: there is nothing that could raise one. I/O privilege level 3 lets user mode
/// use ports, as the task's bitmap does, because some hosts have only the one and some only the other: KVM without
/// virtualization extensions does not keep the level, and QEMU's emulation of SVM refuses the bitmap of a busy task.
const RFLAGS: u64 = 0x3002;

/// A present data segment of user mode, flat.
const USER_DATA: kvm_segment = kvm_segment {
    base: 0,
    limit: 0xffff_ffff,
    selector: 0x2b,
    type_: 3,
    present: 1,
    dpl: 3,
    db: 1,
    s: 1,
    l: 0,
    g: 1,
    avl: 0,
    unusable: 0,
    padding: 0,
};
const USER_CODE: kvm_segment = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, ..USER_DATA };
/// A busy 64-bit task, whose I/O bitmap lets user mode use the monitor's ports.
const TASK: kvm_segment = kvm_segment {
    base: abi::TSS,
    limit: abi::TSS_LIMIT,
    selector: 0x40,
    type_: 11,
    dpl: 0,
    db: 0,
    s: 0,
    g: 0,
    ..USER_DATA
};
const NO_TABLE: kvm_dtable = kvm_dtable { base: 0, limit: 0, padding: [0; 3] };

/// The registers that enter the monitor, and what the system registers of a fresh vCPU must become.
///
/// The image must be in guest memory at [`abi::IMAGE_BASE`], and the event page filled.
pub fn registers(sregs: &mut kvm_sregs) -> kvm_regs {
    sregs.cs = USER_CODE;
    for segment in [&mut sregs.ss, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
        *segment = USER_DATA;
    }
    sregs.tr = TASK;
    sregs.gdt = NO_TABLE;
    sregs.idt = NO_TABLE;
    sregs.cr0 = CR0;
    sregs.cr3 = abi::PAGE_TABLE;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    kvm_regs { rip: abi::ENTRY, rsp: abi::ENTRY_STACK, rflags: RFLAGS, ..kvm_regs::default() }
}

/// The registers that touch pages, from guest physical address `gpa` on, with system registers as [`registers`] leaves them.
/// `registers` are the monitor's, wherever it is.
pub fn toucher(registers: &kvm_regs, gpa: u64, pages: u64) -> kvm_regs {
    kvm_regs { rip: abi::TOUCH, rdi: abi::RAM_VIEW + gpa, rcx: pages, ..*registers }
}
