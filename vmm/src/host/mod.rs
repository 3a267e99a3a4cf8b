//! What this host allows: asked by the server before it makes a VM, and shown by `doctor`.
//!
//! Everything is probed, nothing concluded from a version. `OFFSHOOT_DISABLE=userfaultfd,pagemap-scan` turns off what
//! has a fallback, to test that.

pub(crate) mod heap;
pub mod latency;
mod memory;
mod probe;
mod report;

pub use memory::{available_memory, memory_pressure, total_memory};
pub(crate) use probe::system_call_filter;
pub use report::{HostReport, Item, Verdict};

use crate::wire::{HostFeatures, Isolation};
use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::unistd::geteuid;
use std::fs;
use std::ops::Range;
use std::path::Path;

/// User and group ids of VM processes: this many from far above those that people get, and below what user namespaces usually
/// map. Linux has no process id from 4 Mi on.
pub(crate) const USERS: Range<u64> = 0x7000_0000..0x7040_0000;

/// Why KVM cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvmError {
    /// There is none.
    #[error("this host has no /dev/kvm: load the kvm module, or turn on (nested) virtualization")]
    Absent,
    /// It is for others.
    #[error("no permission to use /dev/kvm: join its group (usually kvm), or be root")]
    Denied,
    /// It is of a version that no kernel of this century has.
    #[error("/dev/kvm speaks version {0} of its interface, not 12")]
    Version(i32),
    /// It fails otherwise.
    #[error("open /dev/kvm: {0}")]
    Other(Errno),
}

/// KVM, ready to make VMs.
pub fn open_kvm() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match Errno::from_raw(e.errno()) {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => KvmError::Absent,
        Errno::EACCES | Errno::EPERM => KvmError::Denied,
        e => KvmError::Other(e),
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        version => Err(KvmError::Version(version)),
    }
}

/// The kernel features that have a fallback.
pub fn features() -> HostFeatures {
    let disabled = std::env::var("OFFSHOOT_DISABLE").unwrap_or_default();
    let enabled = |feature| !disabled.split(',').any(|word| word.trim() == feature);
    HostFeatures {
        userfaultfd: enabled("userfaultfd") && probe::userfaultfd().is_ok(),
        pagemap_scan: enabled("pagemap-scan") && probe::pagemap_scan().is_ok(),
    }
}

/// How a VM process can be kept apart.
pub fn isolation() -> Isolation {
    let mapped = |name| fs::read_to_string(Path::new("/proc/self").join(name)).is_ok_and(|map| maps(&map, USERS));
    let users = || mapped("uid_map") && mapped("gid_map");
    if geteuid().is_root() && has_capabilities(&[CAP_SETGID, CAP_SETUID, CAP_SYS_CHROOT]) && users() {
        Isolation::OwnUser
    } else if probe::user_namespace().is_ok() {
        Isolation::UserNamespace
    } else {
        Isolation::Off
    }
}

/// Whether the ids in this range are ids of this user namespace: who is root of one may have few beside its own.
fn maps(map: &str, ids: Range<u64>) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        let (first, _, count): (u64, u64, u64) = (next(), next(), next());
        first <= ids.start && ids.end <= first + count
    })
}

/// How many mappings a process may have (`vm.max_map_count`); the kernel's default where it does not say.
pub fn max_map_count() -> u32 {
    let text = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    text.trim().parse().unwrap_or(65530)
}

const CAP_SETGID: u32 = 6;
const CAP_SETUID: u32 = 7;
const CAP_SYS_CHROOT: u32 = 18;

/// Whether this process has all of them in its effective set.
fn has_capabilities(wanted: &[u32]) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective_capabilities(&status).is_some_and(|set| wanted.iter().all(|capability| set >> capability & 1 == 1))
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(field.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read() {
        let status = "Name:\tx\nCapPrm:\t0\nCapEff:\t00000000a80425fb\nCapBnd:\t0\n";
        assert_eq!(effective_capabilities(status), Some(0xa804_25fb));
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }

    /// Of the root of a rootless container `doctor` said that its VM processes had users of their own, and every launch failed.
    #[test]
    fn who_is_root_of_a_namespace_may_have_no_other_users() {
        assert!(maps("         0          0 4294967295\n", USERS));
        assert!(!maps("         0       1000          1\n", USERS));
        assert!(!maps("         0       1000          1\n         1     100000      65536\n", USERS));
        assert!(!maps("", USERS));
    }

    #[test]
    fn probes_come_to_an_answer() {
        // Whatever this host is, asking twice gives the same.
        assert_eq!(features(), features());
        assert_eq!(isolation(), isolation());
    }
}
