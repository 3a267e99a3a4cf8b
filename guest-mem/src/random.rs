//! Numbers for tests: the same at each run.

/// Pseudo-random numbers below a bound.
pub(crate) fn numbers() -> impl FnMut(u64) -> u64 {
    let mut seed = 1_u64;
    move |bound| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % bound
    }
}
