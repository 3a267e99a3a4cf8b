//! VM processes as the server sees them.

use crate::link::Link;
use crate::machine::state::PackedState;
use crate::procfs;
use crate::server::ids::{Generation, ProcessId};
use crate::server::procs::answers::Answers;
use crate::server::procs::expect::Expectation;
use crate::server::procs::window::memory::Memory;
use crate::server::procs::window::{Want, Wants};
use crate::server::watch::Token;
use crate::wire::{Bounds, MachineShape, ToVm};
use guest_mem::StoreId;
use guest_mem::sys::FaultEvent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What a VM process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It makes its KVM VM, for the pool, or gets ready what it is to expect.
    Preparing,
    /// It waits for a VM to become.
    Pooled,
    /// It is, or is to become, a VM.
    Vm(Generation),
    /// It is to end.
    Ending,
}

/// A message, and the descriptors that travel along.
#[derive(Debug)]
pub struct Parcel {
    /// The message.
    pub message: ToVm,
    /// The descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// Lines of a process that are shown at once, and how long one more takes.
const LINES: u32 = 50;
const LINE_EVERY: Duration = Duration::from_secs(1);

/// How much a process may still have written into the server's log.
#[derive(Debug)]
struct Lines {
    left: u32,
    counted: Instant,
    /// Not shown since one was.
    missed: u64,
}

impl Lines {
    /// Whether one more is shown, and how many were not before.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.counted).as_secs() / LINE_EVERY.as_secs();
        self.counted += LINE_EVERY * passed.min(u64::from(u32::MAX)) as u32;
        self.left = u64::from(self.left).saturating_add(passed).min(u64::from(LINES)) as u32;
        if self.left == 0 {
            self.missed += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.missed))
    }
}

/// A VM process and its keeper.
#[derive(Debug)]
pub struct VmProcess {
    /// Its name.
    pub id: ProcessId,
    /// What fits it.
    pub shape: MachineShape,
    /// What it is for.
    pub role: Role,
    /// How often it was asked for before.
    pub tries: u32,
    /// The VM that it is, or was.
    pub vm: Option<Generation>,
    /// What it can tell of.
    pub bounds: Rc<Bounds>,
    /// Whether it has said that it is prepared.
    pub ready: bool,
    /// The user namespace that it was in when it was ready. One that is taken over may enter others.
    pub namespace: Option<u64>,
    /// The socket to it.
    pub link: Link,
    /// The watch on the socket.
    pub link_token: Option<Token>,
    /// The same, once the socket has come to its end.
    pub link_ended: Option<Token>,
    /// The watch on its traps.
    pub trap_token: Option<Token>,
    /// Traps that were read before all was heard that it had said by then.
    pub traps: Vec<FaultEvent>,
    /// How it has ended, if not all has been heard that it said.
    pub ended: Option<String>,
    /// What it was told to expect its window to show.
    pub expectation: Expectation,
    /// What it is told when it is ready.
    pub waiting: Vec<Parcel>,
    /// Its memory.
    pub memory: Rc<Memory>,
    /// Messages both ways.
    pub messages: u64,
    /// What it owes an answer to.
    pub answers: Answers,
    /// What it may have logged.
    lines: Lines,
    /// What it was told that may have its guest run.
    wakes: u64,
    /// The last freeze that it was told of, and how many of those messages it had been told before.
    freeze: Option<(StoreId, u64)>,
    /// The machine as it is: its guest has not run since it was frozen.
    still: Option<PackedState>,
}

impl VmProcess {
    /// A process that is to be made with the socket that comes along, and will prepare itself as `prepare` says.
    ///
    /// # Errors
    /// No descriptors.
    pub fn unborn(
        id: ProcessId,
        (shape, bounds): (MachineShape, Rc<Bounds>),
        prepare: &ToVm,
        wants: Wants,
    ) -> io::Result<(Self, OwnedFd)> {
        let (link, theirs) = link_to(&bounds)?;
        let mut process = Self {
            id,
            shape,
            role: Role::Preparing,
            tries: 0,
            bounds,
            vm: None,
            ready: false,
            namespace: None,
            link,
            link_token: None,
            link_ended: None,
            trap_token: None,
            traps: Vec::new(),
            ended: None,
            expectation: Expectation::default(),
            waiting: Vec::new(),
            memory: Rc::new(Memory::new(id, wants)),
            messages: 0,
            answers: Answers::default(),
            lines: Lines { left: LINES, counted: Instant::now(), missed: 0 },
            wakes: 0,
            freeze: None,
            still: None,
        };
        process.send(prepare, &[]);
        Ok((process, theirs))
    }

    /// Whoever was to make the process did not, or does not say so: another is asked, with another socket.
    ///
    /// # Errors
    /// No descriptors.
    pub fn begin_anew(&mut self, prepare: &ToVm) -> io::Result<OwnedFd> {
        let (link, theirs) = link_to(&self.bounds)?;
        self.link = link;
        self.send(prepare, &[]);
        Ok(theirs)
    }

    /// Shows a line of its log, if it has not said too much.
    pub fn log(&mut self, line: &str, now: Instant) {
        match self.lines.take(now) {
            Some(0) => log::error!("{:?} says: {line}", self.id),
            Some(missed) => log::error!("{:?} says, after {missed} lines that are not shown: {line}", self.id),
            None => {}
        }
    }

    /// Sends a message. A process that cannot be reached is about to be reaped; one that cannot be told, for want of memory or
    /// descriptors, is ended: somebody would wait for its answer.
    pub fn send(&mut self, message: &ToVm, fds: &[BorrowedFd<'_>]) {
        self.messages += 1;
        if self.answers.asked(message, Instant::now()) {
            self.memory.want(Want::Answer);
        }
        if message.wakes() {
            self.wakes += 1;
            self.still = None;
        }
        if let ToVm::Freeze { store, .. } = message {
            self.freeze = Some((*store, self.wakes));
            self.still = None;
        }
        let sent = self.link.send(message, fds);
        if self.link.is_backed_up() {
            self.memory.want(Want::Room);
        }
        match sent.map_err(|error| (error.kind(), error)) {
            Ok(()) => {}
            Err((io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset, error)) => {
                log::debug!("message to {:?}: {error}", self.id);
            }
            Err((_, error)) => {
                log::error!("{:?} is ended, it cannot be told what it is to do: {error}", self.id);
                self.kill();
            }
        }
    }

    /// It was frozen into `store` as this, and its guest was still. What it has been told meanwhile it may have heard later.
    pub fn stood_still(&mut self, store: StoreId, state: &PackedState) {
        self.still = (self.freeze == Some((store, self.wakes))).then(|| state.clone());
    }

    /// The state that a freeze would find now, with nothing written since the last one, if that is known.
    pub fn still(&self) -> Option<&PackedState> {
        self.still.as_ref()
    }

    /// The user namespace of the process, as long as it lives.
    pub fn user_namespace(&self) -> Option<u64> {
        let main = self.memory.main()?;
        self.namespace.or_else(|| procfs::user_namespace(main.as_raw()).ok())
    }

    /// Whether it has made its KVM VM, and is no VM's process.
    pub fn is_prepared(&self) -> bool {
        self.ready && matches!(self.role, Role::Preparing | Role::Pooled)
    }

    /// Sends a message when it is ready, and after all others that wait for that.
    pub fn send_when_ready(&mut self, parcel: Parcel) {
        self.waiting.push(parcel);
        self.send_waiting();
    }

    /// Sends what waits, if it is ready.
    pub fn send_waiting(&mut self) {
        if self.ready {
            for Parcel { message, descriptors } in std::mem::take(&mut self.waiting) {
                let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                self.send(&message, &fds);
            }
        }
    }

    /// Ends the process; its keeper, and with it its memory, stays.
    pub fn kill(&mut self) {
        self.answers.forget();
        if let Some(pid) = self.memory.main() {
            signal(pid);
        }
        self.memory.wake_all();
    }

    /// Ends the keeper, and copies of the process: nobody needs the memory any more.
    pub fn kill_keeper(&self) {
        self.memory.end_copies();
        if let Some(keeper) = self.memory.keeper.get() {
            signal(keeper);
        }
    }
}

/// Both ends of a socket to a process. It sends its userfaultfd, once.
pub fn link_to(bounds: &Bounds) -> io::Result<(Link, OwnedFd)> {
    let (link, theirs) = Link::pair()?;
    Ok((link.limited(bounds.bytes, 1), theirs))
}

fn signal(pid: Pid) {
    if let Err(error) = kill(pid, Signal::SIGKILL) {
        log::error!("kill {pid}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_too_much_is_not_listened_to_for_a_while() {
        let start = Instant::now();
        let mut lines = Lines { left: LINES, counted: start, missed: 0 };
        assert!((0..LINES).all(|_| lines.take(start) == Some(0)));
        assert!((0..1000).all(|_| lines.take(start + LINE_EVERY / 2).is_none()));
        assert_eq!(lines.take(start + LINE_EVERY), Some(1000));
        assert_eq!(lines.take(start + LINE_EVERY), None);
        assert!((0..LINES).all(|_| lines.take(start + 1000 * LINE_EVERY).is_some()));
        assert_eq!(lines.take(start + 1000 * LINE_EVERY), None);
    }
}
