//! What a guest says of its memory, in the figures of the balloon's specification.

use crate::api::GuestStats;
use std::time::Instant;

/// What a guest has said, and when.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory {
    /// Without its age.
    said: GuestStats,
    at: Instant,
}

impl GuestMemory {
    /// What figures with tags of the specification say. Tags that nobody knows are for later drivers.
    pub fn new(figures: &[(u16, u64)], at: Instant) -> Self {
        let mut said = GuestStats::default();
        for &(tag, value) in figures {
            let place = match tag {
                0 => &mut said.swap_in_bytes,
                1 => &mut said.swap_out_bytes,
                2 => &mut said.major_faults,
                3 => &mut said.minor_faults,
                4 => &mut said.free_memory_bytes,
                5 => &mut said.total_memory_bytes,
                6 => &mut said.available_memory_bytes,
                7 => &mut said.disk_caches_bytes,
                8 => &mut said.hugetlb_allocations,
                9 => &mut said.hugetlb_failures,
                10 => &mut said.oom_kills,
                11 => &mut said.alloc_stalls,
                12 => &mut said.async_scan_bytes,
                13 => &mut said.direct_scan_bytes,
                14 => &mut said.async_reclaim_bytes,
                15 => &mut said.direct_reclaim_bytes,
                _ => continue,
            };
            *place = Some(value);
        }
        Self { said, at }
    }

    /// Memory that the guest could do without, and when it said so. Drivers before Linux 4.6 tell of free memory only.
    pub fn available(&self) -> Option<(u64, Instant)> {
        self.said.available_memory_bytes.or(self.said.free_memory_bytes).map(|bytes| (bytes, self.at))
    }

    /// What was said, and how long ago.
    pub fn shown(&self) -> GuestStats {
        GuestStats { age_ms: self.at.elapsed().as_millis() as u64, ..self.said }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_their_names() {
        let figures: Vec<(u16, u64)> = (0..20).chain([u16::MAX]).map(|tag| (tag, 100 + u64::from(tag))).collect();
        let said = GuestMemory::new(&figures, Instant::now()).shown();
        assert_eq!(
            (said.swap_in_bytes, said.free_memory_bytes, said.total_memory_bytes),
            (Some(100), Some(104), Some(105))
        );
        assert_eq!((said.available_memory_bytes, said.direct_reclaim_bytes), (Some(106), Some(115)));
        assert_eq!(GuestMemory::new(&[], Instant::now()).said, GuestStats::default());
    }
}
