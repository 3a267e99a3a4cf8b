//! How much memory can still be had: the host's, and that of every control group this process is in.

use crate::procfs::read_file;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

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

/// Bytes that there are: the least of MemTotal and the limits of our control group and its ancestors.
pub fn total_memory() -> io::Result<u64> {
    total_in(Path::new("/"))
}

/// For which part of the last ten seconds something stood still for want of memory, in percent: the most of what the
/// kernel says of the host and of our control group (`some avg10` of pressure stall information). `None` where it does
/// not say.
pub fn memory_pressure() -> Option<f64> {
    pressure_in(Path::new("/"))
}

pub(super) fn cgroups() -> Cgroups {
    let mounts = read_file(Path::new("/").join(MOUNTS)).map(|text| mounts(&text)).unwrap_or_default();
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
    let meminfo = read_file(root.join("proc/meminfo"))?;
    let [mut available, total] = [meminfo_field(&meminfo, "MemAvailable:")?, meminfo_field(&meminfo, "MemTotal:")?];
    for (group, version) in own_groups(root) {
        available = available.min(headroom(&group, version, total).unwrap_or(u64::MAX));
    }
    Ok(available)
}

fn total_in(root: &Path) -> io::Result<u64> {
    let total = meminfo_field(&read_file(root.join("proc/meminfo"))?, "MemTotal:")?;
    Ok(own_groups(root).iter().filter_map(|(group, version)| limit(group, *version)).fold(total, u64::min))
}

fn pressure_in(root: &Path) -> Option<f64> {
    let own = own_groups(root).into_iter().next().map(|(group, _)| group.join("memory.pressure"));
    let files = own.into_iter().chain([root.join("proc/pressure/memory")]);
    files.filter_map(|file| stalled(&read_file(file).ok()?)).reduce(f64::max)
}

/// From `some avg10=0.12 avg60=0.00 avg300=0.00 total=1234`.
fn stalled(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix("some avg10=")?.split(' ').next()?.parse().ok())
}

/// Our control group and its ancestors that are to be seen, in every hierarchy that bounds memory.
fn own_groups(root: &Path) -> Vec<(PathBuf, Version)> {
    let mut found = Vec::new();
    // A kernel without control groups has neither file.
    let (Ok(groups), Ok(text)) = (read_file(root.join("proc/self/cgroup")), read_file(root.join(MOUNTS))) else {
        return found;
    };
    for mount in mounts(&text) {
        let Some(group) = group_of(&groups, mount.version) else { continue };
        let top = root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
        // What is mounted may be a group below the root: ours is named from the root, or (in a namespace of its own)
        // from what is mounted.
        let relative = Path::new(group).strip_prefix(&mount.root).unwrap_or(Path::new(group.trim_start_matches('/')));
        for directory in top.join(relative).ancestors().take_while(|directory| directory.starts_with(&top)) {
            found.push((directory.to_owned(), mount.version));
        }
    }
    found
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

/// What a group's limit leaves; `None` where it has none, or one above the `total` of the host: the kernel adds up what all
/// processors count before it tells what such a group uses, which takes longer than all else here.
fn headroom(group: &Path, version: Version, total: u64) -> Option<u64> {
    let (usage, inactive) = match version {
        Version::V1 => ("memory.usage_in_bytes", "total_inactive_file"),
        Version::V2 => ("memory.current", "inactive_file"),
    };
    let limit = limit(group, version).filter(|limit| *limit < total)?;
    let usage = number(&group.join(usage))?;
    let stat = read_file(group.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse().ok()).unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
}

/// A group's limit.
fn limit(group: &Path, version: Version) -> Option<u64> {
    number(&group.join(match version {
        Version::V1 => "memory.limit_in_bytes",
        Version::V2 => "memory.max",
    }))
}

/// A file that holds one number. "max" is none.
fn number(file: &Path) -> Option<u64> {
    read_file(file).ok()?.trim().parse().ok()
}

fn meminfo_field(meminfo: &str, field: &str) -> io::Result<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix("kB"));
    let bytes = kib.and_then(|kib| kib.trim().parse::<u64>().ok()?.checked_mul(1024));
    bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/meminfo tells no {field}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::TempDir;
    use std::fs;

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
    fn a_limit_above_all_memory_is_none() {
        let files = [
            ("proc/self/cgroup", "0::/a\n"),
            (MOUNTS, V2_MOUNT),
            ("sys/fs/cgroup/a/memory.max", "16777216000\n"),
            ("sys/fs/cgroup/a/memory.current", "16777216000\n"),
        ];
        assert_eq!(available(&files), 8_192_000 * 1024);
    }

    #[test]
    fn a_limit_is_all_there_is() {
        let files = [("proc/self/cgroup", "0::/a\n"), (MOUNTS, V2_MOUNT), ("sys/fs/cgroup/a/memory.max", "1048576\n")];
        assert_eq!(total_in(host(&files).path()).unwrap(), MIB);
        assert_eq!(total_in(host(&[]).path()).unwrap(), 16_384_000 * 1024);
    }

    #[test]
    fn the_worse_pressure_counts() {
        let psi =
            |avg10| format!("some avg10={avg10} avg60=0.10 avg300=0.00 total=9\nfull avg10=99.0 avg60=0 total=1\n");
        let (all, own) = (psi("1.50"), psi("20.25"));
        let files = [("proc/pressure/memory", all.as_str()), ("proc/self/cgroup", "0::/a\n"), (MOUNTS, V2_MOUNT)];
        assert_eq!(pressure_in(host(&files).path()), Some(1.5));
        let with_own = [files.as_slice(), &[("sys/fs/cgroup/a/memory.pressure", own.as_str())]].concat();
        assert_eq!(pressure_in(host(&with_own).path()), Some(20.25));
        assert_eq!(pressure_in(host(&[]).path()), None);
    }

    #[test]
    fn this_host_has_some() {
        assert!(available_memory().unwrap() > 0 && total_memory().unwrap() >= available_memory().unwrap() / 2);
    }
}
