//! What tests of several modules need.

use crate::addr::GfnRange;

/// Ranges from their ends.
pub(crate) fn ranges(raw: &[(u64, u64)]) -> Vec<GfnRange> {
    raw.iter().map(|&(start, end)| (start..end).into()).collect()
}

/// Pseudo-random numbers below a bound, the same at each run.
pub(crate) fn numbers() -> impl FnMut(u64) -> u64 {
    let mut seed = 1_u64;
    move |bound| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % bound
    }
}
