//! What tests of several modules need.

use crate::addr::{Gfn, GfnRange};
use crate::ids::StoreId;
use crate::space::map::Protection;
use crate::window::{Failure, Window};
use std::io;

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

/// A window that has ones in all its pages.
pub(crate) struct Ones;

impl Window for Ones {
    fn read_scratch(&self, _: StoreId, _: Gfn, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(1);
        Ok(())
    }

    fn leave_scratch(&mut self, _: StoreId, _: GfnRange) {}

    fn drop_scratch(&mut self, _: StoreId) {}

    fn zero(&mut self, _: GfnRange) {}

    fn supply(&mut self, _: Gfn, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn protect(&mut self, _: GfnRange, _: Protection) -> io::Result<()> {
        Ok(())
    }

    fn wake(&mut self, _: GfnRange) {}

    fn fail(&mut self, failure: Failure) {
        panic!("{failure}");
    }
}
