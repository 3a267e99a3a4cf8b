//! How much memory can still be had: the host's, and that of every control group this process is in.

use std::io;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

/// The kind of control groups that bound this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cgroups {
    None,
    V1,
    V2,
    /// Both are there (hybrid); memory may be bound by either.
    Both,
}

impl fmt::Display for Cgroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::Both => "v1 and v2",
        })
    }
}

/// Bytes that can be allocated before somebody is out of memory: the least of MemAvailable and, for our control group
/// and each of its ancestors, its limit less what it uses and cannot give up at once (its inactive file pages can go).
pub fn available_memory() -> io::Result<u64> {
    available_in(Path::new("/"))
}

pub(super) fn cgroups() -> Cgroups {
    let mounts = read(&Path::new("/").join(MOUNTS)).map(|text| mounts(&text)).unwrap_or_default();
    let any = |version| mounts.iter().any(|mount| mount.version == version);
    match (any(Version::V1), any(Version::V2)) {
        (false, false) => Cgroups::None,
        (true, false) => Cgroups::V1,
        (false, true) => Cgroups::V2,
        (true, true) => Cgroups::Both,
    }
}

const MOUNTS: &str = "proc/self/mountinfo";

/// The same, in a file system that starts at `root`.
fn available_in(root: &Path) -> io::Result<u64> {
    let mut available = mem_available(&read(&root.join("proc/meminfo"))?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo tells no MemAvailable"))?;
    // A kernel without control groups has neither file.
    let (Ok(groups), Ok(text)) = (read(&root.join("proc/self/cgroup")), read(&root.join(MOUNTS))) else {
        return Ok(available);
    };
    for mount in mounts(&text) {
        let Some(group) = group_of(&groups, mount.version) else { continue };
        let top = root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
        // What is mounted may be a group below the root: ours is named from the root, or (in a namespace of its own)
        // from what is mounted.
        let relative = Path::new(group).strip_prefix(&mount.root).unwrap_or(Path::new(group.trim_start_matches('/')));
        for directory in top.join(relative).ancestors().take_while(|directory| directory.starts_with(&top)) {
            available = available.min(headroom(directory, mount.version).unwrap_or(u64::MAX));
        }
    }
    Ok(available)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// A mounted hierarchy that has, or may have, the memory controller.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// Which group is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

fn mounts(mountinfo: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        // 35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?.into(), left.next()?.into());
        let mut right = right.split(' ');
        let version = match (right.next()?, right.nth(1)) {
            ("cgroup2", _) => Version::V2,
            ("cgroup", Some(options)) if options.split(',').any(|option| option == "memory") => Version::V1,
            _ => return None,
        };
        Some(Mount { version, root, point })
    };
    mountinfo.lines().filter_map(parse).collect()
}

/// Our group in a hierarchy, from `/proc/self/cgroup`: lines of `ID:CONTROLLERS:PATH`.
fn group_of(groups: &str, version: Version) -> Option<&str> {
    groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let found = match version {
            Version::V1 => controllers.split(',').any(|controller| controller == "memory"),
            Version::V2 => controllers.is_empty(),
        };
        found.then_some(path)
    })
}

/// What a group's limit leaves; `None` where it has none.
fn headroom(group: &Path, version: Version) -> Option<u64> {
    let (limit, usage, inactive) = match version {
        Version::V1 => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        Version::V2 => ("memory.max", "memory.current", "inactive_file"),
    };
    let number = |file| read(&group.join(file)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number, and no limit.
    let (limit, usage) = (number(limit)?, number(usage)?);
    let stat = read(&group.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse().ok()).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB"))?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn read(path: &Path) -> io::Result<String> {
    fs::read_to_string(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::TempDir;

    const MIB: u64 = 1 << 20;
    const MEMINFO: &str = "MemTotal:       16384000 kB\nMemFree:  100 kB\nMemAvailable:    8192000 kB\n";
    const V2_MOUNT: &str = "41 31 0:38 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1_MOUNTS: &str = "34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                             35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";

    fn host(files: &[(&str, &str)]) -> TempDir {
        let root = TempDir::new();
        for (path, text) in [("proc/meminfo", MEMINFO)].iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn available(files: &[(&str, &str)]) -> u64 {
        available_in(host(files).path()).unwrap()
    }

    #[test]
    fn without_groups_it_is_what_the_host_has() {
        assert_eq!(available(&[]), 8_192_000 * 1024);
        assert!(available_in(TempDir::new().path()).is_err());
    }

    #[test]
    fn every_ancestor_counts() {
        let mut files = vec![
            ("proc/self/cgroup", "0::/a/b\n"),
            (MOUNTS, V2_MOUNT),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1048576\n"),
            ("sys/fs/cgroup/a/memory.max", "104857600\n"),
            ("sys/fs/cgroup/a/memory.current", "41943040\n"),
        ];
        assert_eq!(available(&files), 60 * MIB);
        // Page cache that can go at once is not in the way.
        files.push(("sys/fs/cgroup/a/memory.stat", "anon 9\ninactive_file 10485760\nactive_file 5\n"));
        assert_eq!(available(&files), 70 * MIB);
        // Over its limit, a group has nothing left.
        files.push(("sys/fs/cgroup/a/b/memory.max", "4096\n"));
        assert_eq!(available(&files), 0);
    }

    #[test]
    fn version_1_counts_too() {
        let files = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/box\n0::/\n"),
            (MOUNTS, V1_MOUNTS),
            ("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "67108864\n"),
            ("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "33554432\n"),
            ("sys/fs/cgroup/memory/box/memory.stat", "inactive_file 4096\ntotal_inactive_file 8388608\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "99999999\n"),
        ];
        assert_eq!(available(&files), 40 * MIB);
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root() {
        // Version 1 in Docker: the group is named from the host's root, and mounted at the top.
        let limit = [
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "67108864\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n"),
        ];
        let mount = "35 31 0:32 /docker/c0ffee /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let files = [("proc/self/cgroup", "4:memory:/docker/c0ffee\n"), (MOUNTS, mount), limit[0], limit[1]];
        assert_eq!(available(&files), 64 * MIB);
        // A group that is not to be seen from here: its mounted ancestors still are.
        let files = [("proc/self/cgroup", "4:memory:/not/here\n"), (MOUNTS, V1_MOUNTS), limit[0], limit[1]];
        assert_eq!(available(&files), 64 * MIB);
    }

    #[test]
    fn this_host_has_some() {
        assert!(available_memory().unwrap() > 0);
    }
}
