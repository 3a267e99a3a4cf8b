//! Puts a Linux guest into its memory.

use super::e820;
use super::plan::Plan;
use super::registers::GDT;
use crate::boot::acpi;
use crate::layout::devices::{RESET, RESET_VALUE};
use crate::layout::linux;
use crate::wire::MachineShape;
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use std::fs::File;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

/// The guest could not be put into its memory.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel.
    #[error("kernel: {0}")]
    Kernel(linux_loader::loader::Error),
    /// What goes into the first megabyte.
    #[error("{what}: {cause}")]
    Low {
        /// What.
        what: &'static str,
        /// Why.
        cause: GuestMemoryError,
    },
}

/// A boot loader that has no number of its own.
const LOADER_OTHER: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const BZIMAGE_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// A compressed kernel's 64-bit entry point is this far into it.
const BZIMAGE_ENTRY_64: u64 = 0x200;

/// `mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt`: all the firmware there is. Linux does not use the reset register
/// of a machine without legacy hardware, but asks the firmware: UEFI's, and then the old one, in real mode.
const RESET_CODE: [u8; 7] = [0xba, RESET.to_le_bytes()[0], RESET.to_le_bytes()[1], 0xb0, RESET_VALUE, 0xee, 0xf4];

/// Loads the kernel, and writes all that it is told beside. Gives the address of its first instruction.
///
/// # Errors
/// The file is no longer what the plan was made for, or the memory is too small for it.
pub fn load(
    memory: &impl GuestMemoryBackend,
    shape: MachineShape,
    kernel: &mut File,
    plan: &Plan,
) -> Result<u64, LoadError> {
    let low = |what| move |cause| LoadError::Low { what, cause };
    let high_start = Some(GuestAddress(linux::HIGH_START));
    let mut params = boot_params::default();
    let entry = if plan.elf {
        let loaded = Elf::load(memory, None, kernel, high_start).map_err(LoadError::Kernel)?;
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = BZIMAGE_MAGIC;
        loaded.kernel_load.0
    } else {
        let loaded = BzImage::load(memory, None, kernel, high_start).map_err(LoadError::Kernel)?;
        params.hdr = loaded.setup_header.unwrap_or_default();
        loaded.kernel_load.0 + BZIMAGE_ENTRY_64
    };
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = linux::CMDLINE as u32;
    if let Some(initrd) = plan.initrd {
        // Below 3 GiB: the plan places it there.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    params.acpi_rsdp_addr = linux::ACPI;
    let map = e820::map(shape.ram);
    params.e820_table[..map.len()].copy_from_slice(&map);
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, GuestAddress(linux::BOOT_PARAMS)).map_err(low("boot parameters"))?;

    let mut cmdline = plan.cmdline.clone().into_bytes();
    cmdline.push(0);
    memory.write_slice(&cmdline, GuestAddress(linux::CMDLINE)).map_err(low("command line"))?;
    write_page_tables(memory).map_err(low("page tables"))?;
    for (number, descriptor) in (0..).zip(GDT) {
        memory.write_obj(descriptor, GuestAddress(linux::GDT + 8 * number)).map_err(low("segment descriptors"))?;
    }
    memory.write_slice(&RESET_CODE, GuestAddress(linux::RESET_VECTOR)).map_err(low("reset code"))?;
    memory.write_slice(&acpi::tables(shape.vcpus), GuestAddress(linux::ACPI)).map_err(low("ACPI tables"))?;
    Ok(entry)
}

/// Maps the first 4 GiB to themselves, in pages of 2 MiB.
fn write_page_tables(memory: &impl GuestMemoryBackend) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const BIG: u64 = 1 << 7;
    const TABLE: u64 = 0x1000;
    let upper = linux::PAGE_TABLES + TABLE;
    memory.write_obj(upper | PRESENT_WRITABLE, GuestAddress(linux::PAGE_TABLES))?;
    for gib in 0..4 {
        let table = upper + TABLE * (1 + gib);
        memory.write_obj(table | PRESENT_WRITABLE, GuestAddress(upper + 8 * gib))?;
        for number in 0..512 {
            let page = (gib << 30) + (number << 21);
            memory.write_obj(page | BIG | PRESENT_WRITABLE, GuestAddress(table + 8 * number))?;
        }
    }
    Ok(())
}
