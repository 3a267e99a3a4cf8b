//! ACPI tables of a Linux guest: a machine without legacy hardware ("hardware-reduced"), so there is no power
//! management block and no legacy interrupt, and everything is told in the tables.
//!
//! Power goes off, and the machine is reset, through three ports. Two events come as interrupts of a generic event
//! device: a new generation id, and a push of the power button.

mod dsdt;

use crate::devices::virtio;
use crate::layout::{devices, linux};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};

const OEM: [u8; 6] = *b"OFFSHT";
const OEM_TABLE: [u8; 8] = *b"OFFSHOOT";
const OEM_REVISION: u32 = 1;

/// All tables for a machine of that many vCPUs, the root first, to be put at [`linux::ACPI`].
pub fn tables(vcpus: u8) -> Vec<u8> {
    let mut all = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let mut add = |table: &dyn Aml| {
        let address = linux::ACPI + all.len() as u64;
        table.to_aml_bytes(&mut all);
        all.resize(all.len().next_multiple_of(ALIGN), 0);
        address
    };
    let dsdt = add(&dsdt(vcpus));
    let fadt = add(&fadt(dsdt));
    let madt = add(&madt(vcpus));
    let mut root = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    root.add_entry(fadt);
    root.add_entry(madt);
    let root = add(&root);
    let mut pointer = Vec::new();
    Rsdp::new(OEM, root).to_aml_bytes(&mut pointer);
    all[..pointer.len()].copy_from_slice(&pointer);
    debug_assert!(linux::ACPI + all.len() as u64 <= linux::GENERATION_ID);
    all
}

const ALIGN: usize = 16;

/// What is written to the sleep control register to switch the machine off: the sleep type, and "go".
pub const POWER_OFF: u8 = dsdt::OFF << 2 | 1 << 5;

fn dsdt(vcpus: u8) -> Sdt {
    const HEADER: u32 = 36;
    const REVISION: u8 = 6;
    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&dsdt::code(vcpus, virtio::DEVICES));
    table
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    /// There is no VGA and no CMOS clock.
    const BOOT: u16 = 1 << 2 | 1 << 5;
    let port = |number: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT.into();
    fadt.reset_reg = port(devices::RESET);
    fadt.reset_value = devices::RESET_VALUE;
    fadt.sleep_control_reg = port(devices::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(devices::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(devices::LOCAL_APIC));
    for number in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, devices::IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, whole.
    fn table(all: &[u8], address: u64) -> &[u8] {
        let at = (address - linux::ACPI) as usize;
        let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
        &all[at..at + len]
    }

    #[test]
    fn the_tables_can_be_found_from_their_root_and_add_up() {
        for vcpus in [1, 2, 8] {
            let all = tables(vcpus);
            assert_eq!(&all[..8], b"RSD PTR ");
            assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
            let root = table(&all, u64_at(&all, 24));
            assert_eq!((&root[..4], sum(root)), (&b"XSDT"[..], 0));
            let fadt = table(&all, u64_at(root, 36));
            assert_eq!((&fadt[..4], sum(fadt), fadt.len()), (&b"FACP"[..], 0, 276));
            let madt = table(&all, u64_at(root, 44));
            assert_eq!((&madt[..4], sum(madt), madt.len()), (&b"APIC"[..], 0, 44 + usize::from(vcpus) * 8 + 12));
            let dsdt = table(&all, u64_at(fadt, 140));
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        }
    }

    #[test]
    fn the_generation_device_tells_where_its_id_is() {
        let all = tables(1);
        let find = |text: &[u8]| all.windows(text.len()).any(|window| window == text);
        assert!(find(b"VM_Gen_Counter") && find(b"ADDR") && find(b"ACPI0013"));
        let address = (linux::GENERATION_ID as u32).to_le_bytes();
        assert!(find(&[&[0x0c], &address[..]].concat()), "a DWord with the address");
        assert_eq!(find(b"LNRO0005"), !virtio::DEVICES.is_empty());
    }
}
