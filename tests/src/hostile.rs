//! A VM process that has been taken over, as this test plays it: with duplicates of the descriptors of a real one, it says
//! and does what such a process could. That takes root.
#![allow(unsafe_code)] // pidfds, which have no safe wrapper

use crate::guest::Guest;
use crate::{Lack, TEN_SECONDS, is_root, skip};
use guest_mem::{Gfn, GfnRange, Harvest, StoreId};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{fs, io, thread};
use vmm::client::Vm;
use vmm::link::Link;
use vmm::machine::WINDOW_BASE;
use vmm::wire::{FromVm, Frozen, RunState, ToVm};

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
            skip(Lack::Root, "only root may take descriptors of other processes");
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

    /// Stops the process, so that this test answers in its place.
    pub fn stop(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGSTOP).expect("stop a process");
    }

    /// What the server tells the process next, in its place.
    pub fn hear(&mut self) -> ToVm {
        let deadline = Instant::now() + TEN_SECONDS;
        loop {
            if let Some((message, _)) = self.link.recv().expect("the server's socket") {
                return message;
            }
            assert!(Instant::now() < deadline, "the server says nothing");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The store of the freeze that the server asks for.
    pub fn hear_freeze(&mut self) -> StoreId {
        loop {
            if let ToVm::Freeze { store, .. } = self.hear() {
                return store;
            }
        }
    }

    /// Says something to the server, in one packet. The server may not listen any more.
    pub fn say(&mut self, said: &[FromVm]) {
        self.say_this(&said);
    }

    /// Says whatever can be encoded, in one packet.
    pub fn say_this(&mut self, said: &impl serde::Serialize) {
        let deadline = Instant::now() + TEN_SECONDS;
        let mut sent = self.link.send(said, &[]);
        while let Ok(true) = sent.and_then(|()| self.link.flush()) {
            assert!(Instant::now() < deadline, "the server does not read");
            thread::sleep(Duration::from_millis(1));
            sent = Ok(());
        }
    }
}

/// A freeze of these pages, as a process may tell of it.
#[must_use]
pub fn frozen(store: StoreId, moved: Vec<GfnRange>, scratch_base: u64) -> FromVm {
    let harvest = Harvest { moved_private: moved.clone(), moved, copied: Vec::new() };
    FromVm::Frozen(Box::new(of_harvest(store, harvest, scratch_base, None)))
}

/// A freeze of these pages, which another process has, as a process may tell of it.
#[must_use]
pub fn frozen_in_copy(store: StoreId, copied: Vec<GfnRange>, copy: i32) -> FromVm {
    let harvest = Harvest { copied, ..Harvest::default() };
    FromVm::Frozen(Box::new(of_harvest(store, harvest, WINDOW_BASE, Some(copy))))
}

fn of_harvest(store: StoreId, harvest: Harvest, scratch_base: u64, copy: Option<i32>) -> Frozen {
    let (copies, activity) = (Gfn(1 << 18), RunState::Running);
    Frozen { store, harvest, scratch_base, copies, copied: None, copy, activity, kicked_ns: 0 }
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
