//! The memory map that a Linux guest is told.

use crate::layout::{linux, ram_ranges};
use guest_mem::PageCount;
use linux_loader::loader::bootparam::boot_e820_entry;

const RAM: u32 = 1;
const ACPI: u32 = 3;

/// The guest's memory: what it may use, and what holds tables.
pub fn map(ram: PageCount) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, r#type| boot_e820_entry { addr: start, size: end - start, r#type };
    let mut map = vec![entry(0, linux::LOW_END, RAM), entry(linux::ACPI, linux::HIGH_START, ACPI)];
    for range in ram_ranges(ram) {
        map.push(entry(range.start().gpa().max(linux::HIGH_START), range.end().gpa(), RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_sorted_and_counts_every_byte() {
        for bytes in [64 << 20, 3 << 30, 5 << 30] {
            let map = map(PageCount::covering(bytes));
            let mut last = 0;
            for entry in &map {
                let (start, size) = (entry.addr, entry.size);
                assert!(start >= last && size > 0);
                last = start + size;
            }
            let usable: u64 = map.iter().filter(|entry| entry.r#type == RAM).map(|entry| entry.size).sum();
            assert_eq!(usable, bytes - (linux::HIGH_START - linux::LOW_END));
            let reserved = map.iter().find(|entry| entry.r#type == ACPI).unwrap();
            assert!(reserved.addr <= linux::GENERATION_ID && linux::GENERATION_ID < reserved.addr + reserved.size);
        }
    }
}
