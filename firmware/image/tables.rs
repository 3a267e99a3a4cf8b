//! Page tables, descriptors and the task state segment: constants, laid out by the linker script at the addresses
//! that [`firmware::abi`] promises.

use firmware::abi::{
    self, COM1, DOORBELL, MAX_PAGES, PAGE_SIZE, RAM_VIEW, TSS, TSS_LIMIT, WAIT, page_to_gpa,
};

/// Selectors in [`Gdt`].
pub const KERNEL_CODE: u16 = 0x08;
pub const USER_DATA: u16 = 0x28 | 3;
pub const USER_CODE: u16 = 0x30 | 3;
pub const TASK: u16 = 0x40;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const HUGE: u64 = 1 << 7;

const TABLE_SIZE: u64 = PAGE_SIZE;
/// Tables of 2 MiB pages, one for each GiB of RAM. Pages of 1 GiB would need none, but not every KVM has them.
const TABLES: usize = ((MAX_PAGES * PAGE_SIZE) >> 30) as usize;

#[repr(C, align(4096))]
pub struct Table([u64; 512]);

/// The top level shows the same RAM at 0 and at [`RAM_VIEW`].
#[unsafe(link_section = ".tables.0")]
#[used]
pub static PAGE_TABLE: Table = Table({
    let mut table = [0; 512];
    table[0] = (abi::PAGE_TABLE + TABLE_SIZE) | PRESENT | WRITE | USER | ACCESSED;
    table[(RAM_VIEW >> 39) as usize] = table[0];
    table
});

/// The next level: one entry for each GiB, none for the devices.
#[unsafe(link_section = ".tables.1")]
#[used]
pub static GIGABYTES: Table = Table({
    let mut table = [0; 512];
    let mut i = 0;
    while i < TABLES {
        let first_table = abi::PAGE_TABLE + 2 * TABLE_SIZE;
        table[(ram_gigabyte(i) >> 30) as usize] =
            (first_table + i as u64 * TABLE_SIZE) | PRESENT | WRITE | USER | ACCESSED;
        i += 1;
    }
    table
});

/// The last level: 2 MiB pages.
#[unsafe(link_section = ".tables.2")]
#[used]
pub static MEGABYTES: [Table; TABLES] = {
    let mut tables = [const { Table([0; 512]) }; TABLES];
    let mut i = 0;
    while i < TABLES * 512 {
        let gpa = ram_gigabyte(i / 512) + ((i as u64 % 512) << 21);
        tables[i / 512].0[i % 512] = gpa | PRESENT | WRITE | USER | ACCESSED | DIRTY | HUGE;
        i += 1;
    }
    tables
};

/// Where the `i`-th GiB of RAM is.
const fn ram_gigabyte(i: usize) -> u64 {
    page_to_gpa((i as u64) << 18)
}

/// The ports that user mode may use: first and count.
const PORTS: [(u16, u16); 3] = [(COM1, 8), (DOORBELL, 4), (WAIT, 4)];
const BITMAP: usize = 0x68;

const _: () = assert!(abi::PAGE_TABLE + (2 + TABLES as u64) * TABLE_SIZE == TSS);

/// The task state segment, whose I/O bitmap is all that Offshoot's start uses, and what the PVH entry needs besides.
#[repr(C, align(4096))]
pub struct Descriptors {
    tss: [u8; TSS_LIMIT as usize + 1],
    pub gdt: Gdt,
}

#[repr(C, align(8))]
pub struct Gdt([u64; 10]);

#[unsafe(link_section = ".tables.3")]
#[used]
pub static DESCRIPTORS: Descriptors = Descriptors {
    tss: {
        let mut tss = [0; TSS_LIMIT as usize + 1];
        tss[0x66] = BITMAP as u8;
        let mut i = BITMAP;
        while i < tss.len() {
            tss[i] = 0xff;
            i += 1;
        }
        let mut range = 0;
        while range < PORTS.len() {
            let (first, count) = PORTS[range];
            let mut port = first;
            while port < first + count {
                tss[BITMAP + port as usize / 8] &= !(1 << (port % 8));
                port += 1;
            }
            range += 1;
        }
        tss
    },
    gdt: Gdt({
        let mut gdt = [0; 10];
        gdt[KERNEL_CODE as usize / 8] = 0x00af_9b00_0000_ffff;
        gdt[USER_DATA as usize / 8] = 0x00cf_f300_0000_ffff;
        gdt[USER_CODE as usize / 8] = 0x00af_fb00_0000_ffff;
        // The base of a system segment lies in four places.
        gdt[TASK as usize / 8] = 0x0000_8900_0000_0000
            | TSS_LIMIT as u64
            | (TSS & 0xff_ffff) << 16
            | (TSS >> 24 & 0xff) << 56;
        gdt[TASK as usize / 8 + 1] = TSS >> 32;
        gdt
    }),
};
