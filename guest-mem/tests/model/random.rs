//! Random operations on families of all kinds, everything checked after each.
//!
//! `OFFSHOOT_SEED` runs one seed again, `OFFSHOOT_STEPS` makes every run longer.

use crate::fakes::{Call, Gaps};
use crate::rng::Rng;
use crate::swap::Reads;
use crate::world::{Layout, World};
use guest_mem::addr::{Gfn, GfnRange, PageCount};
use guest_mem::{Activity, Protection, Sharing, Touch, VmId};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// More VMs than this make no new ones.
const MAX_VMS: usize = 8;

struct Player {
    rng: Rng,
    world: World,
    frames: Vec<Gfn>,
    /// Whether processes get killed.
    deadly: bool,
    /// How often something is evicted, of 100 steps.
    pressure: u64,
}

impl Player {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let layouts = [
            Layout::flat(16),
            Layout::flat(32),
            Layout::flat(64),
            Layout::flat(64).with_files(&[(20, 31)]),
            Layout::flat(64).with_hole(24, 40).with_files(&[(3, 9), (40, 45)]),
            Layout::flat(64).with_files(&[(3, 9)]).with_shared(&[(20, 31), (31, 32)]),
            Layout::flat(64).with_hole(24, 40).with_shared(&[(20, 24), (50, 64)]),
            Layout::flat(128),
            Layout::flat(120).with_hole(60, 70).with_files(&[(33, 50)]),
        ];
        let layout = &layouts[rng.below(layouts.len() as u64) as usize];
        let world = World::new(layout);
        let frames = world.frames().collect();
        let deadly = rng.below(3) == 0;
        let pressure = [0, 5, 20, 40][rng.below(4) as usize];
        if rng.below(2) == 0 {
            world.swap.borrow_mut().reads = Reads::Later;
        }
        if rng.below(4) == 0 {
            world.swap.borrow_mut().size = 30;
        }
        Self { rng, world, frames, deadly, pressure }
    }

    fn vm(&mut self) -> VmId {
        self.rng.pick(&self.world.ids())
    }

    fn frame(&mut self) -> Gfn {
        self.rng.pick(&self.frames)
    }

    /// Neighbours, often enough of them for a stretch of zeros.
    fn stretch(&mut self) -> Vec<Gfn> {
        let first = self.rng.below(self.frames.len() as u64) as usize;
        let count = 1 + self.rng.below(40) as usize;
        self.frames.iter().copied().skip(first).take(count).collect()
    }

    fn gaps(&mut self) -> Gaps {
        match self.rng.below(5) {
            0 | 1 => Gaps::None,
            2 => Gaps::Some(self.rng.bits()),
            3 => Gaps::Stay,
            _ => Gaps::All,
        }
    }

    fn step(&mut self) {
        if self.rng.below(100) < self.pressure {
            self.press();
        } else {
            self.operate();
        }
        self.world.reap();
        if self.world.vms.is_empty() {
            self.world.write_back_all();
        }
        self.world.check();
    }

    /// What memory pressure, and the end of it, brings.
    fn press(&mut self) {
        let vm = self.vm();
        match self.rng.below(15) {
            0 => self.world.evict_all(),
            1..=3 => {
                let limit = 1 + self.rng.below(40);
                self.world.evict_some(limit);
            }
            4 => {
                let nth = self.rng.below(3);
                self.world.ledger.fail(Call::PutSwap, nth);
                self.world.evict_some(40);
                self.world.ledger.take_unfailed();
            }
            5 => {
                let gaps = self.gaps();
                self.world.freeze_to_swap(vm, gaps);
            }
            6 => {
                let activity = self.rng.pick(&[Activity::Running, Activity::Idle]);
                self.world.manager.set_activity(vm, activity).expect("a VM of the family");
            }
            7 | 8 => {
                let gfn = self.frame();
                let touch = self.rng.pick(&[Touch::Read, Touch::Write]);
                self.world.prefetch(vm, gfn, touch);
            }
            9 => drop(self.world.end_reads()),
            10 => drop(self.world.io_done()),
            11 if self.deadly => {
                let nth = self.rng.below(4);
                self.world.ledger.fail(Call::GetSwap, nth);
                self.world.expect_losses();
            }
            12 => drop(self.world.manager.bring_ahead()),
            14 if self.deadly && self.rng.below(4) == 0 => self.world.lose_scratch(vm),
            13 => {
                let room = PageCount(16 * self.rng.below(8));
                self.world.manager.set_room_ahead(room);
            }
            _ => {
                let frames = self.stretch();
                frames.into_iter().for_each(|gfn| self.world.read(vm, gfn));
            }
        }
    }

    fn operate(&mut self) {
        let vm = self.vm();
        match self.rng.below(100) {
            0..15 => {
                let gfn = self.frame();
                self.world.read(vm, gfn);
            }
            15..38 => {
                let gfn = self.frame();
                self.world.write(vm, gfn);
            }
            38..42 => {
                for gfn in self.stretch() {
                    self.world.write(vm, gfn);
                }
            }
            42..48 => {
                for gfn in self.stretch() {
                    self.world.clear(vm, gfn);
                }
            }
            48..51 => {
                let gfn = self.frame();
                self.world.clear(vm, gfn);
            }
            51..54 => {
                let gfn = self.frame();
                self.world.copy_clean(vm, gfn);
            }
            54..66 => self.fork(vm),
            66..71 => {
                let gaps = self.gaps();
                self.world.freeze(vm, gaps);
                if self.rng.below(4) == 0 {
                    self.world.copies_behind(vm);
                }
            }
            71 => self.dedup(vm),
            72 => match self.rng.below(6) {
                0 | 1 => self.protect(vm),
                2 | 3 => self.remap(vm),
                _ => self.move_pages(vm),
            },
            73 => self.world.freeze_in_vain(vm),
            74..80 => {
                if self.world.vms.len() > 1 {
                    self.world.exit(vm);
                }
            }
            80..92 => {
                self.world.write_back();
            }
            92..94 => self.dedup(vm),
            94..96 => self.world.write_back_all(),
            96..99 => {
                let (stretch, gaps) = (self.stretch(), self.gaps());
                let pages = GfnRange::between(stretch[0], Gfn(stretch[stretch.len() - 1].0 + 1));
                match self.rng.below(5) {
                    0 => self.world.balloon_and_freeze(vm, pages, gaps),
                    _ => self.world.balloon(vm, pages),
                }
            }
            _ => self.kill(vm),
        }
    }

    fn protect(&mut self, vm: VmId) {
        let stretch = self.stretch();
        let pages = GfnRange::between(stretch[0], Gfn(stretch[stretch.len() - 1].0 + 1));
        let protection = self.rng.pick(&[Protection::ReadOnly, Protection::ReadWrite]);
        self.world.protect(vm, pages, protection);
    }

    fn remap(&mut self, vm: VmId) {
        let stretch = self.stretch();
        let sharing = self.rng.pick(&[Sharing::CopyOnWrite, Sharing::Shared]);
        self.world.try_remap(vm, &stretch, sharing).expect("nothing is to fail");
    }

    fn move_pages(&mut self, vm: VmId) {
        let stretch = self.stretch();
        self.world.try_move_into_hole(vm, &stretch).expect("nothing is to fail");
    }

    fn dedup(&mut self, vm: VmId) {
        for store in self.world.kept_stores(vm) {
            let (least, limit) = (1 + self.rng.below(5), 1 + self.rng.below(40));
            self.world.dedup(vm, store, least, limit);
        }
    }

    fn fork(&mut self, parent: VmId) {
        let gaps = self.gaps();
        self.world.freeze(parent, gaps);
        if self.rng.below(4) == 0 {
            self.world.copies_behind(parent);
        }
        for _ in 0..=self.rng.below(3) {
            if self.world.vms.len() < MAX_VMS {
                self.world.fork_frozen(parent);
            }
        }
    }

    fn kill(&mut self, vm: VmId) {
        if self.deadly && self.world.vms.len() > 2 {
            let mut victims = self.world.holders();
            victims.push(vm);
            let victim = self.rng.pick(&victims);
            self.world.kill(victim);
        }
    }

    /// Until `steps` are done or every VM has failed.
    fn play(mut self, steps: u64) {
        for step in 0..steps {
            self.step();
            if step % 16 == 0 {
                self.world.check_counts();
            }
            if step % 32 == 0 {
                self.world.verify();
            }
            if step % 256 == 255 {
                self.world.write_back_all();
                self.world.verify();
            }
            if self.world.vms.is_empty() {
                break;
            }
        }
        self.world.verify();
        self.world.end();
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn random_operations_agree_with_the_model() {
    let steps = from_environment("OFFSHOOT_STEPS").unwrap_or(300);
    let seeds = from_environment("OFFSHOOT_SEED").map_or(1..101, |seed| seed..seed + 1);
    for seed in seeds {
        let played = catch_unwind(AssertUnwindSafe(|| Player::new(seed).play(steps)));
        if let Err(panic) = played {
            eprintln!("run it again with OFFSHOOT_SEED={seed} OFFSHOOT_STEPS={steps}");
            resume_unwind(panic);
        }
    }
}
