//! Random verbs on a crowd of VMs, against what each of them must hold.
//!
//! `OFFSHOOT_TORTURE_SECONDS` says for how long, `OFFSHOOT_TORTURE_SEED` repeats a run.

use offshoot_tests::process::kill;
use offshoot_tests::{Guest, Image, Random, Setup, TEN_SECONDS, TestHome, Traced};
use std::collections::BTreeMap;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use vmm::api::VmState;
use vmm::client::ForkOptions;
use vmm::units::ByteSize;

const REGION: Range<u64> = 64..3064;
const MOST: usize = 12;

struct World<'a> {
    home: &'a TestHome,
    random: Random,
    vms: Vec<Traced>,
    named: u64,
    done: BTreeMap<&'static str, u32>,
}

impl World<'_> {
    /// One of them, whichever.
    fn any(&mut self) -> usize {
        self.random.below(self.vms.len() as u64) as usize
    }

    fn part(&mut self) -> Range<u64> {
        self.random.part(&REGION, 400)
    }

    /// A name that is new. Those made by themselves grow with each generation.
    fn name(&mut self) -> String {
        self.named += 1;
        format!("r{}", self.named)
    }

    fn launch(&mut self) {
        let name = self.name();
        let vm = self.home.launch(&name, ByteSize::mib(16));
        self.vms.push(Traced::new(vm, REGION));
    }

    /// One verb.
    fn step(&mut self) -> &'static str {
        if self.vms.is_empty() {
            self.launch();
            return "launch";
        }
        let at = self.any();
        match self.random.below(100) {
            0..30 => self.write(at),
            30..38 => self.zero(at),
            38..48 => self.verify(at),
            48..53 => self.balloon(at),
            53..55 => self.fork_while_it_inflates(at),
            55..72 => self.fork(at),
            72..77 => self.fork_while_it_fills(at),
            77..81 => self.fork_from_inside(at),
            81..87 => self.remove(at),
            87..91 => self.kill(at),
            91..94 => self.pause_and_resume(at),
            94..96 => self.fork_and_kill(at),
            96..98 => self.check(),
            _ if self.vms.len() < MOST => {
                self.launch();
                "launch"
            }
            _ => self.check(),
        }
    }

    fn write(&mut self, at: usize) -> &'static str {
        let pages = self.part();
        self.vms[at].write(pages);
        "write"
    }

    fn zero(&mut self, at: usize) -> &'static str {
        let pages = self.part();
        self.vms[at].zero(pages);
        "zero"
    }

    fn verify(&mut self, at: usize) -> &'static str {
        self.vms[at].verify();
        "verify"
    }

    /// Pages go into the balloon, and come out empty.
    fn balloon(&mut self, at: usize) -> &'static str {
        let pages = self.part();
        self.vms[at].balloon(pages);
        "balloon"
    }

    fn room(&self) -> bool {
        self.vms.len() + 3 <= MOST
    }

    fn fork(&mut self, at: usize) -> &'static str {
        if !self.room() {
            return self.remove(at);
        }
        let paused = self.random.below(4) == 0;
        let count = 1 + self.random.below(3) as u32;
        let options =
            ForkOptions::new().prefix(self.name()).count(count).wait_settled(self.random.below(3) == 0).paused(paused);
        let mut children = self.vms[at].fork(options);
        // The parent's next write comes first.
        if paused {
            self.write(at);
        }
        for child in children.iter().filter(|_| paused) {
            child.vm.resume().expect("resume");
        }
        self.vms.append(&mut children);
        "fork"
    }

    fn fork_from_inside(&mut self, at: usize) -> &'static str {
        // The guest gives no prefix: from one that was forked so often, names would become too long.
        if !self.room() || self.vms[at].vm.name().len() > 40 {
            return self.verify(at);
        }
        let answer = self.vms[at].vm.say("fork 2");
        let image = self.vms[at].image.clone();
        let names = answer.strip_prefix("parent").expect("the parent's answer").split(" child=").skip(1);
        let children = names.map(|name| Traced { vm: self.home.client().vm(name), image: image.clone() });
        self.vms.extend(children.collect::<Vec<_>>());
        "fork from inside"
    }

    /// The child has the fill, or has it not; never a part.
    fn fork_while_it_fills(&mut self, at: usize) -> &'static str {
        if !self.room() {
            return self.remove(at);
        }
        let before = self.vms[at].image.clone();
        let (pages, delay) = (self.part(), Duration::from_micros(self.random.below(3000)));
        let options = ForkOptions::new().prefix(self.name());
        let parent = &mut self.vms[at];
        let vm = parent.vm.clone();
        let child = thread::scope(|scope| {
            scope.spawn(|| parent.write(pages));
            thread::sleep(delay);
            vm.fork(options).expect("fork").remove(0).vm
        });
        child.say("id");
        let image = [before, self.vms[at].image.clone()].into_iter().find(|image| image.verify(&child).is_ok());
        let image: Image =
            image.unwrap_or_else(|| panic!("{} has neither all of the fill nor none of it", child.name()));
        self.vms.push(Traced { vm: child, image });
        "fork in a fill"
    }

    /// The child has given all of the pages back, or none.
    fn fork_while_it_inflates(&mut self, at: usize) -> &'static str {
        if !self.room() {
            return self.remove(at);
        }
        let before = self.vms[at].image.clone();
        let (pages, delay) = (self.part(), Duration::from_micros(self.random.below(1000)));
        let options = ForkOptions::new().prefix(self.name());
        let parent = &mut self.vms[at];
        let vm = parent.vm.clone();
        let child = thread::scope(|scope| {
            scope.spawn(|| parent.balloon(pages.clone()));
            thread::sleep(delay);
            vm.fork(options).expect("fork").remove(0).vm
        });
        child.say(&format!("deflate {} {}", pages.start, pages.end - pages.start));
        let image = [before, self.vms[at].image.clone()].into_iter().find(|image| image.verify(&child).is_ok());
        let image = image.unwrap_or_else(|| panic!("{} has given back a part", child.name()));
        self.vms.push(Traced { vm: child, image });
        "fork while it inflates"
    }

    fn remove(&mut self, at: usize) -> &'static str {
        self.vms.swap_remove(at).vm.remove().expect("remove");
        "rm"
    }

    fn kill(&mut self, at: usize) -> &'static str {
        let vm = self.vms.swap_remove(at).vm;
        kill(vm.pid());
        let dead = vm.wait(Some(TEN_SECONDS)).expect("wait for a killed VM");
        assert!(dead.state == VmState::Dead && dead.reason.is_some(), "{dead:?}");
        vm.remove().expect("remove a dead VM");
        "kill"
    }

    /// The parent dies with all it wrote still unsettled.
    fn fork_and_kill(&mut self, at: usize) -> &'static str {
        if !self.room() {
            return self.verify(at);
        }
        self.vms[at].write(REGION);
        let pid = self.vms[at].vm.pid();
        let options = ForkOptions::new().prefix(self.name()).count(2);
        let children = self.vms[at].fork(options);
        kill(pid);
        self.vms.swap_remove(at).vm.remove().expect("remove a killed VM");
        children.iter().for_each(Traced::verify);
        self.vms.extend(children);
        "fork and kill"
    }

    fn pause_and_resume(&mut self, at: usize) -> &'static str {
        self.vms[at].vm.pause().expect("pause");
        let other = self.any();
        if other != at {
            self.write(other);
        }
        if self.room() {
            let options = ForkOptions::new().prefix(self.name());
            let mut children = self.vms[at].fork(options);
            self.vms.append(&mut children);
        }
        self.vms[at].vm.resume().expect("resume");
        "pause and resume"
    }

    fn check(&mut self) -> &'static str {
        let report = self.home.client().check().expect("check");
        assert!(report.broken.is_empty() && report.vms == self.vms.len() as u64, "{report:?}");
        "check"
    }
}

/// A number from the environment.
fn set(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|e| panic!("{variable}={text}: {e}")))
}

fn torture(setup: Setup, seconds: u64) {
    let Some(home) = setup.home() else { return };
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("the clock is set").as_nanos() as u64;
    let seed = set("OFFSHOOT_TORTURE_SEED").unwrap_or_else(now);
    // Shown where the test fails.
    println!("OFFSHOOT_TORTURE_SEED={seed}");
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut world = World { home: &home, random: Random::new(seed), vms: Vec::new(), named: 0, done: BTreeMap::new() };
    while Instant::now() < end {
        let verb = world.step();
        *world.done.entry(verb).or_default() += 1;
    }
    world.vms.iter().for_each(Traced::verify);
    world.check();
    println!("{:?}", world.done);
    home.client().remove_all().unwrap();
    assert_eq!(home.client().stats().unwrap().total.stores, 0);
    assert_eq!(home.processes(), [0; 0]);
}

/// For twenty seconds, whatever comes.
#[test]
fn random_verbs() {
    torture(Setup::default(), set("OFFSHOOT_TORTURE_SECONDS").unwrap_or(20));
}

/// The same on a host without userfaultfd and `PAGEMAP_SCAN`, for a quarter of that.
#[test]
fn random_verbs_with_fallbacks() {
    let setup = Setup { disable: "userfaultfd,pagemap-scan", ..Setup::default() };
    torture(setup, set("OFFSHOOT_TORTURE_SECONDS").unwrap_or(20) / 4);
}
