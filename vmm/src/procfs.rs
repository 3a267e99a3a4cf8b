//! What `/proc` says of a process's memory.

use guest_mem::PAGE_SHIFT;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What most files of the kernel's hold at most. They do not tell how long they are: without a buffer of this size they are
/// read by eight calls and more, each of which has the kernel write all of it anew.
const MOST: usize = 8192;

/// A file of the kernel's.
///
/// # Errors
/// It is not there, or cannot be read.
pub fn read_file(path: impl AsRef<Path>) -> io::Result<String> {
    read_open(File::open(path)?)
}

/// An open file of the kernel's.
fn read_open(mut file: File) -> io::Result<String> {
    let mut text = String::with_capacity(MOST);
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Its share of all its pages.
    pub pss: u64,
    /// Of that, its share of shared memory: stores.
    pub pss_shared: u64,
    /// Its page tables.
    pub page_tables: u64,
    /// Its anonymous memory.
    pub anonymous: u64,
}

/// The files that say what a process uses. As long as they are open, they are about no other.
#[derive(Debug)]
pub struct UsageFiles {
    rollup: File,
    status: File,
    statm: File,
}

/// A mapping, as a line of `/proc/PID/maps` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub addresses: Range<u64>,
    /// Writes are private.
    pub private: bool,
    /// It may be written.
    pub writable: bool,
    /// Byte of the file at its first address.
    pub offset: u64,
    /// The file; 0 for none.
    pub inode: u64,
}

impl UsageFiles {
    /// Those of a process.
    ///
    /// # Errors
    /// It is gone, or not ours to look at.
    pub fn open(pid: i32) -> io::Result<Self> {
        let open = |name| File::open(format!("/proc/{pid}/{name}"));
        Ok(Self { rollup: open("smaps_rollup")?, status: open("status")?, statm: open("statm")? })
    }

    /// What it uses. The kernel goes over all its page tables for this: some 20 ms for each GiB.
    ///
    /// # Errors
    /// It is gone.
    pub fn read(self) -> io::Result<Usage> {
        let [rollup, status, statm] = [self.rollup, self.status, self.statm].map(read_open);
        let (rollup, status) = (rollup?, status?);
        let bytes = |text: &str, key| kib_field(text, key).unwrap_or(0) << 10;
        Ok(Usage {
            pss: bytes(&rollup, "Pss:"),
            pss_shared: bytes(&rollup, "Pss_Shmem:"),
            page_tables: bytes(&status, "VmPTE:"),
            anonymous: parse_anonymous(&statm?),
        })
    }
}

/// The anonymous memory of a process, in bytes.
///
/// # Errors
/// It is gone.
pub fn anonymous(pid: i32) -> io::Result<u64> {
    // Read often: much cheaper than `status`, whose RssAnon it is.
    Ok(parse_anonymous(&read_file(format!("/proc/{pid}/statm"))?))
}

fn parse_anonymous(statm: &str) -> u64 {
    let mut pages = statm.split_whitespace().skip(1).map(|word| word.parse::<u64>().unwrap_or(0));
    let (resident, shared) = (pages.next().unwrap_or(0), pages.next().unwrap_or(0));
    resident.saturating_sub(shared) << PAGE_SHIFT
}

/// The time that a process has run, its guest included, in ticks of a hundredth of a second.
///
/// # Errors
/// It is gone.
pub fn run_ticks(pid: i32) -> io::Result<u64> {
    let stat = read_file(format!("/proc/{pid}/stat"))?;
    parse_ticks(&stat).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a line of stat without times"))
}

/// User and system time; the name, which may hold anything, is in brackets before them.
fn parse_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Threads of a process that are looked at: ours have fewer by far.
const THREADS: usize = 128;

/// Whether a thread of this process runs, or waits for a processor or for the disk.
pub fn is_busy(pid: i32) -> bool {
    let Ok(all) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let stat = |thread: std::fs::DirEntry| read_file(thread.path().join("stat")).ok();
    let busy = |stat: String| matches!(parse_state(&stat), Some('R' | 'D'));
    all.take(THREADS).flatten().filter_map(stat).any(busy)
}

/// The letter behind the name.
fn parse_state(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// The file that lists the mappings of a process.
///
/// # Errors
/// It is gone, or not ours to look at.
pub fn maps(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/maps"))
}

/// The mappings in [such a file](maps) that lie within `bounds`, in order.
///
/// # Errors
/// The process is gone.
pub fn mappings(maps: File, bounds: &Range<u64>) -> io::Result<Vec<Mapping>> {
    let maps = read_open(maps)?;
    if maps.is_empty() {
        // It has ended, and has not been reaped.
        return Err(io::ErrorKind::NotFound.into());
    }
    let inside = |m: &Mapping| m.addresses.start < bounds.end && m.addresses.end > bounds.start;
    Ok(maps.lines().filter_map(parse_mapping).filter(inside).collect())
}

fn kib_field(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let flags = words.next()?.as_bytes();
    let offset = number(words.next()?)?;
    let inode = words.nth(1)?.parse().ok()?;
    Some(Mapping {
        addresses: number(start)?..number(end)?,
        private: flags.get(3) == Some(&b'p'),
        writable: flags.get(1) == Some(&b'w'),
        offset,
        inode,
    })
}

/// The user that a process runs as.
///
/// # Errors
/// It is gone.
pub fn user(pid: i32) -> io::Result<u32> {
    let status = read_file(format!("/proc/{pid}/status"))?;
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok());
    user.ok_or_else(|| io::Error::other("a process without a user"))
}

/// Descriptors of a process that are looked at: ours have fewer by far.
const DESCRIPTORS: usize = 1024;

/// Whether a process has a descriptor of this name.
pub fn holds(pid: i32, name: &str) -> bool {
    let Ok(all) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let mut all = all.take(DESCRIPTORS).flatten();
    all.any(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == name))
}

/// The user namespace that a process is in.
///
/// # Errors
/// It is gone, or not ours to look at.
pub fn user_namespace(pid: i32) -> io::Result<u64> {
    Ok(std::fs::metadata(format!("/proc/{pid}/ns/user"))?.ino())
}

/// The processes whose parent is this thread.
///
/// # Errors
/// The kernel does not tell (`CONFIG_PROC_CHILDREN`).
pub fn children() -> io::Result<Vec<Pid>> {
    let children = read_file("/proc/thread-self/children")?;
    Ok(children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect())
}

/// The signals that this process ignores.
///
/// # Errors
/// There is no `/proc`, or it says something else.
pub fn ignored_signals() -> io::Result<SigSet> {
    let status = read_file("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Signal::iterator().filter(|&signal| mask & (1 << (signal as i32 - 1)) != 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line =
            "100000010000-100000019000 rw-p 00001000 00:01 4711                       /memfd:offshoot-store (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert_eq!(mapping.addresses, 0x1000_0001_0000..0x1000_0001_9000);
        assert_eq!((mapping.private, mapping.writable, mapping.offset, mapping.inode), (true, true, 0x1000, 4711));
        assert_eq!(parse_mapping("7f00-7f01 r--s 00000000 00:00 0").map(|m| (m.private, m.inode)), Some((false, 0)));
        assert_eq!(parse_mapping("nonsense"), None);
    }

    /// `check` said of a VM process that had been killed a moment ago that nothing was mapped in it.
    #[test]
    fn a_process_that_has_ended_has_no_mappings_and_not_none() {
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        let pid = ended.id() as i32;
        while read_file(format!("/proc/{pid}/stat")).unwrap().split(' ').nth(2) != Some("Z") {
            std::thread::yield_now();
        }
        let all = |pid| mappings(maps(pid)?, &(0..u64::MAX));
        assert!(all(pid).is_err());
        ended.wait().unwrap();
        assert!(all(pid).is_err());
        assert!(!all(std::process::id() as i32).unwrap().is_empty());
    }

    #[test]
    fn times_of_a_process() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 12 30 0 0 20 0 1 0 100 0 0";
        assert_eq!(parse_ticks(stat), Some(42));
        assert_eq!(parse_ticks("7 (a"), None);
        assert!(run_ticks(std::process::id() as i32).is_ok());
    }

    #[test]
    fn who_runs_is_busy_and_who_waits_for_somebody_is_not() {
        assert_eq!(parse_state("7 (a) R) T 1 7 7 0"), Some('T'));
        assert_eq!(parse_state("7 (a"), None);
        assert!(is_busy(std::process::id() as i32));
        let mut waits = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        while is_busy(waits.id() as i32) {
            std::thread::yield_now();
        }
        drop(waits.stdin.take());
        waits.wait().unwrap();
        assert!(!is_busy(waits.id() as i32), "nor who is gone");
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(anonymous(std::process::id() as i32).unwrap() > 0);
        let usage = UsageFiles::open(std::process::id() as i32).unwrap().read().unwrap();
        assert!(usage.pss > usage.pss_shared && usage.page_tables > 0 && usage.anonymous > 0);
    }
}
