//! A busy loop on one core.

use super::{numbers, serve};
use crate::{Result, fail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Which core.
pub fn run(arguments: &[u64]) -> Result<()> {
    let [core] = numbers(arguments)?;
    let mut set = CpuSet::new();
    set.set(core as usize)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    std::thread::spawn(|| {
        loop {
            std::hint::black_box(0);
        }
    });
    serve(|_, _| fail("nothing to ask"))
}
