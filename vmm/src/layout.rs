//! Where things stand in guest-physical space: RAM below 3 GiB, devices up to 4 GiB, the rest of the RAM above.

use guest_mem::{Gfn, GfnRange, PageCount};

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
}
