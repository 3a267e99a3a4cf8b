//! A VM, and what its memory must hold: a stamp for each page, copied at a fork. Stamps are never used twice, so a wrong
//! read tells which write leaked.

use crate::{Guest, PATIENCE};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use vmm::client::{Error, ForkOptions, Vm};

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stamp {
    /// Zeros: nobody has written it, or it was cleared.
    Zero,
    /// What `fill` wrote, with this seed.
    Filled(u64),
}

impl Stamp {
    /// A stamp that no page has had.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self::Filled(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What a region of guest memory must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image(BTreeMap<u64, Stamp>);

impl Image {
    /// Nobody has written these pages.
    pub fn zero(region: Range<u64>) -> Self {
        Self(region.map(|page| (page, Stamp::Zero)).collect())
    }

    /// They were written.
    pub fn set(&mut self, pages: Range<u64>, stamp: Stamp) {
        self.0.extend(pages.map(|page| (page, stamp)));
    }

    /// Whether a VM holds just that.
    pub fn verify(&self, vm: &Vm) -> Result<(), Error> {
        self.runs().into_iter().try_for_each(|(pages, stamp)| match stamp {
            Stamp::Filled(seed) => vm.try_verify(pages, seed),
            Stamp::Zero => {
                match vm.send(&format!("sum {} {}", pages.start, pages.end - pages.start), PATIENCE)?.as_str() {
                    "sum=0" => Ok(()),
                    sum => Err(Error::Guest(format!("pages {pages:?} should be zero, and have {sum}"))),
                }
            }
        })
    }

    fn runs(&self) -> Vec<(Range<u64>, Stamp)> {
        let mut runs: Vec<(Range<u64>, Stamp)> = Vec::new();
        for (&page, &stamp) in &self.0 {
            match runs.last_mut() {
                Some((pages, last)) if pages.end == page && *last == stamp => pages.end += 1,
                _ => runs.push((page..page + 1, stamp)),
            }
        }
        runs
    }
}

/// A VM and what a region of its memory must hold.
#[derive(Clone, Debug)]
pub struct Traced {
    /// The VM.
    pub vm: Vm,
    /// What it must hold.
    pub image: Image,
}

impl Traced {
    /// A VM that has written nothing in this region yet.
    pub fn new(vm: Vm, region: Range<u64>) -> Self {
        Self { vm, image: Image::zero(region) }
    }

    /// Writes pages with a stamp of their own.
    #[track_caller]
    pub fn write(&mut self, pages: Range<u64>) {
        let stamp = Stamp::fresh();
        let Stamp::Filled(seed) = stamp else { unreachable!("a fresh stamp is none of zeros") };
        self.vm.fill(pages.clone(), seed);
        self.image.set(pages, stamp);
    }

    /// Clears pages.
    #[track_caller]
    pub fn zero(&mut self, pages: Range<u64>) {
        self.vm.zero(pages.clone());
        self.image.set(pages, Stamp::Zero);
    }

    /// Gives pages back, and takes them again.
    #[track_caller]
    pub fn balloon(&mut self, pages: Range<u64>) {
        let over = format!("{} {}", pages.start, pages.end - pages.start);
        self.vm.say(&format!("inflate {over}"));
        self.vm.say(&format!("deflate {over}"));
        self.image.set(pages, Stamp::Zero);
    }

    /// Forks it. Children hold what it holds.
    #[track_caller]
    pub fn fork(&self, options: ForkOptions) -> Vec<Self> {
        let children = self.vm.fork(options).unwrap_or_else(|e| panic!("fork {}: {e}", self.vm.name()));
        children.into_iter().map(|child| Self { vm: child.vm, image: self.image.clone() }).collect()
    }

    /// Reads every page.
    #[track_caller]
    pub fn verify(&self) {
        self.image.verify(&self.vm).unwrap_or_else(|e| panic!("{}: {e}", self.vm.name()));
    }
}
