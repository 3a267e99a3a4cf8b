//! A VM process that has been taken over, as this test plays it: with duplicates of the descriptors of a real one, it says
//! and does what such a process could. That takes root.
#![allow(unsafe_code)] // pidfds, which have no safe wrapper

use crate::guest::Guest;
use crate::{is_root, process, skip};
use nix::errno::Errno;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vmm::client::Vm;
use vmm::link::Link;
use vmm::wire::FromVm;

/// A real VM process, and what this test holds of it.
#[derive(Debug)]
pub struct Hostile {
    /// The process.
    pub pid: i32,
    pidfd: OwnedFd,
    link: Link,
}

impl Hostile {
    /// Takes over the process of a VM; none where this test may not, which is told loudly.
    #[must_use]
    pub fn take_over(vm: &Vm) -> Option<Self> {
        if !is_root() {
            skip("only root may take descriptors of other processes");
            return None;
        }
        let pid = vm.pid();
        // SAFETY: The call takes plain numbers and returns a descriptor.
        let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }).expect("open a pidfd");
        let link = Link::new(take(&pidfd, pid, "socket:").expect("a VM process has a socket"));
        Some(Self { pid, pidfd, link })
    }

    /// A duplicate of the descriptor that shows as a name that begins so, with its shared flags and position.
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        take(&self.pidfd, self.pid, name)
    }

    /// Says something to the server, in one packet. Whether the server still listens.
    pub fn say(&mut self, said: &[FromVm]) -> bool {
        self.say_with(&said)
    }

    /// Says whatever can be encoded, in one packet.
    pub fn say_with(&mut self, said: &impl serde::Serialize) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut sent = self.link.send(said, &[]);
        while let Ok(true) = sent.and_then(|()| self.link.flush()) {
            assert!(Instant::now() < deadline, "the server has not read for long");
            std::thread::sleep(Duration::from_millis(1));
            sent = Ok(());
        }
        process::is_alive(self.pid)
    }
}

fn take(pidfd: &OwnedFd, pid: i32, name: &str) -> Option<OwnedFd> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let numbers = entries
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with(name)));
    let number: i32 = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).next()?;
    // SAFETY: The call takes plain numbers and returns a descriptor.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) }).ok()
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = Errno::result(result)? as i32;
    // SAFETY: The kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The VM processes among these that have mapped stores: they have seen memory of a family.
pub fn that_have_seen_memory(pids: &[i32]) -> Vec<i32> {
    let has = |pid: &&i32| {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        maps.contains("memfd:offshoot-store")
    };
    pids.iter().filter(has).copied().collect()
}
