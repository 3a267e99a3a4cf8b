//! One VM process, as its server would hold it.
#![allow(unsafe_code)] // puts a descriptor where the new program looks for it

use guest_mem::sys::Userfaultfd;
use guest_mem::{Along, GfnRange, PageCount, StoreId};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use vmm::link::Link;
use vmm::machine::state::{MachineState, PackedState};
use vmm::wire::{FromVm, Frozen, HostFeatures, Isolation, Line, MachineShape, RunState, Said, Start, Take, ToVm};

pub const CHILD: &str = "OFFSHOOT_TEST_VM_PROCESS";
pub const SOCKET: i32 = 3;
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Worker {
    pub link: Link,
    pub child: Child,
    pub keeper: Pid,
    pub window_base: u64,
    pub traps: Option<Userfaultfd>,
    /// Messages that came behind others.
    unpacked: VecDeque<FromVm>,
    /// Messages that came while we waited for others.
    early: VecDeque<FromVm>,
    next_tag: u64,
    cage: PathBuf,
}

pub const ALL: HostFeatures = HostFeatures { userfaultfd: true, pagemap_scan: true };

impl Worker {
    pub fn spawn() -> (Link, Child) {
        let (link, theirs) = Link::pair().unwrap();
        let raw = theirs.as_raw_fd();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(CHILD, "1");
        // SAFETY: dup2 may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                if raw == SOCKET {
                    libc::fcntl(raw, libc::F_SETFD, 0);
                } else if libc::dup2(raw, SOCKET) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        (link, command.spawn().unwrap())
    }

    pub fn prepare(ram: PageCount, isolation: Isolation, features: HostFeatures) -> Self {
        let (mut link, child) = Self::spawn();
        let cage = std::env::temp_dir().join(format!("offshoot-cage-{}", child.id()));
        std::fs::create_dir(&cage).unwrap();
        let shape = MachineShape { ram, vcpus: 1, machine: vmm::wire::Machine::Monitor };
        link.send(
            &ToVm::Prepare {
                shape,
                isolation,
                features,
                cage: cage.clone(),
                server: std::process::id() as i32,
                niceness: 0,
            },
            &[],
        )
        .unwrap();
        let mut worker = Self {
            link,
            child,
            keeper: Pid::from_raw(0),
            window_base: 0,
            traps: None,
            unpacked: VecDeque::new(),
            early: VecDeque::new(),
            next_tag: 1,
            cage,
        };
        let (ready, mut fds) = worker.recv();
        let FromVm::Ready { keeper, window_base } = ready else { panic!("not ready: {ready:?}") };
        worker.keeper = Pid::from_raw(keeper);
        worker.window_base = window_base;
        worker.traps = fds.pop().map(Userfaultfd::from_fd);
        assert_eq!(worker.traps.is_some(), features.userfaultfd);
        worker
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn tell(&mut self, message: &ToVm, fds: &[BorrowedFd<'_>]) {
        self.link.send(message, fds).unwrap();
    }

    fn recv(&mut self) -> (FromVm, Vec<OwnedFd>) {
        self.try_recv(PATIENCE).expect("the VM process says nothing")
    }

    pub fn try_recv(&mut self, patience: Duration) -> Option<(FromVm, Vec<OwnedFd>)> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(message) = self.unpacked.pop_front() {
                return Some((message, Vec::new()));
            }
            if let Some((Said(said), fds)) = self.link.recv::<Said>().unwrap() {
                let mut said = said.into_iter();
                let first = said.next().expect("a packet says something");
                self.unpacked.extend(said);
                return Some((first, fds));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let timeout = PollTimeout::try_from(left).unwrap();
            poll(&mut [PollFd::new(self.link.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
        }
    }

    /// Waits for a message that `pick` likes; others are kept for later.
    pub fn expect<T>(&mut self, pick: impl Fn(&FromVm) -> Option<T>) -> T {
        if let Some(index) = self.early.iter().position(|message| pick(message).is_some()) {
            return pick(&self.early.remove(index).unwrap()).unwrap();
        }
        loop {
            let (message, _) = self.recv();
            match pick(&message) {
                Some(found) => return found,
                None => self.early.push_back(message),
            }
        }
    }

    pub fn start(&mut self, start: Start, stores: &[BorrowedFd<'_>]) {
        self.tell(&ToVm::Start(Box::new(start)), stores);
    }

    pub fn load(&mut self, state: &MachineState) {
        self.tell(&ToVm::Load(PackedState::pack(state)), &[]);
    }

    pub fn running(&mut self) -> u64 {
        self.expect(|message| match message {
            FromVm::Running { at_ns } => Some(*at_ns),
            FromVm::StartFailed(why) => panic!("{why}"),
            _ => None,
        })
    }

    pub fn first_sign(&mut self) -> u64 {
        self.expect(|message| match message {
            FromVm::FirstSign { at_ns } => Some(*at_ns),
            FromVm::Ended(ending) => panic!("{ending:?}"),
            _ => None,
        })
    }

    pub fn post(&mut self, text: &str) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.tell(&ToVm::Input(Line { tag, text: text.into() }), &[]);
        tag
    }

    pub fn answer(&mut self, tag: u64) -> String {
        self.expect(|message| match message {
            FromVm::Answer(line) if line.tag == tag => Some(line.text.clone()),
            FromVm::Ended(ending) => panic!("{ending:?}"),
            _ => None,
        })
    }

    pub fn ask(&mut self, text: &str) -> String {
        let tag = self.post(text);
        self.answer(tag)
    }

    pub fn ok(&mut self, text: &str) -> String {
        let answer = self.ask(text);
        assert!(answer.starts_with("ok"), "{text}: {answer}");
        answer
    }

    pub fn freeze(&mut self, store: StoreId, file: BorrowedFd<'_>) -> Taken {
        self.tell(
            &ToVm::Freeze { store, max_runs: 10_000, take: Take::Remap, along: Along::default(), first: Vec::new() },
            &[file],
        );
        self.taken()
    }

    pub fn taken(&mut self) -> Taken {
        let frozen = self.expect(|message| match message {
            FromVm::Frozen(frozen) => Some(frozen.clone()),
            FromVm::FreezeFailed(why) => panic!("{why}"),
            _ => None,
        });
        let state = self.expect(|message| match message {
            FromVm::Saved { store, state, .. } if *store == frozen.store => Some(Box::new(state.unpack().unwrap())),
            FromVm::Ended(ending) => panic!("{ending:?}"),
            _ => None,
        });
        let mut pause_ns = || {
            self.expect(|message| match message {
                FromVm::WentOn { store, pause_ns } if *store == frozen.store => Some(*pause_ns),
                FromVm::Ended(ending) => panic!("{ending:?}"),
                _ => None,
            })
        };
        let pause_ns = (frozen.activity == RunState::Running).then(&mut pause_ns);
        Taken { frozen, state, pause_ns }
    }

    /// Reads moved pages through the keeper.
    pub fn read_scratch(&self, scratch_base: u64, pages: GfnRange) -> Vec<u8> {
        read_memory(self.keeper, scratch_base + pages.start().gpa(), pages.len_bytes()).unwrap()
    }

    pub fn wake(&self, pages: GfnRange) {
        if let Some(traps) = &self.traps {
            traps.wake(self.window_base + pages.start().gpa(), pages.len_bytes()).unwrap();
        }
    }
}

/// A freeze, done.
pub struct Taken {
    frozen: Box<Frozen>,
    pub state: Box<MachineState>,
    /// How long the guest was kept from running, if it runs again.
    pub pause_ns: Option<u64>,
}

impl Deref for Taken {
    type Target = Frozen;

    fn deref(&self) -> &Frozen {
        &self.frozen
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if self.keeper.as_raw() > 0 && kill(self.keeper, Signal::SIGKILL).is_ok() {
            let _ = waitpid(self.keeper, None);
        }
        let _ = std::fs::remove_dir(&self.cage);
    }
}

pub fn read_memory(pid: Pid, base: u64, len: usize) -> nix::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let remote = [RemoteIoVec { base: base as usize, len }];
    let got = process_vm_readv(pid, &mut [IoSliceMut::new(&mut bytes)], &remote)?;
    assert_eq!(got, len);
    Ok(bytes)
}
