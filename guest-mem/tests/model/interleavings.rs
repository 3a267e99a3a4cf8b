//! Operations between the halves of freezes and dedups, calls that fail at random, and everything checked after each.
//!
//! What is done is a list of plain values, whose numbers are taken modulo what there is. So any part of a list can be played
//! too, and a failure is told by its seed and by a list that is as short as could be found.

use super::fakes::{Call, Gaps};
use super::rng::Rng;
use super::swap::WorldSwap;
use super::world::{Dedup, Half, Layout, What, World};
use guest_mem::addr::{Gfn, GfnRange, PageCount};
use guest_mem::manager::Error;
use guest_mem::{Activity, Destination, Protection, Sharing, Touch, VmId};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// More VMs than this make no new ones.
const MAX_VMS: usize = 7;
/// Shorter lists are looked for so often.
const SHORTER: usize = 1500;

/// One operation; VMs, pages and counts modulo what there is.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Read(u64, u64, u64),
    Write(u64, u64, u64),
    Clear(u64, u64, u64),
    CopyClean(u64, u64),
    Balloon(u64, u64, u64),
    Protect(u64, u64, u64, Protection),
    Remap(u64, u64, u64, Sharing),
    /// Into what an unmap has left.
    Move(u64, u64, u64),
    Begin(u64, Destination),
    Stand(u64),
    Take(u64, Gaps),
    Finish(u64),
    Abort(u64),
    /// All halves of one, and children.
    Fork(u64, Gaps, u64),
    /// Children of what the last freeze took.
    ForkFrozen(u64),
    CopiesBehind(u64),
    AskToShed(u64, u64, u64),
    DoShed(u64),
    TellDedup(u64),
    Exit(u64),
    /// The process of a VM, or one that outlives its VM.
    Kill(u64),
    WriteBack,
    WriteBackAll,
    WriteAhead(u64, u64),
    Evict(u64),
    BringAhead,
    Room(u64),
    GiveUpCopies(u64),
    SetPace(u64, Activity),
    EndReads,
    Retry,
    /// Every so many calls of a kind fail from now on.
    Fail(Call, u64),
    Mend,
    /// All memory is read, as far as it can be had.
    Look,
}

/// Where a list is played.
#[derive(Clone, Debug)]
pub struct Stage {
    pub layout: Layout,
    /// Memory may be lost.
    pub deadly: bool,
    /// Calls fail.
    pub failing: bool,
    /// How often something is evicted, of 100 operations.
    pub pressure: u64,
    /// The longest stretch that is written or cleared at once.
    pub stretch: u64,
}

impl Stage {
    pub fn new(rng: &mut Rng) -> Self {
        let pages = rng.pick(&[16, 24, 64, 100, 180, 250]);
        let mut layout = Layout::flat(pages);
        if rng.below(2) == 0 && pages >= 24 {
            let from = rng.below(pages - 8);
            let to = from + 1 + rng.below((pages - from - 2).min(20));
            if from > 0 {
                layout = layout.with_hole(from, to);
            }
        }
        let end = layout.ram[0].1;
        if rng.below(3) == 0 && end >= 8 {
            let start = rng.below(end - 4);
            layout = layout.with_files(&[(start, start + 1 + rng.below(end - start - 1))]);
        }
        if rng.below(4) == 0 && end >= 8 && layout.files.is_empty() {
            let start = rng.below(end - 4);
            layout = layout.with_shared(&[(start, start + 1 + rng.below(end - start - 1))]);
        }
        layout.max_runs = rng.pick(&[4, 12, 40, 16_000]);
        let stretch = if rng.below(2) == 0 { 12 } else { 60 };
        let pressure = rng.pick(&[0, 10, 30]);
        Self { layout, deadly: rng.below(3) == 0, failing: rng.below(2) == 0, pressure, stretch }
    }

    fn gaps(rng: &mut Rng) -> Gaps {
        match rng.below(6) {
            0 => Gaps::None,
            1 => Gaps::All,
            2 | 3 => Gaps::Stay,
            _ => Gaps::Some(rng.bits()),
        }
    }

    fn call(&self, rng: &mut Rng) -> Call {
        use Call::*;
        let harmless = [Create, Fill, Read, ReadFile, PutSwap, Supply, Protect, Map];
        let deadly = [Create, Fill, Read, ReadFile, PutSwap, Supply, Protect, Map, ReadScratch, GetSwap];
        rng.pick(if self.deadly { &deadly[..] } else { &harmless[..] })
    }

    pub fn op(&self, rng: &mut Rng) -> Op {
        let (vm, page) = (rng.below(MAX_VMS as u64 * 60), rng.below(1 << 20));
        let count = if rng.below(2) == 0 { 1 } else { 1 + rng.below(self.stretch) };
        if rng.below(100) < self.pressure {
            return match rng.below(12) {
                0..5 => Op::Evict(rng.pick(&[3, 20, 1000])),
                5 => Op::BringAhead,
                6 => Op::Room(16 * rng.below(8)),
                7 => Op::GiveUpCopies(1 + rng.below(40)),
                8 => Op::SetPace(vm, rng.pick(&[Activity::Running, Activity::Idle])),
                9 | 10 => Op::EndReads,
                _ => Op::Read(vm, page, 40),
            };
        }
        match rng.below(100) {
            0..9 => Op::Read(vm, page, count),
            9..24 => Op::Write(vm, page, count),
            24..29 => Op::Clear(vm, page, count),
            29..32 => Op::CopyClean(vm, page),
            32..36 => Op::Balloon(vm, page, count),
            36..41 => Op::Begin(vm, rng.pick(&[Destination::Store, Destination::Store, Destination::Swap])),
            41..47 => Op::Stand(vm),
            47..53 => Op::Take(vm, Self::gaps(rng)),
            53..59 => Op::Finish(vm),
            59 => Op::Abort(vm),
            60..66 => Op::Fork(vm, Self::gaps(rng), rng.below(3)),
            66..69 => Op::ForkFrozen(vm),
            69..72 => Op::CopiesBehind(vm),
            72..75 => Op::AskToShed(vm, 1 + rng.below(4), 1 + rng.below(60)),
            75 => Op::DoShed(vm),
            76 | 77 => Op::TellDedup(vm),
            78..82 => Op::Exit(vm),
            82 => Op::Kill(vm),
            83..89 => Op::WriteBack,
            89 => Op::WriteBackAll,
            90 => Op::WriteAhead(vm, page),
            91 | 92 => Op::EndReads,
            93..95 => Op::Retry,
            95 | 96 if self.failing => Op::Fail(self.call(rng), 1 + rng.below(4)),
            97 => Op::Mend,
            98 if rng.below(3) > 0 => match rng.below(2) {
                0 => Op::Remap(vm, page, count, rng.pick(&[Sharing::CopyOnWrite, Sharing::Shared])),
                _ => Op::Move(vm, page, count),
            },
            98 => Op::Protect(vm, page, count, rng.pick(&[Protection::ReadOnly, Protection::ReadWrite])),
            99 => Op::Look,
            _ => Op::Write(vm, page, 1),
        }
    }
}

pub struct Player<'a, S> {
    stage: &'a Stage,
    world: World<S>,
    frames: Vec<Gfn>,
}

impl<'a, S: WorldSwap> Player<'a, S> {
    pub fn new(stage: &'a Stage, mut world: World<S>) -> Self {
        if stage.deadly {
            world.expect_losses();
        }
        let frames = world.frames().collect();
        Self { stage, world, frames }
    }

    fn vm(&self, number: u64) -> VmId {
        let ids = self.world.ids();
        ids[(number % ids.len() as u64) as usize]
    }

    fn frame(&self, number: u64) -> Gfn {
        self.frames[(number % self.frames.len() as u64) as usize]
    }

    /// Neighbours, but for the hole.
    fn stretch(&self, first: u64, count: u64) -> Vec<Gfn> {
        let first = (first % self.frames.len() as u64) as usize;
        self.frames.iter().copied().skip(first).take(count as usize).collect()
    }

    /// Whether its guest does nothing now.
    fn stands(&self, vm: VmId) -> bool {
        matches!(self.world.halves.get(&vm), Some(Half::Standing(..)))
    }

    /// What is ordered fails; that leaves everything in order.
    fn may_fail(&self, done: Result<(), Error>) {
        if let Err(error) = done {
            let ordered = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source())
                .any(|error| error.to_string().contains("as the test ordered"));
            assert!(self.stage.failing && ordered, "{error}: {error:?}");
        }
    }

    /// Entries are changed before a freeze or after it: what is there may have been moved out.
    fn may_wait(&self, vm: VmId, done: Result<(), Error>) {
        match self.world.halves.contains_key(&vm) {
            true => assert!(matches!(done, Ok(()) | Err(Error::Freezing(_))), "{done:?}"),
            false => self.may_fail(done),
        }
    }

    pub fn step(&mut self, op: Op) {
        self.operate(op);
        self.world.reap();
        self.world.check();
    }

    fn operate(&mut self, op: Op) {
        if self.world.vms.is_empty() {
            return;
        }
        match op {
            Op::Read(vm, page, count) => {
                let vm = self.vm(vm);
                self.each(vm, page, count, |world, gfn| world.attempt_read(vm, gfn));
            }
            Op::Write(vm, page, count) => {
                let vm = self.vm(vm);
                self.each(vm, page, count, |world, gfn| world.attempt_write(vm, gfn, What::Stamp));
            }
            Op::Clear(vm, page, count) => {
                let vm = self.vm(vm);
                self.each(vm, page, count, |world, gfn| world.attempt_write(vm, gfn, What::Zero));
            }
            Op::CopyClean(vm, page) => {
                let vm = self.vm(vm);
                self.each(vm, page, 1, |world, gfn| {
                    world.attempt(vm, gfn, Touch::Write, |window| window.copy_clean(gfn)).map(drop)
                });
            }
            Op::Balloon(vm, page, count) => {
                let (vm, stretch) = (self.vm(vm), self.stretch(page, count));
                let told = !matches!(self.world.halves.get(&vm), Some(Half::Standing(..) | Half::Taken(..)));
                if told {
                    // It tells of one thing after the other.
                    if let Some(Dedup::Done(..)) = self.world.dedups.get(&vm) {
                        self.world.tell_dedup(vm);
                    }
                    for part in stretch.chunk_by(|a, b| a.0 + 1 == b.0) {
                        self.world.balloon(vm, GfnRange::new(part[0], PageCount(part.len() as u64)));
                    }
                }
            }
            Op::Remap(vm, page, count, sharing) => {
                let (vm, stretch) = (self.vm(vm), self.stretch(page, count));
                let done = self.world.try_remap(vm, &stretch, sharing);
                self.may_wait(vm, done);
            }
            Op::Move(vm, page, count) => {
                let (vm, stretch) = (self.vm(vm), self.stretch(page, count));
                let done = self.world.try_move_into_hole(vm, &stretch).map(drop);
                self.may_wait(vm, done);
            }
            Op::Protect(vm, page, count, protection) => {
                let vm = self.vm(vm);
                for part in self.stretch(page, count).chunk_by(|a, b| a.0 + 1 == b.0) {
                    let pages = GfnRange::new(part[0], PageCount(part.len() as u64));
                    if !self.stands(vm) {
                        let done = self.world.try_protect(vm, pages, protection);
                        self.may_fail(done);
                    }
                }
            }
            Op::Begin(vm, to) => {
                let vm = self.vm(vm);
                if !self.world.halves.contains_key(&vm) {
                    let begun = self.world.begin(vm, to).map(drop);
                    self.may_fail(begun);
                }
            }
            Op::Stand(vm) => {
                if let Some(vm) = self.halfway(vm, |half| matches!(half, Half::Begun(..))) {
                    self.world.stand(vm);
                }
            }
            Op::Take(vm, gaps) => {
                if let Some(vm) = self.halfway(vm, |half| matches!(half, Half::Standing(..))) {
                    self.world.take(vm, gaps);
                }
            }
            Op::Finish(vm) => {
                if let Some(vm) = self.halfway(vm, |half| matches!(half, Half::Taken(..))) {
                    self.world.finish(vm);
                }
            }
            Op::Abort(vm) => {
                if let Some(vm) = self.halfway(vm, |half| !matches!(half, Half::Taken(..))) {
                    self.world.abort(vm);
                }
            }
            Op::Fork(vm, gaps, children) => {
                let vm = self.vm(vm);
                if !self.world.halves.contains_key(&vm) {
                    let frozen = self.world.try_freeze(vm, gaps).map(drop);
                    self.may_fail(frozen);
                }
                for _ in 0..children {
                    self.fork_frozen(vm);
                }
            }
            Op::ForkFrozen(vm) => self.fork_frozen(self.vm(vm)),
            Op::CopiesBehind(vm) => self.world.copies_behind(self.vm(vm)),
            Op::AskToShed(vm, least, limit) => {
                let vm = self.vm(vm);
                let may = !self.world.halves.contains_key(&vm) && !self.world.dedups.contains_key(&vm);
                if let Some(store) = self.world.kept_stores(vm).into_iter().next().filter(|_| may) {
                    self.world.ask_to_dedup(vm, store, least, limit);
                }
            }
            Op::DoShed(vm) => {
                let all: Vec<VmId> = self.world.dedups.keys().copied().collect();
                if !all.is_empty() {
                    self.world.do_dedup(all[(vm % all.len() as u64) as usize]);
                }
            }
            Op::TellDedup(vm) => {
                let all: Vec<VmId> = self.world.dedups.keys().copied().collect();
                if !all.is_empty() {
                    self.world.tell_dedup(all[(vm % all.len() as u64) as usize]);
                }
            }
            Op::Exit(vm) => {
                if self.world.vms.len() > 1 {
                    self.world.exit(self.vm(vm));
                }
            }
            Op::Kill(vm) => {
                if self.stage.deadly && self.world.vms.len() > 2 {
                    let mut victims = self.world.holders();
                    victims.push(self.vm(vm));
                    self.world.kill(victims[(vm % victims.len() as u64) as usize]);
                }
            }
            Op::WriteBack => {
                let done = self.world.try_write_back().map(drop);
                self.may_fail(done);
            }
            Op::WriteBackAll => {
                self.world.ledger.take_unfailed();
                self.world.write_back_all();
            }
            Op::WriteAhead(vm, page) => {
                let done = self.world.manager.write_ahead(self.vm(vm), self.frame(page));
                self.may_fail(done);
            }
            Op::Evict(limit) => {
                let full = |error: &Error| {
                    // The disk is full, fails, or is behind.
                    matches!(error, Error::PutSwap { .. })
                };
                let stopped = self.world.evict_some(limit).stopped.filter(|error| !full(error));
                self.may_fail(stopped.map_or(Ok(()), Err));
            }
            Op::BringAhead => drop(self.world.manager.bring_ahead()),
            Op::Room(pages) => self.world.manager.set_room_ahead(PageCount(pages)),
            Op::GiveUpCopies(pages) => drop(self.world.manager.reclaim_swap_cache(PageCount(pages))),
            Op::SetPace(vm, activity) => {
                self.world.manager.set_activity(self.vm(vm), activity).expect("a VM of the family");
            }
            Op::EndReads => drop(self.world.end_reads()),
            Op::Retry => {
                let done = self.world.try_retry();
                self.may_fail(done);
            }
            Op::Fail(call, nth) => self.world.ledger.fail_each(call, nth),
            Op::Mend => drop(self.world.ledger.take_unfailed()),
            Op::Look => {
                for vm in self.world.ids() {
                    self.each(vm, 0, u64::MAX, |world, gfn| world.attempt_read(vm, gfn));
                }
                self.world.check_counts();
            }
        }
    }

    /// A VM that is this far in a freeze.
    fn halfway(&self, vm: u64, far: impl Fn(&Half) -> bool) -> Option<VmId> {
        let all: Vec<VmId> = self.world.halves.iter().filter(|(_, half)| far(half)).map(|(&vm, _)| vm).collect();
        (!all.is_empty()).then(|| all[(vm % all.len() as u64) as usize])
    }

    fn fork_frozen(&mut self, vm: VmId) {
        if self.world.vms.len() < MAX_VMS {
            self.world.fork_frozen(vm);
        }
    }

    /// A guest does something to each page of a stretch.
    fn each(
        &mut self,
        vm: VmId,
        first: u64,
        count: u64,
        mut action: impl FnMut(&mut World<S>, Gfn) -> Result<(), Error>,
    ) {
        for gfn in self.stretch(first, count) {
            if self.stands(vm) || self.world.window(vm).failed.is_some() {
                return;
            }
            let done = action(&mut self.world, gfn);
            self.may_fail(done);
        }
    }

    /// Everything is read, and nothing is left; `swap` looks at what swap is then.
    pub fn end(mut self, swap: impl FnOnce(&S)) {
        self.world.ledger.take_unfailed();
        // Half of them end in the middle.
        let halves: Vec<VmId> = self.world.halves.keys().copied().filter(|vm| vm.0 % 2 == 1).collect();
        for vm in halves {
            self.world.exit(vm);
            self.world.check();
        }
        self.world.close();
        self.world.check();
        self.world.write_back_all();
        self.world.check();
        self.world.reap();
        self.world.verify();
        self.world.check();
        let left = Rc::clone(&self.world.swap);
        self.world.end();
        swap(&left.borrow());
    }
}

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// What went wrong in it, if something did.
fn failure(play: impl FnOnce()) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(play)).err()?;
    let text = panic.downcast_ref::<String>().cloned();
    Some(text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
}

/// The shortest part of a failing list that was found to fail.
fn shorten(mut ops: Vec<Op>, fails: impl Fn(&[Op]) -> bool) -> Vec<Op> {
    let mut tries = 0;
    let mut part = ops.len().div_ceil(2);
    loop {
        let mut from = 0;
        while from < ops.len() && tries < SHORTER {
            let rest: Vec<Op> = ops[..from].iter().chain(&ops[(from + part).min(ops.len())..]).copied().collect();
            tries += 1;
            if fails(&rest) {
                ops = rest;
            } else {
                from += part;
            }
        }
        if part == 1 || tries >= SHORTER {
            return ops;
        }
        part = part.div_ceil(2);
    }
}

/// Plays lists of `length` operations, one for each seed, with `play`; where it panics, tells with what.
pub fn run_seeds(seeds: impl Iterator<Item = u64>, length: usize, play: impl Fn(u64, &Stage, &[Op])) {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !SILENT.get() {
            told(panic);
        }
    }));
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let stage = Stage::new(&mut rng);
        let ops: Vec<Op> = (0..length).map(|_| stage.op(&mut rng)).collect();
        SILENT.set(true);
        let fails = |ops: &[Op]| failure(|| play(seed, &stage, ops));
        if fails(&ops).is_some() {
            let short = shorten(ops, |ops| fails(ops).is_some());
            let why = fails(&short).unwrap_or_else(|| "and not when it is played once more".into());
            SILENT.set(false);
            let list: Vec<String> = short.iter().map(|op| format!("  {op:?}")).collect();
            panic!("OFFSHOOT_SEED={seed}: {why}\non {stage:?}\nby\n{}", list.join("\n"));
        }
        SILENT.set(false);
    }
}

/// Seeds for so many operations in lists of `length`. `OFFSHOOT_SEED` names one instead; `OFFSHOOT_INTERLEAVINGS` says for
/// how many operations there are seeds, or, with an `s` behind it, for how many seconds.
pub fn seeds(operations: u64, length: usize) -> Box<dyn Iterator<Item = u64>> {
    let number = |text: &str| -> u64 { text.parse().expect("a number") };
    if let Ok(seed) = std::env::var("OFFSHOOT_SEED") {
        return Box::new(std::iter::once(number(&seed)));
    }
    let asked = std::env::var("OFFSHOOT_INTERLEAVINGS").ok();
    match asked.as_deref().map(|asked| asked.strip_suffix('s').ok_or(asked)) {
        Some(Ok(seconds)) => {
            let (start, long) = (Instant::now(), Duration::from_secs(number(seconds)));
            Box::new((1..).take_while(move |_| start.elapsed() < long))
        }
        Some(Err(count)) => Box::new(1..1 + number(count).div_ceil(length as u64)),
        None => Box::new(1..1 + operations.div_ceil(length as u64)),
    }
}
