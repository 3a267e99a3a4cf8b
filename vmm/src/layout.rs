//! Where things stand in guest-physical space: RAM below 3 GiB, devices up to 4 GiB, the rest of the RAM above.
//!
//! A Linux guest finds, in its first megabyte:
//!
//! ```text
//! 0x00500  segment descriptors      0x20000  command line
//! 0x07000  boot parameters          0x9fc00  end of what it may use
//! 0x09000  page tables of its start 0xe0000  ACPI tables, the generation id among them
//! ```

use guest_mem::{Gfn, GfnRange, PAGE_SHIFT, PageCount};

/// First guest-physical address that belongs to devices.
pub const DEVICES_START: u64 = 3 << 30;
/// First guest-physical address after the devices: RAM goes on here.
pub const DEVICES_END: u64 = 4 << 30;

/// The guest frames of `ram` pages of memory.
pub fn ram_ranges(ram: PageCount) -> Vec<GfnRange> {
    let low = PageCount(ram.0.min(Gfn::of_gpa(DEVICES_START).0));
    let high = PageCount(ram.0 - low.0);
    let mut ranges = vec![GfnRange::new(Gfn(0), low)];
    if high.0 > 0 {
        ranges.push(GfnRange::new(Gfn::of_gpa(DEVICES_END), high));
    }
    ranges
}

/// The guest frames of `count` pages of memory from page `first`, pages counted without the devices between; none where
/// numbers like these cannot be pages.
pub fn frames_of_pages(first: u64, count: u64) -> Option<Vec<GfnRange>> {
    let end = first.checked_add(count).filter(|&end| end <= u64::MAX >> PAGE_SHIFT >> 1)?;
    let hole = Gfn::of_gpa(DEVICES_START).0;
    let skipped = Gfn::of_gpa(DEVICES_END).0 - hole;
    let low = GfnRange::between(Gfn(first.min(hole)), Gfn(end.min(hole)));
    let high = GfnRange::between(Gfn(first.max(hole) + skipped), Gfn(end.max(hole) + skipped));
    Some([low, high].into_iter().filter(|range| !range.is_empty()).collect())
}

/// What a Linux guest's first megabyte holds.
pub mod linux {
    /// Segment descriptors that the first instructions run with.
    pub const GDT: u64 = 0x500;
    /// The boot parameters (`struct boot_params`).
    pub const BOOT_PARAMS: u64 = 0x7000;
    /// A level-4 page table, a level-3 one and four level-2 ones: the first 4 GiB, mapped to themselves.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The command line and its end.
    pub const CMDLINE: u64 = 0x2_0000;
    /// Bytes that a command line may take, its end included.
    pub const CMDLINE_ROOM: u64 = 0x1_0000;
    /// End of the low memory that the guest may use.
    pub const LOW_END: u64 = 0x9_fc00;
    /// Where the guest looks for the ACPI tables' root, and where all of them are.
    pub const ACPI: u64 = 0xe_0000;
    /// The generation id: 16 bytes that are different in every VM.
    pub const GENERATION_ID: u64 = 0xf_f000;
    /// Where a processor that goes back to real mode looks for the firmware.
    pub const RESET_VECTOR: u64 = 0xf_fff0;
    /// End of the first megabyte: the kernel goes here.
    pub const HIGH_START: u64 = 0x10_0000;
}

/// Devices of a Linux guest: addresses, ports and interrupt lines.
pub mod devices {
    /// The local interrupt controller of each vCPU.
    pub const LOCAL_APIC: u32 = 0xfee0_0000;
    /// The interrupt controller of the devices.
    pub const IO_APIC: u32 = 0xfec0_0000;
    /// First virtio device; each takes a page.
    pub const VIRTIO: u32 = 0xd000_0000;
    /// Bytes that a virtio device takes.
    pub const VIRTIO_SIZE: u32 = 0x1000;

    /// First port of the serial console.
    pub const COM1: u16 = 0x3f8;
    /// ACPI's sleep control register: power off.
    pub const SLEEP_CONTROL: u16 = 0x600;
    /// ACPI's sleep status register.
    pub const SLEEP_STATUS: u16 = 0x601;
    /// ACPI's reset register.
    pub const RESET: u16 = 0x602;
    /// What is written to [`RESET`] for a reset.
    pub const RESET_VALUE: u8 = 1;

    /// Interrupt of the serial console.
    pub const COM1_IRQ: u32 = 4;
    /// Interrupt that says: the generation id is new.
    pub const GENERATION_IRQ: u32 = 5;
    /// Interrupt that says: somebody pushed the power button.
    pub const POWER_IRQ: u32 = 6;
    /// Interrupt of the first virtio device; the next ones follow.
    pub const VIRTIO_IRQ: u32 = 7;
    /// Lines of the I/O APIC.
    pub const IRQS: u32 = 24;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_devices() {
        let small = ram_ranges(PageCount::covering(256 << 20));
        assert_eq!(small, [GfnRange::new(Gfn(0), PageCount(65536))]);
        let large = ram_ranges(PageCount::covering(5 << 30));
        assert_eq!(large[0].end().gpa(), DEVICES_START);
        assert_eq!(large[1].start().gpa(), DEVICES_END);
        assert_eq!(large[1].count().bytes(), 2 << 30);
    }

    #[test]
    fn pages_are_counted_around_the_devices() {
        let hole = DEVICES_START >> PAGE_SHIFT;
        let frames = |start: u64, end: u64| GfnRange::between(Gfn(start), Gfn(end));
        assert_eq!(frames_of_pages(5, 3).unwrap(), [frames(5, 8)]);
        assert_eq!(frames_of_pages(hole - 1, 2).unwrap(), [frames(hole - 1, hole), frames(1 << 20, (1 << 20) + 1)]);
        assert_eq!(frames_of_pages(hole, 1).unwrap(), [frames(1 << 20, (1 << 20) + 1)]);
        assert_eq!(frames_of_pages(9, 0).unwrap(), []);
        assert!(frames_of_pages(u64::MAX, 1).is_none() && frames_of_pages(1, u64::MAX).is_none());
    }
}
