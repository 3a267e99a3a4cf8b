//! One page back from the compressed tier, as whoever touches it sees it.

use super::PRIVATE;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::FIRST_PAGE;
use crate::reference::Reference;
use crate::stats::{Samples, timed};
use crate::{Result, fail};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::io::IoSliceMut;
use std::thread;
use std::time::Duration;
use vmm::client::Vm;
use vmm::machine::WINDOW_BASE;
use vmm::units::ByteSize;

/// Pages that come back with one: a cluster.
const CLUSTER: u64 = 16;
const PAGE: u64 = 4096;

pub fn run(bench: &mut Bench) -> Result<()> {
    let home = bench.home()?;
    let parent = home.launch_settled("p", 256, PRIVATE)?;
    let pid = process_of(&parent)?;
    home.client().reclaim_all(ByteSize::mib(64))?;
    let before = home.client().stats()?.total;
    let count = bench.pick(400, 150);
    let mut bare = Reference::start("fault", &[count * CLUSTER * PAGE, CLUSTER])?;
    let base = bare.figure("where")? as u64;
    let [mut ours, mut theirs] = [(); 2].map(|()| Samples::default());
    let first = FIRST_PAGE.next_multiple_of(CLUSTER);
    // Backwards: nothing is brought ahead of such touches.
    for nth in (0..count).rev() {
        // The server is at rest, and so is the loop.
        thread::sleep(Duration::from_millis(2));
        ours.push(touch(pid, WINDOW_BASE + (first + nth * CLUSTER) * PAGE)?);
        thread::sleep(Duration::from_millis(2));
        theirs.push(touch(bare.pid(), base + nth * CLUSTER * PAGE)?);
    }
    let back = home.client().stats()?.total.swap_in_pages - before.swap_in_pages;
    if back < count * CLUSTER * 9 / 10 {
        return fail(format!("{count} touches of clusters brought {back} pages back: not all were out of memory"));
    }
    let reference = Some(("userfaultfd, minimal loop, 16 pages", &theirs));
    bench.figure(&Figure { of: "one page".into(), unit: "us", subject: &ours, reference, aim: Aim::AtMost(1.5) });
    bench.note(format!(
        "{:.1} pages came back per touch, the touched one first, for which the touch waits, and the others behind it; \
         touched from outside, by process_vm_readv",
        back as f64 / count as f64
    ));
    Ok(())
}

/// The process that holds a VM's memory.
pub fn process_of(vm: &Vm) -> Result<i32> {
    vm.stats()?.vm.pid.ok_or_else(|| format!("{} has no process", vm.name()).into())
}

/// Reads 8 bytes of another process: µs.
fn touch(pid: i32, address: u64) -> Result<f64> {
    let mut bytes = [0; 8];
    read(pid, address, &mut bytes)
}

/// Reads bytes of another process: µs.
pub fn read(pid: i32, address: u64, bytes: &mut [u8]) -> Result<f64> {
    let remote = [RemoteIoVec { base: address as usize, len: bytes.len() }];
    let wanted = bytes.len();
    let (got, us) = timed(|| process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(bytes)], &remote));
    if got? == wanted { Ok(us) } else { fail(format!("{address:#x} of process {pid} can be read in part only")) }
}
