//! Where the main thread and the vCPU threads meet: one lock, held for moments, never across a touch of guest memory.
//!
//! Whoever wakes somebody lets go of the lock first: a thread that wakes on the waker's processor takes it over at once,
//! and would have to give it back until the lock is free.

mod desk;
#[cfg(test)]
mod tests;

use super::kick::StopSwitch;
use super::mailbox::{Mailbox, Wakeup};
use super::now_ns;
use super::panic::PanicWatch;
use super::state::VcpuState;
use crate::devices::serial::Console;
use crate::wire::{Ending, FromVm, RunState};
use desk::{Desk, Rest, Station, Wish};
use guest_mem::GfnRange;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// What both sides share.
#[derive(Debug)]
pub(super) struct Floor {
    shared: Mutex<Shared>,
    changed: Condvar,
    bell: EventFd,
}

/// The floor, locked.
#[derive(Debug)]
pub(super) struct Shared {
    desks: Vec<Desk>,
    /// What is to be said once all vCPUs are where they are told to be.
    announce: Option<RunState>,
    /// What comes after that.
    next: NextNews,
    /// The monitor's mailbox.
    pub mailbox: Mailbox,
    /// The serial console.
    pub console: Console,
    /// Rings when console output has been lying there for a [`CONSOLE_DELAY`].
    console_bell: TimerFd,
    /// When console output was last taken.
    console_taken: Option<Instant>,
    gift: Gift,
    /// The devices are asked for something, which a vCPU sees to.
    errand: bool,
    /// What a Linux guest says of its own end.
    pub panic: PanicWatch,
    out: Vec<FromVm>,
}

/// Pages that a vCPU gives back, on their way through the main thread, whose the window is. There are never two: the
/// monitor has one vCPU, and of a Linux guest's vCPUs one has the balloon device.
#[derive(Debug, Default)]
enum Gift {
    #[default]
    Nothing,
    Offered(Vec<GfnRange>),
    Accepted(Vec<GfnRange>),
}

/// What a vCPU starts from.
#[derive(Clone, Debug)]
pub(super) enum Load {
    /// The monitor's entry.
    Monitor,
    /// A Linux kernel's entry, at this address, or, where another vCPU is to start it, what firmware leaves.
    Linux(Option<u64>),
    /// A vCPU that was saved before; one that is like it follows, most likely. The guest most likely needs these pages first.
    Expected(Box<VcpuState>, Vec<GfnRange>),
    /// A saved vCPU.
    Saved(Box<VcpuState>),
}

/// What the server hears of a guest that begins to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum NextNews {
    /// Nobody knows.
    #[default]
    Unknown,
    /// Its first sign of life, at once.
    FirstSign,
}

/// What a vCPU thread does next.
#[derive(Debug)]
pub(super) enum Task {
    /// Set the registers.
    Load(Load),
    /// Read them.
    Save,
    /// Have the devices do what they are asked for.
    Attend,
    /// Run until it is stopped.
    Run(After),
}

/// What a vCPU did before it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// It stood still, for however long.
    Standing,
    /// It ran, and was called away for a moment.
    Errand,
}

/// What vCPUs did that are to stop.
#[derive(Debug)]
pub(super) struct Stopped {
    /// What they were told to do.
    pub before: RunState,
    /// Those whose threads are to be interrupted: others see it by themselves.
    pub busy: Vec<usize>,
    /// None has run since its registers were last read.
    pub rested: bool,
}

/// Why a vCPU cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unavailable {
    #[error("a vCPU did not stop within {} s", PATIENCE.as_secs())]
    Late,
    #[error("the VM has ended")]
    Ended,
}

/// How long we wait for a vCPU to stop. One that is trapped in an emulated access cannot be kicked out.
const PATIENCE: Duration = Duration::from_secs(5);

/// A guest prints byte by byte, and each could wake the main thread, the server and whoever reads along: they get what
/// comes within this time in one piece. The first is short, for those who type; the second is for a guest that prints on
/// and on.
const CONSOLE_DELAY: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];

impl Floor {
    /// A floor with a desk for each vCPU, whose threads are yet to come.
    pub fn new(switches: impl IntoIterator<Item = StopSwitch>, console: Console) -> io::Result<Self> {
        let desk = |stop| Desk {
            stop,
            wish: Wish::Stand,
            load: None,
            saved: None,
            at: Station::Arriving,
            waits: false,
            rest: Rest::Not,
        };
        let shared = Shared {
            desks: switches.into_iter().map(desk).collect(),
            announce: None,
            next: NextNews::default(),
            mailbox: Mailbox::default(),
            console,
            console_bell: TimerFd::new().map_err(io::Error::from)?,
            console_taken: None,
            gift: Gift::default(),
            errand: false,
            panic: PanicWatch::default(),
            out: Vec::new(),
        };
        Ok(Self { shared: Mutex::new(shared), changed: Condvar::new(), bell: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Rings when there is something for the server.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Rings when there is console output for the server.
    pub fn console_bell(&self) -> RawFd {
        self.lock().console_bell.as_raw_fd()
    }

    /// Locks the floor.
    pub fn lock(&self) -> MutexGuard<'_, Shared> {
        // A thread that panics ends the process (its panic hook does), so a poisoned floor is never used for long.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something changed that a waiting guest may want.
    pub fn notify(&self) {
        self.changed.notify_all();
    }

    /// A message for the server.
    pub fn tell(&self, mut shared: MutexGuard<'_, Shared>, message: FromVm) {
        shared.out.push(message);
        drop(shared);
        self.ring();
    }

    /// Has the main thread look.
    pub fn ring(&self) {
        // The counter is full only if the main thread is about to look anyway.
        let _ = self.bell.write(1);
    }

    /// The messages and the console output for the server.
    pub fn take_messages(&self) -> (Vec<FromVm>, Vec<u8>) {
        let _ = self.bell.read();
        let mut shared = self.lock();
        if shared.console.has_output() {
            // It is silent again until the next output, whether it has rung or not.
            let _ = shared.console_bell.clear();
            shared.console_taken = Some(Instant::now());
        }
        (std::mem::take(&mut shared.out), shared.console.take_output())
    }

    /// Main thread: gives every vCPU what it starts from, then as [`ask`](Self::ask). That they run is told with what the
    /// guest has for the server then, if that is surely something: nobody is woken in between.
    pub fn start_from(&self, loads: Vec<Load>, activity: RunState, next: NextNews) {
        let mut shared = self.lock();
        shared.load(loads);
        shared.next = next;
        self.ask_locked(shared, activity);
    }

    /// Main thread: gives every vCPU, which stands, what it starts from. They go on standing.
    pub fn load(&self, loads: Vec<Load>) {
        self.lock().load(loads);
        self.changed.notify_all();
    }

    /// Main thread: has the vCPUs run or stand, and the server told when they do. Where they are to stand, the caller
    /// interrupts their threads.
    pub fn ask(&self, activity: RunState) {
        self.ask_locked(self.lock(), activity);
    }

    fn ask_locked(&self, mut shared: MutexGuard<'_, Shared>, activity: RunState) {
        shared.wish(match activity {
            RunState::Running => Wish::Run,
            RunState::Paused => Wish::Stand,
        });
        shared.announce = Some(activity);
        if activity == RunState::Running {
            shared.desks.iter_mut().for_each(|desk| desk.rest = Rest::Not);
        }
        let news = shared.announce_standing();
        self.wake(shared, news);
    }

    /// Wakes all who wait here, and, if there is news for the server, the main thread's loop.
    fn wake(&self, shared: MutexGuard<'_, Shared>, news: bool) {
        drop(shared);
        self.changed.notify_all();
        if news {
            self.ring();
        }
    }

    /// Main thread: stops the vCPUs and has their registers saved, while the caller goes on. Then it waits with
    /// [`await_standing`](Self::await_standing).
    pub fn stop_and_save(&self) -> Stopped {
        self.stop_for(Wish::Save)
    }

    /// Main thread: the same, but for the registers.
    pub fn stop(&self) -> Stopped {
        self.stop_for(Wish::Stand)
    }

    fn stop_for(&self, wish: Wish) -> Stopped {
        let mut shared = self.lock();
        let running = shared.desks.iter().any(|desk| desk.wish == Wish::Run);
        shared.wish(wish);
        shared.desks.iter_mut().for_each(Desk::stop_resting);
        let busy = |desk: &Desk| matches!(desk.at, Station::Running { .. }) && !desk.waits;
        let busy = shared.desks.iter().enumerate().filter(|(_, desk)| busy(desk)).map(|(number, _)| number).collect();
        let rested = shared.all_rest();
        if !rested {
            self.wake(shared, false);
        }
        Stopped { before: if running { RunState::Running } else { RunState::Paused }, busy, rested }
    }

    /// Main thread: has a vCPU see to what the devices are asked for, when it runs. The caller interrupts its thread, the
    /// first.
    pub fn send_errand(&self) {
        let mut shared = self.lock();
        shared.errand = true;
        if let Some(desk) = shared.desks.first() {
            desk.stop.set();
        }
    }

    /// Main thread: has the vCPUs do what they did before [`stop`](Self::stop) or
    /// [`stop_and_save`](Self::stop_and_save).
    pub fn go_on(&self, before: RunState) {
        let mut shared = self.lock();
        shared.wish(match before {
            RunState::Running => Wish::Run,
            RunState::Paused => Wish::Stand,
        });
        if before == RunState::Running {
            let since_ns = now_ns();
            let resting = shared.desks.iter_mut().filter(|desk| matches!(desk.rest, Rest::Resting(_)));
            resting.for_each(|desk| desk.at = Station::Running { since_ns });
        }
        if !shared.all_rest() || shared.has_news() {
            self.wake(shared, false);
        }
    }

    /// Whether all vCPUs rest, and nothing is about to end that.
    pub fn rests(&self) -> bool {
        let mut shared = self.lock();
        shared.all_rest() && !shared.has_news()
    }

    /// Main thread: waits until all vCPUs stand.
    pub fn await_standing(&self) -> Result<MutexGuard<'_, Shared>, Unavailable> {
        self.await_desks(|desk| (desk.at == Station::Standing && desk.load.is_none()).then_some(()))
            .map(|(shared, _)| shared)
    }

    /// Main thread: waits until all vCPUs stand, and has `accept` take what they give back before they do.
    pub fn await_standing_and_accept(
        &self,
        mut accept: impl FnMut(&[GfnRange]) -> Vec<GfnRange>,
    ) -> Result<MutexGuard<'_, Shared>, Unavailable> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.accept_gift(&mut accept);
            let shared = self.lock();
            if shared.has_ended() {
                return Err(Unavailable::Ended);
            }
            if shared.all_stand() {
                return Ok(shared);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Unavailable::Late);
            }
            if !matches!(shared.gift, Gift::Offered(_)) {
                drop(self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    /// Main thread: has `accept` take what a vCPU gives back, if one does. It says what it took.
    pub fn accept_gift(&self, accept: impl FnOnce(&[GfnRange]) -> Vec<GfnRange>) {
        let offered = match &mut self.lock().gift {
            Gift::Offered(pages) => std::mem::take(pages),
            _ => return,
        };
        let accepted = accept(&offered);
        self.lock().gift = Gift::Accepted(accepted);
        self.changed.notify_all();
    }

    /// vCPU thread: gives pages back. Returns those that were taken, sorted, when they read zero and the server knows; none
    /// if the VM has ended.
    pub fn give_back(&self, pages: Vec<GfnRange>) -> Vec<GfnRange> {
        let mut shared = self.lock();
        shared.gift = Gift::Offered(pages);
        self.ring();
        self.changed.notify_all();
        loop {
            if let Gift::Accepted(pages) = &mut shared.gift {
                let pages = std::mem::take(pages);
                shared.gift = Gift::Nothing;
                return pages;
            }
            if shared.has_ended() {
                return Vec::new();
            }
            shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Main thread: waits for the registers that [`stop_and_save`](Self::stop_and_save) asked for.
    pub fn await_saved(&self) -> Result<Vec<Result<VcpuState, String>>, Unavailable> {
        self.await_desks(|desk| desk.saved.take()).map(|(_, saved)| saved)
    }

    /// Main thread: waits until the last vCPU is about to enter `KVM_RUN`; tells when that was.
    pub fn await_running(&self) -> Result<u64, Unavailable> {
        let since = |desk: &mut Desk| match desk.at {
            Station::Running { since_ns } => Some(since_ns),
            _ => None,
        };
        self.await_desks(since).map(|(_, times)| times.into_iter().max().unwrap_or_default())
    }

    /// Waits until `ready` has something of every desk.
    fn await_desks<T>(
        &self,
        mut ready: impl FnMut(&mut Desk) -> Option<T>,
    ) -> Result<(MutexGuard<'_, Shared>, Vec<T>), Unavailable> {
        let deadline = Instant::now() + PATIENCE;
        let mut shared = self.lock();
        let mut got: Vec<Option<T>> = shared.desks.iter().map(|_| None).collect();
        loop {
            if shared.has_ended() {
                return Err(Unavailable::Ended);
            }
            for (desk, got) in shared.desks.iter_mut().zip(&mut got) {
                if got.is_none() {
                    *got = ready(desk);
                }
            }
            if got.iter().all(Option::is_some) {
                return Ok((shared, got.into_iter().flatten().collect()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Unavailable::Late);
            }
            (shared, _) = self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// vCPU thread: waits for something to do.
    pub fn next_task(&self, number: usize) -> Task {
        let mut shared = self.lock();
        loop {
            let desk = &mut shared.desks[number];
            if desk.at != Station::Ended {
                if let Some(load) = desk.load.take() {
                    desk.at = Station::Arriving;
                    return Task::Load(load);
                }
                let rests = matches!(desk.rest, Rest::Resting(_));
                if desk.wish == Wish::Run && (!rests || shared.has_news()) {
                    let desk = &mut shared.desks[number];
                    desk.rest = Rest::Not;
                    // Not on its way from a freeze: the errand may wait for pages, and a pause is not to.
                    let runs = matches!(desk.at, Station::Running { .. });
                    if runs && std::mem::take(&mut shared.errand) {
                        return Task::Attend;
                    }
                    return self.set_running(shared, number);
                }
                if shared.desks[number].wish != Wish::Run {
                    let before = std::mem::replace(&mut shared.desks[number].at, Station::Standing);
                    let save = shared.desks[number].wish == Wish::Save && shared.all_stand();
                    if save {
                        shared.desks[number].wish = Wish::Stand;
                    }
                    if before != Station::Standing {
                        let news = shared.announce_standing();
                        self.wake(shared, news);
                        if save {
                            return Task::Save;
                        }
                        shared = self.lock();
                        continue;
                    }
                    if save {
                        return Task::Save;
                    }
                }
            }
            shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set_running(&self, mut shared: MutexGuard<'_, Shared>, number: usize) -> Task {
        let errand = shared.errand;
        let desk = &mut shared.desks[number];
        if !errand {
            // Otherwise `KVM_RUN` is to return at once.
            desk.stop.clear();
        }
        let since_ns = now_ns();
        let before = std::mem::replace(&mut desk.at, Station::Running { since_ns });
        let after = if matches!(before, Station::Running { .. }) { After::Errand } else { After::Standing };
        let news = shared.announce.take_if(|activity| *activity == RunState::Running).is_some();
        if news {
            shared.out.push(FromVm::Running { at_ns: since_ns });
        }
        let next = std::mem::take(&mut shared.next);
        self.wake(shared, news && next == NextNews::Unknown);
        Task::Run(after)
    }

    /// vCPU thread: the registers are saved.
    pub fn saved(&self, number: usize, state: Result<VcpuState, String>) {
        let mut shared = self.lock();
        let desk = &mut shared.desks[number];
        if let (Rest::Told, Ok(registers)) = (&desk.rest, &state)
            && registers.tsc.stands_still()
        {
            desk.rest = Rest::Resting(Box::new(registers.clone()));
        }
        desk.saved = Some(state);
        self.wake(shared, false);
    }

    /// vCPU thread: the VM has come to its end, or did not get to its start. All its vCPUs stop.
    pub fn end(&self, message: FromVm) {
        let mut shared = self.lock();
        if shared.has_ended() {
            return;
        }
        for desk in &mut shared.desks {
            desk.stop.set();
            (desk.at, desk.rest) = (Station::Ended, Rest::Not);
        }
        shared.out.push(message);
        self.wake(shared, true);
    }

    /// vCPU thread: the VM has ended.
    pub fn die(&self, why: String) {
        self.end(FromVm::Ended(Ending::Dead(why)));
    }

    /// vCPU thread: waits until there is something for the guest. `None` if the vCPU is to stop.
    pub fn await_wakeup(&self, number: usize) -> Option<Wakeup> {
        let mut shared = self.lock();
        loop {
            let here = &mut *shared;
            if here.desks[number].wish != Wish::Run || here.desks[number].at == Station::Ended {
                here.desks[number].rest = Rest::Told;
                return None;
            }
            if let Some(wakeup) = here.mailbox.collect(here.console.has_input()) {
                return Some(wakeup);
            }
            shared.desks[number].waits = true;
            shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
            shared.desks[number].waits = false;
        }
    }
}

impl Shared {
    /// Whether no vCPU has anything to do.
    fn all_rest(&self) -> bool {
        self.desks.iter().all(|desk| matches!(desk.rest, Rest::Resting(_)))
    }

    /// Whether there is something for a guest that waits.
    fn has_news(&mut self) -> bool {
        self.mailbox.has_news(self.console.has_input())
    }

    /// Whether there is news for the server: that all stand, as asked.
    fn announce_standing(&mut self) -> bool {
        let stand = self.all_stand() && self.announce.take_if(|activity| *activity == RunState::Paused).is_some();
        if stand {
            self.out.push(FromVm::Paused);
        }
        stand
    }

    /// vCPU thread: the guest writes a register of its console.
    pub fn write_console(&mut self, register: u8, data: &[u8]) {
        let silent = !self.console.has_output();
        data.iter().for_each(|byte| self.console.write(register, *byte));
        if silent && self.console.has_output() {
            let [first, next] = CONSOLE_DELAY;
            let prints_on = self.console_taken.is_some_and(|at| at.elapsed() < next);
            // It can fail for a bad time only.
            let _ = self.console_bell.reset(if prints_on { next } else { first }, None);
        }
    }

    fn load(&mut self, loads: Vec<Load>) {
        for (desk, load) in self.desks.iter_mut().zip(loads) {
            desk.load = Some(load);
            desk.rest = Rest::Not;
        }
    }

    /// What has been said and not sent.
    pub fn take_messages(&mut self) -> Vec<FromVm> {
        std::mem::take(&mut self.out)
    }

    fn has_ended(&self) -> bool {
        self.desks.iter().any(|desk| desk.at == Station::Ended)
    }

    fn all_stand(&self) -> bool {
        self.desks.iter().all(|desk| desk.at == Station::Standing && desk.load.is_none())
    }

    fn wish(&mut self, wish: Wish) {
        for desk in &mut self.desks {
            desk.wish = wish;
            if wish != Wish::Run {
                desk.stop.set();
            }
        }
    }
}
