//! **Plain copy-on-write**: the kernel's own fault on a private mapping of a memfd, taken for a guest's write, in a process
//! with one KVM VM.

use super::{numbers, serve};
use crate::bare::{Platform, Snapshot};
use crate::stats::timed;
use crate::{Result, fail};

/// RAM in MiB, and pages that the parent has written. Answers `read FIRST COUNT` and `unread FIRST COUNT`: µs for writing
/// these pages in a VM made for it, which has read them before, or has not.
pub fn run(arguments: &[u64]) -> Result<()> {
    let [mib, pages] = numbers(arguments)?;
    let platform = Platform::open()?;
    let parent = Snapshot::make(&platform, mib << 20, pages)?;
    serve(|verb, given| {
        let [first, count] = numbers(given)?;
        let mut vm = parent.fork(&platform)?;
        vm.send("id")?;
        match verb {
            "read" => vm.send(&format!("verify-touch {first} {count} 1"))?,
            "unread" => {}
            _ => return fail("read or unread"),
        }
        let (done, us) = timed(|| vm.send(&format!("touch {first} {count} 2")));
        done?;
        Ok(vec![us])
    })
}
