//! What is done to a VM's memory with its vCPUs stopped, and what it leaves behind.

mod copies;

use super::super::floor::{Floor, Shared, Stopped};
use super::super::keeper;
use super::super::kvm::DirtyLog;
use super::super::linux::LinuxMachine;
use super::super::now_ns;
use super::super::outbox::Outbox;
use super::super::state::{LinuxState, MachineState, MailboxState, PackedState};
use super::{Vm, VmError};
use crate::devices::serial;
use crate::wire::{FromVm, Frozen, RunState, SOME};
use guest_mem::window::host::{Asked, Deduped, Dirty, HostWindow, MovedOut, SlotLog, SmallExtents};
use guest_mem::{Gfn, GfnRange, Harvest, PAGE_SIZE, PageCount, Protection, StoreId, Window};
use nix::unistd::Pid;
use rangemap::RangeSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::Duration;

/// For how long a Linux guest is watched before its first freeze: two ticks of its clock. What it writes in that time it
/// gets copies of before it runs again; each page that it would have to copy by itself then takes two exits.
const WATCH: Duration = Duration::from_millis(8);
/// The children of a guest of more memory do not wait until its writes are logged, though it stands still for longer by that:
/// the kernel takes as long as the guest is large.
const LOGGED_AT_ONCE: PageCount = PageCount((1 << 30) / PAGE_SIZE as u64);
/// Stretches of which it gets copies at most.
const HOT_MOST: usize = 512;

/// What a freeze is told.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Freeze<'a> {
    /// The store that takes the pages' place,
    pub store: StoreId,
    /// and its file.
    pub file: BorrowedFd<'a>,
    /// Where pages may stay: the pipe that a copy of this process lives on.
    pub lifeline: Option<BorrowedFd<'a>>,
    /// What it is to take besides what is dirty.
    pub asked: Asked<'a>,
    /// Frames whose pages are copied first; sorted.
    pub first: &'a [Gfn],
}

/// Copies (1 MiB, some 0.1 ms) for which children do not wait: they begin meanwhile.
const BEHIND_FROM: u64 = 256;

impl Vm {
    /// Takes all dirty private pages, with the vCPUs stopped: moves them out and maps the file in their place, or copies them.
    /// They run again at once if they ran and the host has traps; otherwise once the server says so.
    ///
    /// The first freeze of a VM is of all that it has written since it was launched: with a `lifeline`, this process makes a
    /// copy of itself, and the pages stay.
    ///
    /// The registers are read by the vCPU threads while this one moves pages. Before the first is moved, the server is told
    /// all that the vCPUs have said, and that they stand; then what was taken; then the state, which children wait for; last
    /// that the vCPUs run. Of vCPUs that have rested all that is known at once, and told at once. Where many pages are copied,
    /// what was taken and the state are told meanwhile.
    pub fn freeze(&mut self, freeze: &Freeze<'_>, out: &mut Outbox<'_>) -> Result<(), VmError> {
        let &Freeze { store, lifeline, asked, .. } = freeze;
        if !self.started {
            return Err(VmError::NotStarted);
        }
        let watched = lifeline.is_some() && self.linux.is_some();
        // What a first freeze takes needs no log.
        let logs_behind = self.kvm.log() == DirtyLog::Off && !watched && self.shape.ram > LOGGED_AT_ONCE;
        if self.kvm.log() == DirtyLog::Off && !logs_behind && self.begin_log() && watched {
            thread::sleep(WATCH);
        }
        if asked.short == SmallExtents::CopyInPlace && self.log_tells_all {
            self.kvm.read_log()?;
            self.window.prepare_copies(self.kvm.logs());
        }
        let kicked_ns = now_ns();
        let Stopped { before, busy, rested } = self.floor.stop_and_save();
        self.interrupt_those(&busy);
        self.linux.iter().for_each(LinuxMachine::end_hinting);
        let activity = if self.traps { before } else { RunState::Paused };
        let (harvest, scratch_base, copies, copied, copy) = (Harvest::default(), 0, Gfn(0), None, None);
        let begun = Frozen { store, harvest, scratch_base, copies, copied, copy, activity, kicked_ns };
        let standing = self.freeze_standing(&begun, freeze, rested, out);
        let mut told = Ok(());
        let standing = match standing {
            Ok((taken, state)) if logs_behind => {
                // The children begin meanwhile.
                told = self.tell_taken(&begun, taken, &state, rested, out);
                told = told.and_then(|()| out.send().map_err(VmError::Server));
                self.log_tells_all = self.begin_log();
                Ok(None)
            }
            standing => standing.map(Some),
        };
        if !standing.as_ref().is_err_and(VmError::is_fatal) {
            self.floor.go_on(if standing.is_ok() { activity } else { before });
        }
        self.linux.iter().for_each(LinuxMachine::announce_ended_hinting);
        if let Some((taken, state)) = standing? {
            told = self.tell_taken(&begun, taken, &state, rested, out);
        }
        told?;
        if activity == RunState::Running {
            let pause_ns = self.floor.await_running().map_err(VmError::GoOn)?.saturating_sub(kicked_ns);
            out.hold(FromVm::WentOn { store, pause_ns });
        }
        out.send().map_err(VmError::Server)?;
        if self.kvm.log() == DirtyLog::On {
            self.kvm.prepare_log();
        }
        Ok(())
    }

    /// Has writes logged from now on. Whether they are.
    fn begin_log(&mut self) -> bool {
        let on = self.kvm.set_log(DirtyLog::On);
        on.inspect_err(|error| log::warn!("freezes take every private page: {error}")).is_ok()
    }

    /// Tells what a freeze has taken, and the state.
    fn tell_taken(
        &mut self,
        begun: &Frozen,
        taken: Taken,
        state: &MachineState,
        rested: bool,
        out: &mut Outbox<'_>,
    ) -> Result<(), VmError> {
        let told = matches!(taken, Taken::Told(_));
        let frozen = match taken {
            Taken::Nothing => None,
            Taken::Told(harvest) => {
                self.window.keep(&harvest);
                None
            }
            Taken::Moved(moved) => {
                let frozen = self.look(begun, &moved)?;
                self.window.keep(&frozen.harvest);
                Some(frozen)
            }
            Taken::InCopy(harvest, copy) => {
                Some(Frozen { harvest, scratch_base: self.window.base(), copy: Some(copy.as_raw()), ..begun.clone() })
            }
        };
        if let Some(frozen) = frozen {
            out.tell(FromVm::Frozen(Box::new(frozen))).map_err(VmError::Server)?;
        }
        if !told {
            out.hold(self.saved(begun.store, begun.activity, state));
        }
        if rested { Ok(()) } else { out.send().map_err(VmError::Server) }
    }

    fn look(&self, begun: &Frozen, moved: &MovedOut) -> Result<Frozen, VmError> {
        let taken = self.window.look(moved).map_err(VmError::Harvest)?;
        let (harvest, scratch_base, copies) = (taken.harvest, taken.scratch_base, taken.copies);
        Ok(Frozen { harvest, scratch_base, copies, ..begun.clone() })
    }

    /// The machine as it stands, when the vCPU threads have read their registers.
    fn state(&self, stood: Stood) -> Result<MachineState, VmError> {
        let Stood { serial, mailbox, linux } = stood;
        let saved = self.floor.await_saved().map_err(|error| error.to_string());
        let vcpus = saved.and_then(|all| all.into_iter().collect()).map_err(VmError::Save)?;
        Ok(MachineState { vcpus, serial, mailbox, linux })
    }

    /// Has the log say from now on what is written. Whether it will.
    fn clear_log(&self) -> bool {
        let cleared = || self.kvm.clear_log();
        let warn = |error: &_| log::warn!("the next freeze takes every private page: {error}");
        self.kvm.log() == DirtyLog::On && cleared().inspect_err(warn).is_ok()
    }

    fn saved(&self, store: StoreId, activity: RunState, state: &MachineState) -> FromVm {
        FromVm::Saved { store, state: PackedState::pack(state), still: self.is_still(activity, state) }
    }

    /// Whether the guest does nothing before the server has something for it, and `state` stays what it is meanwhile: the
    /// clocks of a Linux guest go on, and on hosts that keep no offset of it the time stamp counter does.
    fn is_still(&self, activity: RunState, state: &MachineState) -> bool {
        let stands = activity == RunState::Paused || self.floor.rests();
        let clocks_stand = self.linux.is_none() && state.vcpus.iter().all(|vcpu| vcpu.tsc.stands_still());
        stands && clocks_stand && self.traps
    }

    /// The part of a freeze for which the vCPUs stand. If nothing was taken, this is told at once: the children get ready
    /// while the registers are read. Otherwise it is told when the parent runs again, or, of many copies, while they are made.
    fn freeze_standing(
        &mut self,
        begun: &Frozen,
        freeze: &Freeze<'_>,
        rested: bool,
        out: &mut Outbox<'_>,
    ) -> Result<(Taken, MachineState), VmError> {
        let &Freeze { file, lifeline, asked, .. } = freeze;
        let floor = Arc::clone(&self.floor);
        let mut shared = self.await_standing(&floor, |message| out.tell(message))?;
        let said = shared.take_messages();
        let (serial, mailbox) = (shared.console.save(), shared.mailbox.save());
        drop(shared);
        said.into_iter().chain([FromVm::Standing]).for_each(|message| out.hold(message));
        if !rested {
            out.send().map_err(VmError::Server)?;
        }
        let linux = self.linux.as_ref().map(LinuxMachine::save).transpose()?;
        self.kvm.read_log()?;
        let in_copy = match lifeline.filter(|_| self.traps && !self.log_tells_all) {
            Some(lifeline) => self.freeze_in_copy(lifeline, asked.max_runs)?,
            None => None,
        };
        let taken = match in_copy {
            Some(taken) => taken,
            None => {
                let dirty = if self.log_tells_all { Dirty::Logged(self.kvm.logs()) } else { Dirty::Every };
                let moved = self.window.move_out(dirty, begun.store, file, asked)?;
                moved.map_or(Taken::Nothing, Taken::Moved)
            }
        };
        if matches!(taken, Taken::Nothing) {
            out.hold(FromVm::Frozen(Box::new(begun.clone())));
        }
        // Before a vCPU runs that may trap.
        if !rested || !matches!(taken, Taken::Nothing) {
            out.send().map_err(VmError::Server)?;
        }
        let stood = Stood { serial, mailbox, linux };
        let (taken, state, cleared) = match taken {
            // Without traps, children have to wait for all copies.
            Taken::Moved(moved) if self.traps && count(moved.copies()) >= BEHIND_FROM => {
                let (taken, state) = self.copy_behind(begun, freeze.first, &moved, stood, out)?;
                (taken, state, self.clear_log())
            }
            taken => {
                if let Taken::Moved(moved) = &taken {
                    self.window.copy(begun.store, moved.copies()).map_err(VmError::Harvest)?;
                }
                let cleared = self.clear_log();
                (taken, self.state(stood)?, cleared)
            }
        };
        self.log_tells_all = cleared;
        Ok((taken, state))
    }

    /// Waits until the vCPUs stand, and takes what they give back before they do.
    fn await_standing<'a>(
        &mut self,
        floor: &'a Floor,
        mut tell: impl FnMut(FromVm) -> io::Result<()>,
    ) -> Result<MutexGuard<'a, Shared>, VmError> {
        let mut told = Ok(());
        let shared = floor.await_standing_and_accept(|pages| {
            let (given, sent) = give_back(&mut self.window, pages, self.max_runs, &mut tell);
            told = std::mem::replace(&mut told, Ok(())).and(sent);
            given
        })?;
        told.map_err(VmError::Server)?;
        Ok(shared)
    }

    /// Has a copy of this process keep the frozen pages. `None` where they are to be moved instead. What the guest has just
    /// written, it is likely to write again at once.
    fn freeze_in_copy(&mut self, lifeline: BorrowedFd<'_>, max_runs: u32) -> Result<Option<Taken>, VmError> {
        let mut copy = None;
        let made = self.window.freeze_in_copy(max_runs, || {
            copy = Some(keeper::copy(lifeline)?);
            Ok(())
        });
        match made {
            Ok(harvest) => {
                let hot = self.kvm.logs().iter().flat_map(SlotLog::pages).take(HOT_MOST);
                hot.for_each(|pages| self.window.copy_ahead(pages));
                Ok(harvest.map(|harvest| copy.map_or(Taken::Nothing, |copy| Taken::InCopy(harvest, copy))))
            }
            Err(error) => {
                log::warn!("pages are moved instead: {error}");
                Ok(None)
            }
        }
    }

    /// Maps `file`, which is `store`, in the place of pages that are kept since a freeze into it, with the vCPUs stopped, and
    /// tells where it did.
    pub fn dedup(
        &mut self,
        store: StoreId,
        file: BorrowedFd<'_>,
        pages: &[GfnRange],
        mut tell: impl FnMut(FromVm) -> io::Result<()>,
    ) -> Result<(), VmError> {
        let Stopped { before, busy, .. } = self.floor.stop();
        self.interrupt_those(&busy);
        let deduped = self.dedup_standing(store, file, pages, &mut tell);
        // Before the guest can touch them: they may trap now.
        let pages = deduped.as_ref().map_or_else(|_| Vec::new(), |deduped| deduped.pages.clone());
        let told = tell(FromVm::Deduped { store, pages });
        if !deduped.as_ref().is_err_and(VmError::is_fatal) {
            self.floor.go_on(before);
        }
        // Only now what was there is given back.
        drop(deduped?);
        told.map_err(VmError::Server)
    }

    fn dedup_standing(
        &mut self,
        store: StoreId,
        file: BorrowedFd<'_>,
        pages: &[GfnRange],
        tell: impl FnMut(FromVm) -> io::Result<()>,
    ) -> Result<Deduped, VmError> {
        let floor = Arc::clone(&self.floor);
        drop(self.await_standing(&floor, tell)?);
        self.kvm.read_log()?;
        let dirty = if self.log_tells_all { Dirty::Logged(self.kvm.logs()) } else { Dirty::Every };
        let deduped = self.window.dedup(dirty, store, file, pages)?;
        if let Err(error) = self.kvm.clear_log() {
            log::warn!("the next freeze takes every private page: {error}");
            self.log_tells_all = false;
        }
        Ok(deduped)
    }

    /// What the guest has written since it was started or frozen; none where no log is kept. Of pages that were touched
    /// ahead it is told when the guest's first moments are over: it is their `last`.
    pub fn wrote(&mut self, last: bool) -> Result<Vec<GfnRange>, VmError> {
        self.kvm.read_log()?;
        let mut pages: RangeSet<u64> = self.kvm.logs().iter().flat_map(SlotLog::pages).map(GfnRange::raw).collect();
        self.window.shared().for_each(|shared| pages.remove(shared.raw()));
        // Most clones are never frozen.
        self.kvm.forget_log();
        if last {
            let touched = std::mem::take(&mut self.touched);
            touched.leave_out_unchanged(self.window.memory(), &mut pages).map_err(VmError::Look)?;
        } else {
            self.touched.leave_out(&mut pages);
        }
        Ok(pages.into_iter().map(GfnRange::from).collect())
    }

    /// Takes the pages that a vCPU gives back, if one does.
    pub fn accept_gift(&mut self, mut tell: impl FnMut(FromVm) -> io::Result<()>) -> io::Result<()> {
        let mut told = Ok(());
        self.floor.accept_gift(|pages| {
            let given;
            (given, told) = give_back(&mut self.window, pages, self.max_runs, &mut tell);
            given
        });
        told
    }

    /// Some pages of the freeze into `store` have settled.
    pub fn leave_scratch(&mut self, store: StoreId, pages: GfnRange) {
        self.window.leave_scratch(store, pages);
    }

    /// The pages of the freeze into `store` have settled. What memory their copies had may be for the next freeze's.
    pub fn drop_scratch(&mut self, store: StoreId) {
        self.window.drop_scratch(store);
    }

    /// What the guest may do with these pages, whatever is mapped there later.
    pub fn protect(&mut self, pages: GfnRange, protection: Protection) -> io::Result<()> {
        self.window.protect(pages, protection)
    }

    /// No freeze is likely to come soon.
    pub fn drop_spare(&mut self) {
        self.window.drop_spare();
    }
}

fn count(pages: &[GfnRange]) -> u64 {
    pages.iter().map(|pages| pages.count().0).sum()
}

/// What of a machine's state does not take long to save.
struct Stood {
    serial: serial::State,
    mailbox: MailboxState,
    linux: Option<LinuxState>,
}

/// What a freeze took.
enum Taken {
    Nothing,
    /// Pages that are in a scratch range now, those that stayed after they have been copied.
    Moved(MovedOut),
    /// What was taken, which the server knows of.
    Told(Harvest),
    /// Pages that stayed, and are in this copy of the process as well.
    InCopy(Harvest, Pid),
}

/// Takes pages out of the window, as far as it has mappings to spare, and tells the server.
fn give_back(
    window: &mut HostWindow,
    pages: &[GfnRange],
    max_runs: u32,
    tell: &mut impl FnMut(FromVm) -> io::Result<()>,
) -> (Vec<GfnRange>, io::Result<()>) {
    let given = window.balloon(pages, max_runs as usize);
    let told = given.chunks(SOME).try_for_each(|some| tell(FromVm::Ballooned(some.to_vec())));
    (given, told)
}
