//! What the kernel says of processes: who is whose, what they run, what they take.

use crate::{Result, home};
use std::fs;
use std::path::{Path, PathBuf};

/// The children of a process, those that have ended and were not waited for included.
pub fn children_of(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let all: Vec<String> = lists.collect();
    all.iter().flat_map(|list| list.split_whitespace()).filter_map(|pid| pid.parse().ok()).collect()
}

/// The children of a server but its zygote.
pub fn vms_of(pid: i32) -> Vec<i32> {
    let zygote =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim_end() == "offshoot-zygote");
    children_of(pid).into_iter().filter(|pid| !zygote(pid)).collect()
}

/// The time that all threads of a process have run, in seconds.
pub fn run_seconds(pid: i32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok());
    stats.filter_map(|stat| stat.split(' ').next()?.parse::<f64>().ok()).sum::<f64>() / 1e9
}

/// What a process takes of memory for its own and shares with others, in bytes: of all its pages its part, and its page
/// tables. A process that only lends its address space to another's name (it has no descriptors) takes nothing more.
pub fn taken(pid: i32) -> (u64, u64) {
    let has_descriptors = fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut entries| entries.next().is_some());
    match vmm::procfs::UsageFiles::open(pid).and_then(|reading| reading.read()) {
        Ok(usage) if has_descriptors => (usage.pss, usage.page_tables),
        _ => (0, 0),
    }
}

/// A control group of ours, which tells of kernel memory. It goes when this is dropped, with no process in it any more.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    V1,
    V2,
}

impl Group {
    /// One below this process's own, if there may be one.
    pub fn new(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let place = |fields: &[&str], group: &str| {
            let path = Path::new(fields[4]).join(group.trim_start_matches('/'));
            path.join(format!("offshoot-bench-{}-{name}", std::process::id()))
        };
        for line in mounts.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let controllers = fields.last().copied().unwrap_or_default();
            let (kind, group) = if controllers.split(',').any(|option| option == "memory") {
                (Kind::V1, own.lines().find_map(|line| line.split_once(":memory:")).map(|(_, group)| group))
            } else if fields.contains(&"cgroup2") {
                (Kind::V2, own.lines().find_map(|line| line.strip_prefix("0::")))
            } else {
                continue;
            };
            let Some(path) = group.map(|group| place(&fields, group)) else { continue };
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let this = Self { path, kind };
            if this.kernel_bytes().is_some() {
                return Some(this);
            }
        }
        None
    }

    /// Moves a process in. What it has stays charged where it was.
    pub fn admit(&self, pid: i32) -> Result<()> {
        Ok(fs::write(self.path.join("cgroup.procs"), pid.to_string())?)
    }

    /// The kernel's memory for the processes: page tables, stacks, KVM's, all else.
    pub fn kernel_bytes(&self) -> Option<u64> {
        match self.kind {
            Kind::V1 => self.number("memory.kmem.usage_in_bytes"),
            Kind::V2 => self.stat("kernel"),
        }
    }

    /// Memory that processes have and share, without what the kernel keeps of files.
    pub fn user_bytes(&self) -> Option<u64> {
        match self.kind {
            Kind::V1 => Some(self.stat("rss")? + self.stat("shmem")?),
            Kind::V2 => Some(self.stat("anon")? + self.stat("shmem")?),
        }
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }

    fn stat(&self, field: &str) -> Option<u64> {
        let stat = fs::read_to_string(self.path.join("memory.stat")).ok()?;
        stat.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(' ')?.parse().ok())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes that have ended are in it until the kernel has done with them.
        let gone = home::wait("a control group is empty", || fs::remove_dir(&self.path).ok());
        if let Err(error) = gone {
            eprintln!("bench: remove {}: {error}", self.path.display());
        }
    }
}
