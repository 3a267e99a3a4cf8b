//! Registers of the first vCPU at a Linux kernel's 64-bit entry point, as the x86 boot protocol wants them.

use crate::layout::linux;
use kvm_bindings::{kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

/// PE, ET, PG.
const CR0: u64 = 0x8000_0011;
/// PAE.
const CR4: u64 = 0x20;
/// LME, LMA.
const EFER: u64 = 0x500;
/// Bit 1 is always set. Interrupts are off.
const RFLAGS: u64 = 0x2;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const CODE_TYPE: u8 = 11;
const DATA_TYPE: u8 = 3;

/// What the kernel expects firmware to have set on every vCPU: memory is write-back where no range says otherwise. Without
/// it, Linux takes the memory type ranges for broken and does without its own page attribute table.
pub const MSRS: [kvm_msr_entry; 1] =
    [kvm_msr_entry { index: MTRR_DEFAULT_TYPE, reserved: 0, data: MTRR_ENABLED | WRITE_BACK }];
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// Descriptors: two that are not used, 64-bit code (0x10) and flat data (0x18).
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// A present data segment of kernel mode, flat.
const DATA: kvm_segment = kvm_segment {
    base: 0,
    limit: 0xffff_ffff,
    selector: DATA_SELECTOR,
    type_: DATA_TYPE,
    present: 1,
    dpl: 0,
    db: 1,
    s: 1,
    l: 0,
    g: 1,
    avl: 0,
    unusable: 0,
    padding: 0,
};
const CODE: kvm_segment = kvm_segment { selector: CODE_SELECTOR, type_: CODE_TYPE, db: 0, l: 1, ..DATA };

/// The registers that enter the kernel at `entry`, and what the system registers of a fresh vCPU must become.
pub fn registers(entry: u64, sregs: &mut kvm_sregs) -> kvm_regs {
    sregs.cs = CODE;
    for segment in [&mut sregs.ss, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
        *segment = DATA;
    }
    let limit = (size_of_val(&GDT) - 1) as u16;
    sregs.gdt = kvm_dtable { base: linux::GDT, limit, padding: [0; 3] };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0;
    sregs.cr3 = linux::PAGE_TABLES;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    kvm_regs { rip: entry, rsi: linux::BOOT_PARAMS, rflags: RFLAGS, ..kvm_regs::default() }
}
