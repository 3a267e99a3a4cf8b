//! The monitor's commands, as methods of a VM. Pages are numbered as the guest does; the first 64 are not for use.

use std::io::Read;
use std::ops::Range;
use std::thread;
use std::time::Duration;
use vmm::client::{Error, ForkOptions, Vm};

/// How long a guest may take for any one command.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a guest can be told to do. All but those that say otherwise panic where the guest answers `err`, with its name
/// and answer.
pub trait Guest {
    /// Sends a line; what follows `ok`.
    fn say(&self, line: &str) -> String;
    /// Writes every word of each page.
    fn fill(&self, pages: Range<u64>, seed: u64);
    /// Writes the first word of each page.
    fn touch(&self, pages: Range<u64>, seed: u64);
    /// Clears pages.
    fn zero(&self, pages: Range<u64>);
    /// Reads every word of each page; what does not fit, as an error.
    fn try_verify(&self, pages: Range<u64>, seed: u64) -> Result<(), Error>;
    /// Reads every word of each page.
    fn verify(&self, pages: Range<u64>, seed: u64);
    /// Reads the first word of each page.
    fn verify_touch(&self, pages: Range<u64>, seed: u64);
    /// Reads every word of each page, which must be 0.
    fn verify_zero(&self, pages: Range<u64>);
    /// What it has printed so far.
    fn log(&self) -> String;
    /// Its process.
    fn pid(&self) -> i32;
}

impl Guest for Vm {
    #[track_caller]
    fn say(&self, line: &str) -> String {
        self.send(line, PATIENCE).unwrap_or_else(|e| panic!("{}: {line}: {e}", self.name()))
    }

    #[track_caller]
    fn fill(&self, pages: Range<u64>, seed: u64) {
        self.say(&over("fill", &pages, seed));
    }

    #[track_caller]
    fn touch(&self, pages: Range<u64>, seed: u64) {
        self.say(&over("touch", &pages, seed));
    }

    #[track_caller]
    fn zero(&self, pages: Range<u64>) {
        self.say(&format!("zero {} {}", pages.start, pages.end - pages.start));
    }

    fn try_verify(&self, pages: Range<u64>, seed: u64) -> Result<(), Error> {
        self.send(&over("verify", &pages, seed), PATIENCE).map(drop)
    }

    #[track_caller]
    fn verify(&self, pages: Range<u64>, seed: u64) {
        self.say(&over("verify", &pages, seed));
    }

    #[track_caller]
    fn verify_touch(&self, pages: Range<u64>, seed: u64) {
        self.say(&over("verify-touch", &pages, seed));
    }

    #[track_caller]
    fn verify_zero(&self, pages: Range<u64>) {
        let sum = self.say(&format!("sum {} {}", pages.start, pages.end - pages.start));
        assert_eq!(sum, "sum=0", "{}: pages {pages:?} are not zero", self.name());
    }

    #[track_caller]
    fn log(&self) -> String {
        let mut text = Vec::new();
        self.logs(None).expect("logs").read_to_end(&mut text).expect("read the log to its end");
        String::from_utf8_lossy(&text).into_owned()
    }

    #[track_caller]
    fn pid(&self) -> i32 {
        self.stats().expect("stats").vm.pid.unwrap_or_else(|| panic!("{} has no process", self.name()))
    }
}

fn over(verb: &str, pages: &Range<u64>, seed: u64) -> String {
    format!("{verb} {} {} {seed}", pages.start, pages.end - pages.start)
}

/// Forks, and waits until all has settled.
#[track_caller]
pub fn fork_settled(vm: &Vm, count: u32) -> Vec<Vm> {
    let forked = vm.fork(ForkOptions::new().count(count).wait_settled(true));
    let forked = forked.unwrap_or_else(|e| panic!("fork {}: {e}", vm.name()));
    forked.into_iter().map(|child| child.vm).collect()
}

/// Does something with each VM, in two threads: as many as the smallest host has processors.
pub fn each(vms: &[Vm], act: impl Fn(usize, &Vm) + Sync) {
    let act = &act;
    thread::scope(|scope| {
        for first in 0..2 {
            scope.spawn(move || vms.iter().enumerate().skip(first).step_by(2).for_each(|(index, vm)| act(index, vm)));
        }
    });
}
