//! What `doctor` shows: each thing that matters on this host, and what follows for the user.

use super::memory::{available_memory, cgroups};
use super::{features, isolation, latency, max_map_count, open_kvm, probe};
use crate::api::Confinement;
use crate::machine::landlock::{self, Landlocked};
use crate::units::{ByteSize, PAGE_BYTES};
use crate::wire::Isolation;
use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_PRE_FAULT_MEMORY};
use kvm_ioctls::{Cap, Kvm};
use linux_raw_sys::general::{UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// How well something is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// VMs run, and something is slower or weaker for it.
    Degraded,
    /// No VM runs without it.
    Missing,
}

/// One thing that matters.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Item {
    /// What it is.
    pub item: String,
    /// How it is here.
    pub value: String,
    /// How well that is.
    pub verdict: Verdict,
    /// What follows for the user.
    pub meaning: String,
}

/// What this host allows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostReport {
    /// VMs can run: nothing is missing.
    pub can_run: bool,
    /// Why, one by one.
    pub items: Vec<Item>,
    /// What keeps a VM process apart that was made to find out, as the kernel tells it; null if none could be made.
    pub confinement: Option<Confinement>,
}

impl HostReport {
    /// Asks this host. It takes some milliseconds: a KVM VM is made, and processes. `jail` tries to make one that is kept apart.
    pub fn probe(jail: impl FnOnce() -> Result<Option<Confinement>, String>) -> Self {
        let mut items = kvm();
        items.extend([virtualization(), kernel(), userfaultfd(), pagemap_scan(), isolation_kind()]);
        let (jailed, confinement) = jailed(jail());
        items.push(jailed);
        items.extend(confinement.as_ref().map(confined));
        items.extend([filter(), landlock(), memory()]);
        items.extend([files(), processes(), mappings(), overcommit(), huge_pages(), page_sizes(), wake_latency()]);
        Self { can_run: items.iter().all(|item| item.verdict != Verdict::Missing), items, confinement }
    }
}

fn item(item: &str, value: impl ToString, verdict: Verdict, meaning: impl ToString) -> Item {
    Item { item: item.into(), value: value.to_string(), verdict, meaning: meaning.to_string() }
}

fn ok(name: &str, value: impl ToString, meaning: impl ToString) -> Item {
    item(name, value, Verdict::Ok, meaning)
}

fn degraded(name: &str, value: impl ToString, meaning: impl ToString) -> Item {
    item(name, value, Verdict::Degraded, meaning)
}

fn missing(name: &str, value: impl ToString, meaning: impl ToString) -> Item {
    item(name, value, Verdict::Missing, meaning)
}

fn kvm() -> Vec<Item> {
    let kvm = match open_kvm() {
        Ok(kvm) => kvm,
        Err(e) => return vec![missing("kvm", "unusable", e)],
    };
    let made = match kvm.create_vm() {
        Ok(_) => ok("kvm", format!("version {}", kvm.get_api_version()), "VMs can be made"),
        Err(e) => missing("kvm", "makes no VM", format!("KVM_CREATE_VM: {e} (another hypervisor may have the CPU)")),
    };
    let required = |name, cap| match kvm.check_extension(cap) {
        true => ok(name, "yes", "needed"),
        false => missing(name, "no", "the VMM is built on it: a newer kernel is needed"),
    };
    let mut items = vec![
        made,
        required("kvm user memory", Cap::UserMemory),
        required("kvm immediate exit", Cap::ImmediateExit),
        required("kvm split irqchip", Cap::SplitIrqchip),
    ];
    items.extend([dirty_log(&kvm), extended_state(&kvm), registers(&kvm), pre_fault(&kvm), sizes(&kvm)]);
    items
}

fn dirty_log(kvm: &Kvm) -> Item {
    match kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) {
        0 => ok("kvm dirty log", "bitmap", "a fork reads what its parent wrote; reading protects all pages at once"),
        _ => ok("kvm dirty log", "bitmap, manual protect", "a fork reads what its parent wrote"),
    }
}

fn extended_state(kvm: &Kvm) -> Item {
    match kvm.check_extension_int(Cap::Xsave2) {
        0 => degraded("kvm XSAVE2", "no", "guest register state past 4 KiB (AMX) is not forked; hide it from guests"),
        bytes => ok("kvm XSAVE2", format!("{bytes} bytes"), "all guest register state is forked"),
    }
}

fn registers(kvm: &Kvm) -> Item {
    match kvm.get_msr_index_list() {
        Ok(list) => ok("kvm MSR list", format!("{} registers", list.as_slice().len()), "all of them are forked"),
        Err(e) => missing("kvm MSR list", e, "a fork cannot know which registers there are"),
    }
}

fn pre_fault(kvm: &Kvm) -> Item {
    match kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) {
        0 => ok("kvm pre-fault", "no", "nothing: a clone's pages are mapped at its first touch"),
        _ => ok("kvm pre-fault", "yes", "pages that a clone will need can be mapped ahead"),
    }
}

fn sizes(kvm: &Kvm) -> Item {
    let (slots, vcpus) = (kvm.get_nr_memslots(), kvm.get_max_vcpus());
    ok("kvm sizes", format!("{slots} memory slots, {vcpus} vCPUs"), "most per VM")
}

fn virtualization() -> Item {
    const NAME: &str = "virtualization";
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let parameter = |path| sysctl(path).is_some_and(|text| matches!(text.as_str(), "Y" | "1"));
    let (kind, nested_paging) = match () {
        () if has_flag(&cpuinfo, "vmx") => ("vmx", parameter("/sys/module/kvm_intel/parameters/ept")),
        () if has_flag(&cpuinfo, "svm") => ("svm", parameter("/sys/module/kvm_amd/parameters/npt")),
        () => {
            let meaning = "shadow paging or PVM: stock Linux kernels do not run; the built-in guest does";
            return degraded(NAME, "neither vmx nor svm", meaning);
        }
    };
    if nested_paging {
        ok(NAME, format!("{kind}, nested paging"), "any guest runs at full speed")
    } else {
        degraded(NAME, format!("{kind}, shadow paging"), "guest page faults are slower")
    }
}

/// Whether the first CPU has it.
fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split_whitespace().any(|word| word == flag))
}

fn kernel() -> Item {
    let name = uname().map(|uts| uts.release().to_string_lossy().into_owned()).unwrap_or_default();
    match kernel_version(&name) {
        Some(version) if version >= (6, 1) => ok("kernel", name, "6.1 or newer"),
        _ => degraded("kernel", name, "not tested before 6.1"),
    }
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn userfaultfd() -> Item {
    const NAME: &str = "userfaultfd";
    let without = "forks settle within the pause, and nothing is swapped";
    let name = match probe::userfaultfd() {
        Err(e) => {
            let remedy = "make /dev/userfaultfd usable, or be root";
            return degraded(NAME, format!("no: {e}"), format!("{without}; {remedy}"));
        }
        Ok(_) if !features().userfaultfd => return degraded(NAME, "off (OFFSHOOT_DISABLE)", without),
        Ok(features) if features & u64::from(UFFD_FEATURE_MISSING_SHMEM) == 0 => {
            return degraded(NAME, "not for shared memory", without);
        }
        Ok(features) if features & u64::from(UFFD_FEATURE_WP_HUGETLBFS_SHMEM) == 0 => "yes, no write protection",
        Ok(_) => "yes",
    };
    ok(NAME, name, "a fork's pages settle behind its back")
}

fn pagemap_scan() -> Item {
    const NAME: &str = "PAGEMAP_SCAN";
    match probe::pagemap_scan() {
        Ok(()) if features().pagemap_scan => ok(NAME, "yes", "private pages are found fast"),
        Ok(()) => degraded(NAME, "off (OFFSHOOT_DISABLE)", "the pagemap is read instead"),
        Err(e) => degraded(
            NAME,
            format!("no: {e}"),
            "the pagemap is read instead: forks pause a little longer (Linux 6.7 has it)",
        ),
    }
}

fn isolation_kind() -> Item {
    const NAME: &str = "isolation";
    match isolation() {
        Isolation::OwnUser => ok(NAME, "own user", "each VM process has a user id of its own and sees no files"),
        Isolation::UserNamespace => ok(NAME, "user namespace", "each VM process has no rights and sees no files"),
        Isolation::Off => {
            let meaning = "VMs run with `serve --isolation weaker` alone, and their processes can do what their user can: allow \
                           user namespaces, or be root";
            missing(NAME, "off", meaning)
        }
    }
}

fn jailed(tried: Result<Option<Confinement>, String>) -> (Item, Option<Confinement>) {
    const NAME: &str = "jail";
    let (found, tried) = tried.map_or_else(|why| (None, Err(why)), |found| (found, Ok(())));
    let item = match tried {
        Ok(()) => {
            let meaning =
                "VM processes have mount, network, IPC and UTS namespaces of their own, and an empty, read-only root";
            ok(NAME, "yes", meaning)
        }
        Err(why) => missing(
            NAME,
            why,
            "VMs run with `serve --isolation weaker` alone: namespaces take CAP_SYS_ADMIN, or user namespaces",
        ),
    };
    (item, found)
}

fn confined(found: &Confinement) -> Item {
    const NAME: &str = "confinement";
    match &found.weaknesses[..] {
        [] => ok(NAME, "complete", "read back from /proc of a VM process: `inspect` tells it of each VM"),
        weak => degraded(NAME, weak.join("; "), "a VM process could do more to this host than it should"),
    }
}

fn filter() -> Item {
    const NAME: &str = "system call filter";
    match probe::system_call_filter() {
        Ok(()) => ok(NAME, "seccomp", "a VM process makes the calls that it needs, and is ended for any other"),
        Err(e) => missing(NAME, e, "no VM is started without: a kernel with CONFIG_SECCOMP_FILTER is needed"),
    }
}

fn landlock() -> Item {
    const NAME: &str = "Landlock";
    match landlock::probe() {
        Ok(Landlocked::Whole) => ok(NAME, "yes", "a second wall: no files, no TCP, no signals to other processes"),
        Ok(Landlocked::Partly) => {
            ok(NAME, "in part", "a second wall: newer kernels add TCP and signals to other processes")
        }
        Ok(Landlocked::Not) => {
            ok(NAME, "no", "nothing: it would be a second wall, behind the filter and the namespaces")
        }
        Err(e) => degraded(NAME, e, "the kernel has it, and it cannot be used as a second wall"),
    }
}

fn memory() -> Item {
    let groups = cgroups();
    match available_memory() {
        Ok(bytes) if bytes < crate::api::MIN_MEMORY => {
            missing("memory", ByteSize(bytes).approx(), "too little for any guest")
        }
        Ok(bytes) => ok(
            "memory",
            format!("{} available, control groups {groups}", ByteSize(bytes).approx()),
            "the largest guest there can be",
        ),
        Err(e) => missing("memory", "unknown", format!("read available memory: {e}")),
    }
}

fn files() -> Item {
    const NAME: &str = "open files";
    match limit(Resource::RLIMIT_NOFILE) {
        Some(files) if files < 4096 => {
            degraded(NAME, files, "a server needs several for each VM: raise `ulimit -n` to have hundreds")
        }
        files => ok(NAME, shown(files), "a server needs several for each VM"),
    }
}

fn processes() -> Item {
    const NAME: &str = "processes";
    match limit(Resource::RLIMIT_NPROC) {
        Some(count) if count < 4096 => {
            degraded(NAME, count, "a VM takes two, and a thread for each vCPU: raise `ulimit -u` to have many")
        }
        count => ok(NAME, shown(count), "a VM takes two, and a thread for each vCPU"),
    }
}

/// The most there may be (the server raises its own limit to it); `None` for no limit.
fn limit(resource: Resource) -> Option<u64> {
    let (_, hard) = getrlimit(resource).ok()?;
    (hard != RLIM_INFINITY).then_some(hard)
}

fn shown(limit: Option<u64>) -> String {
    limit.map_or("unlimited".into(), |limit| limit.to_string())
}

fn mappings() -> Item {
    const NAME: &str = "vm.max_map_count";
    let count = max_map_count();
    let meaning = format!("a VM's window has {} runs; past that, forks copy clean pages along", count / 4);
    if count < 65530 { degraded(NAME, count, meaning) } else { ok(NAME, count, meaning) }
}

fn overcommit() -> Item {
    const NAME: &str = "vm.overcommit_memory";
    match sysctl("/proc/sys/vm/overcommit_memory").as_deref() {
        Some("2") => {
            degraded(NAME, "2 (strict)", "every VM's whole memory counts against the commit limit, shared or not")
        }
        value => ok(NAME, value.unwrap_or("unknown"), "VMs may share more memory than there is"),
    }
}

fn huge_pages() -> Item {
    const NAME: &str = "transparent huge pages";
    let chosen = sysctl("/sys/kernel/mm/transparent_hugepage/enabled").as_deref().and_then(selected).map(str::to_owned);
    match chosen.as_deref() {
        Some(mode @ ("always" | "madvise")) => ok(NAME, mode, "a launched VM uses them until its first fork"),
        mode => degraded(NAME, mode.unwrap_or("none"), "a launched VM's first touches are slower"),
    }
}

/// The word in brackets.
fn selected(text: &str) -> Option<&str> {
    text.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

fn page_sizes() -> Item {
    let mut kib: Vec<u64> = fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            entry.ok()?.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    kib.push(PAGE_BYTES / 1024);
    kib.sort_unstable();
    let list: Vec<String> = kib.iter().map(|&kib| ByteSize(kib << 10).to_string()).collect();
    ok("page sizes", list.join(", "), "memory is shared in pages of 4K")
}

fn wake_latency() -> Item {
    const NAME: &str = "wake-up latency";
    match latency::probe() {
        Ok(()) => ok(
            NAME,
            "can be asked for",
            "with `serve --low-latency` idle processors poll during a fork, which makes it faster",
        ),
        Err(e) => {
            ok(NAME, format!("as it is: {e}"), "idle processors halt during a fork, which makes it a little slower")
        }
    }
}

fn sysctl(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_kernel_are_read() {
        assert_eq!(kernel_version("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(kernel_version("6.1"), Some((6, 1)));
        assert_eq!(kernel_version("mainline"), None);
        assert_eq!(selected("always [madvise] never"), Some("madvise"));
        assert_eq!(selected("none"), None);
        assert!(has_flag("processor: 0\nflags\t\t: fpu vmx sse\n", "vmx"));
        assert!(!has_flag("flags\t\t: fpu svm_lock sse\nvmx flags\t: vnmi\n", "svm"));
    }

    #[test]
    fn a_report_has_no_empty_words() {
        let report = HostReport::probe(|| Ok(None));
        assert!(report.items.len() >= 12);
        for item in &report.items {
            assert!(!item.item.is_empty() && !item.value.is_empty() && !item.meaning.is_empty(), "{item:?}");
        }
        assert_eq!(report.can_run, report.items.iter().all(|item| item.verdict != Verdict::Missing));
    }
}
