//! The entry for other VMMs: the PVH boot protocol of Xen, as in QEMU's `-kernel`.
//!
//! The loader starts us in 32-bit protected mode without paging, EBX pointing to a `start_info`. We go to long mode on
//! the image's own tables, and from there to user mode. (`ltr` marks the task descriptor busy, which writes to the
//! image; Offshoot sets the registers itself and enters at [`firmware::abi::ENTRY`], which writes nothing.)

use core::arch::global_asm;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use firmware::abi::{BALLOON, ENTRY, ENTRY_STACK, EVENT_PAGE, HOLE_START, PAGE_SIZE, PAGE_TABLE, TSS};
use firmware::machine::Machine;

use crate::pc::Pc;
use crate::tables::{Descriptors, Gdt, KERNEL_CODE, TASK, USER_CODE, USER_DATA};

global_asm!(
    r#"
    .pushsection .note.pvh, "a", @note
    .long 4, 4, 18                  # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry
    .popsection

    .pushsection .text.pvh, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    lgdt [gdt_pointer]
    mov eax, {page_table}
    mov cr3, eax
    mov eax, 0x620                  # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov ecx, 0xc0000080             # EFER: LME
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80050033             # PG, AM, WP, NE, ET, MP, PE
    mov cr0, eax
    ljmp {kernel_code}, offset long_mode

    .code64
long_mode:
    mov eax, {task}
    ltr ax
    mov eax, {user_data}
    mov ds, eax
    mov es, eax
    mov edi, ebx                    # user_entry(start_info)
    mov esp, {stack}
    push {user_data}
    push {stack}
    push 2                          # RFLAGS: no interrupts
    push {user_code}
    push {entry}
    iretq

    .balign 8
gdt_pointer:
    .short {gdt_size} - 1
    .quad {gdt}
    .popsection
    "#,
    page_table = const PAGE_TABLE,
    kernel_code = const KERNEL_CODE,
    user_code = const USER_CODE,
    user_data = const USER_DATA,
    task = const TASK,
    stack = const ENTRY_STACK,
    entry = const ENTRY,
    gdt = const TSS + offset_of!(Descriptors, gdt) as u64,
    gdt_size = const size_of::<Gdt>(),
);

/// `hvm_start_info`: its magic, and the byte offsets of what we read.
const MAGIC: u32 = 0x336e_c578;
const MEMMAP: u64 = 40;
const MEMMAP_ENTRIES: u64 = 48;
/// `hvm_memmap_table_entry`: 8 bytes each of address and length, 4 of type and 4 reserved.
const ENTRY_SIZE: u64 = 24;
const TYPE_RAM: u32 = 1;
/// Somewhere in the RAM we want: below 1 MiB lies the BIOS area.
const ONE_MIB: u64 = 1 << 20;

/// Fills the event page from a PVH loader's `start_info`, whose address is 0 under Offshoot.
pub fn describe(pc: &Pc, start_info: u64) {
    if start_info == 0 || u32_at(pc, start_info) != MAGIC {
        return;
    }
    let memmap = u64_at(pc, start_info + MEMMAP);
    let entries = u64::from(u32_at(pc, start_info + MEMMAP_ENTRIES));
    let end = (0..entries)
        .map(|i| memmap + i * ENTRY_SIZE)
        .filter(|&entry| u32_at(pc, entry + 16) == TYPE_RAM)
        .map(|entry| (u64_at(pc, entry), u64_at(pc, entry) + u64_at(pc, entry + 8)))
        .find(|&(start, end)| (start..end).contains(&ONE_MIB))
        .map_or(0, |(_, end)| end.min(HOLE_START));
    for shared in [EVENT_PAGE, BALLOON] {
        pc.page(shared / PAGE_SIZE)
            .iter()
            .for_each(|word| word.store(0, Relaxed));
    }
    pc.event_page().mem_pages.store(end / PAGE_SIZE, Relaxed);
}

fn u64_at(pc: &Pc, gpa: u64) -> u64 {
    u64::from(u32_at(pc, gpa)) | u64::from(u32_at(pc, gpa + 4)) << 32
}

/// The protocol aligns its structures to 4 bytes.
fn u32_at(pc: &Pc, gpa: u64) -> u32 {
    let word = pc.page_at(gpa & !(PAGE_SIZE - 1))[(gpa % PAGE_SIZE / 8) as usize].load(Relaxed);
    (word >> (gpa % 8 * 8)) as u32
}
