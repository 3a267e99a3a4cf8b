//! **In-process**: the common design. All VMs live in one process; a fork makes a KVM VM, a memory slot over a private
//! mapping of the parent's memory, and a vCPU, in the best order of calls.

use super::{numbers, serve};
use crate::bare::{Platform, Snapshot, Vm};
use crate::stats::timed;
use crate::{Result, fail};

/// RAM in MiB, pages that the parent has written, and VMs that live beside. Answers `fork` (µs from the request to the
/// guest's first exit; the VM ends), and `crowd N` (N forks, each of which runs and answers; µs in total, and µs for
/// ending them all).
pub fn run(arguments: &[u64]) -> Result<()> {
    let [mib, pages, live] = numbers(arguments)?;
    let platform = Platform::open()?;
    let parent = Snapshot::make(&platform, mib << 20, pages)?;
    let fork = || {
        let mut vm = parent.fork(&platform)?;
        vm.run()?;
        Ok::<Vm, crate::Error>(vm)
    };
    let mut others = Vec::new();
    for _ in 0..live {
        others.push(fork()?);
    }
    serve(|verb, given| match verb {
        "fork" => {
            let (vm, us) = timed(fork);
            drop(vm?);
            Ok(vec![us])
        }
        "crowd" => {
            let [count] = numbers(given)?;
            let (vms, us) = timed(|| {
                let mut vms = Vec::new();
                for _ in 0..count {
                    let mut vm = fork()?;
                    vm.send("id")?;
                    vms.push(vm);
                }
                Ok::<_, crate::Error>(vms)
            });
            let vms = vms?;
            let ((), end) = timed(|| drop(vms));
            Ok(vec![us, end])
        }
        _ => fail("fork or crowd"),
    })
}
