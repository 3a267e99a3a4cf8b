//! The measures, one file each: what is sampled in turn, and what becomes of the samples.

pub mod crowd;
pub mod depth;
pub mod evict;
pub mod first_fork;
pub mod fork;
pub mod growth;
pub mod idle;
pub mod launch;
pub mod learned;
pub mod live_clones;
pub mod memory;
pub mod overcommit;
pub mod pause;
pub mod qemu;
pub mod ram;
pub mod scattered;
pub mod settling;
pub mod swap_in;
pub mod swap_read;
pub mod victim;
pub mod writes;

use crate::Result;
use crate::aim::Aim;
use crate::bench::Bench;
use crate::entry::Figure;
use crate::home::{Home, Times, fork};
use crate::stats::Samples;
use crate::svg::{Curve, Series};
use vmm::client::Vm;

/// Pages that a parent has written long ago, where nothing else is said: 64 MiB.
const PRIVATE: u64 = 16384;

/// Forks a parent and removes the child. `vms` is how many VMs live beside the child. Whoever is sampled next has the
/// machine to himself: the pool is full again when this returns.
fn sample(home: &Home, parent: &Vm, vms: usize) -> Result<Times> {
    home.rest(vms)?;
    let (child, times) = fork(parent)?;
    child.remove()?;
    home.rest(vms)?;
    Ok(times)
}

/// Clones of a parent, which live as long as their home.
fn clones(parent: &Vm, count: usize) -> Result<Vec<Vm>> {
    (0..count).map(|_| Ok(fork(parent)?.0)).collect()
}

/// Points of a curve, each with what was sampled there.
struct Points {
    points: Vec<(u64, Samples)>,
}

impl Points {
    fn at(points: impl IntoIterator<Item = u64>) -> Self {
        Self { points: points.into_iter().map(|at| (at, Samples::default())).collect() }
    }

    fn push(&mut self, index: usize, value: f64) {
        self.points[index].1.push(value);
    }

    fn series(&self, name: &str) -> Series {
        let points = self.points.iter().map(|(at, samples)| (*at as f64, samples.median())).collect();
        Series { name: name.into(), points }
    }

    /// An entry for each point, beside the first, and one for the whole: its largest median beside its least.
    fn tell_flat(&self, bench: &mut Bench, unit_of_point: &str) {
        let Some((first, least)) = self.points.first() else { return };
        let name = format!("{first}{unit_of_point}");
        for (at, samples) in &self.points {
            let of = format!("first-instruction/{at}{unit_of_point}");
            bench.figure(&Figure {
                of,
                unit: "us",
                subject: samples,
                reference: Some((&name, least)),
                aim: Aim::Report,
            });
        }
        let by_median = |a: &&(u64, Samples), b: &&(u64, Samples)| a.1.median().total_cmp(&b.1.median());
        let all = || self.points.iter();
        if let (Some((at, most)), Some((low_at, low))) = (all().max_by(by_median), all().min_by(by_median)) {
            let of = format!("flat (most: {at}{unit_of_point})");
            let reference = format!("least: {low_at}{unit_of_point}");
            let reference = Some((reference.as_str(), low));
            bench.figure(&Figure { of, unit: "us", subject: most, reference, aim: Aim::AtMost(1.2) });
        }
    }
}

fn curve(file: &str, title: &str, x: &str, y: &str, series: Vec<Series>) -> Curve {
    Curve { file: file.into(), title: title.into(), x: x.into(), y: y.into(), series }
}
