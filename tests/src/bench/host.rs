//! Where the figures come from: they mean nothing without it.

use serde::{Deserialize, Serialize};
use std::fs;

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its processor, and what it says it is.
    pub machine: String,
    /// How its KVM shows memory to guests.
    pub kvm: String,
    /// Its kernel's release.
    pub kernel: String,
    /// Processors that this program may use.
    pub cores: usize,
}

impl Host {
    /// This one.
    pub fn this() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let virtual_machine = cpuinfo.contains(" hypervisor");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, m)| m);
        let kind = if virtual_machine { "virtual machine" } else { "bare metal" };
        Self {
            machine: format!("{}, {kind}", model.unwrap_or("unknown processor")),
            kvm: kvm_kind(|parameter| fs::read_to_string(format!("/sys/module/{parameter}")).ok()),
            kernel: release.trim().to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// In one line.
    pub fn line(&self) -> String {
        let Self { machine, kvm, kernel, cores } = self;
        format!("{machine}, {cores} cores; KVM with {kvm}; Linux {kernel}")
    }
}

/// Whether the processor walks the guest's and the host's page tables itself, or KVM keeps shadows of them.
fn kvm_kind(read: impl Fn(&str) -> Option<String>) -> String {
    let on = |parameter| read(parameter).is_some_and(|value| matches!(value.trim(), "Y" | "1"));
    if on("kvm_intel/parameters/ept") {
        "nested paging (EPT)".into()
    } else if on("kvm_amd/parameters/npt") {
        "nested paging (NPT)".into()
    } else {
        "shadow paging".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_kvm() {
        let only =
            |name: &'static str, value: &'static str| move |asked: &str| (asked == name).then(|| value.to_owned());
        assert_eq!(kvm_kind(only("kvm_intel/parameters/ept", "Y\n")), "nested paging (EPT)");
        assert_eq!(kvm_kind(only("kvm_amd/parameters/npt", "1\n")), "nested paging (NPT)");
        assert_eq!(kvm_kind(only("kvm_amd/parameters/npt", "N\n")), "shadow paging");
        assert_eq!(kvm_kind(|_| None), "shadow paging");
    }
}
