//! What `/proc` says of processes, and how to end one.

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// The living children of a process: of a server, its zygote, its VM processes, its pool and all their keepers.
pub fn children_of(parent: i32) -> Vec<i32> {
    let all = fs::read_dir("/proc").expect("there is a /proc");
    let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| state_and_parent(pid).is_some_and(|(state, of)| of == parent && state != 'Z')).collect()
}

/// Whether a process runs, or could.
pub fn is_alive(pid: i32) -> bool {
    state_and_parent(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

/// Zygotes and VM processes, of any server, that have lost it.
pub fn orphans() -> Vec<i32> {
    let read = |pid: i32, what| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
    let all = fs::read_dir("/proc").expect("there is a /proc");
    let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let ours = pids.filter(|&pid| read(pid, "comm").starts_with("offshoot-") && is_alive(pid));
    ours.filter(|&pid| {
        state_and_parent(pid)
            .is_some_and(|(_, parent)| !read(parent, "cmdline").split('\0').any(|word| word == "serve"))
    })
    .collect()
}

/// Whether a process is a zygote.
pub fn is_zygote(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "offshoot-zygote")
}

/// Ends a process as nobody wants to be ended. One that is gone is as wanted.
pub fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// The real, effective, saved and file system user ids of a process.
pub fn users(pid: i32) -> Vec<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read a process's status");
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a process has user ids");
    line.split_whitespace().map(|id| id.parse().expect("a number")).collect()
}

/// The lines of a process's `maps`.
pub fn maps(pid: i32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("read a process's maps");
    maps.lines().map(str::to_owned).collect()
}

/// What a process's descriptors are, with the paths in `/proc` to open them by.
pub fn descriptors(pid: i32) -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("list a process's descriptors");
    let named = entries.flatten().map(|entry| entry.path());
    named.filter_map(|path| Some((path.clone(), fs::read_link(path).ok()?.to_string_lossy().into_owned()))).collect()
}

/// Which user namespace a process is in.
pub fn user_namespace(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/user")).expect("a process has a user namespace")
}

/// What the host has for a server, as the host says: what its processes have beside stores, their page tables, and the
/// pages of its stores, whoever sees them.
pub fn host_memory(server: i32) -> u64 {
    // A keeper, which has no descriptors, has the memory of its VM process: that counts once.
    let has_descriptors = |pid: &i32| fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut all| all.next().is_some());
    let processes: Vec<i32> = children_of(server).into_iter().filter(has_descriptors).chain([server]).collect();
    let mut seen = BTreeSet::new();
    let stores = descriptors(server).into_iter().filter(|(_, name)| name.contains("memfd:offshoot-store"));
    let stores: Vec<PathBuf> = stores.map(|(path, _)| path).collect();
    let slow: u64 = processes.iter().filter_map(|&pid| files_and_tables(pid)).sum();
    // At one moment, as far as that goes: pages move between processes and stores all the time.
    let anonymous: u64 = processes.iter().filter_map(|&pid| anonymous(pid)).sum();
    let stores = stores.iter().filter_map(|path| fs::metadata(path).ok()).filter(|store| seen.insert(store.ino()));
    slow + anonymous + stores.map(|store| store.blocks() * 512).sum::<u64>()
}

/// A process's share of the files it maps, and its page tables. A process that ends meanwhile has none.
fn files_and_tables(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |text: &str, key: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some((field(&rollup, "Pss_File:")? + field(&status, "VmPTE:")?) << 10)
}

/// A process's pages that are of no file.
fn anonymous(pid: i32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let mut pages = statm.split_whitespace().skip(1).map(|word| word.parse::<u64>());
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    Some((resident - shared) * 4096)
}

/// The time that a process has run, in hundredths of a second.
pub fn run_ticks(pid: i32) -> u64 {
    vmm::procfs::run_ticks(pid).expect("read a process's times")
}

fn state_and_parent(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, can have anything in it.
    let mut after = stat[stat.rfind(')')? + 1..].split_whitespace();
    Some((after.next()?.chars().next()?, after.next()?.parse().ok()?))
}
